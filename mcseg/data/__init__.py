"""Data sets as LightningDataModules: images and masks with train ids 0..C-1, void 255."""

from mcseg.data.benchmark import BenchmarkData, CamVidData
from mcseg.data.datamodule import SegmentationData
from mcseg.data.folder import FolderData
from mcseg.data.labels import IGNORE_INDEX, DataError, LabelTable
from mcseg.data.synthetic import SyntheticData

__all__ = [
    "IGNORE_INDEX",
    "BenchmarkData",
    "CamVidData",
    "DataError",
    "FolderData",
    "LabelTable",
    "SegmentationData",
    "SyntheticData",
]
