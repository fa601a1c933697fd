r"""The calibrated log-loss per pixel with its gradient computed in the same pass over the logits.

Gradient. Let ``q1`` be the largest logit of a pixel and ``q2`` its runner-up. The rival of class ``k``, the logit that
its margin is measured against, is ``q2`` for ``k = q1`` and ``q1`` for every other class::

    s_q1 = z_q1 - z_q2,        s_k = z_k - z_q1    (k != q1)

So ``z_k`` occurs in its own margin, ``z_q1`` also in the margins of all other classes, and ``z_q2`` also in that of
``q1``. With ``g_k = d loss / d s_k``, the chain rule gives::

    d loss / d z_k  = g_k                          (k not in {q1, q2})
    d loss / d z_q1 = g_q1 - sum_{k != q1} g_k
    d loss / d z_q2 = g_q2 - g_q1

    C g_y = -foreground_weight sigmoid(foreground_y - s_y),    C g_k = sigmoid(background_k + s_k)    (k != y)

Maximum, runner-up and their indices are all that a pixel needs, and loss and gradient share the argument ``t_k`` of
softplus and sigmoid.

Logarithm. With ``u_k = exp(-|t_k|)``, ``sum_k softplus(t_k) = sum_k max(t_k, 0) + log prod_k (1 + u_k)``: one logarithm
per pixel instead of one per class. The product is carried as ``prod - 1``, folded by ``(1+a)(1+b) - 1 = a + b + ab``,
which is a sum of positive terms, so ``log1p`` of it is exact to rounding even where all ``u_k`` are tiny.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .tiles import on_threads, tiles

# elements of a tile on the CPU; with fewer, Python takes longer than the operations
_TILE = 2**19
# each factor 1 + u_k is at most 2, and 2^64 is far from overflow in float32
_FACTORS = 64


def fused_pixel_loss(
    logits: Tensor, target: Tensor, foreground: Tensor, background: Tensor, foreground_weight: float, ignore_index: int
) -> Tensor:
    """Compute the loss of every pixel; arguments as in `mcseg.kernels.pixel_loss`, target int64, offsets converted.

    Note:
        Keeps one tensor for the backward pass besides its inputs, of the logits' shape: the gradient for an upstream
        gradient of 1.
    """
    constants = (foreground, background, foreground_weight, ignore_index)
    if torch.is_grad_enabled() and logits.requires_grad:
        loss: Tensor = _Fused.apply(logits, target, *constants)
        return loss
    return _loss_and_gradient(logits, target, *constants, with_gradient=False)[0]


class _Fused(torch.autograd.Function):
    """Differentiable once: forward computes the gradient, backward scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        foreground: Tensor,
        background: Tensor,
        foreground_weight: float,
        ignore_index: int,
    ) -> Tensor:
        constants = (foreground, background, foreground_weight, ignore_index)
        loss, gradient = _loss_and_gradient(logits, target, *constants, with_gradient=True)
        ctx.save_for_backward(logits, target, foreground, background)
        ctx.scalars = (foreground_weight, ignore_index)
        ctx.gradient = gradient
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # @once_differentiable would let the gradient pass as a constant where `upstream` is one
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and not compiling:
            raise RuntimeError('create_graph=True: backend "fused" has no second derivative; use backend="reference"')
        logits, *constants = ctx.saved_tensors
        if compiling:
            scaled = ctx.gradient * upstream.unsqueeze(1)
        else:
            # The gradient is scaled where it lies and handed out, which halves the memory; a second backward through a
            # retained graph finds none and computes it anew.
            gradient, ctx.gradient = ctx.gradient, None
            if gradient is None:
                gradient = _loss_and_gradient(logits, *constants, *ctx.scalars, with_gradient=True)[1]
            scaled = gradient.mul_(upstream.unsqueeze(1))
        return scaled.to(logits.dtype), None, None, None, None, None


def _loss_and_gradient(
    logits: Tensor,
    target: Tensor,
    foreground: Tensor,
    background: Tensor,
    foreground_weight: float,
    ignore_index: int,
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Run the tiles and collect what they return; without gradient, the second tensor is empty."""
    dtype = foreground.dtype
    # the gradient of one pixel reaches foreground_weight / C + 1 before it is divided by the number of pixels: a large
    # weight would overflow float16, and bfloat16 has the range for it
    saved = dtype if logits.dtype == torch.float16 else logits.dtype

    constants = (foreground, background, foreground_weight, ignore_index, with_gradient)
    if _as_a_whole(logits):
        loss, gradient = _tile(logits.to(dtype), target, *constants)
        return loss, gradient.to(saved)

    loss = torch.empty_like(target, dtype=dtype)
    gradient = torch.empty_like(logits if with_gradient else logits[:0], dtype=saved)

    def compute(parts: Sequence[tuple[slice, slice]]) -> None:
        samples, rows = parts[0]  # no other one is larger
        shape = logits[samples, :, rows].shape
        work = [torch.empty(shape[0], size, *shape[2:], dtype=dtype) for size in (shape[1], shape[1], shape[1] // 2)]
        for samples, rows in parts:
            z, y = logits[samples, :, rows], target[samples, rows]
            out = gradient[samples, :, rows] if with_gradient else None
            some = [tensor[: len(z), :, : z.shape[2]] for tensor in work]
            loss[samples, rows], _ = _tile(z.to(dtype), y, *constants, out, *some)

    on_threads(compute, list(tiles(logits, _TILE)))
    return loss, gradient


def _as_a_whole(logits: Tensor) -> bool:
    """On the CPU tiles stay in the cache; elsewhere, and where code is compiled, there are none."""
    return logits.device.type != "cpu" or torch.compiler.is_compiling()


def _tile(
    z: Tensor,
    target: Tensor,
    foreground: Tensor,
    background: Tensor,
    foreground_weight: float,
    ignore_index: int,
    with_gradient: bool,
    out: Tensor | None = None,
    t: Tensor | None = None,
    u: Tensor | None = None,
    half: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return loss ``(N, *spatial)`` and gradient, of the shape of ``z``; operations on whole tensors of any strides.

    The gradient is written to ``out``, and what lies between to ``t``, ``u`` (of the shape of ``z``) and ``half`` (of half
    as many classes), where these are given: new memory costs as much as an operation.
    """
    num_classes = z.shape[1]
    void = (target == ignore_index).unsqueeze(1)  # (N, 1, *spatial), as everything below that has one value per pixel
    label = target.unsqueeze(1).masked_fill(void, 0)

    top, q1 = largest(z, u)
    t = torch.sub(z, top, out=t).scatter_(1, q1, -torch.inf)
    runner_up, q2 = largest(t, u)  # minus the largest
    t.scatter_(1, q1, -runner_up)  # the class margins
    t_y = foreground[label] - t.gather(1, label)
    t += background.view(-1, *[1] * (z.ndim - 2))
    t.scatter_(1, label, -torch.inf)  # the label's own term has its own weight; -inf adds 0 to the sums below

    u = torch.clamp(t, min=0, out=u)
    loss = u.sum(dim=1, keepdim=True)
    # exp2 takes a third of the time of exp
    loss += _log_product(torch.abs(t, out=u).mul_(-1 / math.log(2)).exp2_(), half)
    loss += foreground_weight * (t_y.clamp(min=0) + _log1p(t_y.abs().neg_().exp_()))
    loss /= num_classes
    # masked_fill_() of whole tiles takes as long as five products, and differs from them only where values are not finite
    strange = _as_a_whole(z) or not loss.isfinite().all()
    loss = loss.masked_fill_(void, 0.0).squeeze(1)
    if not with_gradient:
        return loss, z[:0]

    g = t.sigmoid_().scatter_(1, label, -foreground_weight * t_y.sigmoid())
    g_q1, g_q2 = g.gather(1, q1), g.gather(1, q2)
    others = g.sum(dim=1, keepdim=True).sub_(g_q1)
    g.scatter_(1, q1, g_q1 - others).scatter_(1, q2, g_q2 - g_q1)
    gradient = torch.mul(g, (~void).to(g.dtype) / num_classes, out=g if out is None else out)
    return loss, gradient.masked_fill_(void, 0.0) if strange else gradient


def largest(z: Tensor, work: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return maximum and its lowest index over dimension 1, kept; ``work`` may give memory of the shape of ``z``."""
    if z.device.type != "cpu":
        return z.max(dim=1, keepdim=True)
    # max() with indices handles one pixel at a time here, the operations below many: a tenth of its time
    num_classes = z.shape[1]
    classes = torch.arange(num_classes, dtype=z.dtype).view(-1, *[1] * (z.ndim - 2))
    top = z.amax(dim=1, keepdim=True)
    # floor(z - top) is 0 at maxima and <= -1 elsewhere: the best score is minus the lowest index of a maximum
    score = torch.sub(z, top, out=work).floor_().mul_(num_classes).sub_(classes).amax(dim=1, keepdim=True)
    return top, score.neg_().long().clamp_(0, num_classes - 1)  # a nan score must not become a wild index


def _log_product(u: Tensor, half: Tensor | None) -> Tensor:
    """Return ``sum_k log(1 + u_k)`` over dimension 1, kept, for ``0 <= u_k <= 1``; overwrites both arguments."""
    factors = 1
    while u.shape[1] > 1 and factors < _FACTORS:
        pairs = u.shape[1] // 2
        a, b = u[:, :pairs], u[:, u.shape[1] - pairs :]
        a += torch.addcmul(b, a, b, out=None if half is None else half[:, :pairs])  # (1 + a)(1 + b) - 1
        u = u[:, : u.shape[1] - pairs]
        factors *= 2
    return _log1p(u).sum(dim=1, keepdim=True)


def _log1p(x: Tensor) -> Tensor:
    """``log(1 + x)`` for x >= 0 to rounding; log1p() handles one element at a time."""
    u = 1 + x
    return torch.where(u == 1, x, u.log() * (x / (u - 1)))
