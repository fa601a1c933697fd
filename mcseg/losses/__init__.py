"""Objectives for semantic segmentation: modules called with logits and target that return a scalar."""

from mcseg.kernels import Upsampling
from mcseg.losses.base import ObjectiveProtocol, offered
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
    "default_objective",
    "margin_calibration_loss",
    "offered",
]

# In checkpoints and configurations objectives are named by this path, wherever in the package they are written.
for _name in __all__:
    if isinstance(_object := globals()[_name], type):
        _object.__module__ = __name__
