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

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# elements per tile on the CPU: 4 MB of float32, so that intermediate results stay in the L3 cache; smaller tiles that
# fit the L2 cache lose more to the synchronisation of threads after each operation than they gain
_TILE = 2**20
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

    def tile(z: Tensor, y: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _tile(z.to(dtype), y, foreground, background, foreground_weight, ignore_index, with_gradient, out)

    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        loss, gradient = tile(logits, target)
        return loss, gradient.to(saved)

    loss = torch.empty_like(target, dtype=dtype)
    gradient = torch.empty_like(logits if with_gradient else logits[:0], dtype=saved)
    for samples, rows in tiles(logits, _TILE):
        out = gradient[samples, :, rows] if with_gradient else None
        loss[samples, rows], _ = tile(logits[samples, :, rows], target[samples, rows], out)
    return loss, gradient


def tiles(logits: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    """Cut into rows of one sample, or runs of whole samples where these are small, of about ``size`` elements."""
    num, num_classes, height, *rest = logits.shape
    if logits.numel() == 0:
        return
    row = num_classes * torch.Size(rest).numel()
    rows = max(1, min(height, size // row))
    samples = max(1, size // (row * height))
    for n in range(0, num, samples):
        for r in range(0, height, rows):
            yield slice(n, n + samples), slice(r, r + rows)


def _tile(
    z: Tensor,
    target: Tensor,
    foreground: Tensor,
    background: Tensor,
    foreground_weight: float,
    ignore_index: int,
    with_gradient: bool,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return loss ``(N, *spatial)`` and gradient, of the shape of ``z``; operations on whole tensors of any strides.

    The gradient is written to ``out`` where that is given.
    """
    num_classes = z.shape[1]
    void = (target == ignore_index).unsqueeze(1)  # (N, 1, *spatial), as everything below that has one value per pixel
    label = target.unsqueeze(1).masked_fill(void, 0)

    top, q1 = largest(z)
    rest = z.scatter(1, q1, -torch.inf)
    runner_up, q2 = largest(rest)
    t = torch.sub(z, top, out=rest).scatter_(1, q1, top - runner_up)  # the class margins
    t_y = foreground[label] - t.gather(1, label)
    t += background.view(-1, *[1] * (z.ndim - 2))
    t.scatter_(1, label, -torch.inf)  # the label's own term has its own weight; -inf adds 0 to the sums below

    u = t.clamp(min=0)
    loss = u.sum(dim=1, keepdim=True)
    loss += _log_product(torch.abs(t, out=u).neg_().exp_())
    loss -= foreground_weight * F.logsigmoid(-t_y)
    loss = loss.div_(num_classes).masked_fill_(void, 0.0).squeeze(1)
    if not with_gradient:
        return loss, z[:0]

    g = t.sigmoid_().scatter_(1, label, -foreground_weight * t_y.sigmoid())
    g_q1, g_q2 = g.gather(1, q1), g.gather(1, q2)
    others = g.sum(dim=1, keepdim=True).sub_(g_q1)
    g.scatter_(1, q1, g_q1 - others).scatter_(1, q2, g_q2 - g_q1)
    return loss, torch.div(g, num_classes, out=g if out is None else out).masked_fill_(void, 0.0)


def largest(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return maximum and its lowest index over dimension 1, kept."""
    if z.device.type != "cpu":
        return z.max(dim=1, keepdim=True)
    # max() with indices handles one pixel at a time here, the operations below many: a third of its time
    num_classes = z.shape[1]
    classes = torch.arange(num_classes, dtype=z.dtype).view(-1, *[1] * (z.ndim - 2))
    top = z.amax(dim=1, keepdim=True)
    # floor(z - top) is 0 at maxima and <= -1 elsewhere: the best score is minus the lowest index of a maximum
    score = torch.sub(z, top).floor_().mul_(num_classes).sub_(classes).amax(dim=1, keepdim=True)
    return top, score.neg_().long().clamp_(0, num_classes - 1)  # a nan score must not become a wild index


def _log_product(u: Tensor) -> Tensor:
    """Return ``sum_k log(1 + u_k)`` over dimension 1, kept, for ``0 <= u_k <= 1``; overwrites ``u``."""
    factors = 1
    while u.shape[1] > 1 and factors < _FACTORS:
        half = u.shape[1] // 2
        a, b = u[:, :half], u[:, u.shape[1] - half :]
        a += torch.addcmul(b, a, b)  # (1 + a)(1 + b) - 1
        u = u[:, : u.shape[1] - half]
        factors *= 2
    return u.log1p_().sum(dim=1, keepdim=True)
