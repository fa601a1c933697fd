"""Shifts of the logits at inference: one number per class, chosen on held-out images so that mIoU rises."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_GRID = np.round(np.arange(-8, 8.001, 0.05), 2)  # shifts of one class that are tried, in logit units
_SWEEPS = 20
_GAIN = 1e-7  # smaller ones are rounding


def fit_shifts(log_probs: Sequence[NDArray[np.floating]], target: Sequence[NDArray[np.integer]]) -> Floats:
    """Choose additive shifts of the logits that raise mIoU, averaged over folds.

    Coordinate ascent from zero: for one class after the other, the best of a grid of shifts while the others stay, until a
    sweep over the classes gains nothing. For a class, a pixel changes hands at one known shift (the largest shifted logit
    of the others minus its own), so one histogram of these gives the counts for the whole grid. Of equally good shifts the
    nearest to the present one is taken; nothing is random.

    Args:
        log_probs: per fold (P,C) logits or log-probabilities of its pixels.
        target: per fold (P,) labels 0..C-1.

    Returns:
        (C,) float64 with mean 0; all 0 where no shift is better. mIoU on these pixels is never below the unshifted one.
    """
    folds = [
        (np.asarray(logits, np.float32), np.asarray(labels, np.int64))
        for logits, labels in zip(log_probs, target, strict=True)
    ]
    classes = folds[0][0].shape[1]
    shifts = np.zeros(classes)
    best = shifted_miou(log_probs, target, shifts)
    for _ in range(_SWEEPS):
        before = best
        for index in range(classes):
            found = np.mean([_miou_on_grid(*fold, shifts, index) for fold in folds], axis=0)
            nearest = np.argsort(np.abs(_GRID - shifts[index]), kind="stable")
            choice = nearest[np.argmax(found[nearest] >= found.max() - _GAIN)]
            if found[choice] > best + _GAIN:
                best, shifts[index] = float(found[choice]), _GRID[choice]
        if best <= before + _GAIN:
            break
    shifts = np.round(shifts - shifts.mean(), 4) + 0.0  # no -0
    unshifted = np.zeros(classes)
    # rounding to float32 can decide ties another way than on the grid
    better = shifted_miou(log_probs, target, shifts) > shifted_miou(log_probs, target, unshifted)
    return shifts if better else unshifted


def shifted_miou(log_probs: Sequence[NDArray[np.floating]], target: Sequence[NDArray[np.integer]], shifts: Floats) -> float:
    """Mean over the folds of the mIoU of the largest shifted logit; arguments as in :func:`fit_shifts`."""
    found = []
    for logits, labels in zip(log_probs, target, strict=True):
        preds = (np.asarray(logits, np.float32) + shifts.astype(np.float32)).argmax(1)
        counts = [np.bincount(ids, minlength=len(shifts)) for ids in (labels[preds == labels], labels, preds)]
        found.append(float(_miou(*(count[None] for count in counts))[0]))
    return float(np.mean(found))


def _miou_on_grid(logits: NDArray[np.float32], labels: NDArray[np.int64], shifts: Floats, index: int) -> Floats:
    """MIoU (G,) for each shift of class ``index`` on the grid, the other classes shifted as they are."""
    classes, steps = len(shifts), len(_GRID)
    others = logits + shifts.astype(np.float32)
    others[:, index] = -np.inf
    rival = others.argmax(1)
    threshold = others[np.arange(len(rival)), rival] - logits[:, index]
    # first grid point at which the pixel is predicted as the class; argmax gives ties to the lower class
    lower = index < rival
    place = np.where(lower, np.searchsorted(_GRID, threshold, "left"), np.searchsorted(_GRID, threshold, "right"))

    def taken(ids: NDArray[np.int64], chosen: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """(G,C): pixels with these ids among those that the class has taken at each grid point."""
        cell = place * classes + ids
        cell = cell if chosen is None else cell[chosen]
        return np.bincount(cell, minlength=(steps + 1) * classes).reshape(-1, classes)[:steps].cumsum(0)

    from_rivals = taken(rival)
    predicted = np.bincount(rival, minlength=classes) - from_rivals
    predicted[:, index] += from_rivals.sum(1)
    hit = np.bincount(labels[rival == labels], minlength=classes) - taken(rival, rival == labels)
    hit[:, index] += taken(labels, labels == index)[:, index]
    present = np.broadcast_to(np.bincount(labels, minlength=classes), hit.shape)
    return _miou(hit, present, predicted)


def _miou(hit: NDArray[np.int64], target: NDArray[np.int64], predicted: NDArray[np.int64]) -> Floats:
    """MIoU (G,) of counts (G,C); classes in neither target nor prediction are left out."""
    union = target + predicted - hit
    iou = np.divide(hit, union, out=np.zeros(hit.shape), where=union > 0)
    mean: Floats = iou.sum(1) / np.maximum(1, (union > 0).sum(1))
    return mean
