"""Errors at full resolution from coarse logits, upsampled a strip of rows at a time.

Most networks compute logits at a fraction of the image's resolution and end in a bilinear upsampling, whose result and
gradient are the largest tensors of a training step. Here the forward pass upsamples a strip, computes its errors and drops
it; the backward pass upsamples it again and adds its gradient to that of the coarse logits. The memory is that of one strip.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mcseg.kernels.tiles import on_threads

# logits of a strip; on the CPU a few copies of them fit into the cache of a thread
_STRIP = 2**20
_GPU_STRIP = 2**24


class Upsampling(NamedTuple):
    """Bilinear upsampling of logits, as by `torch.nn.functional.interpolate`.

    Attributes:
        height: Rows of the upsampled logits. A target with fewer rows or columns covers the first ones.
        width: Columns of the upsampled logits.
        align_corners: Whether the centres of the corner pixels coincide, as in the heads of segmentation_models_pytorch.
    """

    height: int
    width: int
    align_corners: bool = True


def neighbours(coarse: int, full: int, align_corners: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Find the two coarse cells that each pixel along an axis lies between in bilinear upsampling.

    Args:
        coarse: Number of coarse cells.
        full: Number of pixels.
        align_corners: Whether the centres of the outermost cells and pixels coincide.
        dtype: Floating point dtype of the weights.

    Returns:
        Indices of the lower and of the upper cell, int64, and the weight of the upper cell, ``(full,)`` on the CPU each.
    """
    position = torch.arange(full, dtype=dtype)
    if align_corners:
        position = position * ((coarse - 1) / (full - 1) if full > 1 else 0.0)
    else:
        position = ((position + 0.5) * (coarse / full) - 0.5).clamp(min=0)
    lower = position.floor().clamp(max=coarse - 1)
    return lower.long(), (lower.long() + 1).clamp(max=coarse - 1), (position - lower).clamp(0, 1)


class Strip(NamedTuple):
    """Some rows of upsampled logits and how to interpolate them.

    Attributes:
        rows: The rows of the upsampled logits.
        coarse_rows: The rows of the coarse logits that they lie between.
        lower: Lower coarse neighbour of each row, counted from the first of ``coarse_rows``.
        upper: Upper coarse neighbour of each row, counted likewise.
        weight: Weight of the upper neighbour.
    """

    rows: slice
    coarse_rows: slice
    lower: Tensor
    upper: Tensor
    weight: Tensor


class Strips:
    """Upsampled logits, a strip of rows at a time.

    Args:
        coarse: ``(N, C, h, w)`` logits.
        size: ``(H, W)``: the first H rows and W columns of the upsampled logits are computed.
        upsampling: Size of the upsampled logits, and whether corners are aligned.
    """

    def __init__(self, coarse: Tensor, size: torch.Size, upsampling: Upsampling) -> None:
        self.dtype = torch.promote_types(coarse.dtype, torch.float32)
        self.on_cpu = coarse.device.type == "cpu"
        self.upsampling, self.width = upsampling, size[1]
        rows = neighbours(coarse.shape[2], upsampling.height, align_corners=upsampling.align_corners, dtype=self.dtype)
        elements = _STRIP if self.on_cpu else _GPU_STRIP
        step = max(1, elements // max(1, coarse.shape[0] * coarse.shape[1] * upsampling.width))
        self.strips = []
        for start in range(0, size[0], step):
            part = slice(start, min(start + step, size[0]))
            lower, upper, weight = (values[part] for values in rows)
            first = int(lower[0])
            strip = Strip(
                rows=part,
                coarse_rows=slice(first, int(upper[-1]) + 1),
                lower=(lower - first).to(coarse.device),
                upper=(upper - first).to(coarse.device),
                weight=weight.to(coarse.device),
            )
            self.strips.append(strip)

    def run(self, function: Callable[[Sequence[tuple[int, Strip]]], None]) -> None:
        """Call a function with numbered strips: on the CPU in several threads with a share each, otherwise once with all."""
        numbered = list(enumerate(self.strips))
        if self.on_cpu:
            on_threads(function, numbered)
        else:
            function(numbered)

    def interpolate(self, part: Tensor, strip: Strip) -> Tensor:
        """Upsample the coarse logits ``part`` in the strip's ``coarse_rows`` to the strip."""
        part = part.to(self.dtype)
        rows = torch.lerp(part[:, :, strip.lower], part[:, :, strip.upper], strip.weight[:, None])
        size = (rows.shape[2], self.upsampling.width)
        align = self.upsampling.align_corners
        return F.interpolate(rows, size, mode="bilinear", align_corners=align)[..., : self.width]


def apply_upsampled(
    function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor, *, upsampling: Upsampling, per_pixel: bool
) -> Tensor:
    """Apply a function of logits and target to upsampled logits, a strip of rows at a time.

    Args:
        function: Function of logits ``(N, C, rows, W)`` in float32 or wider and their target ``(N, rows, W)``.
        logits: ``(N, C, h, w)`` coarse logits.
        target: ``(N, H, W)`` int64.
        upsampling: Upsampling of the logits to the target.
        per_pixel: Whether the function returns ``(N, rows, W)``; otherwise it returns a sum over pixels.

    Returns:
        Result of the function for all rows: concatenated if ``per_pixel``, otherwise summed. Differentiable once in the
        logits.
    """
    result: Tensor = _Upsampled.apply(logits, target, function, upsampling, per_pixel)
    return result


class _Upsampled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        function: Callable[[Tensor, Tensor], Tensor],
        upsampling: Upsampling,
        per_pixel: bool,
    ) -> Tensor:
        ctx.save_for_backward(logits, target)
        ctx.arguments = (function, upsampling, per_pixel)
        strips = Strips(logits, target.shape[-2:], upsampling)
        results: dict[int, Tensor] = {}

        def apply(numbered: Sequence[tuple[int, Strip]]) -> None:
            for index, strip in numbered:
                z = strips.interpolate(logits[:, :, strip.coarse_rows], strip)
                results[index] = function(z, target[:, strip.rows])

        strips.run(apply)
        parts = [results[index] for index in range(len(strips.strips))]
        return torch.cat(parts, dim=1) if per_pixel else torch.stack(parts).sum(0, dtype=torch.float64).to(parts[0].dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: losses with an upsampling have no second derivative; upsample the logits before the loss"
            )
        logits, target = ctx.saved_tensors
        function, upsampling, per_pixel = ctx.arguments
        strips = Strips(logits, target.shape[-2:], upsampling)
        gradients: dict[int, Tensor] = {}

        def differentiate(numbered: Sequence[tuple[int, Strip]]) -> None:
            for index, strip in numbered:
                with torch.enable_grad():
                    part = logits[:, :, strip.coarse_rows].detach().requires_grad_()
                    value = function(strips.interpolate(part, strip), target[:, strip.rows])
                (gradients[index],) = torch.autograd.grad(value, part, upstream[:, strip.rows] if per_pixel else upstream)

        strips.run(differentiate)
        # strips share coarse rows: their gradients are added in float32 and in a fixed order
        gradient = torch.zeros_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
        for index, strip in enumerate(strips.strips):
            gradient[:, :, strip.coarse_rows] += gradients.pop(index)
        return gradient.to(logits.dtype), None, None, None, None
