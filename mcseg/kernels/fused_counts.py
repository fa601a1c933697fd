r"""Soft counts per class from powers of the probabilities: one pass over the logits for the counts, one for the gradient.

A pixel with label y, softmax p and power q adds ``1 - p_y^q`` to the misses of class y and ``1 - (1 - p_k)^q`` to the false
alarms of every other class k. A loss that is a function of the counts has the upstream gradients u_k for misses and v_k for
false alarms. With h_k as the slope of the loss in log p_k::

    h_k = v_k q p_k (1 - p_k)^(q - 1)    (k != y),        h_y = -u_y q p_y^q
    d loss / d z_j = h_j - p_j sum_k h_k

The p of the largest logit, class 1 below, may round to 1. Then 1 - p is lost, and two large numbers cancel. All terms with
1 - p_1 are therefore computed from R = 1 - p_1 as a sum over the other classes. With S = sum_{k != 1} h_k and the shares
w_k = p_k / R, no part is a difference of nearly equal numbers::

    A = v_1 q p_1 R^q   if class 1 is not the label,     A = -u_1 q p_1^q R   if it is
    d loss / d z_1 = A - p_1 S
    d loss / d z_k = h_k - w_k (R S + A)        (k != 1)

No tensor of the size of the logits is saved between the passes: the second pass computes the probabilities again.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mcseg.kernels.fused_loss import first_zero
from mcseg.kernels.tiles import on_threads, tiles

# elements of a tile on the CPU; a pass allocates a few tensors of this size
_TILE = 2**18

_Part = tuple[slice, slice, slice]  # samples, classes, rows


def soft_counts(logits: Tensor, target: Tensor, power: float, ignore_index: int) -> Tensor:
    """Compute what `mcseg.kernels.soft_counts` does, for logits with a spatial dimension and int64 targets.

    Note:
        Saves only its inputs for the backward pass. Differentiable once.
    """
    counts: Tensor = _SoftCounts.apply(logits, target, power, ignore_index)
    return counts


class _SoftCounts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, power: float, ignore_index: int) -> Tensor:
        ctx.save_for_backward(logits, target)
        ctx.scalars = (power, ignore_index)

        parts = list(enumerate(_parts(logits)))
        counts = torch.zeros(len(parts), 3, logits.shape[1], dtype=torch.float64, device=logits.device)

        def count(parts: Sequence[tuple[int, _Part]]) -> None:
            for index, part in parts:
                z, y = logits[part], target[part[0], *part[2:]]
                counts[index] = _counts(z, y, power=power, ignore_index=ignore_index)

        on_threads(count, parts)
        return counts.sum(0).to(torch.promote_types(logits.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # @once_differentiable would treat the gradient as a constant if `upstream` is a constant
        if torch.is_grad_enabled():
            raise RuntimeError('create_graph=True: backend "fused" has no second derivative; use backend="reference"')
        logits, target = ctx.saved_tensors
        power, ignore_index = ctx.scalars
        gradient = torch.empty_like(logits)

        def differentiate(parts: Sequence[_Part]) -> None:
            for part in parts:
                z, y = logits[part], target[part[0], *part[2:]]
                gradient[part] = _gradient(z, y, power=power, ignore_index=ignore_index, upstream=upstream)

        on_threads(differentiate, _parts(logits))
        return gradient, None, None, None


def _parts(logits: Tensor) -> list[_Part]:
    """Cut into tiles that fit into the cache on the CPU; elsewhere return one part with everything."""
    everything = slice(None)
    if logits.device.type != "cpu":
        return [(everything, everything, everything)]
    return [(samples, everything, rows) for samples, rows in tiles(logits, _TILE)]


class _Pixels(NamedTuple):
    """Values that both passes need of a tile, ``(N, 1, *spatial)`` if not stated otherwise.

    Attributes:
        void: Whether the pixel is void.
        label: Class of the pixel, 0 if void.
        top_class: Class of the largest logit, the lowest class if several are equal.
        label_is_top: Whether the label is the class of the largest logit.
        log_p_label: Logarithm of the label's probability.
        log_p_top: Logarithm of the largest probability.
        log_rest: log R, with R = 1 - p of the largest logit.
        shares: w_k, ``(N, C, *spatial)``; 0 for the largest logit and for void pixels.
    """

    void: Tensor
    label: Tensor
    top_class: Tensor
    label_is_top: Tensor
    log_p_label: Tensor
    log_p_top: Tensor
    log_rest: Tensor
    shares: Tensor


def _pixels(z: Tensor, target: Tensor, ignore_index: int) -> _Pixels:
    void = (target == ignore_index).unsqueeze(1)
    label = target.unsqueeze(1).masked_fill(void, 0)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    t = z - z.amax(dim=1, keepdim=True)
    top_class = first_zero(t)
    t_label = t.gather(1, label)
    # scatter_() with a tensor takes half as long as with a number
    t.scatter_(1, top_class, z.new_full((), -torch.inf).expand(top_class.shape))
    runner_up = t.amax(dim=1, keepdim=True)
    scale = 1 / math.log(2)  # exp2 takes a third of the time of exp
    shares = torch.add(runner_up * -scale, t, alpha=scale, out=t).exp2_()
    total = shares.sum(dim=1, keepdim=True)
    log_odds = runner_up + total.log()  # log sum_{k != 1} exp(z_k - z_1)
    log_sum = -F.logsigmoid(-log_odds)  # log sum_k exp(z_k - z_1)
    shares.mul_(total.reciprocal().masked_fill_(void, 0.0))
    # the factor 0 suffices for finite values; masked_fill_() of a tile takes as long as five multiplications
    if shares.device.type != "cpu" or not total.isfinite().all():
        shares.masked_fill_(void, 0.0)
    return _Pixels(
        void=void,
        label=label,
        top_class=top_class,
        label_is_top=label == top_class,
        log_p_label=t_label - log_sum,
        log_p_top=-log_sum,
        log_rest=log_odds - log_sum,
        shares=shares,
    )


def _counts(z: Tensor, target: Tensor, *, power: float, ignore_index: int) -> Tensor:
    """Count labels, misses and false alarms of a tile, ``(3, C)`` float64."""
    pixels = _pixels(z, target, ignore_index)
    rest = pixels.log_rest.exp().masked_fill_(pixels.void, 0.0)
    if power < 1:  # p is at most 1/2 except for the largest logit, which is replaced below: nothing cancels
        one_minus_p = torch.mul(pixels.shares, -rest, out=pixels.shares).add_(1)
        alarms = one_minus_p.pow_(power).neg_().add_(1)
    else:
        alarms = pixels.shares.mul_(rest)
    alarm_of_top = _one_minus_power(pixels.log_rest, power)
    alarms.scatter_(1, pixels.top_class, alarm_of_top.masked_fill_(pixels.void, 0.0))
    alarms.scatter_(1, pixels.label, torch.zeros_like(alarm_of_top))
    pixel_dims = [dim for dim in range(alarms.ndim) if dim != 1]
    false_alarms = alarms.sum(pixel_dims)
    miss = _one_minus_power(pixels.log_p_label, power).masked_fill_(pixels.void, 0.0)
    misses = alarms.zero_().scatter_(1, pixels.label, miss).sum(pixel_dims)
    # not bincount, which makes the host wait for the device
    labels = torch.zeros_like(misses, dtype=torch.float64)
    labels.scatter_add_(0, pixels.label.flatten(), (~pixels.void).double().flatten())
    return torch.stack([labels, misses.double(), false_alarms.double()])


def _gradient(z: Tensor, target: Tensor, *, power: float, ignore_index: int, upstream: Tensor) -> Tensor:
    """Compute the gradient of a tile from the upstream gradient ``(3, C)`` of the counts."""
    pixels = _pixels(z, target, ignore_index)
    u, v = power * upstream[1], power * upstream[2]
    rest = pixels.log_rest.exp().masked_fill_(pixels.void, 0.0)
    h = pixels.shares * rest
    if power < 1:
        h *= (1 - h).pow_(power - 1)
    h *= v.view(-1, *[1] * (z.ndim - 2))
    p_top = pixels.log_p_top.exp()
    h_label = (power * pixels.log_p_label).exp_() * -u.take(pixels.label)
    a_if_alarm = (power * pixels.log_rest).exp_() * p_top * v.take(pixels.top_class)
    a = torch.where(pixels.label_is_top, h_label * rest, a_if_alarm).masked_fill_(pixels.void, 0.0)
    h.scatter_(1, pixels.label, h_label.masked_fill_(pixels.void | pixels.label_is_top, 0.0))
    s = h.sum(dim=1, keepdim=True)
    h.addcmul_(pixels.shares, rest * s + a, value=-1)
    return h.scatter_(1, pixels.top_class, (a - p_top * s).masked_fill_(pixels.void, 0.0))


def _one_minus_power(log_x: Tensor, power: float) -> Tensor:
    """Compute ``1 - x^power`` from log x, without cancellation."""
    return (power * log_x).expm1_().neg_()
