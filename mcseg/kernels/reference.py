"""The operations of `mcseg.kernels` written to be read: plain PyTorch, autograd derives the gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_pixel_loss(
    logits: Tensor,
    target: Tensor,
    foreground: Tensor,
    background: Tensor,
    misses: Tensor,
    false_alarms: Tensor,
    ignore_index: int,
) -> Tensor:
    """Compute what `mcseg.kernels.weighted_pixel_loss` does.

    Args:
        logits: ``(N, C, *spatial)`` floating point.
        target: ``(N, *spatial)`` int64.
        foreground: ``(C,)`` offsets in float32 or wider, likewise ``background``.
        background: See there.
        misses: ``(C,)`` weights, likewise ``false_alarms``.
        false_alarms: See there.
        ignore_index: Label of void pixels.

    Returns:
        ``(N, *spatial)`` in float32 or wider.
    """
    z, label, void = _without_void(logits, target, ignore_index)
    is_label = _is_class(z, label)
    per_class = (-1, *[1] * (z.ndim - 2))
    foreground, background, misses, false_alarms = (
        vector.to(z.dtype).view(per_class) for vector in (foreground, background, misses, false_alarms)
    )
    s = class_margins(z)
    t = torch.where(is_label, foreground - s, background + s)
    # F.softplus turns into the identity too early for float64
    errors = torch.where(is_label, misses, false_alarms) * -F.logsigmoid(-t)
    return errors.sum(dim=1).masked_fill(void.squeeze(1), 0.0)


def soft_counts(logits: Tensor, target: Tensor, power: float, ignore_index: int) -> Tensor:
    """Compute what `mcseg.kernels.soft_counts` does; arguments and types as in `weighted_pixel_loss`."""
    z, label, void = _without_void(logits, target, ignore_index)
    is_label = _is_class(z, label) & ~void
    log_p, log_rest = log_probabilities(z)
    over = [dim for dim in range(z.ndim) if dim != 1]
    misses = _lost(power * log_p).masked_fill(~is_label, 0.0)
    false_alarms = _lost(power * log_rest).masked_fill(is_label | void, 0.0)
    return torch.stack([is_label.sum(over).to(z.dtype), misses.sum(over), false_alarms.sum(over)])


def class_margins(z: Tensor) -> Tensor:
    """``s_k = z_k - max_{j != k} z_j`` for logits ``(N, C, *spatial)``, of the same shape.

    Of several largest logits the lowest index counts as the largest, and the lowest of the others as its rival.
    """
    top, first = z.max(dim=1, keepdim=True)
    is_first = _is_class(z, first)
    # not amax, which shares the gradient of a tie out
    second = z.masked_fill(is_first, -torch.inf).max(dim=1, keepdim=True).values
    return z - torch.where(is_first, second, top)


def log_probabilities(z: Tensor) -> tuple[Tensor, Tensor]:
    """``log p`` and ``log(1 - p)`` of the softmax of logits ``(N, C, *spatial)``, both exact to rounding, C >= 2.

    For the largest logit, whose p may be 1 to rounding, both follow from the log-odds of the others against it; for all
    else p is at most 1/2, and nothing cancels.
    """
    top, first = z.max(dim=1, keepdim=True)
    z = z - top.detach()  # a shift changes nothing; sums of large logarithms would be rounded to their size
    is_first = _is_class(z, first)
    odds = z.masked_fill(is_first, -torch.inf).logsumexp(dim=1, keepdim=True) - z.gather(1, first)
    log_p = z.log_softmax(dim=1)
    rest = torch.log1p(-log_p.masked_fill(is_first, -1.0).exp())  # -1: the slope at p = 1 is infinite
    return torch.where(is_first, F.logsigmoid(-odds), log_p), torch.where(is_first, F.logsigmoid(odds), rest)


def _lost(log_kept: Tensor) -> Tensor:
    """``1 - kept`` from its logarithm: to rounding where little is lost, and with the slope where all but a little is."""
    # autograd takes the slope of expm1 from its result, which is -1 to rounding there
    return torch.where(log_kept > -0.5, -torch.expm1(log_kept), 1 - log_kept.exp())


def _without_void(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in float32 or wider, 0 where void; label, 0 where void, and whether void, both ``(N, 1, *spatial)``."""
    void = (target == ignore_index).unsqueeze(1)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # before any arithmetic: 0 * nan would be nan in the backward pass
    return z.masked_fill(void, 0.0), target.unsqueeze(1).masked_fill(void, 0), void


def _is_class(z: Tensor, index: Tensor) -> Tensor:
    """One-hot ``(N, C, *spatial)`` of class indices ``(N, 1, *spatial)``."""
    classes = torch.arange(z.shape[1], device=z.device).view(-1, *[1] * (z.ndim - 2))
    return classes == index
