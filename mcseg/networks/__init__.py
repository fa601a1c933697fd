"""Networks: the architectures of segmentation_models_pytorch and COPLE-Net, with normalisation and padding inside."""

from mcseg.networks.coplenet import COPLENet
from mcseg.networks.network import SegmentationNetwork

__all__ = ["COPLENet", "SegmentationNetwork"]
