"""Errors at calibrated margins, written to be read; autograd derives the gradient."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Margin = Literal["hard", "soft"]
Surrogate = Literal["log", "sigmoid"]


@dataclass(frozen=True)
class ErrorKind:
    """Member of the family of `mcseg.losses.family`.

    Attributes:
        margin: ``"hard"`` or ``"soft"``.
        surrogate: ``"log"`` or ``"sigmoid"``.
        power: q of the sigmoid, above 0 and up to 1.
        ignore_index: label of void pixels.
    """

    margin: Margin = "hard"
    surrogate: Surrogate = "log"
    power: float = 1.0
    ignore_index: int = 255


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
        # not amax, which shares the gradient of a tie out
        return logits - torch.where(is_first, others.max(dim=1, keepdim=True).values, top)
    # log(1 - p) is exact for all but the largest class, whose rivals are summed by themselves.
    log_p = (logits - logits.logsumexp(dim=1, keepdim=True)).masked_fill(is_first, -1.0)
    rivals = others.logsumexp(dim=1, keepdim=True)
    return torch.where(is_first, logits - rivals, log_p - torch.log1p(-log_p.exp()))


def surrogate_errors(
    logits: Tensor,
    target: Tensor,
    foreground: Tensor,
    background: Tensor,
    kind: ErrorKind,
) -> tuple[Tensor, Tensor]:
    """Compute ``phi`` for every pixel and class, and which of them are misses.

    Args:
        logits: ``(N, C, *spatial)`` floating point.
        target: ``(N, *spatial)`` int64.
        foreground: ``(C,)`` offsets, likewise ``background``.
        background: see there.
        kind: margin, surrogate in natural units, label of void pixels.

    Returns:
        Errors ``(N, C, *spatial)`` in float32 or wider, 0 at void pixels; and the one-hot labels of the same shape, bool:
        where true the error is that of a miss, elsewhere that of a false alarm.
    """
    void = (target == kind.ignore_index).unsqueeze(1)
    label = target.unsqueeze(1).masked_fill(void, 0)
    wide = torch.promote_types(logits.dtype, torch.float32)
    z = logits.to(wide).masked_fill(void, 0.0)  # before any arithmetic: 0 * nan would be nan in the backward pass
    classes = torch.arange(z.shape[1], device=z.device).view(-1, *[1] * (z.ndim - 2))
    is_label = (classes == label) & ~void
    per_class = (-1, *[1] * (z.ndim - 2))
    foreground, background = (offsets.to(wide).view(per_class) for offsets in (foreground, background))
    if (kind.margin, kind.surrogate) == ("soft", "sigmoid"):
        errors = _soft_sigmoid(z, label, foreground, background)
    else:
        s = class_margins(z, kind.margin)
        t = torch.where(is_label, foreground - s, background + s)
        # F.softplus turns into the identity too early for float64
        errors = -F.logsigmoid(-t) if kind.surrogate == "log" else torch.sigmoid(t)
    if kind.power < 1:  # the slope at 1 is infinite
        errors = 1 - (1 - errors).clamp(min=torch.finfo(errors.dtype).eps).pow(kind.power)
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


def error_sums(errors: Tensor, is_label: Tensor) -> Tensor:
    """Sum errors over the pixels: ``(3, C)`` labelled pixels, misses, false alarms; arguments as in :func:`weighted_sum`."""
    over = [dim for dim in range(errors.ndim) if dim != 1]
    misses = errors.masked_fill(~is_label, 0.0).sum(over)
    false_alarms = errors.masked_fill(is_label, 0.0).sum(over)
    return torch.stack([is_label.sum(over).to(errors.dtype), misses, false_alarms])
