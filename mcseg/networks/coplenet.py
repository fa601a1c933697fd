"""COPLE-Net: a U-Net with parallel max and mean pooling, squeeze-and-excitation, bridges in the skips and an ASPP.

G. Wang et al., "A Noise-robust Framework for Automatic Segmentation of COVID-19 Pneumonia Lesions from CT Images",
IEEE Transactions on Medical Imaging, 2020. The norms are group norms with 4 groups, as in the experiments of the
margin-calibration paper.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_GROUPS = 4
_DILATIONS = (1, 2, 4, 6)


class COPLENet(nn.Module):
    """COPLE-Net with 5 scales, from full resolution to 1/16.

    It has the structure of the networks of segmentation_models_pytorch: an ``encoder`` that returns a list of feature maps,
    and a ``segmentation_head`` as the last layer. Source: G. Wang et al., IEEE Transactions on Medical Imaging, 2020.

    Args:
        classes: number of classes C.
        in_channels: channels of the image.
        feature_channels: channels of the 5 scales. Each is twice the one before, because parallel pooling doubles the
            channels and the blocks are residual; the first is a multiple of 8.
        dropout: dropout probabilities, >= 0 and < 1, of the 5 scales in encoder and decoder.

    Raises:
        ValueError: ``feature_channels`` or ``dropout`` do not have this form; the message is one line.
    """

    def __init__(
        self,
        classes: int,
        in_channels: int = 3,
        feature_channels: Sequence[int] = (16, 32, 64, 128, 256),
        dropout: Sequence[float] = (0.0, 0.0, 0.3, 0.4, 0.5),
    ) -> None:
        super().__init__()
        widths = list(feature_channels)
        doubled = len(widths) == 5 and all(2 * a == b for a, b in pairwise(widths))
        if not doubled or widths[0] < 8 or widths[0] % 8:
            raise ValueError(
                f"feature_channels: found {widths}, expected 5 numbers, each twice the one before, the first a multiple of 8"
            )
        if len(dropout) != 5 or not all(0 <= rate < 1 for rate in dropout):
            raise ValueError(f"dropout: found {list(dropout)}, expected 5 numbers >= 0 and < 1")
        self.encoder = COPLENetEncoder(in_channels, widths, dropout)
        self.aspp = _ASPP(widths[-1])
        self.bridges = nn.ModuleList(_conv_norm(width, width // 2, 1) for width in widths[:-1])
        self.ups = nn.ModuleList(_Up(widths[i + 1], widths[i], dropout[i]) for i in range(4))
        self.segmentation_head = nn.Conv2d(widths[0], classes, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits.

        Args:
            image: (N,in_channels,H,W) floating point, normalised; H and W multiples of 16.

        Returns:
            (N,C,H,W) logits in the dtype of the image.
        """
        features = self.encoder(image)
        x = self.aspp(features[-1])
        for i in (3, 2, 1, 0):
            x = self.ups[i](x, self.bridges[i](features[i + 1]))
        return cast(Tensor, self.segmentation_head(x))


class COPLENetEncoder(nn.Module):
    """Encoder of COPLE-Net.

    Args:
        in_channels: channels of the image.
        widths: channels of the 5 scales.
        dropout: dropout probabilities of the 5 scales.
    """

    output_stride = 16

    def __init__(self, in_channels: int, widths: Sequence[int], dropout: Sequence[float]) -> None:
        super().__init__()
        self.out_channels = [in_channels, *widths]
        self.stem = _Block(in_channels, widths[0], dropout[0])
        self.downs = nn.ModuleList(_Down(widths[i], dropout[i + 1]) for i in range(4))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Compute feature maps.

        Args:
            image: (N,in_channels,H,W) floating point.

        Returns:
            The image, then feature maps (N,widths[i],H/2^i,W/2^i) for i = 0..4.
        """
        features = [image, self.stem(image)]
        for down in self.downs:
            features.append(down(features[-1]))
        return features


def _conv_norm(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2),
        nn.GroupNorm(_GROUPS, out_channels),
        nn.LeakyReLU(),
    )


class _SqueezeExcite(nn.Module):
    """Residual gating: multiplies a feature map (N,K,h,w) by 1 + g, a gate g >= 0 (N,K,1,1) computed from its mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // 2, 1)
        self.excite = nn.Conv2d(channels // 2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        gate = F.relu(self.excite(F.leaky_relu(self.squeeze(mean))))
        return x * (1 + gate)


class _Block(nn.Module):
    """Two 3x3 convolutions with dropout between them, then squeeze-and-excitation: (N,in,h,w) to (N,out,h,w)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.first = _conv_norm(in_channels, out_channels, 3)
        self.dropout = nn.Dropout(dropout)
        self.second = _conv_norm(out_channels, out_channels, 3)
        self.attention = _SqueezeExcite(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.attention(self.second(self.dropout(self.first(x)))))


class _Down(nn.Module):
    """Concatenated 2x2 max and mean pooling, then a residual block: (N,K,h,w) to (N,2K,h/2,w/2)."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block = _Block(2 * channels, 2 * channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([F.max_pool2d(x, 2), F.avg_pool2d(x, 2)], dim=1)
        return cast(Tensor, self.block(pooled) + pooled)


class _Up(nn.Module):
    """Upsampling of (N,below,h/2,w/2), concatenation with the bridge (N,K/2,h,w), and a residual block: to (N,K,h,w)."""

    def __init__(self, below: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(below, channels // 2, 1)
        self.block = _Block(channels, channels, dropout)

    def forward(self, x: Tensor, bridge: Tensor) -> Tensor:
        x = F.interpolate(self.reduce(x), scale_factor=2, mode="bilinear", align_corners=True)
        joined = torch.cat([bridge, x], dim=1)
        return cast(Tensor, self.block(joined) + joined)


class _ASPP(nn.Module):
    """Four parallel convolutions of increasing dilation, a quarter of the channels each, then a 1x1 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, channels // 4, 1)
            if dilation == 1
            else nn.Conv2d(channels, channels // 4, 3, padding=dilation, dilation=dilation)
            for dilation in _DILATIONS
        )
        self.join = _conv_norm(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.join(torch.cat([branch(x) for branch in self.branches], dim=1)))
