"""Semantic segmentation trained for mIoU: margin calibration for PyTorch Lightning."""

__version__ = "0.1.0"
