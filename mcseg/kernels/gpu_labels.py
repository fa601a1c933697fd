"""Predicted classes and counts of pairs of labels, as Triton kernels.

Arguments are those of `gpu_pixels`. Label maps consist of runs of equal pixels, so `count` adds once for a run instead of
once for a pixel: if pixel i of a block differs from the one before, i is added to the count of the run that ends and
subtracted from that of the run that begins. Integer additions may happen in any order, so the counts are exact and the same
in every run.
"""

import triton
import triton.language as tl

from mcseg.kernels.gpu_pixels import locate, read


@triton.jit
def predict(
    z_ptr, preds_ptr, rows_ptr, down_ptr, columns_ptr, across_ptr,
    classes, blocks, pixels, width, coarse_height, zn, zc, zp, zh, zw,
    UP: tl.constexpr, R: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write the class of the largest logit of every pixel, of equal ones the lowest, to (N, pixels) uint8 or int16."""
    sample, pixel, inside, place = locate(
        tl.program_id(0), blocks, z_ptr, rows_ptr, down_ptr, columns_ptr, across_ptr,
        pixels, width, coarse_height, zn, zc, zp, zh, zw, UP, R, BP,
    )  # fmt: skip
    top = read(place, 0, UP)
    first = tl.zeros_like(top).to(tl.int32)
    for c in range(1, classes):
        z = read(place, c, UP)
        first = tl.where(z > top, c, first)
        top = tl.maximum(top, z)
    tl.store(preds_ptr + sample * pixels + pixel, first, mask=inside)


@triton.jit
def _pair(preds_ptr, target_ptr, place, inside, classes, ignore):
    """Cell of the counts of a pixel: of target and prediction, C * C where one of them is no class, -1 where void."""
    y = tl.load(target_ptr + place, mask=inside, other=ignore).to(tl.int64)
    k = tl.load(preds_ptr + place, mask=inside, other=0).to(tl.int64)
    known = (y >= 0) & (y < classes) & (k >= 0) & (k < classes)
    return tl.where(inside & (y != ignore), tl.where(known, y * classes + k, classes * classes), -1)


@triton.jit
def count(preds_ptr, target_ptr, counts_ptr, pixels, classes, ignore, BP: tl.constexpr):
    """Add a block's pixels to the counts (C * C + 1)."""
    start = tl.program_id(0).to(tl.int64) * BP
    i = tl.arange(0, BP)
    inside = start + i < pixels
    cell = _pair(preds_ptr, target_ptr, start + i, inside, classes, ignore)
    before = _pair(preds_ptr, target_ptr, start + i - 1, inside & (i > 0), classes, ignore)
    begins = inside & (cell != before)
    at = i.to(tl.int64)
    tl.atomic_add(counts_ptr + cell, -at, mask=begins & (cell >= 0) & (i > 0), sem="relaxed")
    tl.atomic_add(counts_ptr + before, at, mask=begins & (before >= 0), sem="relaxed")
    tl.atomic_add(
        counts_ptr + cell, at + 1, mask=inside & (cell >= 0) & ((i == BP - 1) | (start + i == pixels - 1)), sem="relaxed"
    )
