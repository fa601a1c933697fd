"""Compute scores from pixel counts per image, and bootstrap intervals of their differences over images and seeds."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

MEASURES = ("miou", "miou_tail", "pixel_accuracy")
LEVEL = 0.95
_DRAWS = 4000


class Interval(NamedTuple):
    """A difference and the ends of its interval."""

    difference: float
    low: float
    high: float


def class_iou(counts: NDArray[np.floating] | Counts) -> Floats:
    """Return IoU (...,C) from counts (...,3,C): predicted correctly, in the target, in the prediction; NaN for 0 / 0."""
    hit, target, predicted = np.moveaxis(counts.astype(np.float64), -2, 0)
    union = target + predicted - hit
    iou: Floats = np.divide(hit, union, out=np.full(hit.shape, np.nan), where=union > 0)
    return iou


def measures(counts: NDArray[np.floating] | Counts, tail: Sequence[int]) -> Floats:
    """Compute mIoU, the mean IoU of the ``tail`` classes, and pixel accuracy: (...,3) from counts (...,3,C).

    The means leave out classes in neither target nor prediction; a mean over no class is NaN.
    """
    iou = class_iou(counts)
    labelled = counts[..., 1, :].sum(-1).astype(np.float64)
    accuracy = np.divide(counts[..., 0, :].sum(-1), labelled, out=np.full(labelled.shape, np.nan), where=labelled > 0)
    return np.stack([mean_of_defined(iou), mean_of_defined(iou[..., list(tail)]), accuracy], axis=-1)


def mean_of_defined(values: Floats) -> Floats:
    """Return the mean over the last axis without NaN; NaN if no value is defined."""
    defined = ~np.isnan(values)
    number = defined.sum(-1).astype(np.float64)
    total = np.where(defined, values, 0).sum(-1)
    mean: Floats = np.divide(total, number, out=np.full(number.shape, np.nan), where=number > 0)
    return mean


def paired_intervals(
    ours: Counts, theirs: Counts, tail: Sequence[int], draws: int = _DRAWS, seed: int = 0
) -> list[Interval]:
    """Compute intervals of the differences between two objectives by the paired bootstrap over images and seeds.

    Each draw samples images with replacement, the same for both objectives and all seeds, and seeds with replacement, in
    pairs. A measure is computed for each seed from the counts summed over the drawn images, then averaged over the drawn
    seeds. The ends of the interval are percentiles of the differences over the draws. S - 1 of S seeds are drawn: this
    corrects the variance for so small a sample (Rao and Wu, JASA 1988). A single seed adds no variance.

    Images are treated as independent; if they are frames of a few videos, the interval is too narrow.

    Args:
        ours: counts (S,N,3,C) per seed and image.
        theirs: counts of the other objective, for the same seeds and images.
        tail: train ids of the rare classes.
        draws: number of draws.
        seed: seed of the draws.

    Returns:
        One interval per measure, in the order of ``MEASURES``.

    Raises:
        ValueError: the counts differ in shape.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"counts: found {ours.shape} and {theirs.shape}, expected the same seeds, images and classes")
    seeds, images, _, classes = ours.shape
    generator = np.random.default_rng(seed)
    image_weights = generator.multinomial(images, np.full(images, 1 / images), draws).astype(np.float64)
    drawn_seeds = max(1, seeds - 1)
    seed_weights = generator.multinomial(drawn_seeds, np.full(seeds, 1 / seeds), draws) / drawn_seeds

    def drawn(counts: Counts) -> Floats:
        flat = counts.transpose(1, 0, 2, 3).reshape(images, -1).astype(np.float64)
        values = measures((image_weights @ flat).reshape(draws, seeds, 3, classes), tail)
        values[np.isnan(values) & (seed_weights == 0)[..., None]] = 0  # NaN of a seed that is not drawn must not spread
        mean: Floats = np.einsum("ds,dsm->dm", seed_weights, values)
        return mean

    differences = drawn(ours) - drawn(theirs)
    point = (measures(ours.sum(1), tail) - measures(theirs.sum(1), tail)).mean(0)
    intervals = []
    for value, drawn_values in zip(point, differences.T, strict=True):
        defined = drawn_values[~np.isnan(drawn_values)]  # a draw may miss all images of the rare classes
        ends = np.percentile(defined, [50 * (1 - LEVEL), 50 * (1 + LEVEL)]) if len(defined) else (np.nan, np.nan)
        intervals.append(Interval(float(value), float(ends[0]), float(ends[1])))
    return intervals
