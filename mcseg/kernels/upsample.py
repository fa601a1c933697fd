"""Errors at full resolution from coarse logits, without the logits in between: they are made a strip of rows at a time.

Most networks compute logits at a fraction of the image's resolution and end in a bilinear upsampling, whose result and
gradient are the largest tensors of a training step. Here a strip is interpolated, its errors are summed, and it is dropped;
the backward pass interpolates it again and adds its gradient to that of the coarse logits. Memory is that of one strip.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# elements of a strip's logits, of which a few copies are alive at a time
_STRIP = 2**22


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


class Strips:
    """Upsampled logits (N, C, H', W'), a strip of rows at a time; ``size`` (H, W) of them, from the first row and column."""

    def __init__(self, coarse: Tensor, size: torch.Size, upsampling: Upsampling) -> None:
        self.device = coarse.device
        dtype = torch.promote_types(coarse.dtype, torch.float32)
        height, width = size
        self.height = height
        self.rows, columns = (
            [part[:kept] for part in neighbours(size, full, upsampling.align_corners, dtype)]
            for size, full, kept in zip(coarse.shape[-2:], upsampling[:2], (height, width), strict=True)
        )
        self.columns = [part.to(coarse.device) for part in columns]
        self.step = max(1, _STRIP // max(1, coarse.shape[0] * coarse.shape[1] * width))
        self.dtype = dtype

    def __iter__(self) -> Iterator[tuple[slice, slice, Callable[[Tensor], Tensor]]]:
        """Give rows, the rows of coarse logits that they need, and how the former come from the latter."""
        for start in range(0, self.height, self.step):
            rows = slice(start, min(start + self.step, self.height))
            lower, upper, weight = (part[rows] for part in self.rows)
            needed = slice(int(lower[0]), int(upper[-1]) + 1)
            local = [part.to(self.device) for part in (lower - needed.start, upper - needed.start, weight)]
            yield rows, needed, lambda part, local=local: self._interpolated(part, local)  # type: ignore[misc]

    def _interpolated(self, part: Tensor, rows: list[Tensor]) -> Tensor:
        part = part.to(self.dtype)
        for dim, (lower, upper, weight) in ((3, self.columns), (2, rows)):
            weight = weight.view(-1, *[1] * (3 - dim))
            part = part.index_select(dim, lower) * (1 - weight) + part.index_select(dim, upper) * weight
        return part


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
        parts = [
            function(interpolate(logits[:, :, needed]), target[:, rows])
            for rows, needed, interpolate in Strips(logits, target.shape[-2:], upsampling)
        ]
        return torch.cat(parts, dim=1) if per_pixel else torch.stack(parts).sum(0, dtype=torch.float64).to(parts[0].dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True: errors of upsampled logits have no second derivative")
        logits, target = ctx.saved_tensors
        function, upsampling, per_pixel = ctx.how
        # strips share a row of cells, and many are added up: in float32
        gradient = torch.zeros_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
        for rows, needed, interpolate in Strips(logits, target.shape[-2:], upsampling):
            with torch.enable_grad():
                part = logits[:, :, needed].detach().requires_grad_()
                value = function(interpolate(part), target[:, rows])
            (found,) = torch.autograd.grad(value, part, upstream[:, rows] if per_pixel else upstream)
            gradient[:, :, needed] += found
        return gradient.to(logits.dtype), None, None, None, None
