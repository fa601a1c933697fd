"""Networks: segmentation_models_pytorch by name, taking images as the data modules give them."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SegmentationNetwork(nn.Module):
    """A network of segmentation_models_pytorch (SMP) that takes RGB images of any size and gives logits of that size.

    Normalisation and padding belong to the network, so that they cannot drift from its weights: images are scaled to [0, 1],
    normalised with the encoder's mean and standard deviation, and padded at the right and bottom to a multiple of the
    output stride; the logits of the padding are cut off.

    Args:
        arch: SMP architecture, for example ``unet``, ``deeplabv3plus``, ``segformer``.
        encoder: SMP or timm (``tu-...``) encoder.
        num_classes: number of classes C.
        options: further arguments of the architecture, for example ``{"decoder_channels": [64, 32, 16]}``.
        channels_last: keep weights and activations in channels-last memory, the faster format for convolutions on CPUs and
            on GPUs with mixed precision.

    Raises:
        ValueError: unknown architecture, encoder or option; the message is one line.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        arch: str,
        encoder: str,
        num_classes: int,
        options: dict[str, Any] | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.model = _build(arch, encoder, num_classes, None, options)
        self.arch = arch.lower()
        self.channels_last = channels_last
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        # ImageNet's, until pretrained weights bring their own; part of the checkpoint, as they belong to its weights.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    @property
    def output_stride(self) -> int:
        """Height and width are padded to multiples of this."""
        stride = int(self.model.encoder.output_stride)
        return 2 * stride if self.arch == "dpt" else stride  # DPT halves the grid of patches once more

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits.

        Args:
            image: (N,3,H,W) RGB: uint8 0..255, or floating point 0..1.

        Returns:
            (N,C,H,W) logits.
        """
        height, width = image.shape[-2:]
        if not image.is_floating_point():
            image = image.to(self.mean.dtype) / 255
        image = (image - self.mean) / self.std
        stride = self.output_stride
        padding = (0, -width % stride, 0, -height % stride)
        if any(padding):
            image = F.pad(image, padding, mode="replicate")
        if self.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        logits = self.model(image)
        return cast(Tensor, logits[..., :height, :width])

    def load_pretrained_encoder(self, arch: str, encoder: str, weights: str, options: dict[str, Any] | None = None) -> None:
        """Copy pretrained encoder weights in, with the normalisation that they were trained with.

        SMP fetches both from its hub when they are not in the local cache.

        Raises:
            ValueError: unknown weights, or they can be had neither from the cache nor from the network.
        """
        from segmentation_models_pytorch.encoders import get_preprocessing_params

        try:
            source = _build(arch, encoder, 2, True if encoder.startswith("tu-") else weights, options)
            found = get_preprocessing_params(encoder, pretrained=weights)
        except OSError as error:
            raise ValueError(
                f"encoder_weights: {weights} for {encoder} are not in the local cache and cannot be fetched "
                f"({_one_line(error)}); set encoder_weights to null to train from scratch"
            ) from None
        self.model.encoder.load_state_dict(source.encoder.state_dict())
        high = (found["input_range"] or [0, 1])[1]  # a few encoders were trained on 0..255
        self.mean.copy_(torch.tensor(found["mean"]).view(1, 3, 1, 1) / high)
        self.std.copy_(torch.tensor(found["std"]).view(1, 3, 1, 1) / high)


def _build(arch: str, encoder: str, num_classes: int, weights: str | bool | None, options: dict[str, Any] | None) -> Any:
    import segmentation_models_pytorch as smp  # at first use: it loads timm and torchvision, which takes seconds

    try:
        return smp.create_model(arch, encoder, encoder_weights=weights, classes=num_classes, **(options or {}))
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"network {arch} with encoder {encoder}: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + "..."
