"""Fit shifts of the logits, one per class, that increase mIoU on held-out images."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_GRID = np.round(np.arange(-8, 8.001, 0.05), 2)  # candidate shifts of one class, in logit units
_SWEEPS = 20
_GAIN = 1e-7  # smaller gains of mIoU are rounding errors


def fit_shifts(log_probs: Sequence[NDArray[np.floating]], target: Sequence[NDArray[np.integer]]) -> Floats:
    """Fit additive shifts of the logits that increase mIoU, averaged over folds.

    The method is coordinate ascent from zero. For each class in turn it takes the best shift on a grid while the other
    shifts stay fixed, until a sweep over the classes gains nothing. A pixel's prediction changes to the class at one
    threshold: the largest shifted logit of the other classes minus the class's own logit. One histogram of the thresholds
    therefore gives the counts for the whole grid. Of equally good shifts, the nearest to the current one is taken. The
    result is deterministic.

    Args:
        log_probs: per fold, logits or log-probabilities (P,C) of its pixels.
        target: per fold, labels (P,) in 0..C-1.

    Returns:
        (C,) float64 with mean 0; all 0 if no shift is better. mIoU on these pixels is never below that without shifts.
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
            scores = np.mean([_miou_on_grid(*fold, shifts, index) for fold in folds], axis=0)
            nearest = np.argsort(np.abs(_GRID - shifts[index]), kind="stable")
            choice = nearest[np.argmax(scores[nearest] >= scores.max() - _GAIN)]
            if scores[choice] > best + _GAIN:
                best, shifts[index] = float(scores[choice]), _GRID[choice]
        if best <= before + _GAIN:
            break
    shifts = np.round(shifts - shifts.mean(), 4) + 0.0  # turns -0 into 0
    unshifted = np.zeros(classes)
    # Rounding to float32 can break ties differently than on the grid
    better = shifted_miou(log_probs, target, shifts) > shifted_miou(log_probs, target, unshifted)
    return shifts if better else unshifted


def shifted_miou(log_probs: Sequence[NDArray[np.floating]], target: Sequence[NDArray[np.integer]], shifts: Floats) -> float:
    """Return the mean mIoU over folds if the class with the largest shifted logit is predicted; see :func:`fit_shifts`."""
    scores = []
    for logits, labels in zip(log_probs, target, strict=True):
        preds = (np.asarray(logits, np.float32) + shifts.astype(np.float32)).argmax(1)
        counts = [np.bincount(ids, minlength=len(shifts)) for ids in (labels[preds == labels], labels, preds)]
        scores.append(float(_miou(*(count[None] for count in counts))[0]))
    return float(np.mean(scores))


def _miou_on_grid(logits: NDArray[np.float32], labels: NDArray[np.int64], shifts: Floats, index: int) -> Floats:
    """MIoU (G,) for each shift of class ``index`` on the grid, with the other shifts fixed."""
    classes, steps = len(shifts), len(_GRID)
    others = logits + shifts.astype(np.float32)
    others[:, index] = -np.inf
    rival = others.argmax(1)
    threshold = others[np.arange(len(rival)), rival] - logits[:, index]
    # First grid point at which the pixel is predicted as the class; argmax breaks ties in favour of the lower class
    lower = index < rival
    first = np.where(lower, np.searchsorted(_GRID, threshold, "left"), np.searchsorted(_GRID, threshold, "right"))

    def gained(ids: NDArray[np.int64], chosen: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """(G,C): of the pixels predicted as the class at each grid point, how many have each id."""
        cell = first * classes + ids
        cell = cell if chosen is None else cell[chosen]
        return np.bincount(cell, minlength=(steps + 1) * classes).reshape(-1, classes)[:steps].cumsum(0)

    from_rivals = gained(rival)
    predicted = np.bincount(rival, minlength=classes) - from_rivals
    predicted[:, index] += from_rivals.sum(1)
    hit = np.bincount(labels[rival == labels], minlength=classes) - gained(rival, rival == labels)
    hit[:, index] += gained(labels, labels == index)[:, index]
    present = np.broadcast_to(np.bincount(labels, minlength=classes), hit.shape)
    return _miou(hit, present, predicted)


def _miou(hit: NDArray[np.int64], target: NDArray[np.int64], predicted: NDArray[np.int64]) -> Floats:
    """MIoU (G,) of counts (G,C), over the classes in target or prediction."""
    union = target + predicted - hit
    iou = np.divide(hit, union, out=np.zeros(hit.shape), where=union > 0)
    mean: Floats = iou.sum(1) / np.maximum(1, (union > 0).sum(1))
    return mean
