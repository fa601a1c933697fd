"""Predicted classes and confusion counts in PyTorch, block by block on the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mcseg.kernels.fused_loss import first_zero
from mcseg.kernels.tiles import on_threads, tiles
from mcseg.kernels.upsample import Strip, Strips, Upsampling

_TILE = 2**19  # logits of a tile, which fits into a cache with its copies
_PIXELS = 2**17  # pixels of a block of labels


def predict(logits: Tensor, size: torch.Size, upsampling: Upsampling | None) -> Tensor:
    """Compute what `mcseg.kernels.predicted_classes` does, on any device."""
    preds = torch.empty((len(logits), *size), dtype=id_dtype(logits.shape[1]), device=logits.device)
    if upsampling is None:
        _write(preds, logits)
    else:
        strips = Strips(logits, size, upsampling)

        def write_strips(numbered: Sequence[tuple[int, Strip]]) -> None:
            for _, strip in numbered:
                _write(preds[:, strip.rows], strips.interpolate(logits[:, :, strip.coarse_rows], strip))

        strips.run(write_strips)
    return preds


def id_dtype(num_classes: int) -> torch.dtype:
    """Return the narrowest dtype that can hold the ids of the classes."""
    return torch.uint8 if num_classes <= 256 else torch.int16


def _write(preds: Tensor, logits: Tensor) -> None:
    """Write the classes of the largest logits to ``preds``."""
    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        preds.copy_(logits.argmax(1))
        return

    def write_tiles(parts: Sequence[tuple[slice, slice]]) -> None:
        for samples, rows in parts:
            z = logits[samples, :, rows]
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            top = z.amax(dim=1, keepdim=True)
            top_class = first_zero(z - top)
            # argmax() is slower, one pixel at a time, but handles infinities and nan
            preds[samples, rows] = top_class.squeeze(1) if top.isfinite().all() else z.argmax(1)

    on_threads(write_tiles, list(tiles(logits, _TILE)))


def count_unchecked(preds: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Compute the counts of `mcseg.kernels.confusion_counts` on any device without making the host wait.

    Returns:
        ``(C * C + 1,)`` int64: rows of the matrix, then the number of pixels whose target or prediction is not a class.
    """
    y, k = target.reshape(-1).long(), preds.reshape(-1).long()
    known = (y >= 0) & (y < num_classes) & (k >= 0) & (k < num_classes)
    cell = torch.where(known, y * num_classes + k, num_classes * num_classes)
    counts = torch.zeros(num_classes * num_classes + 1, dtype=torch.int64, device=target.device)
    return counts.scatter_add(0, cell.where(y != ignore_index, 0), (y != ignore_index).long())


def count_on_cpu(preds: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Compute the counts of `mcseg.kernels.confusion_counts`, ``(C * C,)`` int64, on the CPU.

    Raises:
        ValueError: A target or prediction is not a class.
    """
    cells = num_classes * num_classes  # also the index of the cell of void pixels, which is dropped
    dtype = torch.int16 if cells < 2**15 else torch.int32
    preds, target = preds.reshape(-1), target.reshape(-1)
    blocks = [slice(start, start + _PIXELS) for start in range(0, len(target), _PIXELS)]
    counts = torch.zeros(len(blocks), cells + 1, dtype=torch.int64)

    def count_blocks(parts: Sequence[tuple[int, slice]]) -> None:
        for index, block in parts:
            y = target[block].long()  # in uint8, the comparison would wrap an ignore_index outside 0..255
            void = y == ignore_index
            y, k = y.masked_fill(void, 0), preds[block].masked_fill(void, 0)
            for name, ids in (("target", y), ("predictions", k)):
                low, high = (int(extreme) for extreme in ids.aminmax())
                if low < 0 or high >= num_classes:
                    raise ValueError(
                        f"{name}: found class {low if low < 0 else high}, expected 0 to {num_classes - 1}, or "
                        f"{ignore_index} (ignore_index) as target; map other ids to these"
                    )
            cell = y.to(dtype).mul_(num_classes).add_(k).masked_fill_(void, cells)
            counts[index] = torch.bincount(cell, minlength=cells + 1)

    on_threads(count_blocks, list(enumerate(blocks)))
    return counts.sum(0)[:-1]
