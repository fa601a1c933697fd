r"""The calibrated log-loss per pixel, with its gradient computed in the same pass over the logits.

Gradient. Let ``q1`` be the class of the largest logit of a pixel and ``q2`` that of its runner-up. The margin of ``q1`` is
measured against ``q2``, and the margin of every other class against ``q1``::

    s_q1 = z_q1 - z_q2,        s_k = z_k - z_q1    (k != q1)

So ``z_k`` occurs in the margin of class k, ``z_q1`` in all margins, and ``z_q2`` in its own margin and in that of ``q1``.
With ``g_k = d loss / d s_k``, the chain rule gives::

    d loss / d z_k  = g_k                          (k not in {q1, q2})
    d loss / d z_q1 = g_q1 - sum_{k != q1} g_k
    d loss / d z_q2 = g_q2 - g_q1

    C g_y = -foreground_weight sigmoid(foreground_y - s_y),    C g_k = sigmoid(background_k + s_k)    (k != y)

A pixel needs only its maximum, its runner-up and their indices.

Two classes have one margin, s_y = z_y - z_k = -s_k, and need no maximum::

    C d loss / d z_y = -foreground_weight sigmoid(foreground_y - s_y) - sigmoid(background_k - s_y) = -C d loss / d z_k

Logarithm. The terms of the label and of the largest logit are computed separately. The argument ``t_k`` of softplus and
sigmoid in every other term is at most the offset of class k. With moderate offsets, ``u_k = exp(t_k)`` and products of
several ``1 + u_k`` therefore do not overflow. ``sum_k softplus(t_k) = log prod_k (1 + u_k)`` takes one logarithm per pixel
instead of one per class, and ``u_k / (1 + u_k)`` is the sigmoid. The product is stored as ``prod - 1`` and multiplied by
``(1 + a)(1 + b) - 1 = a + b + ab``. This is a sum of positive terms, so its ``log1p`` is accurate even if all ``u_k`` are
tiny.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mcseg.kernels.tiles import on_threads, tiles

# elements of a tile on the CPU; in smaller tiles, Python takes longer than the operations
_TILE = 2**19
# logarithm of the largest value of a product; exp(88) overflows in float32
_MAX_LOG = 60
# a negative difference of logits times this is below minus the number of classes
_ZERO_PENALTY = 1e38


def pixel_loss(
    logits: Tensor, target: Tensor, foreground: Tensor, background: Tensor, foreground_weight: float, ignore_index: int
) -> Tensor:
    """Compute what `mcseg.kernels.pixel_loss` does, for ``(N, *spatial)`` int64 targets and offsets in the loss's dtype.

    Note:
        Besides its inputs, saves one tensor of the logits' shape for the backward pass: C times the gradient
        of the sum of the losses.
    """
    if torch.is_grad_enabled() and logits.requires_grad:
        loss: Tensor = _FusedLoss.apply(logits, target, foreground, background, foreground_weight, ignore_index)
        return loss
    return _loss_and_gradient(
        logits,
        target,
        foreground=foreground,
        background=background,
        foreground_weight=foreground_weight,
        ignore_index=ignore_index,
        with_gradient=False,
    )[0]


class _FusedLoss(torch.autograd.Function):
    """Compute the gradient in the forward pass and scale it in the backward pass; differentiable once."""

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
        ctx.scalars = {"foreground_weight": foreground_weight, "ignore_index": ignore_index}
        loss, ctx.gradient = _loss_and_gradient(
            logits, target, foreground=foreground, background=background, **ctx.scalars, with_gradient=True
        )
        ctx.save_for_backward(logits, target, foreground, background)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # @once_differentiable would treat the gradient as a constant if `upstream` is a constant
        if torch.is_grad_enabled():
            raise RuntimeError('create_graph=True: backend "fused" has no second derivative; use backend="reference"')
        logits, target, foreground, background = ctx.saved_tensors
        upstream = (upstream * (target != ctx.scalars["ignore_index"]) / logits.shape[1]).unsqueeze(1)
        # scaling in place halves the memory; a second backward pass through a retained graph computes the gradient again
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            _, gradient = _loss_and_gradient(
                logits, target, foreground=foreground, background=background, **ctx.scalars, with_gradient=True
            )
        return gradient.mul_(upstream).to(logits.dtype), None, None, None, None, None


def _loss_and_gradient(
    logits: Tensor, target: Tensor, *, foreground: Tensor, with_gradient: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    """Compute the loss and C times its gradient tile by tile on the CPU, otherwise at once.

    The options are those of `_compute_tile`. Without gradient, the second tensor is empty.
    """
    dtype = foreground.dtype
    # C times the gradient of a pixel reaches foreground_weight + C, which may overflow float16 but not bfloat16
    saved = dtype if logits.dtype == torch.float16 else logits.dtype

    options |= {"foreground": foreground, "with_gradient": with_gradient}
    if logits.device.type != "cpu":
        loss, gradient = _compute_tile(logits.to(dtype), target, **options)
        return loss, gradient.to(saved)

    loss = torch.empty_like(target, dtype=dtype)
    gradient = torch.empty_like(logits if with_gradient else logits[:0], dtype=saved)

    parts = list(tiles(logits, _TILE))

    def compute(parts_of_thread: Sequence[tuple[slice, slice]]) -> None:
        samples, rows = parts[0]  # the largest of all tiles, but not always one of this thread
        num, num_classes, *spatial = logits[samples, :, rows].shape
        sizes = (num_classes, num_classes, (num_classes + 1) // 2)
        buffers = [torch.empty(num, size, *spatial, dtype=dtype) for size in sizes]
        for samples, rows in parts_of_thread:
            z, y = logits[samples, :, rows], target[samples, rows]
            t, u, half = (buffer[: len(z), :, : z.shape[2]] for buffer in buffers)
            out = gradient[samples, :, rows] if with_gradient else None
            loss[samples, rows], _ = _compute_tile(z.to(dtype), y, **options, out=out, t=t, u=u, half=half)

    on_threads(compute, parts)
    return loss, gradient


def _compute_tile(
    z: Tensor,
    target: Tensor,
    *,
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
    """Compute the loss ``(N, *spatial)`` and C times its gradient, in the shape of ``z``, with operations on whole tensors.

    The gradient is written to ``out`` if given. The buffers ``t`` and ``u`` (of the shape of ``z``) and ``half`` (of half as
    many classes, rounded up) hold intermediate values: an allocation takes as long as an operation.
    """
    num_classes = z.shape[1]
    if num_classes == 2:
        return _compute_two_classes(
            z,
            target,
            foreground=foreground,
            background=background,
            foreground_weight=foreground_weight,
            ignore_index=ignore_index,
            with_gradient=with_gradient,
            out=out,
        )
    on_cpu = z.device.type == "cpu"
    void = (target == ignore_index).unsqueeze(1)  # one value per pixel has the shape (N, 1, *spatial) below
    label = target.unsqueeze(1).masked_fill(void, 0)

    # scatter_() with a tensor takes half as long as with a number
    minus_inf = z.new_full((), -torch.inf).expand(label.shape)

    top = z.amax(dim=1, keepdim=True)
    t = torch.sub(z, top, out=t)
    q1 = first_zero(t, u)
    t.scatter_(1, q1, minus_inf)
    runner_up = t.amax(dim=1, keepdim=True)  # minus the largest logit
    q2 = first_zero(u := torch.sub(t, runner_up, out=u), u)
    # The terms of the label and of the largest logit are separate, because the first has another weight and the second may
    # be large. All other terms are at most their background offset.
    label_is_top = q1 == label
    t_y = foreground.take(label) - torch.where(label_is_top, -runner_up, t.gather(1, label))
    t_q1 = background.take(q1).sub_(runner_up).masked_fill_(label_is_top, -torch.inf)
    t.scatter_(1, label, minus_inf)
    offsets = background.view(-1, *[1] * (z.ndim - 2))
    u_q1 = t_q1.abs().neg_().exp_()
    bound = float(background.max()) if on_cpu else None  # the host would wait for a GPU
    if bound is None or not bound <= _MAX_LOG:
        t += offsets
        loss = (t.clamp(min=0) + _log1p(t.abs().neg_().exp_())).sum(dim=1, keepdim=True) + _log1p(u_q1)
        g = t.sigmoid_() if with_gradient else t
    else:
        scale = 1 / math.log(2)  # exp2 takes a third of the time of exp
        u = torch.add(offsets * scale, t, alpha=scale, out=u).exp2_()
        product = _multiply(u, max_factors=max(1, int(_MAX_LOG / math.log1p(math.exp(bound)))), half=half)
        product[:, :1].addcmul_(product[:, :1], u_q1).add_(u_q1)
        loss = _log1p(product).sum(dim=1, keepdim=True)
        g = torch.div(u, torch.add(u, 1, out=t), out=t if out is None or out.dtype != t.dtype else out)
    loss += t_q1.clamp(min=0)
    loss += foreground_weight * (t_y.clamp(min=0) + _log1p(t_y.abs().neg_().exp_()))
    loss /= num_classes
    # The backward pass multiplies by 0 at void pixels, so masked_fill_() is needed only if values are not finite. For a
    # whole tile it takes as long as five multiplications.
    fill_void = not on_cpu or not loss.isfinite().all()
    loss = loss.masked_fill_(void, 0.0).squeeze(1)
    if not with_gradient:
        return loss, z[:0]

    g_y, g_q1 = t_y.sigmoid_().mul_(-foreground_weight), t_q1.sigmoid_()
    g_y_if_top = g_y * label_is_top
    g_q1 += g_y_if_top
    g_not_top = g.sum(dim=1, keepdim=True).add_(g_y.sub(g_y_if_top))
    g.scatter_(1, label, g_y).scatter_(1, q1, g_q1 - g_not_top).scatter_add_(1, q2, -g_q1)
    if fill_void:
        g.masked_fill_(void, 0.0)
    if out is not None and g is not out:
        out.copy_(g)
    return loss, g


def _compute_two_classes(
    z: Tensor,
    target: Tensor,
    *,
    foreground: Tensor,
    background: Tensor,
    foreground_weight: float,
    ignore_index: int,
    with_gradient: bool,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute what `_compute_tile` does, for two classes."""
    valid = (target != ignore_index).to(z.dtype)
    label = target.to(z.dtype).mul_(valid)  # a product with 0 or 1 takes a tenth of the time of torch.where
    sign = label.mul(-2).add_(1)
    s = (z[:, 0] - z[:, 1]).mul_(sign)
    t_y = (label * (foreground[1] - foreground[0])).add_(foreground[0]).sub_(s)
    t_k = label.mul_(background[0] - background[1]).add_(background[1]).sub_(s)
    loss = F.logsigmoid(-t_y).mul_(-foreground_weight).sub_(F.logsigmoid(-t_k)).mul_(valid).mul_(0.5)
    fill_void = z.device.type != "cpu" or not bool(loss.sum().isfinite())
    if fill_void:
        loss = loss.masked_fill_(target == ignore_index, 0.0)
    if not with_gradient:
        return loss, z[:0]
    slope = t_y.sigmoid_().mul_(foreground_weight).add_(t_k.sigmoid_()).mul_(sign.mul_(valid))
    if fill_void:
        slope.masked_fill_(target == ignore_index, 0.0)
    gradient = torch.empty_like(z) if out is None else out
    gradient[:, 1] = slope
    gradient[:, 0] = slope.neg_()
    return loss, gradient


def first_zero(x: Tensor, buffer: Tensor | None = None) -> Tensor:
    """Find the lowest index along dimension 1 at which ``x`` is 0, for ``x`` with a maximum of 0 there.

    Args:
        x: ``(N, C, *spatial)`` with values of at most 0; on the CPU values above -1e-34 count as 0.
        buffer: Memory of the shape of ``x`` that is overwritten; may be ``x``.

    Returns:
        ``(N, 1, *spatial)`` int64.
    """
    if x.device.type != "cpu":
        return x.argmax(dim=1, keepdim=True)
    # on the CPU argmax() handles one pixel at a time and takes ten times as long as the operations below
    num_classes = x.shape[1]
    minus_index = -torch.arange(num_classes, dtype=x.dtype).view(-1, *[1] * (x.ndim - 2))
    # the score of a value below 0 is less than minus all indices, so the largest score is minus the lowest index of a zero
    score = torch.add(minus_index, x, alpha=_ZERO_PENALTY, out=buffer).amax(dim=1, keepdim=True)
    return score.neg_().long().clamp_(0, num_classes - 1)  # clamped, because nan gives an arbitrary integer


def _multiply(u: Tensor, max_factors: int, half: Tensor | None) -> Tensor:
    """Multiply ``1 + u_k`` over dimension 1, for u_k >= 0, into as few products as possible.

    Args:
        u: ``(N, C, *spatial)``.
        max_factors: Number of factors that a product may have without overflow.
        half: Memory for the result with half as many classes, rounded up; None to allocate it.

    Returns:
        The products minus 1.
    """
    classes, pairs = u.shape[1], u.shape[1] // 2
    if not pairs or max_factors < 2:
        return u.clone()
    product = torch.empty_like(u[:, pairs:]) if half is None else half
    torch.addcmul(u[:, classes - pairs :], u[:, :pairs], u[:, classes - pairs :], out=product[:, :pairs])
    product[:, :pairs] += u[:, :pairs]  # (1 + a)(1 + b) - 1 = a + b + ab
    product[:, pairs:] = u[:, pairs : classes - pairs]  # the middle factor if their number is odd
    while (pairs := product.shape[1] // 2) and (max_factors := max_factors // 2) > 1:
        a, b = product[:, :pairs], product[:, product.shape[1] - pairs :]
        a.addcmul_(a, b).add_(b)
        product = product[:, : product.shape[1] - pairs]
    return product


def _log1p(x: Tensor) -> Tensor:
    """Compute ``log(1 + x)`` for x >= 0 to rounding; torch.log1p handles one element at a time."""
    u = 1 + x
    return u.log().add_((x - (u - 1)).div_(u))  # the second term corrects the rounding of 1 + x
