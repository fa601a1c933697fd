"""Objectives for semantic segmentation: modules called with logits and target that return a scalar."""

from mcseg.kernels import Upsampling
from mcseg.losses.combine import SumLoss
from mcseg.losses.margin import POWER_DICE, MarginCalibrationLoss, Reduction, margin_calibration_loss
from mcseg.losses.pixelwise import BalancedSoftmaxLoss, CrossEntropyLoss, FocalLoss, LDAMLoss, LogitAdjustmentLoss
from mcseg.losses.regions import DiceLoss, GeneralizedDiceLoss, JaccardLoss, LovaszSoftmaxLoss, TverskyLoss

__all__ = [
    "POWER_DICE",
    "BalancedSoftmaxLoss",
    "CrossEntropyLoss",
    "DiceLoss",
    "FocalLoss",
    "GeneralizedDiceLoss",
    "JaccardLoss",
    "LDAMLoss",
    "LogitAdjustmentLoss",
    "LovaszSoftmaxLoss",
    "MarginCalibrationLoss",
    "Reduction",
    "SumLoss",
    "TverskyLoss",
    "Upsampling",
    "margin_calibration_loss",
]

# In checkpoints and configurations objectives are named by this path, wherever in the package they are written.
for _name in __all__:
    if isinstance(_object := globals()[_name], type):
        _object.__module__ = __name__
