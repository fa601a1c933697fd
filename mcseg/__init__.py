"""Semantic segmentation trained for mIoU: margin calibration for PyTorch Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

from mcseg.version import __version__

if TYPE_CHECKING:
    from mcseg.callbacks import *  # noqa: F403
    from mcseg.data import *  # noqa: F403
    from mcseg.evaluation import *  # noqa: F403
    from mcseg.losses import *  # noqa: F403
    from mcseg.margins import *  # noqa: F403
    from mcseg.module import *  # noqa: F403

# Public name -> the module that defines it. `__all__` and `__dir__` follow from it.
_MODULES = {
    "callbacks": ("ConfusionPicture", "JaccardCallback", "ObjectiveMonitor", "PredictionPanel", "PredictionWriter"),
    "data": (
        "BDD100KData",
        "CamVidData",
        "CityscapesData",
        "CocoStuff10kData",
        "EndoVis2017Data",
        "FolderData",
        "MapillaryVistasData",
        "PascalVOCData",
        "SceneParse150Data",
        "SegmentationData",
        "SyntheticData",
    ),
    "evaluation": ("Scores", "SegmentationScores", "score"),
    "losses": ("DiceLoss", "MarginCalibrationLoss", "margin_calibration_loss"),
    "margins": ("MarginOffsets", "margin_offsets"),
    "module": ("SegmentationModule",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Import the module of a public name at its first use, which keeps ``import mcseg`` fast."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"mcseg.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, for tab completion."""
    return sorted([*globals(), *_HOME])
