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

Maximum, runner-up and their indices are all that a pixel needs.

Two classes have one margin, s_y = z_y - z_k = -s_k, so that no maximum is needed::

    C d loss / d z_y = -foreground_weight sigmoid(foreground_y - s_y) - sigmoid(background_k - s_y) = -C d loss / d z_k

Logarithm. The argument ``t_k`` of softplus and sigmoid is at most the offset of class k, but for the label and the
largest logit, whose terms are computed by themselves. So ``u_k = exp(t_k)`` and products of several ``1 + u_k`` do not
overflow where offsets are moderate: ``sum_k softplus(t_k) = log prod_k (1 + u_k)`` takes one logarithm per pixel instead
of one per class, and ``u_k / (1 + u_k)`` is the sigmoid. The product is carried as ``prod - 1``, folded by ``(1+a)(1+b) -
1 = a + b + ab``, which is a sum of positive terms, so ``log1p`` of it is exact to rounding even where all ``u_k`` are
tiny.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mcseg.kernels.tiles import on_threads, tiles

# elements of a tile on the CPU; with fewer, Python takes longer than the operations
_TILE = 2**19
# logarithm of numbers that are far from overflow in float32
_LARGEST = 60
# a difference of logits times this is beyond any number of classes
_STEEP = 1e38


def pixel_loss(
    logits: Tensor, target: Tensor, foreground: Tensor, background: Tensor, foreground_weight: float, ignore_index: int
) -> Tensor:
    """Compute the loss of every pixel; arguments as in `mcseg.kernels.pixel_loss`, with offsets in the dtype of the loss.

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
        if torch.is_grad_enabled():
            raise RuntimeError('create_graph=True: backend "fused" has no second derivative; use backend="reference"')
        logits, *constants = ctx.saved_tensors
        target = constants[0]
        upstream = (upstream * (target != ctx.scalars[1]) / logits.shape[1]).unsqueeze(1)
        # The gradient is scaled where it lies and handed out, which halves the memory; a second backward through a retained
        # graph finds none and computes it anew.
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            gradient = _loss_and_gradient(logits, *constants, *ctx.scalars, with_gradient=True)[1]
        return gradient.mul_(upstream).to(logits.dtype), None, None, None, None, None


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
    # the gradient of one pixel reaches foreground_weight + C before it is divided by C and the number of pixels: a large
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
        work = [torch.empty(shape[0], size, *shape[2:], dtype=dtype) for size in (shape[1], shape[1], (shape[1] + 1) // 2)]
        for samples, rows in parts:
            z, y = logits[samples, :, rows], target[samples, rows]
            out = gradient[samples, :, rows] if with_gradient else None
            some = [tensor[: len(z), :, : z.shape[2]] for tensor in work]
            loss[samples, rows], _ = _tile(z.to(dtype), y, *constants, out, *some)

    on_threads(compute, list(tiles(logits, _TILE)))
    return loss, gradient


def _as_a_whole(logits: Tensor) -> bool:
    """On the CPU tiles stay in the cache; elsewhere there are none."""
    return logits.device.type != "cpu"


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
    if num_classes == 2:
        return _two_classes(z, target, foreground, background, foreground_weight, ignore_index, with_gradient, out)
    void = (target == ignore_index).unsqueeze(1)  # (N, 1, *spatial), as everything below that has one value per pixel
    label = target.unsqueeze(1).masked_fill(void, 0)

    # scatter_() takes half of the time with a tensor
    nothing = z.new_full((), -torch.inf).expand(label.shape)

    top = z.amax(dim=1, keepdim=True)
    t = torch.sub(z, top, out=t)
    q1 = lowest_zero(t, u)
    t.scatter_(1, q1, nothing)
    runner_up = t.amax(dim=1, keepdim=True)  # minus the largest
    q2 = lowest_zero(u := torch.sub(t, runner_up, out=u), u)
    # Label and largest have terms of their own: the one another weight, the other's may be large. All else is at most its
    # background offset.
    is_label = q1 == label
    t_y = foreground.take(label) - torch.where(is_label, -runner_up, t.gather(1, label))
    t_q1 = background.take(q1).sub_(runner_up).masked_fill_(is_label, -torch.inf)
    t.scatter_(1, label, nothing)
    offsets = background.view(-1, *[1] * (z.ndim - 2))
    u_q1 = t_q1.abs().neg_().exp_()
    bound = None if _as_a_whole(z) else float(background.max())  # a GPU would be waited for
    if bound is None or not bound <= _LARGEST:
        t += offsets
        loss = (t.clamp(min=0) + _log1p(t.abs().neg_().exp_())).sum(dim=1, keepdim=True) + _log1p(u_q1)
        g = t.sigmoid_() if with_gradient else t
    else:
        scale = 1 / math.log(2)  # exp2 takes a third of the time of exp
        u = torch.add(offsets * scale, t, alpha=scale, out=u).exp2_()
        product = _product(u, max(1, int(_LARGEST / math.log1p(math.exp(bound)))), half)
        product[:, :1].addcmul_(product[:, :1], u_q1).add_(u_q1)
        loss = _log1p(product).sum(dim=1, keepdim=True)
        g = torch.div(u, torch.add(u, 1, out=t), out=t if out is None or out.dtype != t.dtype else out)
    loss += t_q1.clamp(min=0)
    loss += foreground_weight * (t_y.clamp(min=0) + _log1p(t_y.abs().neg_().exp_()))
    loss /= num_classes
    # masked_fill_() of whole tiles takes as long as five products, and differs from them only where values are not finite
    strange = _as_a_whole(z) or not loss.isfinite().all()
    loss = loss.masked_fill_(void, 0.0).squeeze(1)
    if not with_gradient:
        return loss, z[:0]

    g_y, g_q1 = t_y.sigmoid_().mul_(-foreground_weight), t_q1.sigmoid_()
    of_both = g_y * is_label  # where the largest is the label's
    g_q1 += of_both
    others = g.sum(dim=1, keepdim=True).add_(g_y.sub(of_both))
    g.scatter_(1, label, g_y).scatter_(1, q1, g_q1 - others).scatter_add_(1, q2, -g_q1)
    if strange:
        g.masked_fill_(void, 0.0)
    if out is not None and g is not out:
        out.copy_(g)
    return loss, g


def _two_classes(
    z: Tensor,
    target: Tensor,
    foreground: Tensor,
    background: Tensor,
    foreground_weight: float,
    ignore_index: int,
    with_gradient: bool,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute what `_tile` does for two classes."""
    valid = (target != ignore_index).to(z.dtype)
    label = target.to(z.dtype).mul_(valid)  # products with 0 and 1 take a tenth of the time of torch.where
    sign = label.mul(-2).add_(1)
    s = (z[:, 0] - z[:, 1]).mul_(sign)
    t_y = (label * (foreground[1] - foreground[0])).add_(foreground[0]).sub_(s)
    t_k = label.mul_(background[0] - background[1]).add_(background[1]).sub_(s)
    loss = F.logsigmoid(-t_y).mul_(-foreground_weight).sub_(F.logsigmoid(-t_k)).mul_(valid).mul_(0.5)
    strange = _as_a_whole(z) or not bool(loss.sum().isfinite())
    if strange:
        loss = loss.masked_fill_(target == ignore_index, 0.0)
    if not with_gradient:
        return loss, z[:0]
    slope = t_y.sigmoid_().mul_(foreground_weight).add_(t_k.sigmoid_()).mul_(sign.mul_(valid))
    if strange:
        slope.masked_fill_(target == ignore_index, 0.0)
    gradient = torch.empty_like(z) if out is None else out
    gradient[:, 1] = slope
    gradient[:, 0] = slope.neg_()
    return loss, gradient


def lowest_zero(below: Tensor, work: Tensor | None = None) -> Tensor:
    """Return the lowest index over dimension 1, kept, at which values that are at most 0 are 0.

    ``work`` may give memory of their shape, also their own. On the CPU values above -1e-34 count as 0.
    """
    if below.device.type != "cpu":
        return below.argmax(dim=1, keepdim=True)
    # argmax() handles one pixel at a time here, the operations below many: a tenth of its time
    num_classes = below.shape[1]
    behind = -torch.arange(num_classes, dtype=below.dtype).view(-1, *[1] * (below.ndim - 2))
    # what is not 0 falls below all of `behind`: the best score is minus the lowest index of a maximum
    score = torch.add(behind, below, alpha=_STEEP, out=work).amax(dim=1, keepdim=True)
    return score.neg_().long().clamp_(0, num_classes - 1)  # a nan score must not become a wild index


def _product(u: Tensor, factors: int, half: Tensor | None) -> Tensor:
    """Multiply 1 + u_k over dimension 1, for u_k >= 0, to as few factors as ``factors`` of them may be without overflow.

    ``half`` may give memory of half as many classes, rounded up.

    Returns:
        The products minus 1.
    """
    classes, pairs = u.shape[1], u.shape[1] // 2
    if not pairs or factors < 2:
        return u.clone()
    product = torch.empty_like(u[:, pairs:]) if half is None else half
    torch.addcmul(u[:, classes - pairs :], u[:, :pairs], u[:, classes - pairs :], out=product[:, :pairs])
    product[:, :pairs] += u[:, :pairs]  # (1 + a)(1 + b) - 1 = a + b + ab
    product[:, pairs:] = u[:, pairs : classes - pairs]  # the middle one, if there is one
    while (pairs := product.shape[1] // 2) and (factors := factors // 2) > 1:
        a, b = product[:, :pairs], product[:, product.shape[1] - pairs :]
        a.addcmul_(a, b).add_(b)
        product = product[:, : product.shape[1] - pairs]
    return product


def _log1p(x: Tensor) -> Tensor:
    """``log(1 + x)`` for x >= 0 to rounding; log1p() handles one element at a time."""
    u = 1 + x
    return u.log().add_((x - (u - 1)).div_(u))  # with what the sum has lost
