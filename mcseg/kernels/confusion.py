"""Predicted classes, and counts of the pixels by target and prediction, a block at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mcseg.kernels.fused_loss import lowest_zero
from mcseg.kernels.tiles import on_threads, tiles
from mcseg.kernels.upsample import Strip, Strips, Upsampling

_TILE = 2**19  # logits of a tile: with its copies it stays in a cache
_LABELS = 2**17  # pixels of a block that is counted


def predicted(logits: Tensor, size: torch.Size, upsampling: Upsampling | None) -> Tensor:
    """Compute what `mcseg.kernels.predicted_classes` does, on any device."""
    preds = torch.empty((len(logits), *size), dtype=id_dtype(logits.shape[1]), device=logits.device)
    if upsampling is None:
        _write(preds, logits)
    else:
        strips = Strips(logits, size, upsampling)

        def some(parts: Sequence[tuple[int, Strip]]) -> None:
            for _, strip in parts:
                _write(preds[:, strip.rows], strips.interpolate(logits[:, :, strip.needed], strip))

        strips.run(some)
    return preds


def id_dtype(num_classes: int) -> torch.dtype:
    """Narrowest type that holds the ids of so many classes."""
    return torch.uint8 if num_classes <= 256 else torch.int16


def _write(preds: Tensor, logits: Tensor) -> None:
    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        preds.copy_(logits.argmax(1))
        return

    def some(parts: Sequence[tuple[slice, slice]]) -> None:
        for samples, rows in parts:
            part = logits[samples, :, rows]
            part = part.to(torch.promote_types(part.dtype, torch.float32))
            top = part.amax(dim=1, keepdim=True)
            first = lowest_zero(part - top)
            # argmax() handles one pixel at a time, but infinities and nan as well
            preds[samples, rows] = first.squeeze(1) if top.isfinite().all() else part.argmax(1)

    on_threads(some, list(tiles(logits, _TILE)))


def counted_anywhere(preds: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Compute ``(C * C + 1,)`` counts, the last one of pixels that are no class, without a look at the values."""
    y, k = target.reshape(-1).long(), preds.reshape(-1).long()
    known = (y >= 0) & (y < num_classes) & (k >= 0) & (k < num_classes)
    cell = torch.where(known, y * num_classes + k, num_classes * num_classes)
    counts = torch.zeros(num_classes * num_classes + 1, dtype=torch.int64, device=target.device)
    return counts.scatter_add(0, cell.where(y != ignore_index, 0), (y != ignore_index).long())


def counted(preds: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Compute the counts (C * C,) of `mcseg.kernels.confusion_counts`, in cells of 16 bits where they suffice."""
    cells = num_classes * num_classes  # the last one is for void
    dtype = torch.int16 if cells < 2**15 else torch.int32
    preds, target = preds.reshape(-1), target.reshape(-1)
    size = _LABELS if target.device.type == "cpu" else max(1, len(target))
    blocks = [slice(start, start + size) for start in range(0, len(target), size)]
    counts = torch.zeros(len(blocks), cells + 1, dtype=torch.int64, device=target.device)

    def some(parts: Sequence[tuple[int, slice]]) -> None:
        for index, part in parts:
            y = target[part].long()  # before the comparison: uint8 would wrap an ignore_index outside 0..255
            void = y == ignore_index
            y, k = y.masked_fill(void, 0), preds[part].masked_fill(void, 0)
            for name, ids in (("target", y), ("predictions", k)):
                low, high = (int(extreme) for extreme in ids.aminmax())
                if low < 0 or high >= num_classes:
                    raise ValueError(
                        f"{name}: found class {low if low < 0 else high}, expected 0 to {num_classes - 1}, or "
                        f"{ignore_index} in the target for void"
                    )
            cell = y.to(dtype).mul_(num_classes).add_(k).masked_fill_(void, cells)
            counts[index] = torch.bincount(cell, minlength=cells + 1)

    on_threads(some, list(enumerate(blocks)))
    return counts.sum(0)[:-1]
