"""Semantic segmentation trained for mIoU: margin calibration for PyTorch Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mcseg.callbacks import ConfusionPicture, JaccardCallback, PredictionPanel, PredictionWriter
    from mcseg.data import (
        BDD100KData,
        CamVidData,
        CityscapesData,
        CocoStuff10kData,
        EndoVis2017Data,
        FolderData,
        MapillaryVistasData,
        PascalVOCData,
        SceneParse150Data,
        SegmentationData,
        SyntheticData,
    )
    from mcseg.losses import MarginCalibrationLoss, margin_calibration_loss
    from mcseg.margins import MarginOffsets, margin_offsets
    from mcseg.metrics import Scores, SegmentationScores, score
    from mcseg.module import SegmentationModule
    from mcseg.tracking import ObjectiveMonitor

_HOMES = {
    "mcseg.callbacks": ("ConfusionPicture", "JaccardCallback", "PredictionPanel", "PredictionWriter"),
    "mcseg.data": (
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
    "mcseg.losses": ("MarginCalibrationLoss", "margin_calibration_loss"),
    "mcseg.margins": ("MarginOffsets", "margin_offsets"),
    "mcseg.metrics": ("Scores", "SegmentationScores", "score"),
    "mcseg.module": ("SegmentationModule",),
    "mcseg.tracking": ("ObjectiveMonitor",),
}
__all__ = [
    "BDD100KData",
    "CamVidData",
    "CityscapesData",
    "CocoStuff10kData",
    "ConfusionPicture",
    "EndoVis2017Data",
    "FolderData",
    "JaccardCallback",
    "MapillaryVistasData",
    "MarginCalibrationLoss",
    "MarginOffsets",
    "ObjectiveMonitor",
    "PascalVOCData",
    "PredictionPanel",
    "PredictionWriter",
    "SceneParse150Data",
    "Scores",
    "SegmentationData",
    "SegmentationModule",
    "SegmentationScores",
    "SyntheticData",
    "__version__",
    "margin_calibration_loss",
    "margin_offsets",
    "score",
]


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first used, so that ``import mcseg`` stays quick."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
