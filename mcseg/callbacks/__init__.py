"""Lightning callbacks: scores, pictures, prediction files, and records for experiment trackers."""

from mcseg.callbacks.base import EvaluationCallback
from mcseg.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from mcseg.callbacks.held_out import HeldOutBounds
from mcseg.callbacks.last_validation import LastValidation
from mcseg.callbacks.objective_monitor import ObjectiveMonitor
from mcseg.callbacks.panels import ConfusionPicture, PredictionPanel, TrainingCurves
from mcseg.callbacks.prediction_writer import PredictionWriter
from mcseg.callbacks.scores import JaccardCallback, score_table

__all__ = [
    "BestCheckpoint",
    "ConfusionPicture",
    "EvaluationCallback",
    "HeldOutBounds",
    "JaccardCallback",
    "LastCheckpoint",
    "LastValidation",
    "ObjectiveMonitor",
    "PredictionPanel",
    "PredictionWriter",
    "TrainingCurves",
    "score_table",
]
