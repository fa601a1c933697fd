"""Confusion counts over a whole split, and what is read from them; every IoU in the package comes from here."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from mcseg.kernels import confusion_counts

IGNORE_INDEX = 255  # label of void pixels


@dataclass(frozen=True)
class Scores:
    """What one confusion matrix says.

    Per class (C,) float64, NaN where the quantity is undefined (division by zero pixels): ``iou`` TP / (TP + FP + FN),
    ``precision`` TP / (TP + FP), ``recall`` TP / (TP + FN), ``share`` of the labelled pixels. ``miou`` is the mean of
    the defined IoUs, so a class with neither target nor predicted pixels is left out; ``classes_averaged`` counts the
    others. ``pixel_accuracy`` is the share of labelled pixels predicted right. ``confusion`` (C,C) holds the counts
    where they are known for each pair of classes. Void pixels count nowhere.
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
        """Compute from (C,C) int64 counts: rows are targets, columns predictions."""
        counts = confusion.cpu()
        return replace(cls.from_counts(counts.diagonal(), counts.sum(1), counts.sum(0)), confusion=counts)

    @classmethod
    def from_counts(cls, hit: Tensor, target: Tensor, predicted: Tensor) -> "Scores":
        """Compute from (C,) counts of pixels per class: predicted right, in the target, in the prediction."""
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
    """Train ids of the rarest third of the classes, rarest first; a class without a pixel is not rare but absent.

    Args:
        class_pixels: (C,) labelled training pixels.

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
    """Find the images that a distributed sampler repeats so that each process has as many.

    Lightning's sampler deals image j to process j % processes and fills up at the end.

    Args:
        loader: the process's loader, not shuffled, with a ``batch_size`` of its own or of its batch sampler.
        count: images N of the batch.
        batch_idx: number of the batch in its epoch.
        processes: number of processes.
        rank: number of this process.
        dropped: places of images of the batch that were skipped; they are not among the N.

    Returns:
        (N,) bool on the CPU.
    """
    places = torch.tensor([place for place in range(count + len(dropped)) if place not in dropped], dtype=torch.int64)
    size = loader.batch_size or loader.batch_sampler.batch_size
    repeated: Tensor = (batch_idx * size + places) * processes + rank >= len(loader.dataset)
    return repeated


def image_counts(preds: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Count an image's pixels per class, void left out.

    Args:
        preds: (H,W) integer classes 0..C-1.
        target: (H,W) integer classes 0..C-1 or ``ignore_index``.
        num_classes: number of classes C.
        ignore_index: target value that counts nowhere.

    Returns:
        (3,C) int64: pixels predicted right, in the target, in the prediction; see :meth:`Scores.from_counts`.
    """
    if preds.shape != target.shape:
        raise ValueError(f"preds: found shape {tuple(preds.shape)}, expected {tuple(target.shape)}, the shape of the target")
    preds, target = preds.long(), target.long()  # before the comparison: uint8 would wrap an ignore_index outside 0..255
    labelled = target != ignore_index
    chosen = (labelled & (preds == target), target), (labelled, target), (labelled, preds)
    ids = [torch.where(mask, ids, num_classes).flatten() for mask, ids in chosen]  # what is left out gets a bin of its own
    return torch.stack([torch.bincount(found, minlength=num_classes + 1) for found in ids])[:, :num_classes]


class SegmentationScores(MulticlassJaccardIndex):
    """torchmetrics' Jaccard index over one confusion matrix of a whole split, giving :class:`Scores`.

    The counts are int64 and summed over processes. ``compute()`` is torchmetrics' macro average, the mIoU as a tensor;
    :meth:`scores` gives everything.

    Args:
        num_classes: number of classes C.
        ignore_index: target value that counts nowhere.
    """

    confmat: Tensor
    unknown: Tensor
    num_classes: int
    ignore_index: int

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        # Its validation runs torch.unique over every batch and still does not look at the range.
        super().__init__(num_classes, average="macro", ignore_index=ignore_index, validate_args=False)
        self.add_state("unknown", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: (N,H,W) integer classes 0..C-1.
            target: (N,H,W) integer classes 0..C-1 or ``ignore_index``.

        Raises:
            ValueError: other classes, on the CPU; on a GPU, :meth:`scores` does.
        """
        # torchmetrics' own update compares every pixel with every pair of classes under `deterministic=True`, 44 GiB for a
        # batch of 512x512 and 150 classes
        counts, unknown = confusion_counts(preds, target, self.num_classes, self.ignore_index)
        self.confmat += counts
        self.unknown += unknown

    def compute(self) -> Tensor:
        """Compute the mIoU; see :meth:`scores` for what it raises."""
        self._check()
        return super().compute()

    def scores(self) -> Scores:
        """Read the counts, summed over all processes in a process group.

        Raises:
            ValueError: a target or a prediction was no class. On the CPU :meth:`update` has said so.
        """
        with self.sync_context():
            self._check()
            return Scores.from_confusion(self.confmat)

    def _check(self) -> None:
        if self.unknown:
            raise ValueError(
                f"{int(self.unknown)} pixels are of unknown classes; expected 0 to {self.num_classes - 1} in predictions "
                f"and target, or {self.ignore_index} in the target for void"
            )


def score(preds: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255) -> Scores:
    """Score predictions that are all at hand.

    Args:
        preds: integer classes 0..C-1, any shape.
        target: of the same shape: 0..C-1 or ``ignore_index``.
        num_classes: number of classes C.
        ignore_index: target value that counts nowhere.

    Example:
        >>> import torch
        >>> from mcseg.evaluation import score
        >>> found = score(preds=torch.tensor([0, 0, 1, 1]), target=torch.tensor([0, 1, 1, 255]), num_classes=2)
        >>> found.iou
        tensor([0.5000, 0.5000], dtype=torch.float64)
        >>> found.miou
        0.5
    """
    metric = SegmentationScores(num_classes, ignore_index)
    metric.update(preds, target)
    return metric.scores()
