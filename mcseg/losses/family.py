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
import torch.nn.functional as F
from torch import Tensor

from mcseg.kernels.counts import error_counts as soft_error_counts
from mcseg.losses.base import summed_over_processes

Margin = Literal["hard", "soft"]
Surrogate = Literal["log", "sigmoid"]
Aggregation = Literal["sum", "jaccard", "dice"]
Classes = Literal["present", "all"]

_LOG_2 = 0.6931471805599453


def class_margins(logits: Tensor, kind: Margin) -> Tensor:
    """Compute the margin of every class.

    Args:
        logits: ``(N, C, *spatial)`` float32 or float64, finite, C >= 2.
        kind: ``"hard"`` or ``"soft"``.

    Returns:
        ``(N, C, *spatial)``. Of several largest logits the lowest index counts as the largest.
    """
    classes = torch.arange(logits.shape[1], device=logits.device).view(-1, *[1] * (logits.ndim - 2))
    top, first = logits.max(dim=1, keepdim=True)
    is_first = classes == first
    others = logits.masked_fill(is_first, -torch.inf)
    if kind == "hard":
        return logits - torch.where(is_first, others.amax(dim=1, keepdim=True), top)
    # log(1 - p) is exact for all but the largest class, whose rivals are summed by themselves.
    log_p = (logits - logits.logsumexp(dim=1, keepdim=True)).masked_fill(is_first, -1.0)
    rivals = others.logsumexp(dim=1, keepdim=True)
    return torch.where(is_first, logits - rivals, log_p - torch.log1p(-log_p.exp()))


def surrogate_errors(
    logits: Tensor,
    target: Tensor,
    foreground: Tensor,
    background: Tensor,
    margin: Margin,
    surrogate: Surrogate,
    power: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Compute ``phi`` for every pixel and class, and which of them are misses.

    Args:
        logits: ``(N, C, *spatial)`` floating point.
        target: ``(N, *spatial)`` int64.
        foreground: ``(C,)`` offsets, likewise ``background``.
        background: see there.
        margin: kind of margin.
        surrogate: kind of surrogate, in natural units.
        power: q of the sigmoid.
        ignore_index: label of void pixels.

    Returns:
        Errors ``(N, C, *spatial)`` in float32 or wider, 0 at void pixels; and the one-hot labels of the same shape, bool:
        where true the error is that of a miss, elsewhere that of a false alarm.
    """
    void = (target == ignore_index).unsqueeze(1)
    label = target.unsqueeze(1).masked_fill(void, 0)
    wide = torch.promote_types(logits.dtype, torch.float32)
    z = logits.to(wide).masked_fill(void, 0.0)  # before any arithmetic: 0 * nan would be nan in the backward pass
    classes = torch.arange(z.shape[1], device=z.device).view(-1, *[1] * (z.ndim - 2))
    is_label = (classes == label) & ~void
    per_class = (-1, *[1] * (z.ndim - 2))
    foreground, background = (offsets.to(wide).view(per_class) for offsets in (foreground, background))
    if (margin, surrogate) == ("soft", "sigmoid"):
        errors = _soft_sigmoid(z, label, foreground, background)
    else:
        s = class_margins(z, margin)
        t = torch.where(is_label, foreground - s, background + s)
        # F.softplus turns into the identity too early for float64
        errors = -F.logsigmoid(-t) if surrogate == "log" else torch.sigmoid(t)
    if power < 1:  # the slope at 1 is infinite
        errors = 1 - (1 - errors).clamp(min=torch.finfo(errors.dtype).eps).pow(power)
    return errors.masked_fill(void, 0.0), is_label


def _soft_sigmoid(z: Tensor, label: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
    """Sigmoid errors at soft margins from the probabilities alone, quicker than by way of the margins.

    As p / (1 - p) = exp(s), a false alarm has 1 / (1 + exp(-(offset + s))) = p / (p + (1 - p) exp(-offset)). A miss,
    where s changes its sign, has the same with p and 1 - p exchanged.
    """
    tiny = torch.finfo(z.dtype).tiny
    p = z.softmax(dim=1)
    own = p.gather(1, label)
    # 1 - p of the label as the sum of the others, without cancellation: where it is tiny, it is the error
    rest = p.scatter(1, label, 0.0).sum(dim=1, keepdim=True)
    miss = rest / (rest + own * (-foreground).exp().flatten()[label]).clamp(min=tiny)
    odds = (-background).exp()
    errors = p / torch.addcmul(odds, p, 1 - odds).clamp(min=tiny)
    return errors.scatter(1, label, miss)


def weighted_sum(errors: Tensor, is_label: Tensor, misses: Tensor, false_alarms: Tensor) -> Tensor:
    """Aggregate by ``sum``: per pixel, weight of the label times its miss plus weights of the others times false alarms.

    Args:
        errors: as from :func:`surrogate_errors`, likewise ``is_label``.
        is_label: see there.
        misses: ``(C,)`` weights.
        false_alarms: ``(C,)`` weights.

    Returns:
        ``(N, *spatial)``.
    """
    per_class = (-1, *[1] * (errors.ndim - 2))
    weights = torch.where(is_label, misses.to(errors.dtype).view(per_class), false_alarms.to(errors.dtype).view(per_class))
    return (weights * errors).sum(dim=1)


def error_counts(
    logits: Tensor,
    target: Tensor,
    offsets: tuple[Tensor, Tensor] | None,
    margin: Margin,
    surrogate: Surrogate,
    power: float,
    ignore_index: int,
) -> Tensor:
    """Sum the errors of each class over the pixels of this process.

    Args:
        logits: as in :func:`surrogate_errors`, likewise ``target``.
        target: see there.
        offsets: foreground and background, ``(C,)`` each; None: all are 0.
        margin: as in :func:`surrogate_errors`, likewise the others.
        surrogate: see there; ``log`` is brought to units in which it is 1 at the decision boundary.
        power: see there.
        ignore_index: see there.

    Returns:
        ``(3, C)``: labelled pixels, misses A, false alarms B.
    """
    if (margin, surrogate) == ("soft", "sigmoid"):
        return soft_error_counts(logits, target, offsets, power, ignore_index)
    foreground, background = offsets or 2 * (torch.zeros(logits.shape[1], device=logits.device),)
    errors, is_label = surrogate_errors(logits, target, foreground, background, margin, surrogate, power, ignore_index)
    if surrogate == "log":
        errors = errors / _LOG_2
    over = [dim for dim in range(errors.ndim) if dim != 1]
    misses = errors.masked_fill(~is_label, 0.0).sum(over)
    false_alarms = errors.masked_fill(is_label, 0.0).sum(over)
    return torch.stack([is_label.sum(over).to(errors.dtype), misses, false_alarms])


def ratio(counts: Tensor, aggregation: Aggregation, classes: Classes, smooth: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Aggregate by ``jaccard`` or ``dice`` over the batch, and over all processes of a group.

    Args:
        counts: ``(3, C)`` as from :func:`error_counts`.
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


def confusion_shares(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Count labels, hits and predictions of a batch, over all processes of a group, as shares of the labelled pixels.

    Returns:
        ``(3, C)`` float64, without gradient: share of the pixels that are labelled i, that are so and predicted so, and
        that are predicted i. All 0 where nothing is labelled.
    """
    num_classes = logits.shape[1]
    labelled = target != ignore_index
    preds = logits.detach().argmax(1)
    label = torch.where(labelled, target, 0)
    hit = (labelled & (preds == label)).double().flatten()
    one = labelled.double().flatten()
    # Not by bincount, for which the host would wait for the device
    counts = torch.zeros(3, num_classes, dtype=torch.float64, device=logits.device)
    counts[0].scatter_add_(0, label.flatten(), one)
    counts[1].scatter_add_(0, label.flatten(), hit)
    counts[2].scatter_add_(0, preds.flatten(), one)
    counts = summed_over_processes(counts)
    return counts / counts[0].sum().clamp(min=1)


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
