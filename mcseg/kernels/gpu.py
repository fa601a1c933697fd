"""Launches of the Triton kernels, registered with torch.library; imported at the first call on a GPU."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import gpu_kernels as kernels
from .confusion import id_dtype
from .upsample import neighbours

# Elements of a tile, 8 for a thread: compiled for compute capability 9.0 no kernel then needs more than 128 registers of a
# thread where a tile holds all classes, and none spills; with 16 elements up to 180, with 32 some spill.
_TILE = 2048
_WARPS = 8
_ONE_CHUNK = 256  # most classes that a tile holds at once
_CHUNK = 128  # classes at a time where there are more
_PROGRAMS = 1024  # of a sum over pixels: each keeps its sums in registers and goes on to its next block
_LABELS = 1024  # pixels of a block that counts labels


class _Places(NamedTuple):
    """How a kernel finds the logits of the pixels, and where coarse ones are, the pixels of a cell."""

    strides: list[tuple[int, ...]]  # (N,C,H,W) of each tensor
    pixels: int  # of a sample
    width: int
    shape: tuple[int, int]  # of the coarse logits
    tables: tuple[Tensor | None, ...]  # lower neighbour and weight of the upper one, of rows and of columns
    ranges: tuple[Tensor, ...]  # first pixel and one behind the last of each coarse row and of each coarse column
    most: int  # columns of pixels of a coarse column
    flat: bool  # one stride serves for all pixels of a sample


def _places(target: Tensor, upsampling: tuple[int, int, bool], *tensors: Tensor) -> _Places:
    shape = tensors[0].shape
    strides = [(*tensor.stride()[:2], *(0,) * (4 - tensor.ndim), *tensor.stride()[2:]) for tensor in tensors]
    height, width = (1, 1, *shape[2:])[-2:]
    if not upsampling[0]:
        flat = all(stride[2] == width * stride[3] for stride in strides) or height == 1
        return _Places(strides, height * width, width, (height, width), (None,) * 4, (), 0, flat)
    rows, columns = (
        _table(coarse, full, upsampling[2], kept, target.device)
        for coarse, full, kept in zip((height, width), upsampling[:2], target.shape[-2:], strict=True)
    )
    pixels = target.shape[-2] * target.shape[-1]
    tables, ranges = (*rows[:2], *columns[:2]), (*rows[2:4], *columns[2:4])
    return _Places(strides, pixels, target.shape[-1], (height, width), tables, ranges, columns[4], False)


@lru_cache(maxsize=256)
def _table(
    coarse: int, full: int, align_corners: bool, kept: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Lower neighbours, the upper ones' weights of the first ``kept`` pixels; range of pixels of each cell, and the longest.

    Kept for the next step: a copy to the device would make the host wait.
    """
    lower, _, weight = (part[:kept] for part in neighbours(coarse, full, align_corners, torch.float32))
    cells = torch.arange(coarse)
    start = torch.searchsorted(lower, cells - 1)
    end = torch.searchsorted(lower, cells, right=True)
    most = int((end - start).max())
    return (*(part.to(device) for part in (lower.int(), weight, start.int(), end.int())), most)  # type: ignore[return-value]


def _tile(classes: int) -> dict[str, int | bool]:
    one = classes <= _ONE_CHUNK
    block = triton.next_power_of_2(classes) if one else _CHUNK
    return {"ONE": one, "BC": block, "BP": max(16, _TILE // block), "num_warps": _WARPS}


def _planes(z: Tensor) -> Tensor:
    """At most two spatial dimensions, without a copy where strides allow it."""
    return z if z.ndim <= 4 else z.flatten(2, -2) if z.is_contiguous() else z.reshape(*z.shape[:2], -1, z.shape[-1])


@torch.library.custom_op("mcseg::weighted_pixel_loss", mutates_args=())
def weighted_pixel_loss(
    logits: Tensor,
    target: Tensor,
    foreground: Tensor,
    background: Tensor,
    misses: Tensor,
    false_alarms: Tensor,
    ignore_index: int,
    height: int = 0,
    width: int = 0,
    align_corners: bool = False,
) -> Tensor:
    """Compute what `mcseg.kernels.weighted_pixel_loss` does.

    With a spatial dimension, target int64, vectors ``(C,)`` float32 on the device of the logits. Height and width are those
    of an upsampling, and 0 without one.
    """
    loss = torch.empty(target.shape, dtype=torch.float32, device=logits.device)
    vectors = (foreground, background, misses, false_alarms)
    _sum(logits, target, vectors, loss, None, 1.0, ignore_index, (height, width, align_corners))
    return loss


@torch.library.custom_op("mcseg::soft_counts", mutates_args=())
def soft_counts(
    logits: Tensor,
    target: Tensor,
    power: float,
    ignore_index: int,
    height: int = 0,
    width: int = 0,
    align_corners: bool = False,
) -> Tensor:
    """Compute what `mcseg.kernels.soft_counts` does; arguments as in `weighted_pixel_loss`."""
    counts = torch.zeros(_PROGRAMS, 3, logits.shape[1], dtype=torch.float32, device=logits.device)
    _sum(logits, target, (None,) * 4, None, counts, power, ignore_index, (height, width, align_corners))
    return counts.sum(0, dtype=torch.float64).float()


@torch.library.custom_op("mcseg::error_gradient", mutates_args=())
def error_gradient(
    logits: Tensor,
    target: Tensor,
    foreground: Tensor | None,
    background: Tensor | None,
    misses: Tensor,
    false_alarms: Tensor,
    upstream: Tensor | None,
    power: float,
    ignore_index: int,
    height: int = 0,
    width: int = 0,
    align_corners: bool = False,
) -> Tensor:
    """Differentiate the weighted errors of `weighted_pixel_loss`, or without offsets those of `soft_counts`, in the logits.

    Times ``upstream`` ``(N, *spatial)`` where given.

    Returns:
        In the shape, dtype and memory format of the logits.
    """
    z = _planes(logits)
    found = torch.empty_like(z)
    if z.numel() == 0 or target.numel() == 0:
        return found.zero_().view(logits.shape)
    target = target.contiguous()
    places = _places(target, (height, width, align_corners), z, found)
    tile = _tile(z.shape[1])
    blocks = triton.cdiv(places.pixels, tile["BP"])
    upstream = None if upstream is None else upstream.float().contiguous()
    vectors = (foreground, background, misses, false_alarms)
    sizes = (places.width, *places.shape, z.shape[1], *places.strides[0], *places.strides[1], ignore_index, power)
    kind = {"SOFT": foreground is None, "POWER": power != 1}
    up = height > 0
    statistics, pair = None, None
    if up:
        statistics = torch.empty(6, target.numel(), dtype=torch.float32, device=z.device)
        pair = torch.empty(target.numel(), dtype=torch.int32, device=z.device)
    outputs = (None if up else found, statistics, pair)
    kernels.backward[(blocks * z.shape[0],)](
        z,
        target,
        *vectors,
        upstream,
        *outputs,
        *places.tables,
        blocks,
        places.pixels,
        *sizes,
        **kind,
        FLAT=places.flat,
        UP=up,
        **tile,
    )
    if up:
        cells = {"BC": min(tile["BC"], 64), "BP": 16, "num_warps": 4}
        grid = (z.shape[0] * places.shape[0], triton.cdiv(places.shape[1], 16), triton.cdiv(z.shape[1], cells["BC"]))
        kernels.gather[grid](
            z, target, *vectors, statistics, pair, found, *places.tables, *places.ranges, places.pixels, *sizes,
            target.numel(), **kind, MOST=places.most, **cells,
        )  # fmt: skip
    return found.view(logits.shape) if logits.ndim > 4 else found


@torch.library.custom_op("mcseg::predicted_classes", mutates_args=())
def predicted_classes(
    logits: Tensor, size: list[int], height: int = 0, width: int = 0, align_corners: bool = False
) -> Tensor:
    """Compute what `mcseg.kernels.predicted_classes` does; with a spatial dimension, ``size`` is that of the result."""
    z = _planes(logits)
    preds = torch.empty((len(z), *size), dtype=id_dtype(z.shape[1]), device=z.device)
    if preds.numel() == 0 or z.numel() == 0:
        return preds.zero_()
    places = _places(preds, (height, width, align_corners), z)
    tile = _tile(z.shape[1])
    blocks = triton.cdiv(places.pixels, tile["BP"])
    sizes = (blocks, places.pixels, places.width, *places.shape, z.shape[1], *places.strides[0])
    grid = (blocks * len(z),)
    kernels.predict[grid](z, preds, *places.tables, *sizes, FLAT=places.flat, UP=height > 0, **tile)
    return preds


@torch.library.custom_op("mcseg::confusion_counts", mutates_args=())
def confusion_counts(preds: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Count pixels by target and prediction.

    Args:
        preds: integers of any shape.
        target: of the same shape.
        num_classes: C.
        ignore_index: target that counts nowhere.

    Returns:
        ``(C * C + 1,)`` int64: ``target * C + prediction``, and last the pixels of which one is neither a class nor void.
    """
    counts = torch.zeros(num_classes * num_classes + 1, dtype=torch.int64, device=target.device)
    if target.numel():
        blocks = triton.cdiv(target.numel(), _LABELS)
        sizes = (target.numel(), num_classes, ignore_index)
        kernels.count[(blocks,)](preds.contiguous(), target.contiguous(), counts, *sizes, BP=_LABELS, num_warps=4)
    return counts


def _sum(
    logits: Tensor,
    target: Tensor,
    vectors: tuple[Tensor | None, ...],
    loss: Tensor | None,
    counts: Tensor | None,
    power: float,
    ignore_index: int,
    upsampling: tuple[int, int, bool],
) -> None:
    z = _planes(logits)
    if z.numel() == 0 or target.numel() == 0:
        return
    places = _places(target, upsampling, z)
    tile = _tile(z.shape[1])
    blocks = triton.cdiv(places.pixels, tile["BP"])
    num_blocks = blocks * z.shape[0]
    sizes = (num_blocks, blocks, places.pixels, places.width, *places.shape, z.shape[1])
    kind = {"SOFT": counts is not None, "POWER": power != 1, "FLAT": places.flat, "UP": upsampling[0] > 0}
    programs = num_blocks if counts is None else min(num_blocks, _PROGRAMS)
    settings = (*sizes, *places.strides[0], ignore_index, power)
    kernels.forward[(programs,)](z, target.contiguous(), *vectors, loss, counts, *places.tables, *settings, **kind, **tile)


@weighted_pixel_loss.register_fake
def _(logits: Tensor, target: Tensor, *_: Any) -> Tensor:
    return torch.empty(target.shape, dtype=torch.float32, device=logits.device)


@soft_counts.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(3, logits.shape[1], dtype=torch.float32, device=logits.device)


@error_gradient.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    z = _planes(logits)
    found = torch.empty_like(z)
    return found.view(logits.shape) if logits.ndim > 4 else found


@predicted_classes.register_fake
def _(logits: Tensor, size: list[int], *_: Any) -> Tensor:
    return torch.empty((len(logits), *size), dtype=id_dtype(logits.shape[1]), device=logits.device)


@confusion_counts.register_fake
def _(preds: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return torch.empty(num_classes * num_classes + 1, dtype=torch.int64, device=target.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.settings = tuple(value for value in inputs if not isinstance(value, Tensor))


def _of_pixels(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return error_gradient(*ctx.saved_tensors, upstream, 1.0, *ctx.settings), *(None,) * 9


def _of_counts(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    # a function of the counts weighs the errors of a class with its derivative in their sum
    weights = upstream[1].contiguous(), upstream[2].contiguous()
    return error_gradient(*ctx.saved_tensors, None, None, *weights, None, *ctx.settings), *(None,) * 6


weighted_pixel_loss.register_autograd(_of_pixels, setup_context=_keep)
soft_counts.register_autograd(_of_counts, setup_context=_keep)
