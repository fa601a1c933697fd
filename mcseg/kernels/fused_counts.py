r"""Soft counts per class of powers of the probabilities, in two passes over the logits: counts, then the gradient.

With the softmax p of a pixel, its label y and a power q, the errors are a miss ``1 - p_y^q`` and for every other class a
false alarm ``1 - (1 - p_k)^q``. A function of their sums has one upstream gradient for each class and kind of error: u for
misses, v for false alarms. With h the slopes of a pixel's errors in log p::

    h_k = v_k q p_k (1 - p_k)^(q - 1)    (k != y),        h_y = -u_y q p_y^q
    d loss / d z_j = h_j - p_j sum_k h_k

The largest logit, class 1 below, may have a p of 1 to rounding; then 1 - p is lost, and two large numbers cancel. All that
concerns it is therefore written by the sum over the *others*: with R = 1 - p_1 as that sum, S = sum_{k != 1} h_k and the
shares w_k = p_k / R of the others, every part is computed without a difference of neighbours, log R from the runner-up::

    A = v_1 q p_1 R^q   where 1 is a rival,     A = -u_1 q p_1^q R   where it is the label
    d loss / d z_1 = A - p_1 S
    d loss / d z_k = h_k - w_k (R S + A)        (k != 1)

Nothing of the size of the logits is kept between the passes: probabilities are computed anew, a tile at a time.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mcseg.kernels.fused_loss import lowest_zero
from mcseg.kernels.tiles import on_threads, tiles

# elements of a tile on the CPU; one pass makes a few tensors of this size
_TILE = 2**18

_Part = tuple[slice, slice, slice]


def soft_counts(logits: Tensor, target: Tensor, power: float, ignore_index: int) -> Tensor:
    """Compute what `mcseg.kernels.soft_counts` does, with a spatial dimension and target int64.

    Note:
        Keeps nothing for the backward pass besides its inputs. Differentiable once.
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

        def some(parts: Sequence[tuple[int, _Part]]) -> None:
            for index, part in parts:
                counts[index] = _counts(logits[part], target[part[0], *part[2:]], power, ignore_index)

        on_threads(some, parts)
        return counts.sum(0).to(torch.promote_types(logits.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # @once_differentiable would let the gradient pass as a constant where `upstream` is one
        if torch.is_grad_enabled():
            raise RuntimeError('create_graph=True: backend "fused" has no second derivative; use backend="reference"')
        logits, target = ctx.saved_tensors
        power, ignore_index = ctx.scalars
        gradient = torch.empty_like(logits)

        def some(parts: Sequence[_Part]) -> None:
            for part in parts:
                gradient[part] = _gradient(logits[part], target[part[0], *part[2:]], power, ignore_index, upstream)

        on_threads(some, _parts(logits))
        return gradient, None, None, None


def _parts(logits: Tensor) -> list[_Part]:
    """Tiles on the CPU, where they stay in the cache; elsewhere the whole."""
    whole = slice(None)
    if logits.device.type != "cpu":
        return [(whole, whole, whole)]
    return [(samples, whole, rows) for samples, rows in tiles(logits, _TILE)]


class _Pixels(NamedTuple):
    """What both passes need of a tile: one value per pixel, ``(N, 1, *spatial)``, but for the shares."""

    void: Tensor  # whether the pixel is
    label: Tensor  # its class, 0 where void
    first: Tensor  # class of the largest logit, the lowest of several
    is_first: Tensor  # whether that is the label
    log_p_label: Tensor
    log_p_first: Tensor
    log_rest: Tensor  # log R, R = 1 - p of the largest
    shares: Tensor  # ``(N, C, *spatial)``: w_k, 0 for the largest and where void


def _pixels(z: Tensor, target: Tensor, ignore_index: int) -> _Pixels:
    void = (target == ignore_index).unsqueeze(1)
    label = target.unsqueeze(1).masked_fill(void, 0)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    t = z - z.amax(dim=1, keepdim=True)
    first = lowest_zero(t)
    of_label = t.gather(1, label)
    t.scatter_(1, first, z.new_full((), -torch.inf).expand(first.shape))  # with a tensor: a number takes twice as long
    second = t.amax(dim=1, keepdim=True)
    scale = 1 / math.log(2)  # exp2 takes a third of the time of exp
    shares = torch.add(second * -scale, t, alpha=scale, out=t).exp2_()
    total = shares.sum(dim=1, keepdim=True)
    odds = second + total.log()  # log sum_{k != 1} exp(z_k - z_1)
    log_sum = -F.logsigmoid(-odds)
    shares.mul_(total.reciprocal().masked_fill_(void, 0.0))
    if shares.device.type != "cpu" or not total.isfinite().all():  # masked_fill_() of a tile takes as long as five products
        shares.masked_fill_(void, 0.0)
    return _Pixels(void, label, first, label == first, of_label - log_sum, -log_sum, odds - log_sum, shares)


def _counts(z: Tensor, target: Tensor, power: float, ignore_index: int) -> Tensor:
    """Labels, misses and false alarms ``(3, C)`` float64 of a tile."""
    pixels = _pixels(z, target, ignore_index)
    rest = pixels.log_rest.exp().masked_fill_(pixels.void, 0.0)
    if power < 1:  # p is at most 1/2 here, so nothing cancels
        kept = torch.mul(pixels.shares, -rest, out=pixels.shares).add_(1)
        alarms = kept.pow_(power).neg_().add_(1)
    else:
        alarms = pixels.shares.mul_(rest)
    of_first = _error(pixels.log_rest, power)
    alarms.scatter_(1, pixels.first, of_first.masked_fill_(pixels.void, 0.0))
    alarms.scatter_(1, pixels.label, torch.zeros_like(of_first))
    over = [dim for dim in range(alarms.ndim) if dim != 1]
    false_alarms = alarms.sum(over)
    miss = _error(pixels.log_p_label, power).masked_fill_(pixels.void, 0.0)
    misses = alarms.zero_().scatter_(1, pixels.label, miss).sum(over)
    # not by bincount, for which the host would wait for the device
    labels = torch.zeros_like(misses, dtype=torch.float64)
    labels.scatter_add_(0, pixels.label.flatten(), (~pixels.void).double().flatten())
    return torch.stack([labels, misses.double(), false_alarms.double()])


def _gradient(z: Tensor, target: Tensor, power: float, ignore_index: int, upstream: Tensor) -> Tensor:
    """Gradient of a tile, for an upstream gradient ``(3, C)`` of the counts."""
    pixels = _pixels(z, target, ignore_index)
    u, v = power * upstream[1], power * upstream[2]
    rest = pixels.log_rest.exp().masked_fill_(pixels.void, 0.0)
    h = pixels.shares * rest
    if power < 1:
        h *= (1 - h).pow_(power - 1)
    h *= v.view(-1, *[1] * (z.ndim - 2))
    p_first = pixels.log_p_first.exp()
    of_label = (power * pixels.log_p_label).exp_() * -u.take(pixels.label)
    of_rival = (power * pixels.log_rest).exp_() * p_first * v.take(pixels.first)
    a = torch.where(pixels.is_first, of_label * rest, of_rival).masked_fill_(pixels.void, 0.0)
    h.scatter_(1, pixels.label, of_label.masked_fill_(pixels.void | pixels.is_first, 0.0))
    s = h.sum(dim=1, keepdim=True)
    h.addcmul_(pixels.shares, rest * s + a, value=-1)
    return h.scatter_(1, pixels.first, (a - p_first * s).masked_fill_(pixels.void, 0.0))


def _error(log_kept: Tensor, power: float) -> Tensor:
    """``1 - kept^power`` from the logarithm, without cancellation."""
    return (power * log_kept).expm1_().neg_()
