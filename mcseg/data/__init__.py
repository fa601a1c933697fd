"""Data sets as LightningDataModules that give images and masks of train ids, 0..C-1 and void 255."""

from mcseg.data.benchmark import (
    BDD100KData,
    BenchmarkData,
    CamVidData,
    CityscapesData,
    CocoStuff10kData,
    MapillaryVistasData,
    PascalVOCData,
    SceneParse150Data,
)
from mcseg.data.datamodule import SegmentationData
from mcseg.data.endovis import EndoVis2017Data
from mcseg.data.folder import FolderData
from mcseg.data.labels import IGNORE_INDEX, DataError, LabelTable
from mcseg.data.synthetic import SyntheticData

__all__ = [
    "IGNORE_INDEX",
    "BDD100KData",
    "BenchmarkData",
    "CamVidData",
    "CityscapesData",
    "CocoStuff10kData",
    "DataError",
    "EndoVis2017Data",
    "FolderData",
    "LabelTable",
    "MapillaryVistasData",
    "PascalVOCData",
    "SceneParse150Data",
    "SegmentationData",
    "SyntheticData",
]
