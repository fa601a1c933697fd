"""Readable implementations of the operations of `mcseg.kernels` in plain PyTorch; autograd derives the gradients."""

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
        foreground: ``(C,)`` offsets, floating point.
        background: ``(C,)`` offsets, floating point.
        misses: ``(C,)`` weights, floating point.
        false_alarms: ``(C,)`` weights, floating point.
        ignore_index: Label of void pixels.

    Returns:
        ``(N, *spatial)`` in float32 or wider.
    """
    z, label, void = _mask_void(logits, target, ignore_index)
    is_label = _is_class(z, label)
    per_class = (-1, *[1] * (z.ndim - 2))
    foreground, background, misses, false_alarms = (
        vector.to(z.dtype).view(per_class) for vector in (foreground, background, misses, false_alarms)
    )
    s = class_margins(z)
    t = torch.where(is_label, foreground - s, background + s)
    # logsigmoid, because softplus becomes the identity too early for float64
    errors = torch.where(is_label, misses, false_alarms) * -F.logsigmoid(-t)
    return errors.sum(dim=1).masked_fill(void.squeeze(1), 0.0)


def soft_counts(logits: Tensor, target: Tensor, power: float, ignore_index: int) -> Tensor:
    """Compute what `mcseg.kernels.soft_counts` does, for inputs as in `weighted_pixel_loss`."""
    z, label, void = _mask_void(logits, target, ignore_index)
    is_label = _is_class(z, label) & ~void
    log_p, log_rest = log_probabilities(z)
    pixel_dims = [dim for dim in range(z.ndim) if dim != 1]
    misses = _one_minus_exp(power * log_p).masked_fill(~is_label, 0.0)
    false_alarms = _one_minus_exp(power * log_rest).masked_fill(is_label | void, 0.0)
    return torch.stack([is_label.sum(pixel_dims).to(z.dtype), misses.sum(pixel_dims), false_alarms.sum(pixel_dims)])


def class_margins(z: Tensor) -> Tensor:
    """Compute the class margins ``s_k = z_k - max_{j != k} z_j`` of logits ``(N, C, *spatial)``, in the same shape.

    Among equal largest logits, the one of the lowest index is the largest, and the next lowest is its runner-up.
    """
    top, top_class = z.max(dim=1, keepdim=True)
    is_top = _is_class(z, top_class)
    # max, because amax divides the gradient among equal logits
    runner_up = z.masked_fill(is_top, -torch.inf).max(dim=1, keepdim=True).values
    return z - torch.where(is_top, runner_up, top)


def log_probabilities(z: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``log p`` and ``log(1 - p)`` of the softmax of logits ``(N, C, *spatial)``, C >= 2, without cancellation.

    The p of the largest logit may round to 1, so both of its logarithms are computed from the log-odds against it. For all
    other logits p is at most 1/2, and ``log1p`` is accurate.
    """
    top, top_class = z.max(dim=1, keepdim=True)
    z = z - top.detach()  # the softmax does not change, and logsumexp of large logits would lose digits
    is_top = _is_class(z, top_class)
    odds = z.masked_fill(is_top, -torch.inf).logsumexp(dim=1, keepdim=True) - z.gather(1, top_class)
    log_p = z.log_softmax(dim=1)
    # -1 is any value below 0: the slope of log1p at p = 1 is infinite, and torch.where would turn it into nan
    log_rest = torch.log1p(-log_p.masked_fill(is_top, -1.0).exp())
    return torch.where(is_top, F.logsigmoid(-odds), log_p), torch.where(is_top, F.logsigmoid(odds), log_rest)


def _one_minus_exp(x: Tensor) -> Tensor:
    """Compute ``1 - exp(x)`` for x <= 0, with an accurate value near 0 and an accurate gradient far below 0."""
    # autograd computes the slope of expm1 as its result plus 1, which rounds to 0 far below 0
    return torch.where(x > -0.5, -torch.expm1(x), 1 - x.exp())


def _mask_void(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Set logits and labels of void pixels to 0.

    Returns:
        Logits in float32 or wider, labels ``(N, 1, *spatial)``, and whether each pixel is void ``(N, 1, *spatial)``.
    """
    void = (target == ignore_index).unsqueeze(1)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # masked before any arithmetic, because 0 * nan is nan in the backward pass
    return z.masked_fill(void, 0.0), target.unsqueeze(1).masked_fill(void, 0), void


def _is_class(z: Tensor, index: Tensor) -> Tensor:
    """Convert class indices ``(N, 1, *spatial)`` to a one-hot mask ``(N, C, *spatial)``."""
    classes = torch.arange(z.shape[1], device=z.device).view(-1, *[1] * (z.ndim - 2))
    return classes == index
