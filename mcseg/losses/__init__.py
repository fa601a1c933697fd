"""Objectives for semantic segmentation: modules that take logits and target and return a scalar."""

from mcseg.kernels import Upsampling
from mcseg.losses.base import ObjectiveProtocol, calibrate_from_data, offered
from mcseg.losses.combine import SumLoss
from mcseg.losses.iou_weights import IoUWeightedLoss
from mcseg.losses.margin import MarginCalibrationLoss, Reduction, margin_calibration_loss
from mcseg.losses.pixelwise import BalancedSoftmaxLoss, CrossEntropyLoss, FocalLoss, LDAMLoss, LogitAdjustmentLoss
from mcseg.losses.regions import (
    DiceLoss,
    GeneralizedDiceLoss,
    JaccardLoss,
    LovaszSoftmaxLoss,
    TverskyLoss,
    default_objective,
)

__all__ = [
    "BalancedSoftmaxLoss",
    "CrossEntropyLoss",
    "DiceLoss",
    "FocalLoss",
    "GeneralizedDiceLoss",
    "IoUWeightedLoss",
    "JaccardLoss",
    "LDAMLoss",
    "LogitAdjustmentLoss",
    "LovaszSoftmaxLoss",
    "MarginCalibrationLoss",
    "ObjectiveProtocol",
    "Reduction",
    "SumLoss",
    "TverskyLoss",
    "Upsampling",
    "calibrate_from_data",
    "default_objective",
    "margin_calibration_loss",
    "offered",
]

# Checkpoints and configs name objectives by this path, so that a class can move to another file.
for _name in __all__:
    if isinstance(_object := globals()[_name], type):
        _object.__module__ = __name__
