r"""Counts of errors at soft margins per class, in two passes over the logits: one for the counts, one for the gradient.

With the probabilities p of a pixel and ``r = 1 / (1 + exp(-t))`` at the calibrated margin t, the error is ``1 - (1 - r)^q``.
As ``p / (1 - p) = exp(s)``::

    false alarm of k    1 - r = o (1 - p_k) / (p_k + o (1 - p_k)),      o = exp(-background_k)
    miss of y           1 - r = o p_y / (1 - p_y + o p_y),              o = exp(-foreground_y)

A function of the counts has one upstream gradient for each class and kind of error. With these, w, a second pass writes::

    d loss / d z_j = p_j g_j - p_j sum_k p_k g_k,      g_k = w_k d error_k / d p_k

Nothing of the size of the logits is kept between the passes: the probabilities are computed anew, a tile at a time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .tiles import on_threads, tiles

# elements per tile on the CPU; one pass makes a few tensors of this size
_TILE = 2**18

_Part = tuple[slice, slice, slice]


def soft_error_counts(
    logits: Tensor, target: Tensor, offsets: tuple[Tensor, ...] | None, power: float, ignore_index: int
) -> Tensor:
    """Count labels, misses and false alarms of every class.

    As `mcseg.kernels.error_counts`, with a spatial dimension, target int64, offsets converted.

    Note:
        Keeps nothing for the backward pass besides its inputs. Differentiable once.
    """
    odds = [(-offset).exp() for offset in offsets] if offsets else [None, None]
    counts: Tensor = _ErrorCounts.apply(logits, target, *odds, power, ignore_index)
    return counts


class _ErrorCounts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        foreground: Tensor | None,
        background: Tensor | None,
        power: float,
        ignore_index: int,
    ) -> Tensor:
        ctx.save_for_backward(logits, target, foreground, background)
        ctx.scalars = (power, ignore_index)

        parts = list(enumerate(_parts(logits)))
        counts = torch.zeros(len(parts), 3, logits.shape[1], dtype=torch.float64, device=logits.device)

        def some(parts: Sequence[tuple[int, _Part]]) -> None:
            for index, part in parts:
                pixels = (logits[part], target[part[0], *part[2:]])
                counts[index] = _counts(*pixels, foreground, background, power, ignore_index)

        on_threads(some, parts)
        return counts.sum(0).to(torch.promote_types(logits.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # @once_differentiable would let the gradient pass as a constant where `upstream` is one
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("create_graph=True: counts of errors have no second derivative")
        logits, target, foreground, background = ctx.saved_tensors
        power, ignore_index = ctx.scalars
        gradient = torch.empty_like(logits)

        def some(parts: Sequence[_Part]) -> None:
            for part in parts:
                pixels = (logits[part], target[part[0], *part[2:]])
                gradient[part] = _gradient(*pixels, foreground, background, power, ignore_index, upstream)

        on_threads(some, _parts(logits))
        return gradient, None, None, None, None, None


def _parts(logits: Tensor) -> list[_Part]:
    """Tiles on the CPU, where they stay in the cache; elsewhere the whole."""
    whole = slice(None)
    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        return [(whole, whole, whole)]
    return [(samples, whole, rows) for samples, rows in tiles(logits, _TILE)]


def _counts(
    z: Tensor, target: Tensor, foreground: Tensor | None, background: Tensor | None, power: float, ignore_index: int
) -> Tensor:
    """Labels, misses and false alarms ``(3, C)`` float64 of a tile; odds instead of offsets."""
    rivals, own, rest, label, void = _probabilities(z, target, ignore_index)
    kept = own if foreground is None else own * foreground[label]
    hit = kept / (rest + kept)
    miss = rest / (rest + kept) if power == 1 else 1 - hit.pow_(power)
    if power == 1:
        alarms = rivals if background is None else rivals / _total(rivals, background)
    else:
        alarms = _rejected(rivals, background).pow_(power).neg_().add_(1)
    over = [dim for dim in range(alarms.ndim) if dim != 1]
    false_alarms = alarms.sum(over)
    misses = alarms.zero_().scatter_(1, label, miss.masked_fill_(void, 0.0)).sum(over)
    # not by bincount, for which the host would wait for the device
    labels = torch.zeros_like(misses, dtype=torch.float64)
    labels.scatter_add_(0, label.flatten(), (~void).double().flatten())
    return torch.stack([labels, misses.double(), false_alarms.double()])


def _gradient(
    z: Tensor,
    target: Tensor,
    foreground: Tensor | None,
    background: Tensor | None,
    power: float,
    ignore_index: int,
    upstream: Tensor,
) -> Tensor:
    """Gradient of a tile, for an upstream gradient ``(3, C)`` of the counts."""
    p, own, rest, label, void = _probabilities(z, target, ignore_index)
    # p g of rivals: p q (1 - r)^(q - 1) o / (p + o (1 - p))^2
    weights = power * (upstream[2] if background is None else upstream[2] * background)
    pg = p * weights.view(-1, *[1] * (p.ndim - 2))
    if background is not None:
        pg /= _total(p, background).square_()
    if power < 1:
        # the power is infinite at 0, where p is 1; p g vanishes in the difference below, so that any finite number serves
        pg *= _rejected(p, background).clamp_(min=torch.finfo(p.dtype).eps).pow_(power - 1)
    # of the label: as p o / (1 - p + o p) = 1 - r, it is - q (1 - r)^q / (1 - p + o p), finite where p is 0
    kept = own if foreground is None else own * foreground[label]
    total = rest + kept
    of_label = (kept / total).pow_(power).div_(total).mul_(-power * upstream[1][label])
    pg.scatter_(1, label, of_label.masked_fill_(void, 0.0))
    p.scatter_(1, label, own.masked_fill_(void, 0.0))
    return pg.addcmul_(p, pg.sum(dim=1, keepdim=True), value=-1)


def _probabilities(z: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Probabilities and labels.

    Returns:
        Probabilities of the rivals ``(N, C, *spatial)``, 0 for the label, and 0 where void, which makes these no errors;
        and ``(N, 1, *spatial)``: probability of the label, sum of the rivals', label (0 where void), whether void.
    """
    void = (target == ignore_index).unsqueeze(1)
    label = target.unsqueeze(1).masked_fill(void, 0)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    p = (z - z.amax(dim=1, keepdim=True)).exp_()
    own = p.gather(1, label)
    # 1 - p of the label as the sum of the others, without cancellation: where it is tiny, it is the error
    rest = p.scatter_(1, label, 0.0).sum(dim=1, keepdim=True)
    scale = (own + rest).reciprocal_()
    return p.mul_(scale).masked_fill_(void, 0.0), own.mul_(scale), rest.mul_(scale), label, void


def _total(p: Tensor, odds: Tensor) -> Tensor:
    odds = odds.view(-1, *[1] * (p.ndim - 2))
    return torch.addcmul(odds, p, 1 - odds)


def _rejected(p: Tensor, odds: Tensor | None) -> Tensor:
    """``1 - r`` of rivals."""
    rest = 1 - p
    if odds is not None:
        rest.mul_(odds.view(-1, *[1] * (p.ndim - 2))).div_(_total(p, odds))
    return rest
