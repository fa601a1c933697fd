"""The calibrated family: margin x surrogate x aggregation, of which the paper's loss and other known ones are corners.

Per pixel and class there is a margin ``s_k``, an error at it is counted by a surrogate ``phi`` of the calibrated margin, and
the counts become one number::

    margin       hard  s_k = z_k - max_{j != k} z_j         soft  s_k = z_k - log sum_{j != k} exp z_j = log(p_k / (1 - p_k))
    surrogate    log   phi(t) = softplus(t)                 sigmoid  phi(t) = 1 - (1 - r)^q,  r = 1 / (1 + exp(-t))
    misses       A_i = sum over pixels with y = i of phi(foreground_i - s_i)
    false alarms B_i = sum over pixels with y != i of phi(background_i + s_i)
    aggregation  sum      sum_i (u_i A_i + v_i B_i) / N for weights u, v of misses and false alarms
                 jaccard  1 - mean_i (n_i - A_i + smooth) / (n_i + B_i + smooth)
                 dice     1 - mean_i (2 (n_i - A_i) + smooth) / (2 n_i - A_i + B_i + smooth)

with n_i labelled pixels of class i and N of all classes in the batch. The ratios count errors from 0 to 1, so there the
surrogate ``log`` is divided by log 2, which makes it 1 at t = 0; in ``sum`` it is not, as in the paper.

The power q lies above 0 and is at most 1. At 1 the error of a pixel at a soft margin without offsets is a probability, and
its slope in the logits, p (1 - p), vanishes for the pixels that are most wrong. In general it is q p^q (1 - p) for a miss:
the smaller q is, the more do hopeless pixels still pull, until the sigmoid over q becomes the log surrogate. Errors stay
within 0 and 1, so that ratios of them stay ratios. Nor does q move the decision: with weights u of misses and v of false
alarms, a pixel of two classes that has the first one with probability h has least risk at p = 1/2 where h (u_1 + v_2) =
(1 - h)(u_2 + v_1), for every q, while an offset moves that point. For one-hot labels 1 - p^q is q times the loss of Zhang
and Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels", NeurIPS 2018.
"""

from typing import Literal

import torch
from torch import Tensor

from mcseg.kernels import Upsampling, confusion_counts, predicted_classes
from mcseg.losses.base import summed_over_processes

Aggregation = Literal["sum", "jaccard", "dice"]
Classes = Literal["present", "all"]


def ratio(counts: Tensor, aggregation: Aggregation, classes: Classes, smooth: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Aggregate by ``jaccard`` or ``dice`` over the batch, and over all processes of a group.

    Args:
        counts: ``(3, C)`` as from :func:`mcseg.kernels.error_counts`, with the errors of the surrogate ``log`` over log 2.
        aggregation: which ratio.
        classes: the classes of the mean: those that the targets hold, or all.
        smooth: added to numerator and denominator, in pixels.

    Returns:
        Scalar, 0 where nothing is labelled; and per class, ``(C,)`` without gradient, ``ratio`` (NaN of classes outside the
        mean), ``miss_rate`` and ``false_alarm_rate``: A_i over the pixels of class i, B_i over those of the others (NaN
        where there are none).
    """
    n, a, b = summed_over_processes(counts).unbind()
    if aggregation == "jaccard":
        ratios = (n - a + smooth) / (n + b + smooth).clamp(min=torch.finfo(n.dtype).tiny)
    else:
        ratios = (2 * (n - a) + smooth) / (2 * n - a + b + smooth).clamp(min=torch.finfo(n.dtype).tiny)
    counted = n > 0 if classes == "present" else (n.sum() > 0).expand_as(n)
    value = ((1 - ratios) * counted).sum() / counted.sum().clamp(min=1)
    found = {"ratio": ratios.masked_fill(~counted, torch.nan), "miss_rate": a / n, "false_alarm_rate": b / (n.sum() - n)}
    return value, {name: values.detach() for name, values in found.items()}


def confusion_shares(logits: Tensor, target: Tensor, ignore_index: int, upsampling: Upsampling | None = None) -> Tensor:
    """Count labels, hits and predictions of a batch, over all processes of a group, as shares of the labelled pixels.

    Returns:
        ``(3, C)`` float64, without gradient: share of the pixels that are labelled i, that are so and predicted so, and
        that are predicted i. All 0 where nothing is labelled.
    """
    preds = predicted_classes(logits, target.shape[-2:] if upsampling else None, upsampling)
    confusion, _ = confusion_counts(preds, target, logits.shape[1], ignore_index)
    found = summed_over_processes(torch.stack([confusion.sum(1), confusion.diagonal(), confusion.sum(0)]).double())
    return found / found[0].sum().clamp(min=1)


def class_iou(shares: Tensor) -> Tensor:
    """IoU ``(C,)`` of ``(3, C)`` shares as from :func:`confusion_shares`, NaN without a label or a prediction."""
    labels, hits, predictions = shares.unbind()
    return hits / (labels + predictions - hits)


def iou_weights(shares: Tensor, floor: float = 0.1) -> tuple[Tensor, Tensor]:
    """Derive the weights of misses and false alarms that make their sum the first-order change of mIoU.

    With p_i the share of class i, b_i that of its false alarms and IoU_i, all of the current model::

        d mIoU = -(1/C) sum_i [d a_i + IoU_i d b_i] / (p_i + b_i)

    Args:
        shares: ``(3, C)`` as from :func:`confusion_shares`, or a multiple.
        floor: smallest IoU that weighs false alarms.

    Returns:
        ``(C,)`` weights of misses, w_i = 1 / (p_i + b_i) scaled so that sum_i w_i p_i = 1, and of false alarms,
        w_i max(IoU_i, floor). Classes without a label so far have both 0.
    """
    labels, hits, predictions = (shares / shares[0].sum().clamp(min=torch.finfo(shares.dtype).tiny)).unbind()
    union = labels + predictions - hits
    misses = torch.where(labels > 0, 1 / union.clamp(min=1e-12), 0.0)
    misses = misses / (misses * labels).sum().clamp(min=1e-12)
    return misses, misses * (hits / union.clamp(min=1e-12)).clamp(min=floor)
