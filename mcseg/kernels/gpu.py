"""Launches of the Triton kernels, registered with torch.library; imported at the first call on a GPU.

Sizes of blocks are those of the prototypes that were measured on an H200, unless said otherwise.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mcseg.kernels import gpu_labels, gpu_pixels, gpu_upsampled
from mcseg.kernels.confusion import id_dtype
from mcseg.kernels.upsample import neighbours

# Most classes whose logits a thread keeps in registers: with 32, compiled for compute capability 9.0, kernels spill
UNROLLED = 24
_CHUNK = 4  # classes at a time where there are more: as many loads are in flight
_PROGRAMS = 1024  # of a sum over pixels in registers: each goes through several blocks
_STRIDED = 16  # bytes: pixels no longer than this are read where they lie, one after the other
_TILE = 128  # columns of a tile of upsampled pixels
_LABELS = 1024  # pixels of a block that counts labels
_FOLD = {
    "BC": 16,
    "BP": 64,
    "BX": 16,
}  # classes, columns of pixels and coarse cells of a program; with 128 columns it spills


class _Grid(NamedTuple):
    """Blocks of pixels of some logits, and the arguments by which a kernel finds them."""

    z: Tensor  # (N, C, pixels) or coarse (N, C, h, w)
    blocks: int  # of a sample
    where: dict[str, Any]
    shape: dict[str, Any]  # compile-time constants


class _Table(NamedTuple):
    """How rows or columns of pixels lie between coarse ones."""

    lower: Tensor
    weight: Tensor  # of the next one
    start: Tensor  # first pixel that a coarse cell contributes to
    end: Tensor  # the one after the last
    rows: int  # most rows of a tile that lie between three coarse ones: 4, 2 or 1
    cells: int  # most coarse cells of a program of the fold: its columns of pixels hold all that they contribute to


def _grid(logits: Tensor, pixels: torch.Size, upsampling: tuple[int, int, bool], block: int | None = None) -> _Grid:
    none = dict.fromkeys(("rows_ptr", "down_ptr", "columns_ptr", "across_ptr"))
    if not upsampling[0]:
        z = _lined_up(logits)
        block = block or _block(z.shape[1])
        count = z.shape[2]
        zn, zc, zp = z.stride()
        where = {"width": count, "coarse_height": 1, "zn": zn, "zc": zc, "zp": zp, "zh": 0, "zw": 0, **none}
        return _Grid(z, triton.cdiv(count, block), where | {"pixels": count}, {"UP": False, "R": 1, "BP": block})
    z = logits.contiguous()
    height, width = pixels[-2:]
    rows, columns = _tables(z, pixels, upsampling)
    zn, zc, zh, zw = z.stride()
    where = {
        "width": width, "coarse_height": z.shape[2], "pixels": height * width,
        "zn": zn, "zc": zc, "zp": 0, "zh": zh, "zw": zw if z.shape[3] > 1 else 0,
        "rows_ptr": rows.lower, "down_ptr": rows.weight, "columns_ptr": columns.lower, "across_ptr": columns.weight,
    }  # fmt: skip
    blocks = triton.cdiv(height, rows.rows) * triton.cdiv(width, _TILE)
    return _Grid(z, blocks, where, {"UP": True, "R": rows.rows, "BP": _TILE})


def _lined_up(logits: Tensor) -> Tensor:
    """Bring logits to (N, C, pixels), as a view where pixels lie one after the other."""
    z = logits.reshape(*logits.shape[:2], -1)
    # reading longer pixels in place takes one memory transaction per class; a copy takes one read and one write
    return z if z.stride(2) == 1 or _is_short(z) else z.contiguous()


def _is_short(z: Tensor) -> bool:
    return z.shape[1] * z.element_size() <= _STRIDED and abs(z.stride(2)) * z.shape[2] < 2**31


def _tables(z: Tensor, pixels: torch.Size, upsampling: tuple[int, int, bool]) -> tuple[_Table, _Table]:
    return tuple(  # type: ignore[return-value]
        _table(coarse, full, upsampling[2], kept, z.device)
        for coarse, full, kept in zip(z.shape[-2:], upsampling[:2], pixels[-2:], strict=True)
    )


@lru_cache(maxsize=256)
def _table(coarse: int, full: int, align_corners: bool, kept: int, device: torch.device) -> _Table:
    """Compute the table of the first ``kept`` pixels; cached, as a copy to the device makes the host wait."""
    lower, upper, weight = (part[:kept] for part in neighbours(coarse, full, align_corners, torch.float32))
    weight = torch.where(upper > lower, weight, 1.0 if coarse > 1 else 0.0)
    lower = lower.clamp(max=max(0, coarse - 2))  # so that the next cell exists
    cells = torch.arange(coarse)
    start = torch.searchsorted(lower, cells - 1)
    end = torch.searchsorted(lower, cells, right=True)
    rows = next(r for r in (4, 2, 1) if all(int(lower[i : i + r].max() - lower[i]) <= 1 for i in range(0, kept, r)))
    runs = range(1, min(coarse, _FOLD["BX"]) + 1)
    fits = [int((end[k - 1 :] - start[: coarse - k + 1]).max()) <= _FOLD["BP"] for k in runs]
    parts = [part.to(device) for part in (lower.int(), weight, start.int(), end.int())]
    return _Table(parts[0], parts[1], parts[2], parts[3], rows, max(1, sum(fits)))


def _block(classes: int) -> int:
    """Choose the pixels of a block of 128 threads: as many as keep up to `UNROLLED` logits of a thread in registers."""
    if classes > UNROLLED:
        return 256
    return min(512, 128 << int(math.log2(UNROLLED // classes)))


def _kind(power: float) -> str:
    return {1.0: "one", 0.5: "half"}.get(power, "any")


def _classes(logits: Tensor, upsampling: bool) -> dict[str, Any]:
    """Compile-time constants of the loop over classes."""
    one = logits.shape[1] <= UNROLLED and not upsampling
    return {"ONE": one, "U": logits.shape[1] if one else 1 if upsampling else _CHUNK}


def _like(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Make a gradient in the memory format of the logits, and (N, C, pixels) to write it to: it, or to be copied to it."""
    gradient = torch.empty_like(logits)
    lined_up = gradient.reshape(*logits.shape[:2], -1)
    if lined_up.data_ptr() == gradient.data_ptr() and (lined_up.stride(2) == 1 or _is_short(lined_up)):
        return gradient, lined_up
    return gradient, torch.empty(lined_up.shape, dtype=logits.dtype, device=logits.device)


def _in_format(gradient: Tensor, written: Tensor) -> Tensor:
    if written.data_ptr() != gradient.data_ptr():
        gradient.copy_(written.view(gradient.shape))
    return gradient


@torch.library.custom_op("mcseg::margin_loss", mutates_args=())
def margin_loss(
    logits: Tensor,
    target: Tensor,
    foreground: Tensor,
    background: Tensor,
    misses: Tensor,
    false_alarms: Tensor | None,
    weight: float,
    ignore_index: int,
    height: int,
    width: int,
    align_corners: bool,
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `mcseg.kernels.weighted_pixel_loss` does.

    Args:
        logits: ``(N, C, *spatial)`` with a spatial dimension, at most 32 bits.
        target: ``(N, *spatial)`` int64.
        foreground: ``(C,)`` float32 on the device of the logits, likewise the next three.
        background: See there.
        misses: See there.
        false_alarms: None: ``weight`` for all classes.
        weight: See there.
        ignore_index: Label of void pixels.
        height: Rows of an upsampling, 0 without one.
        width: Columns, likewise.
        align_corners: Likewise.
        differentiable: Whether to keep what the gradient needs.

    Returns:
        ``(N, *spatial)`` float32; and for `margin_loss_gradient` numbers and classes of the pixels, empty if it needs none.
    """
    upsampling = (height, width, align_corners)
    total = target.numel()
    loss = torch.empty(target.shape, dtype=torch.float32, device=logits.device)
    kept = differentiable and _keeps(logits, height)
    numbers = loss.new_empty((3, total) if kept else (0,))
    pair = torch.empty(total if kept else 0, dtype=torch.int32, device=logits.device)
    if total == 0:
        return loss, numbers, pair
    constants = _classes(logits, height > 0)
    grid = _grid(logits, target.shape, upsampling)
    gpu_pixels.margin_forward[(grid.blocks * len(grid.z),)](
        z_ptr=grid.z,
        y_ptr=target.contiguous(),
        fg_ptr=foreground,
        bg_ptr=background,
        u_ptr=misses,
        v_ptr=false_alarms,
        loss_ptr=loss,
        numbers_ptr=numbers if kept else None,
        classes_ptr=pair,
        classes=logits.shape[1],
        blocks=grid.blocks,
        total=total,
        ignore=ignore_index,
        weight=weight,
        num_warps=4,
        **grid.where,
        **grid.shape,
        **constants,
    )
    return loss, numbers, pair


def _keeps(logits: Tensor, height: int) -> bool:
    return logits.shape[1] > UNROLLED or height > 0


@torch.library.custom_op("mcseg::margin_loss_gradient", mutates_args=())
def margin_loss_gradient(
    logits: Tensor,
    target: Tensor,
    foreground: Tensor,
    background: Tensor,
    misses: Tensor,
    false_alarms: Tensor | None,
    upstream: Tensor,
    numbers: Tensor,
    pair: Tensor,
    weight: float,
    ignore_index: int,
    height: int,
    width: int,
    align_corners: bool,
) -> Tensor:
    """Differentiate `margin_loss` in the logits, times ``upstream`` ``(N, *spatial)``; in their dtype and memory format."""
    if logits.numel() == 0 or target.numel() == 0:
        return torch.zeros_like(logits)
    # the gradient of a mean is one number for all pixels
    step = 0 if all(stride == 0 for stride in upstream.stride()) else 1
    upstream = upstream.float() if step == 0 else upstream.float().contiguous()
    vectors = {"fg_ptr": foreground, "bg_ptr": background, "u_ptr": misses, "v_ptr": false_alarms}
    given = {"upstream_ptr": upstream, "upstream_step": step, "numbers_ptr": numbers, "classes_ptr": pair, "weight": weight}
    if height:
        return _folded(logits, target, (height, width, align_corners), "margin", ignore_index, **vectors, **given)
    return _at_full_size(gpu_pixels.margin_backward, logits, target, ignore_index, **vectors, **given)


@torch.library.custom_op("mcseg::soft_counts", mutates_args=())
def soft_counts(
    logits: Tensor,
    target: Tensor,
    power: float,
    ignore_index: int,
    height: int,
    width: int,
    align_corners: bool,
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `mcseg.kernels.soft_counts` does; arguments and the rest of the result as of `margin_loss`."""
    classes, total = logits.shape[1], target.numel()
    kept = differentiable and _keeps(logits, height)
    numbers = torch.empty((2, total) if kept else (0,), dtype=torch.float32, device=logits.device)
    index = torch.empty(total if kept else 0, dtype=torch.int16, device=logits.device)
    if total == 0:
        return numbers.new_zeros(3, classes), numbers, index
    constants = _classes(logits, height > 0)
    grid = _grid(logits, target.shape, (height, width, align_corners))
    num_blocks = grid.blocks * len(logits)
    programs = min(num_blocks, _PROGRAMS) if constants["ONE"] else num_blocks
    counts = torch.zeros(programs, 3, classes, dtype=torch.float32, device=logits.device)
    gpu_pixels.soft_forward[(programs,)](
        z_ptr=grid.z,
        y_ptr=target.contiguous(),
        counts_ptr=counts,
        numbers_ptr=numbers if kept else None,
        classes_ptr=index,
        classes=classes,
        num_blocks=num_blocks,
        blocks=grid.blocks,
        total=total,
        ignore=ignore_index,
        power=power,
        KIND=_kind(power),
        BINS=triton.next_power_of_2(classes + 1),
        num_warps=4,
        **grid.where,
        **grid.shape,
        **constants,
    )
    return counts.sum(0, dtype=torch.float64).float(), numbers, index


@torch.library.custom_op("mcseg::soft_counts_gradient", mutates_args=())
def soft_counts_gradient(
    logits: Tensor,
    target: Tensor,
    misses: Tensor,
    false_alarms: Tensor,
    numbers: Tensor,
    index: Tensor,
    power: float,
    ignore_index: int,
    height: int,
    width: int,
    align_corners: bool,
) -> Tensor:
    """Differentiate `soft_counts` in the logits, for upstream gradients ``(C,)`` float32 of misses and false alarms."""
    if logits.numel() == 0 or target.numel() == 0:
        return torch.zeros_like(logits)
    kind = _kind(power)
    target = target.contiguous()
    given = {
        "u_ptr": misses.contiguous(),
        "v_ptr": false_alarms.contiguous(),
        "numbers_ptr": numbers,
        "classes_ptr": index,
        "power": power,
    }
    total = target.numel()
    if height:
        upsampling = (height, width, align_corners)
        statistics = torch.empty(3, total, dtype=torch.float32, device=logits.device)
        grid = _grid(logits, target.shape, upsampling)
        gpu_upsampled.soft_statistics[(grid.blocks * len(logits),)](
            z_ptr=grid.z,
            y_ptr=target,
            statistics_ptr=statistics,
            classes=logits.shape[1],
            blocks=grid.blocks,
            total=total,
            ignore=ignore_index,
            KIND=kind,
            R=grid.shape["R"],
            BP=grid.shape["BP"],
            num_warps=4,
            **given,
            **{name: value for name, value in grid.where.items() if name != "zp"},
        )
        return _folded(logits, target, upsampling, kind, ignore_index, statistics_ptr=statistics, **given)
    return _at_full_size(gpu_pixels.soft_backward, logits, target, ignore_index, KIND=kind, **given)


def _at_full_size(kernel: Any, logits: Tensor, target: Tensor, ignore_index: int, **given: Any) -> Tensor:
    """Launch a backward kernel on logits that have the size of the target."""
    gradient, written = _like(logits)
    grid = _grid(logits, target.shape, (0, 0, False))
    gn, gc, gp = written.stride()
    kernel[(grid.blocks * len(logits),)](
        z_ptr=grid.z,
        y_ptr=target.contiguous(),
        gradient_ptr=written,
        classes=logits.shape[1],
        blocks=grid.blocks,
        pixels=grid.z.shape[2],
        total=target.numel(),
        **{name: grid.where[name] for name in ("zn", "zc", "zp")},
        gn=gn,
        gc=gc,
        gp=gp,
        ignore=ignore_index,
        BP=grid.shape["BP"],
        num_warps=4,
        **given,
        **_classes(logits, False),
    )
    return _in_format(gradient, written)


def _folded(
    logits: Tensor, target: Tensor, upsampling: tuple[int, int, bool], kind: str, ignore_index: int, **given: Any
) -> Tensor:
    """Launch the fold: the gradient in coarse logits from what the forward pass kept."""
    z = logits.contiguous()
    rows, columns = _tables(z, target.shape, upsampling)
    written = torch.empty_like(z)
    gradient = written if z is logits else torch.empty_like(logits)
    height, width = z.shape[2:]
    zn, zc, zh, zw = z.stride()
    gn, gc, gh, gw = written.stride()
    unused = dict.fromkeys(("fg_ptr", "bg_ptr", "upstream_ptr", "statistics_ptr")) | dict(
        upstream_step=0, weight=0.0, power=1.0
    )
    cells = columns.cells
    grid = (len(z) * height * triton.cdiv(width, cells), triton.cdiv(z.shape[1], _FOLD["BC"]))
    gpu_upsampled.fold[grid](
        z_ptr=z,
        y_ptr=target.contiguous(),
        gradient_ptr=written,
        rows_ptr=rows.lower,
        down_ptr=rows.weight,
        columns_ptr=columns.lower,
        across_ptr=columns.weight,
        row_start_ptr=rows.start,
        row_end_ptr=rows.end,
        column_start_ptr=columns.start,
        column_end_ptr=columns.end,
        classes=z.shape[1],
        pixels=target[0].numel(),
        width=target.shape[-1],
        coarse_height=height,
        coarse_width=width,
        total=target.numel(),
        zn=zn,
        zc=zc,
        zh=zh,
        zw=zw if width > 1 else 0,
        gn=gn,
        gc=gc,
        gh=gh,
        gw=gw,
        ignore=ignore_index,
        KIND=kind,
        # tensor cores round to 10 bits of mantissa, which bfloat16's 7 do not notice
        PRECISION="tf32" if logits.dtype == torch.bfloat16 else "ieee",
        CELLS=cells,
        num_warps=4,
        **_FOLD,
        **unused | given,
    )
    return _in_format(gradient, written)


@torch.library.custom_op("mcseg::predicted_classes", mutates_args=())
def predicted_classes(logits: Tensor, size: list[int], height: int, width: int, align_corners: bool) -> Tensor:
    """Compute what `mcseg.kernels.predicted_classes` does; with a spatial dimension, ``size`` is that of the result."""
    preds = torch.empty((len(logits), *size), dtype=id_dtype(logits.shape[1]), device=logits.device)
    if preds.numel() == 0 or logits.numel() == 0:
        return preds.zero_()
    grid = _grid(logits, preds.shape, (height, width, align_corners), 512)
    gpu_labels.predict[(grid.blocks * len(logits),)](
        z_ptr=grid.z,
        preds_ptr=preds,
        classes=logits.shape[1],
        blocks=grid.blocks,
        num_warps=4,
        **grid.where,
        **grid.shape,
    )
    return preds


@torch.library.custom_op("mcseg::confusion_counts", mutates_args=())
def confusion_counts(preds: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Count pixels by target and prediction.

    Args:
        preds: Integers of any shape.
        target: Of the same shape.
        num_classes: C.
        ignore_index: Target that counts nowhere.

    Returns:
        ``(C * C + 1,)`` int64: ``target * C + prediction``, and last the pixels whose label is neither a class nor void.
    """
    counts = torch.zeros(num_classes * num_classes + 1, dtype=torch.int64, device=target.device)
    if target.numel():
        gpu_labels.count[(triton.cdiv(target.numel(), _LABELS),)](
            preds_ptr=preds.contiguous(),
            target_ptr=target.contiguous(),
            counts_ptr=counts,
            pixels=target.numel(),
            classes=num_classes,
            ignore=ignore_index,
            BP=_LABELS,
            num_warps=4,
        )
    return counts


@margin_loss.register_fake
def _(logits: Tensor, target: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss = torch.empty(target.shape, dtype=torch.float32, device=logits.device)
    kept = given[-1] and _keeps(logits, given[-4])
    pair = torch.empty(target.numel() if kept else 0, dtype=torch.int32, device=logits.device)
    return loss, loss.new_empty((3, target.numel()) if kept else (0,)), pair


@soft_counts.register_fake
def _(logits: Tensor, target: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    counts = torch.empty(3, logits.shape[1], dtype=torch.float32, device=logits.device)
    kept = given[-1] and _keeps(logits, given[-4])
    index = torch.empty(target.numel() if kept else 0, dtype=torch.int16, device=logits.device)
    return counts, counts.new_empty((2, target.numel()) if kept else (0,)), index


@margin_loss_gradient.register_fake
@soft_counts_gradient.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


@predicted_classes.register_fake
def _(logits: Tensor, size: list[int], *_: Any) -> Tensor:
    return torch.empty((len(logits), *size), dtype=id_dtype(logits.shape[1]), device=logits.device)


@confusion_counts.register_fake
def _(preds: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return torch.empty(num_classes * num_classes + 1, dtype=torch.int64, device=target.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors = tuple(value for value in inputs if isinstance(value, Tensor))
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.settings = tuple(value for value in inputs[:-1] if not isinstance(value, Tensor))
    ctx.set_materialize_grads(False)


def _margin_loss_backward(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, numbers, pair = ctx.saved_tensors
    settings = ctx.settings
    if len(tensors) == 5:  # no weights of false alarms
        tensors, settings = [*tensors, None], settings[1:]
    return margin_loss_gradient(*tensors, upstream, numbers, pair, *settings), *(None,) * 11


def _soft_counts_backward(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    # a function of the counts weighs the errors of a class with its derivative in their sum
    *tensors, numbers, index = ctx.saved_tensors
    return soft_counts_gradient(*tensors, upstream[1], upstream[2], numbers, index, *ctx.settings), *(None,) * 7


margin_loss.register_autograd(_margin_loss_backward, setup_context=_keep)
soft_counts.register_autograd(_soft_counts_backward, setup_context=_keep)
