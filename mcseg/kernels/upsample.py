"""Errors at full resolution from coarse logits, without the logits in between: they are made a strip of rows at a time.

Most networks compute logits at a fraction of the image's resolution and end in a bilinear upsampling, whose result and
gradient are the largest tensors of a training step. Here a strip is interpolated, its errors are summed, and it is dropped;
the backward pass interpolates it again and adds its gradient to that of the coarse logits. Memory is that of one strip.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mcseg.kernels.tiles import on_threads

# elements of a strip's logits, of which a few copies are alive at a time: on the CPU in the cache of each thread
_STRIP = 2**20
_GPU_STRIP = 2**24


class Upsampling(NamedTuple):
    """Bilinear upsampling of logits, as by `torch.nn.functional.interpolate`.

    Attributes:
        height: rows of the upsampled logits. The target may have fewer: then it covers the first ones, likewise columns.
        width: columns.
        align_corners: whether the outermost pixels' centres coincide, as in the heads of segmentation_models_pytorch.
    """

    height: int
    width: int
    align_corners: bool = True


def neighbours(coarse: int, full: int, align_corners: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Index of the lower and of the upper coarse cell of each of ``full`` pixels, and the upper one's weight; on the CPU."""
    place = torch.arange(full, dtype=dtype)
    if align_corners:
        place = place * ((coarse - 1) / (full - 1) if full > 1 else 0.0)
    else:
        place = ((place + 0.5) * (coarse / full) - 0.5).clamp(min=0)
    lower = place.floor().clamp(max=coarse - 1)
    return lower.long(), (lower.long() + 1).clamp(max=coarse - 1), (place - lower).clamp(0, 1)


class Strip(NamedTuple):
    """Some rows of upsampled logits: which, the rows of coarse logits that they lie between, and how."""

    rows: slice
    needed: slice
    lower: Tensor  # row above each of the rows, counted from the first one that is needed
    upper: Tensor
    weight: Tensor  # of the row below


class Strips:
    """Upsampled logits (N, C, H', W'), a strip of rows at a time; ``size`` (H, W) of them, from the first row and column."""

    def __init__(self, coarse: Tensor, size: torch.Size, upsampling: Upsampling) -> None:
        self.dtype = torch.promote_types(coarse.dtype, torch.float32)
        self.on_cpu = coarse.device.type == "cpu"
        self.upsampling, self.width = upsampling, size[1]
        rows = neighbours(coarse.shape[2], upsampling.height, upsampling.align_corners, self.dtype)
        elements = _STRIP if self.on_cpu else _GPU_STRIP
        step = max(1, elements // max(1, coarse.shape[0] * coarse.shape[1] * upsampling.width))
        self.strips = []
        for start in range(0, size[0], step):
            part = slice(start, min(start + step, size[0]))
            lower, upper, weight = (values[part] for values in rows)
            first = int(lower[0])
            local = (values.to(coarse.device) for values in (lower - first, upper - first, weight))
            self.strips.append(Strip(part, slice(first, int(upper[-1]) + 1), *local))

    def run(self, function: Callable[[Sequence[tuple[int, Strip]]], None]) -> None:
        """Call a function with some of the strips and their numbers, until it has had all; on the CPU in several threads."""
        numbered = list(enumerate(self.strips))
        if self.on_cpu:
            on_threads(function, numbered)
        else:
            function(numbered)

    def interpolate(self, part: Tensor, strip: Strip) -> Tensor:
        """Upsample the coarse logits that a strip needs."""
        part = part.to(self.dtype)
        rows = torch.lerp(part[:, :, strip.lower], part[:, :, strip.upper], strip.weight[:, None])
        size = (rows.shape[2], self.upsampling.width)
        align = self.upsampling.align_corners
        return F.interpolate(rows, size, mode="bilinear", align_corners=align)[..., : self.width]


def upsampled(
    function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor, upsampling: Upsampling, per_pixel: bool
) -> Tensor:
    """Apply a function of logits and target to upsampled logits.

    Args:
        function: of ``(N, C, h, W)`` logits in float32 or wider and ``(N, h, W)`` target of any rows; its results are joined
            along the rows (``per_pixel``) or summed.
        logits: ``(N, C, H', W')`` coarse.
        target: ``(N, H, W)`` int64.
        upsampling: how to come from the former to the latter.
        per_pixel: whether the function gives ``(N, h, W)``, or sums over pixels.

    Returns:
        What the function gives for the whole of the upsampled logits. Differentiable once in the logits.
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
        ctx.how = (function, upsampling, per_pixel)
        strips = Strips(logits, target.shape[-2:], upsampling)
        found: dict[int, Tensor] = {}

        def some(parts: Sequence[tuple[int, Strip]]) -> None:
            for index, strip in parts:
                part = strips.interpolate(logits[:, :, strip.needed], strip)
                found[index] = function(part, target[:, strip.rows])

        strips.run(some)
        parts = [found[index] for index in range(len(strips.strips))]
        return torch.cat(parts, dim=1) if per_pixel else torch.stack(parts).sum(0, dtype=torch.float64).to(parts[0].dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True: errors of upsampled logits have no second derivative")
        logits, target = ctx.saved_tensors
        function, upsampling, per_pixel = ctx.how
        strips = Strips(logits, target.shape[-2:], upsampling)
        found: dict[int, Tensor] = {}

        def some(parts: Sequence[tuple[int, Strip]]) -> None:
            for index, strip in parts:
                with torch.enable_grad():
                    part = logits[:, :, strip.needed].detach().requires_grad_()
                    value = function(strips.interpolate(part, strip), target[:, strip.rows])
                (found[index],) = torch.autograd.grad(value, part, upstream[:, strip.rows] if per_pixel else upstream)

        strips.run(some)
        # strips share a row of cells, and many are added up: in float32, and in their order
        gradient = torch.zeros_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
        for index, strip in enumerate(strips.strips):
            gradient[:, :, strip.needed] += found.pop(index)
        return gradient.to(logits.dtype), None, None, None, None
