"""Evaluation: scores over a split, inference on whole images, and bounds for unseen images."""

from mcseg.evaluation.inference import Inference
from mcseg.evaluation.metrics import IGNORE_INDEX, Scores, SegmentationScores, score

__all__ = ["IGNORE_INDEX", "Inference", "Scores", "SegmentationScores", "score"]
