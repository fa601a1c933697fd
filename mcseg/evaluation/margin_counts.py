"""Counts of pixels whose class margin exceeds given thresholds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mcseg.evaluation.inference import bands_at
from mcseg.evaluation.metrics import IGNORE_INDEX

_STEPS = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
MARGINS = (0.0, *(round(step * scale, 2) for scale in (0.1, 1.0, 10.0) for step in _STEPS))  # logit units
_CHUNK = 1 << 22  # margins that are counted at once; each takes about 30 bytes


class MarginCounts:
    """Counts of the pixels that clear given margins, over any number of images.

    The class margin of class k is s_k = z_k - max_{j != k} z_j. A pixel of class k clears the margin m if s_k > m; a pixel
    of another class is a false alarm of class k at m if s_k > -m. At m = 0 these are the hits and false alarms of the
    prediction, except for ties.

    Args:
        num_classes: number of classes C.
        margins: margins >= 0 in logit units, ascending.
        device: device of the logits.
    """

    def __init__(self, num_classes: int, margins: Sequence[float] = MARGINS, device: torch.device | str = "cpu") -> None:
        self._margins = torch.tensor(margins, device=device)
        # column r: pixels that clear exactly the first r margins, and false alarms whose first margin is margin r
        self._reach = torch.zeros((num_classes, len(margins) + 1), dtype=torch.int64, device=device)
        self._alarm = torch.zeros_like(self._reach)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count the pixels of a batch.

        Args:
            logits: (N,C,h,w) floating point; resized bilinearly to the target, in bands of rows.
            target: (N,H,W) int64 classes 0..C-1, or 255 for void.
        """
        height = max(1, _CHUNK // (logits.shape[0] * logits.shape[1] * target.shape[-1]))
        for rows, band in bands_at(logits, target.shape[-2:]):
            labels = target[:, rows]
            for top in range(0, labels.shape[1], height):
                part, own = band[:, :, top : top + height], labels[:, top : top + height]
                self._count(part.float().movedim(1, 0).flatten(1).contiguous(), own.flatten())

    def _count(self, logits: Tensor, target: Tensor) -> None:
        """Count pixels with logits (C,P) and target (P,)."""
        classes, bins = self._reach.shape
        top, first = logits.max(0, keepdim=True)
        second = logits.scatter(0, first, -torch.inf).max(0, keepdim=True).values
        margin = (logits - top).scatter_(0, first, top - second)
        labelled = target != IGNORE_INDEX
        own = target.masked_fill(~labelled, 0)[None]
        reached = torch.bucketize(margin.gather(0, own)[0], self._margins)  # margins below it
        cell = torch.where(labelled, own[0] * bins + reached, classes * bins)
        self._reach += torch.bincount(cell, minlength=classes * bins + 1)[:-1].view(classes, bins)
        alarm = torch.bucketize(margin.neg_(), self._margins, right=True)
        alarm += bins * torch.arange(classes, device=alarm.device)[:, None]
        alarm.scatter_(0, own, classes * bins).masked_fill_(~labelled, classes * bins)
        self._alarm += torch.bincount(alarm.flatten(), minlength=classes * bins + 1)[:-1].view(classes, bins)

    def cleared(self) -> Tensor:
        """Compute the share of each class's pixels that clear each margin.

        Returns:
            (C, margins) float64; NaN for a class without pixels.
        """
        return self._clear().double() / self._reach.sum(1, keepdim=True)

    def iou(self) -> Tensor:
        """Compute the IoU at each margin: pixels that clear it are hits, false alarms are those at this margin.

        Returns:
            (C, margins) float64; NaN for a class without pixels and false alarms.
        """
        alarms = self._alarm.cumsum(1)[:, :-1]
        return self._clear().double() / (self._reach.sum(1, keepdim=True) + alarms)

    def _clear(self) -> Tensor:
        return self._reach.flip(1).cumsum(1).flip(1)[:, 1:]
