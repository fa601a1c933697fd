r"""Errors at calibrated margins, their sums and their gradient as Triton kernels; imported at the first call on a GPU.

A block of pixels with all of its classes is one tile. Three passes over it, of which only the first reads device memory
where the classes fit on chip (up to 256; with more, the tile comes from the cache again):

1. largest logit and runner-up, and ``sum_r``, the sum of ``exp(z_k - runner-up)`` over all but the largest;
2. errors, summed over the classes of a pixel (`pixel_loss`) or over the pixels of a class (`error_counts`); or what the
   gradient needs of all classes;
3. the gradient, written once.

With the weighted slopes G_k = d loss / d s_k, q1 the largest logit and q2 its runner-up, hard margins give::

    d / d z_k = G_k        d / d z_q1 = G_q1 - sum_{k != q1} G_k        d / d z_q2 = G_q2 - G_q1

and soft ones, where d s_k / d z_j = -p_j / (1 - p_k) for j != k, with h_k = G_k / (1 - p_k)::

    d / d z_j = G_j - p_j sum_{k != j} h_k

``sum_r`` gives 1 - p of the largest without cancellation: with d = exp(runner-up - largest) it is d sum_r / (1 + d sum_r).

Sums over pixels are made per program, in a fixed order, and then over the programs: two runs are equal bit by bit. The
backward pass computes the gradient from the logits, where the upstream gradient is known, rather than to keep one for an
upstream gradient of 1 and to scale it: three passes over device memory in all instead of four, and nothing is kept.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile. One is read per thread and pass in bfloat16 pairs; three tiles are alive at a time, which with 4 warps
# is 3 * 4096 / 128 = 96 registers of a thread.
_TILE = 4096
_ONE_CHUNK = 256  # most classes that a tile holds at once
_CHUNK = 128  # classes at a time where there are more
_PROGRAMS = 1024  # of a sum over pixels: each keeps its sums in registers and goes on to its next block


@triton.jit
def _log1p(x):
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _load(z_ptr, place, c, classes, readable, zc):
    """Logits (classes, pixels) in float32: 0 where not readable, -inf beyond the last class."""
    in_c = (c < classes)[:, None]
    z = tl.load(z_ptr + c.to(tl.int64)[:, None] * zc + place[None, :], mask=in_c & readable[None, :], other=0.0)
    return tl.where(in_c, z.to(tl.float32), float("-inf"))


@triton.jit
def _two_largest(z, c):
    """Largest logit, its class, runner-up, its class, sum of exp(z - runner-up) over all but the largest."""
    top, first = tl.max(z, axis=0, return_indices=True)
    first += tl.min(c)
    rest = tl.where(c[:, None] == first[None, :], float("-inf"), z)
    second, other = tl.max(rest, axis=0, return_indices=True)
    # a chunk of one class has no runner-up: -inf, and exp(-inf - -inf) would be nan
    base = tl.where(second == float("-inf"), 0.0, second)
    return top, first, second, other + tl.min(c), tl.sum(tl.exp(rest - base[None, :]), axis=0)


@triton.jit
def _merge(top, first, second, other, sum_r, z, c):
    """Go on to further classes, with higher indices; of equal logits the lower index stays in front."""
    top2, first2, second2, other2, sum2 = _two_largest(z, c)
    wins = top2 > top
    loser, loser_class = tl.where(wins, top, top2), tl.where(wins, first, first2)
    # runner-up: the loser, or that of the winner; where these tie, the one with the lower index
    rival, rival_class = tl.where(wins, second2, second), tl.where(wins, other2, other)
    loses = (loser > rival) | ((loser == rival) & (loser_class < rival_class))
    new = tl.where(loses, loser, rival)
    base = tl.where(new == float("-inf"), 0.0, new)
    total = tl.where(second == float("-inf"), 0.0, sum_r * tl.exp(second - base))
    total += tl.where(second2 == float("-inf"), 0.0, sum2 * tl.exp(second2 - base))
    total += tl.exp(loser - base)
    return tl.where(wins, top2, top), tl.where(wins, first2, first), new, tl.where(loses, loser_class, rival_class), total


@triton.jit
def _errors(
    z, c, classes, top, first, second, sum_r, label, valid, fg_ptr, bg_ptr, power,
    SOFT: tl.constexpr, LOG: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """Errors, their slopes in t, p and 1 - p (soft margins), and which is the label's; (classes, pixels), 0 if not valid."""
    is_label = c[:, None] == label[None, :]
    is_top = c[:, None] == first[None, :]
    valid = valid[None, :] & (c < classes)[:, None]
    z = tl.where(valid, z, 0.0)
    fg = tl.load(fg_ptr + label)[None, :]
    bg = tl.load(bg_ptr + c, mask=c < classes, other=0.0)[:, None]
    p, rest = z, z
    if SOFT:
        d = tl.exp(second - top)
        total = 1.0 + d * sum_r
        p = tl.where(is_top, (1.0 / total)[None, :], tl.exp(z - top[None, :]) / total[None, :])
        rest = tl.where(is_top, (d * sum_r / total)[None, :], 1.0 - p)
        log_total, log_sum_r = tl.log(total), tl.log(sum_r)
        s = z - (top + log_total)[None, :] - tl.log(tl.maximum(rest, 1e-37))
        s = tl.where(is_top, (top - second - log_sum_r)[None, :], s)
    else:
        s = tl.where(is_top, (top - second)[None, :], z - top[None, :])
    t = tl.where(is_label, fg - s, bg + s)
    u = tl.exp(-tl.abs(t))
    slope = tl.where(t > 0, 1.0, u) / (1.0 + u)
    error = tl.maximum(t, 0.0) + _log1p(u)
    if not LOG:
        if POWER:
            # 1 - r = exp(-softplus(t))
            kept = tl.exp(-power * error)
            error = 1.0 - kept
            slope = power * kept * slope
        else:
            error = slope
            slope = error * tl.where(t > 0, u, 1.0) / (1.0 + u)
    return tl.where(valid, error, 0.0), tl.where(valid, slope, 0.0), p, rest, is_label


@triton.jit
def _sums(error, slope, rest, c, classes, first, is_label, label, wm_ptr, wf_ptr, SOFT: tl.constexpr):
    """Per pixel: weighted sum of the errors; sum of G (hard) or h (soft) without the largest, and that of the largest."""
    wm = tl.load(wm_ptr + label)[None, :]
    w = tl.where(is_label, wm, tl.load(wf_ptr + c, mask=c < classes, other=0.0)[:, None])
    g = tl.where(is_label, -w, w) * slope
    if SOFT:
        g = g / tl.maximum(rest, 1e-37)
    is_top = c[:, None] == first[None, :]
    return tl.sum(w * error, axis=0), tl.sum(tl.where(is_top, 0.0, g), axis=0), tl.sum(tl.where(is_top, g, 0.0), axis=0)


@triton.jit
def _add(place, values, inside):
    tl.store(place, tl.load(place, mask=inside, other=0.0) + values, mask=inside)


@triton.jit
def _pixels_of(block, blocks, y_ptr, pixels, width, classes, zn, zh, zw, ignore, FLAT: tl.constexpr, BP: tl.constexpr):
    """Sample, places of a block's pixels in it, labels, which pixels have one, and a factor: nan where it is no class."""
    sample = (block // blocks).to(tl.int64)
    p = (block % blocks).to(tl.int64) * BP + tl.arange(0, BP)
    inside = p < pixels
    y = tl.load(y_ptr + sample * pixels + p, mask=inside, other=ignore)
    valid = inside & (y != ignore)
    known = (y >= 0) & (y < classes)
    label = tl.where(valid & known, y, 0).to(tl.int32)
    # where all pixels of a sample lie at one stride, the compiler must see it, or it will not read them in vectors
    place = p * zw if FLAT else (p // width) * zh + (p % width) * zw
    return sample, p, inside, sample * zn + place, label, valid, tl.where(valid & ~known, float("nan"), 1.0)


@triton.jit
def _forward(
    z_ptr, y_ptr, fg_ptr, bg_ptr, wm_ptr, wf_ptr, loss_ptr, counts_ptr,
    num_blocks, blocks, pixels, width, classes, zn, zc, zh, zw, ignore, power,
    SOFT: tl.constexpr, LOG: tl.constexpr, POWER: tl.constexpr, FLAT: tl.constexpr, ONE: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write the loss of every pixel, or each program's counts (programs, 3, classes), which begin at 0."""
    labels = tl.zeros([BC], tl.float32)
    misses = tl.zeros([BC], tl.float32)
    alarms = tl.zeros([BC], tl.float32)
    row = counts_ptr
    if counts_ptr is not None:
        row = counts_ptr + tl.program_id(0).to(tl.int64) * 3 * classes
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        sample, p, inside, place, label, valid, factor = _pixels_of(
            block, blocks, y_ptr, pixels, width, classes, zn, zh, zw, ignore, FLAT, BP
        )
        c = tl.arange(0, BC)
        z = _load(z_ptr, place, c, classes, valid, zc)
        top, first, second, other, sum_r = _two_largest(z, c)
        if not ONE:
            for start in range(BC, classes, BC):
                z = _load(z_ptr, place, start + c, classes, valid, zc)
                top, first, second, other, sum_r = _merge(top, first, second, other, sum_r, z, start + c)
        loss = tl.zeros([BP], tl.float32)
        for start in range(0, 1 if ONE else classes, BC):
            if not ONE:
                z = _load(z_ptr, place, start + c, classes, valid, zc)
            error, slope, _, rest, is_label = _errors(
                z, start + c, classes, top, first, second, sum_r, label, valid, fg_ptr, bg_ptr, power, SOFT, LOG, POWER
            )
            if counts_ptr is None:
                loss += _sums(error, slope, rest, start + c, classes, first, is_label, label, wm_ptr, wf_ptr, SOFT)[0]
            else:
                error *= factor[None, :]
                found_labels = tl.sum((is_label & valid[None, :]).to(tl.float32), axis=1)
                found_misses = tl.sum(tl.where(is_label, error, 0.0), axis=1)
                found_alarms = tl.sum(tl.where(is_label, 0.0, error), axis=1)
                if ONE:
                    labels += found_labels
                    misses += found_misses
                    alarms += found_alarms
                else:  # too many to be kept in registers; the barrier keeps a fast warp out of the next block's sums
                    tl.debug_barrier()
                    _add(row + start + c, found_labels, start + c < classes)
                    _add(row + start + c + classes, found_misses, start + c < classes)
                    _add(row + start + c + 2 * classes, found_alarms, start + c < classes)
        if counts_ptr is None:
            tl.store(loss_ptr + sample * pixels + p, tl.where(valid, loss * factor, 0.0), mask=inside)
    if ONE and counts_ptr is not None:
        c = tl.arange(0, BC)
        _add(row + c, labels, c < classes)
        _add(row + c + classes, misses, c < classes)
        _add(row + c + 2 * classes, alarms, c < classes)


@triton.jit
def _backward(
    z_ptr, y_ptr, fg_ptr, bg_ptr, wm_ptr, wf_ptr, upstream_ptr, gradient_ptr,
    blocks, pixels, width, classes, zn, zc, zh, zw, gn, gc, gh, gw, ignore, power,
    SOFT: tl.constexpr, LOG: tl.constexpr, POWER: tl.constexpr, FLAT: tl.constexpr, ONE: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the weighted errors, times a pixel's upstream gradient where there is one."""
    sample, p, inside, place, label, valid, factor = _pixels_of(
        tl.program_id(0), blocks, y_ptr, pixels, width, classes, zn, zh, zw, ignore, FLAT, BP
    )
    c = tl.arange(0, BC)
    z = _load(z_ptr, place, c, classes, valid, zc)
    top, first, second, other, sum_r = _two_largest(z, c)
    if not ONE:
        for start in range(BC, classes, BC):
            z = _load(z_ptr, place, start + c, classes, valid, zc)
            top, first, second, other, sum_r = _merge(top, first, second, other, sum_r, z, start + c)
    of_others, of_top = tl.zeros([BP], tl.float32), tl.zeros([BP], tl.float32)
    for start in range(0, 1 if ONE else classes, BC):
        if not ONE:
            z = _load(z_ptr, place, start + c, classes, valid, zc)
        error, slope, _, rest, is_label = _errors(
            z, start + c, classes, top, first, second, sum_r, label, valid, fg_ptr, bg_ptr, power, SOFT, LOG, POWER
        )
        _, others, largest = _sums(error, slope, rest, start + c, classes, first, is_label, label, wm_ptr, wf_ptr, SOFT)
        of_others += others
        of_top += largest
    if upstream_ptr is not None:
        factor *= tl.load(upstream_ptr + sample * pixels + p, mask=valid, other=0.0)
    written = sample * gn + (p * gw if FLAT else (p // width) * gh + (p % width) * gw)
    for start in range(0, 1 if ONE else classes, BC):
        if not ONE:
            z = _load(z_ptr, place, start + c, classes, valid, zc)
        _, slope, share, rest, is_label = _errors(
            z, start + c, classes, top, first, second, sum_r, label, valid, fg_ptr, bg_ptr, power, SOFT, LOG, POWER
        )
        in_c = start + c < classes
        wm = tl.load(wm_ptr + label)[None, :]
        w = tl.where(is_label, wm, tl.load(wf_ptr + start + c, mask=in_c, other=0.0)[:, None])
        g = tl.where(is_label, -w, w) * slope
        is_top = (start + c)[:, None] == first[None, :]
        if SOFT:
            h = g / tl.maximum(rest, 1e-37)
            g -= share * tl.where(is_top, of_others[None, :], of_others[None, :] - h + of_top[None, :])
        else:
            g -= tl.where(is_top, of_others[None, :], 0.0)
            g -= tl.where((start + c)[:, None] == other[None, :], of_top[None, :], 0.0)
        g = tl.where(valid[None, :], g * factor[None, :], 0.0)
        target = gradient_ptr + (start + c).to(tl.int64)[:, None] * gc + written[None, :]
        tl.store(target, g, mask=in_c[:, None] & inside[None, :])


def _geometry(*tensors: Tensor) -> tuple[list[tuple[int, ...]], int, int, bool]:
    """Strides (N,C,H,W) of tensors of one shape with at most two spatial dimensions, pixels, width, one stride for all."""
    shape = tensors[0].shape
    strides = [(*tensor.stride()[:2], *(0,) * (4 - tensor.ndim), *tensor.stride()[2:]) for tensor in tensors]
    height, width = (1, 1, *shape[2:])[-2:]
    flat = all(stride[2] == width * stride[3] for stride in strides) or height == 1
    return strides, height * width, width, flat


def _tile(classes: int) -> dict[str, int | bool]:
    one = classes <= _ONE_CHUNK
    block = triton.next_power_of_2(classes) if one else _CHUNK
    return {"ONE": one, "BC": block, "BP": max(16, _TILE // block)}


def _planes(z: Tensor) -> Tensor:
    """At most two spatial dimensions, without a copy where strides allow it."""
    return z if z.ndim <= 4 else z.flatten(2, -2) if z.is_contiguous() else z.reshape(*z.shape[:2], -1, z.shape[-1])


@torch.library.custom_op("mcseg::pixel_errors", mutates_args=())
def pixel_errors(
    logits: Tensor,
    target: Tensor,
    foreground: Tensor,
    background: Tensor,
    misses: Tensor,
    false_alarms: Tensor,
    soft: bool,
    log: bool,
    power: float,
    ignore_index: int,
) -> Tensor:
    """Compute what `mcseg.kernels.pixel_errors` does.

    With a spatial dimension, target int64, vectors ``(C,)`` float32 on the device of the logits.
    """
    loss = torch.empty(target.shape, dtype=torch.float32, device=logits.device)
    _sum(logits, target, (foreground, background, misses, false_alarms), loss, None, soft, log, power, ignore_index)
    return loss


@torch.library.custom_op("mcseg::error_counts", mutates_args=())
def error_counts(
    logits: Tensor,
    target: Tensor,
    foreground: Tensor,
    background: Tensor,
    soft: bool,
    log: bool,
    power: float,
    ignore_index: int,
) -> Tensor:
    """Compute what `mcseg.kernels.error_counts` does; arguments as in `pixel_errors`."""
    counts = torch.zeros(_PROGRAMS, 3, logits.shape[1], dtype=torch.float32, device=logits.device)
    vectors = (foreground, background, foreground, foreground)  # weights are not read
    _sum(logits, target, vectors, None, counts, soft, log, power, ignore_index)
    return counts.sum(0, dtype=torch.float64).float()


@torch.library.custom_op("mcseg::error_gradient", mutates_args=())
def error_gradient(
    logits: Tensor,
    target: Tensor,
    foreground: Tensor,
    background: Tensor,
    misses: Tensor,
    false_alarms: Tensor,
    upstream: Tensor | None,
    soft: bool,
    log: bool,
    power: float,
    ignore_index: int,
) -> Tensor:
    """Differentiate `pixel_errors` in the logits, times ``upstream`` ``(N, *spatial)`` where given.

    Returns:
        In the shape, dtype and memory format of the logits.
    """
    z = _planes(logits)
    found = torch.empty_like(z)
    if z.numel():
        (read, written), pixels, width, flat = _geometry(z, found)
        tile = _tile(z.shape[1])
        blocks = triton.cdiv(pixels, tile["BP"])
        upstream = None if upstream is None else upstream.float().contiguous()
        vectors = (foreground, background, misses, false_alarms, upstream, found)
        sizes = (blocks, pixels, width, z.shape[1], *read, *written, ignore_index, power)
        kind = {"SOFT": soft, "LOG": log, "POWER": power != 1, "FLAT": flat}
        _backward[(blocks * z.shape[0],)](z, target.contiguous(), *vectors, *sizes, **kind, **tile)
    return found.view(logits.shape) if logits.ndim > 4 else found


def _sum(
    logits: Tensor,
    target: Tensor,
    vectors: tuple[Tensor, ...],
    loss: Tensor | None,
    counts: Tensor | None,
    soft: bool,
    log: bool,
    power: float,
    ignore_index: int,
) -> None:
    z = _planes(logits)
    if z.numel() == 0:
        return
    (read,), pixels, width, flat = _geometry(z)
    tile = _tile(z.shape[1])
    blocks = triton.cdiv(pixels, tile["BP"])
    num_blocks = blocks * z.shape[0]
    sizes = (num_blocks, blocks, pixels, width, z.shape[1], *read, ignore_index, power)
    kind = {"SOFT": soft, "LOG": log, "POWER": power != 1, "FLAT": flat}
    programs = num_blocks if counts is None else min(num_blocks, _PROGRAMS)
    _forward[(programs,)](z, target.contiguous(), *vectors, loss, counts, *sizes, **kind, **tile)


@pixel_errors.register_fake
def _(logits: Tensor, target: Tensor, *_: Any) -> Tensor:
    return torch.empty(target.shape, dtype=torch.float32, device=logits.device)


@error_counts.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(3, logits.shape[1], dtype=torch.float32, device=logits.device)


@error_gradient.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    z = _planes(logits)
    found = torch.empty_like(z)
    return found.view(logits.shape) if logits.ndim > 4 else found


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.settings = tuple(value for value in inputs if not isinstance(value, Tensor))


def _of_pixels(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return error_gradient(*ctx.saved_tensors, upstream, *ctx.settings), *(None,) * 9


def _of_counts(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    # a function of the counts weighs the errors of a class with its derivative in their sum
    weights = upstream[1].contiguous(), upstream[2].contiguous()
    return error_gradient(*ctx.saved_tensors, *weights, None, *ctx.settings), *(None,) * 7


pixel_errors.register_autograd(_of_pixels, setup_context=_keep)
error_counts.register_autograd(_of_counts, setup_context=_keep)
