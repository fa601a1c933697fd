"""Confusion counts over a whole split and the scores derived from them: IoU, precision, recall, accuracy."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from mcseg.kernels import check_predictions, confusion_counts

IGNORE_INDEX = 255  # label of void pixels


@dataclass(frozen=True)
class Scores:
    """Scores of one confusion matrix; void pixels do not count.

    Attributes:
        miou: mean of the defined IoUs; a class without target and predicted pixels does not enter it.
        pixel_accuracy: share of the labelled pixels that are predicted correctly.
        classes_averaged: number of classes in ``miou``.
        iou: TP / (TP + FP + FN) of each class, float64 (C,); NaN if that is 0 / 0, like the three scores below.
        precision: TP / (TP + FP) of each class, float64 (C,).
        recall: TP / (TP + FN) of each class, float64 (C,).
        share: share of the labelled pixels, float64 (C,).
        confusion: int64 (C,C) counts, rows are targets, columns predictions; None if only sums per class are known.
    """

    miou: float
    pixel_accuracy: float
    classes_averaged: int
    iou: Tensor
    precision: Tensor
    recall: Tensor
    share: Tensor
    confusion: Tensor | None = None

    @classmethod
    def from_confusion(cls, confusion: Tensor) -> "Scores":
        """Compute scores from int64 counts (C,C); rows are targets, columns predictions."""
        counts = confusion.cpu()
        return replace(cls.from_counts(counts.diagonal(), counts.sum(1), counts.sum(0)), confusion=counts)

    @classmethod
    def from_counts(cls, hit: Tensor, target: Tensor, predicted: Tensor) -> "Scores":
        """Compute scores from pixel counts per class.

        Args:
            hit: (C,) pixels that are predicted correctly.
            target: (C,) pixels in the target.
            predicted: (C,) pixels in the prediction.
        """
        hit, target, predicted = hit.double(), target.double(), predicted.double()  # exact up to 2^53 pixels
        iou = hit / (target + predicted - hit)
        return cls(
            miou=float(iou.nanmean()),
            pixel_accuracy=float(hit.sum() / target.sum()),
            classes_averaged=int((~iou.isnan()).sum()),
            iou=iou,
            precision=hit / predicted,
            recall=hit / target,
            share=target / target.sum(),
        )


def rarest_third(class_pixels: Tensor) -> Tensor:
    """Select the rarest third of the classes with pixels, rounded up.

    Args:
        class_pixels: (C,) labelled training pixels per class.

    Returns:
        int64 train ids, rarest first.

    Example:
        >>> import torch
        >>> from mcseg.evaluation.metrics import rarest_third
        >>> rarest_third(torch.tensor([900, 40, 60, 0]))
        tensor([1])
    """
    absent = int((class_pixels == 0).sum())
    present = class_pixels.argsort(stable=True)[absent:]
    return present[: math.ceil(len(present) / 3)]


def is_repeated(loader: Any, count: int, batch_idx: int, processes: int, rank: int, dropped: Collection[int] = ()) -> Tensor:
    """Find the images of a batch that a distributed sampler repeats to give each process the same number.

    Lightning's sampler gives image j to process j % processes and repeats images at the end.

    Args:
        loader: this process's loader, not shuffled, with a ``batch_size`` or a ``batch_sampler`` that has one.
        count: number of images N in the batch.
        batch_idx: index of the batch in the epoch.
        processes: number of processes.
        rank: rank of this process.
        dropped: positions of images that were dropped from the batch; they are not among the N.

    Returns:
        (N,) bool on the CPU.
    """
    positions = torch.tensor([index for index in range(count + len(dropped)) if index not in dropped], dtype=torch.int64)
    size = loader.batch_size or loader.batch_sampler.batch_size
    repeated: Tensor = (batch_idx * size + positions) * processes + rank >= len(loader.dataset)
    return repeated


def image_counts(preds: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Count the labelled pixels of an image per class.

    Args:
        preds: (H,W) integer classes 0..C-1.
        target: (H,W) integer classes 0..C-1 or ``ignore_index``.
        num_classes: number of classes C.
        ignore_index: label of void pixels.

    Returns:
        (3,C) int64: pixels predicted correctly, in the target, in the prediction, as
        :meth:`mcseg.evaluation.Scores.from_counts` takes them.

    Raises:
        TypeError: predictions or target are not integers.
        ValueError: predictions and target have different shapes.
    """
    check_predictions(preds, target)
    preds, target = preds.long(), target.long()  # before the comparison: uint8 would wrap an ignore_index outside 0..255
    labelled = target != ignore_index
    selections = (labelled & (preds == target), target), (labelled, target), (labelled, preds)
    ids = [torch.where(mask, classes, num_classes).flatten() for mask, classes in selections]  # other pixels get bin C
    return torch.stack([torch.bincount(values, minlength=num_classes + 1) for values in ids])[:, :num_classes]


class SegmentationScores(MulticlassJaccardIndex):
    """Metric over a whole split: torchmetrics' Jaccard index with :class:`~mcseg.evaluation.Scores` as a second result.

    The int64 counts are summed over batches and processes. ``compute()`` returns the mIoU, the macro average of
    torchmetrics; :meth:`scores` returns all scores.

    Args:
        num_classes: number of classes C.
        ignore_index: label of void pixels.
    """

    confmat: Tensor
    unknown: Tensor
    num_classes: int
    ignore_index: int

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        # the validation of torchmetrics runs torch.unique on every batch and does not check the range
        super().__init__(num_classes, average="macro", ignore_index=ignore_index, validate_args=False)
        self.add_state("unknown", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: (N,H,W) integer classes 0..C-1.
            target: (N,H,W) integer classes 0..C-1 or ``ignore_index``.

        Raises:
            TypeError: predictions or target are not integers.
            ValueError: shapes differ, or (CPU only) a value is out of range. On a GPU, :meth:`scores` raises instead.
        """
        # with `deterministic=True` the update of torchmetrics compares every pixel with every pair of classes: 44 GiB for a
        # batch of 512x512 pixels and 150 classes
        counts, unknown = confusion_counts(preds, target, self.num_classes, self.ignore_index)
        self.confmat += counts
        self.unknown += unknown

    def compute(self) -> Tensor:
        """Compute the mIoU, a scalar.

        Raises:
            ValueError: a prediction or a target was out of range.
        """
        self._check()
        return super().compute()

    def scores(self) -> Scores:
        """Compute all scores from the counts of all processes.

        Raises:
            ValueError: a prediction or a target was out of range; on the CPU, :meth:`update` raises first.
        """
        with self.sync_context():
            self._check()
            return Scores.from_confusion(self.confmat)

    def _check(self) -> None:
        if self.unknown:
            raise ValueError(
                f"found {int(self.unknown)} pixels of unknown classes, expected 0 to {self.num_classes - 1} in predictions "
                f"and target, or {self.ignore_index} for void in the target; check the labels and num_classes"
            )


def score(preds: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255) -> Scores:
    """Compute the scores of predictions in one call.

    Args:
        preds: integer classes 0..C-1, any shape.
        target: integer classes 0..C-1 or ``ignore_index``, same shape as ``preds``.
        num_classes: number of classes C.
        ignore_index: label of void pixels.

    Raises:
        TypeError: predictions or target are not integers.
        ValueError: shapes differ, or a value is out of range.

    Example:
        >>> import torch
        >>> from mcseg.evaluation import score
        >>> scores = score(preds=torch.tensor([0, 0, 1, 1]), target=torch.tensor([0, 1, 1, 255]), num_classes=2)
        >>> scores.iou
        tensor([0.5000, 0.5000], dtype=torch.float64)
        >>> scores.miou
        0.5
    """
    metric = SegmentationScores(num_classes, ignore_index)
    metric.update(preds, target)
    return metric.scores()
