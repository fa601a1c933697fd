r"""The losses of pixels, the soft counts of classes and their gradients as Triton kernels.

A thread owns its pixels and loops over the classes, so that nothing but the sums of a block crosses threads. Up to
`UNROLLED` classes the loop is unrolled and the logits stay in registers (``ONE``); with more, each pass reads them again,
from the cache, ``U`` classes at a time. With ``UP`` a pixel's logits are interpolated from coarse ones where they are read.

**Margin loss.** With s_k = z_k - max_{j != k} z_j, weights u (misses) and v (false alarms), and G the slopes in s::

    loss = u_y phi(fg_y - s_y) + sum_{k != y} v_k phi(bg_k + s_k),       phi(t) = log(1 + e^t)
    G_y = -u_y phi'(fg_y - s_y),                                         G_k = v_k phi'(bg_k + s_k)
    d / d z_k = G_k       d / d z_1 = G_1 - sum_{k != 1} G_k             d / d z_2 = G_2 - G_1

for the largest logit z_1 and its runner-up z_2. Where v is the same for all classes, the sum of the logarithms is the
logarithm of a product, kept as the product minus 1: one logarithm for a chunk instead of one for a class.

**Soft counts.** Softmax p, power q, misses 1 - p_y^q, false alarms 1 - (1 - p_k)^q, upstream gradients u and v. With the
sum over all but the largest in place of 1 - p_1, nothing cancels::

    R = 1 - p_1,  w_k = p_k / R                                  (k != 1)
    h_k = v_k q p_k (1 - p_k)^(q-1),   h_y = -u_y q p_y^q,   S = sum_{k != 1} h_k
    A = v_1 q p_1 R^q,   or   -u_1 q p_1^q R   if class 1 is the label
    d / d z_1 = A - p_1 S,             d / d z_k = h_k - w_k (R S + A)

Exponentials are kept times 2^100, so that R and w_k are exact up to a gap of 156 between the two largest logits.

Arguments that several kernels share:

    z_ptr           logits (N, C, pixels) or coarse (N, C, h, w); strides zn, zc and zp or zh and zw
    y_ptr           labels (N, pixels) int64, ``ignore`` where void
    fg_ptr, bg_ptr  offsets (C,) float32
    u_ptr, v_ptr    weights of misses and false alarms (C,) float32; v_ptr None: ``weight`` for all classes
    upstream_ptr    gradient of each pixel's loss (N, pixels) float32, or one number for all with step 0
    numbers_ptr     (3 or 2, N * pixels) float32, written by the forward pass for the backward pass: the largest logit; for a
                    margin loss the sum of the slopes of the others and the slope of the largest; for soft counts the sum of
                    the others' exponentials
    classes_ptr     (N * pixels) int32: class of the largest logit, and times 2^16 that of the runner-up
    rows_ptr, down_ptr        lower neighbour of each row of pixels among the coarse rows, and the weight of the next one
    columns_ptr, across_ptr   likewise of each column
"""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_SCALE = tl.constexpr(2.0**-100)  # undoes the factor of the exponentials
_TINY = tl.constexpr(2.0**-125)  # its reciprocal is finite


@triton.jit
def read(place, c, UP: tl.constexpr):
    """Read the logits of class c in float32, 0 outside the image."""
    if UP:
        z_ptr, zc, first, second, third, column, step, across, mix, mask = place
        z_ptr += tl.cast(c, tl.int64) * zc
        z = mix[0][:, None] * _between(z_ptr + first, column, step, across, mask)[None, :]
        z += mix[1][:, None] * _between(z_ptr + second, column, step, across, mask)[None, :]
        z += mix[2][:, None] * _between(z_ptr + third, column, step, across, mask)[None, :]
    else:
        z_ptr, zc, offset, mask = place
        z_ptr += tl.cast(c, tl.int64) * zc
        z = tl.load(z_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    return z


@triton.jit
def _between(row_ptr, column, step, across, mask):
    z = tl.load(row_ptr + column, mask=mask, other=0.0).to(tl.float32)
    return z + across * (tl.load(row_ptr + column + step, mask=mask, other=0.0).to(tl.float32) - z)


@triton.jit
def read_chunk(place, start, classes, UP: tl.constexpr, ONE: tl.constexpr, U: tl.constexpr):
    """Read U classes from ``start`` as a tuple; -inf beyond the last class."""
    chunk = ()
    for k in tl.static_range(U):
        if UP or ONE:  # there is none beyond
            z = read(place, start + k, UP)
        else:
            z_ptr, zc, offset, mask = place
            exists = start + k < classes
            z = tl.where(exists, read((z_ptr, zc, offset, mask & exists), start + k, UP), float("-inf"))
        chunk = chunk + (z,)
    return chunk


@triton.jit
def read_labels(y_ptr, at, inside, classes, ignore):
    """Read labels, 0 where void; which pixels are labelled; and a factor: NaN for a label that is no class, else 1."""
    y = tl.load(y_ptr + at, mask=inside, other=ignore)
    valid = inside & (y != ignore)
    known = (y >= 0) & (y < classes)
    return tl.where(valid & known, y, 0).to(tl.int32), valid, tl.where(valid & (known == 0), float("nan"), 1.0)


@triton.jit
def locate(
    block, blocks, z_ptr, rows_ptr, down_ptr, columns_ptr, across_ptr, pixels, width, coarse_height, zn, zc, zp, zh, zw,
    UP: tl.constexpr, R: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Find a block of pixels: its sample, their numbers in it, which exist, and the place of their logits for `read`.

    Of coarse logits a block is a tile of R rows and BP columns, between at most three coarse rows.
    """
    sample = tl.cast(block // blocks, tl.int64)
    block = block % blocks
    zc = tl.cast(zc, tl.int64)
    z_ptr += sample * zn
    if UP:
        across_blocks = tl.cdiv(width, BP)
        row = (block // across_blocks) * R + tl.arange(0, R)
        column = (block % across_blocks) * BP + tl.arange(0, BP)
        height = pixels // width
        rows, columns = row < height, column < width
        lowest = tl.load(rows_ptr + (block // across_blocks) * R)
        step = tl.load(rows_ptr + row, mask=rows, other=0) - lowest
        down = tl.load(down_ptr + row, mask=rows, other=0.0)
        mix = (
            tl.where(step == 0, 1.0 - down, 0.0),
            tl.where(step == 0, down, tl.where(step == 1, 1.0 - down, 0.0)),
            tl.where(step == 1, down, 0.0),
        )
        zh = tl.cast(zh, tl.int64)
        place = (
            z_ptr, zc, lowest * zh, tl.minimum(lowest + 1, coarse_height - 1) * zh,
            tl.minimum(lowest + 2, coarse_height - 1) * zh,
            tl.load(columns_ptr + column, mask=columns, other=0) * zw, zw,
            tl.load(across_ptr + column, mask=columns, other=0.0), mix, columns,
        )  # fmt: skip
        pixel = row[:, None] * width + column[None, :]
        inside = rows[:, None] & columns[None, :]
    else:
        pixel = block * BP + tl.arange(0, BP)
        inside = pixel < pixels
        place = (z_ptr, zc, pixel * zp, inside)
    return sample, pixel, inside, place


@triton.jit
def _log1p(x):
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def two_largest(z, place, classes, UP: tl.constexpr, ONE: tl.constexpr, U: tl.constexpr):
    """Find the largest logit, its class, the runner-up and its class; of equal logits the lower class comes first."""
    top = tl.full(z[0].shape, float("-inf"), tl.float32)
    second = top
    first = tl.zeros(z[0].shape, tl.int32)
    other = first
    for start in range(0, U if ONE else classes, U):
        chunk = z if ONE else read_chunk(place, start, classes, UP, ONE, U)
        for k in tl.static_range(U):
            wins = chunk[k] > top
            follows = chunk[k] > second
            second = tl.where(wins, top, tl.where(follows, chunk[k], second))
            other = tl.where(wins, first, tl.where(follows, start + k, other))
            top = tl.where(wins, chunk[k], top)
            first = tl.where(wins, start + k, first)
    return top, first, second, other


@triton.jit
def softplus(t):
    """Compute log(1 + e^t) and its slope."""
    e = tl.exp2(-tl.abs(t) * _LOG2E)
    return tl.maximum(t, 0.0) + _log1p(e), tl.where(t > 0, 1.0, e) / (1.0 + e)


@triton.jit
def _constant(ptr, c, classes, otherwise, ONE: tl.constexpr):
    if ptr is None:
        value = otherwise
    elif ONE:
        value = tl.load(ptr + c)
    else:
        value = tl.load(ptr + c, mask=c < classes, other=0.0)
    return value


@triton.jit
def margin_sums(
    z, place, y, top, first, second, of_label, fg_ptr, bg_ptr, u_ptr, v_ptr, classes, weight,
    UP: tl.constexpr, ONE: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Sum over the classes: the loss; the slopes of all but the largest logit; that of the largest; that of the label."""
    gap = top - second
    is_right = first == y
    error, slope = softplus(tl.load(fg_ptr + y) - tl.where(is_right, gap, of_label - top))
    u = tl.load(u_ptr + y)
    slope_label = -u * slope
    rival, slope = softplus(tl.load(bg_ptr + first) + gap)
    weight_first = weight if v_ptr is None else tl.load(v_ptr + first)
    slope_first = tl.where(is_right, slope_label, weight_first * slope)
    loss = u * error + tl.where(is_right, 0.0, weight_first * rival)
    slopes = tl.where(is_right, 0.0, slope_label)
    for start in range(0, U if ONE else classes, U):
        chunk = z if ONE else read_chunk(place, start, classes, UP, ONE, U)
        linear = tl.zeros_like(top)  # a sum of its own for a chunk: a thousand terms added to one number lose digits
        product = tl.zeros_like(top)  # of 1 + e, minus 1
        slopes_chunk = tl.zeros_like(top)
        for k in tl.static_range(U):
            is_done = (first == start + k) | (y == start + k)
            t = _constant(bg_ptr, start + k, classes, 0.0, ONE) + (chunk[k] - top)
            v = _constant(v_ptr, start + k, classes, weight, ONE)
            e = tl.exp2(-tl.abs(t) * _LOG2E)
            slopes_chunk += tl.where(is_done, 0.0, v * (tl.where(t > 0, 1.0, e) / (1.0 + e)))
            if v_ptr is None:
                e = tl.where(is_done, 0.0, e)
                linear += tl.where(is_done, 0.0, tl.maximum(t, 0.0))
                product += e + product * e
            else:
                linear += tl.where(is_done, 0.0, v * (tl.maximum(t, 0.0) + _log1p(e)))
        loss += weight * (linear + _log1p(product)) if v_ptr is None else linear
        slopes += slopes_chunk
    return loss, slopes, slope_first, slope_label


@triton.jit
def margin_forward(
    z_ptr, y_ptr, fg_ptr, bg_ptr, u_ptr, v_ptr, loss_ptr, numbers_ptr, classes_ptr,
    rows_ptr, down_ptr, columns_ptr, across_ptr,
    classes, blocks, pixels, width, coarse_height, total, zn, zc, zp, zh, zw, ignore, weight,
    UP: tl.constexpr, ONE: tl.constexpr, U: tl.constexpr, R: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write the loss of every pixel, and unless ``numbers_ptr`` is None what the backward pass reads."""
    sample, pixel, inside, place = locate(
        tl.program_id(0), blocks, z_ptr, rows_ptr, down_ptr, columns_ptr, across_ptr,
        pixels, width, coarse_height, zn, zc, zp, zh, zw, UP, R, BP,
    )  # fmt: skip
    start = sample * pixels
    y, valid, factor = read_labels(y_ptr + start, pixel, inside, classes, ignore)
    z = read_chunk(place, 0, classes, UP, ONE, U)
    top, first, second, other = two_largest(z, place, classes, UP, ONE, U)
    of_label = _at_label(z, place, y, classes, UP, ONE, U)
    loss, slopes, slope_first, _ = margin_sums(
        z, place, y, top, first, second, of_label, fg_ptr, bg_ptr, u_ptr, v_ptr, classes, weight, UP, ONE, U
    )
    tl.store(loss_ptr + start + pixel, tl.where(valid, loss * factor, 0.0), mask=inside)
    if numbers_ptr is not None:
        numbers_ptr += start
        tl.store(numbers_ptr + pixel, top, mask=inside)
        tl.store(numbers_ptr + total + pixel, slopes, mask=inside)
        tl.store(numbers_ptr + 2 * total + pixel, slope_first, mask=inside)
        tl.store(classes_ptr + start + pixel, first + (other << 16), mask=inside)


@triton.jit
def _at_label(z, place, y, classes, UP: tl.constexpr, ONE: tl.constexpr, U: tl.constexpr):
    """Logit of the label: gathered; of upsampled logits, which are nowhere to gather from, selected."""
    if UP:
        found = z[0]
        for c in range(1, classes):
            found = tl.where(y == c, read(place, c, UP), found)
    elif ONE:
        found = z[0]
        for k in tl.static_range(1, U):
            found = tl.where(y == k, z[k], found)
    else:
        z_ptr, zc, offset, mask = place
        found = tl.load(z_ptr + y * zc + offset, mask=mask, other=0.0).to(tl.float32)
    return found


@triton.jit
def margin_backward(
    z_ptr, y_ptr, fg_ptr, bg_ptr, u_ptr, v_ptr, upstream_ptr, numbers_ptr, classes_ptr, gradient_ptr,
    classes, blocks, pixels, total, zn, zc, zp, gn, gc, gp, upstream_step, ignore, weight,
    ONE: tl.constexpr, U: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write the gradient in the logits. Up to `UNROLLED` classes it needs no numbers and reads each logit once."""
    sample, pixel, inside, place = locate(
        tl.program_id(0), blocks, z_ptr, None, None, None, None, pixels, 0, 0, zn, zc, zp, 0, 0, False, 1, BP
    )
    start = sample * pixels
    y, valid, factor = read_labels(y_ptr + start, pixel, inside, classes, ignore)
    factor *= tl.load(upstream_ptr + (start + pixel) * upstream_step, mask=valid, other=0.0)
    z = ()
    if ONE:
        z = read_chunk(place, 0, classes, False, ONE, U)
        top, first, second, other = two_largest(z, place, classes, False, ONE, U)
        of_label = _at_label(z, place, y, classes, False, ONE, U)
        _, slopes, slope_first, slope_label = margin_sums(
            z, place, y, top, first, second, of_label, fg_ptr, bg_ptr, u_ptr, v_ptr, classes, weight, False, ONE, U
        )
    else:
        numbers_ptr += start
        top = tl.load(numbers_ptr + pixel, mask=inside, other=0.0)
        slopes = tl.load(numbers_ptr + total + pixel, mask=inside, other=0.0)
        slope_first = tl.load(numbers_ptr + 2 * total + pixel, mask=inside, other=0.0)
        pair = tl.load(classes_ptr + start + pixel, mask=inside, other=0)
        first, other = pair & 0xFFFF, pair >> 16
        of_label = _at_label(z, place, y, classes, False, ONE, U)
        slope_label = -tl.load(u_ptr + y) * softplus(tl.load(fg_ptr + y) - (of_label - top))[1]
    gradient_ptr += sample * gn
    for begin in range(0, U if ONE else classes, U):
        chunk = z if ONE else read_chunk(place, begin, classes, False, ONE, U)
        found = ()  # stored last, so that no store stands between a class's passes
        for k in tl.static_range(U):
            c = begin + k
            v = _constant(v_ptr, c, classes, weight, ONE)
            g = v * softplus(_constant(bg_ptr, c, classes, 0.0, ONE) + (chunk[k] - top))[1]
            g = tl.where(y == c, slope_label, g)
            g = tl.where(first == c, slope_first - slopes, g)
            g = tl.where(other == c, g - slope_first, g)
            found = found + (tl.where(valid, g * factor, 0.0),)
        for k in tl.static_range(U):
            at = gradient_ptr + tl.cast(begin + k, tl.int64) * gc + pixel * gp
            tl.store(at, found[k], mask=inside if ONE else inside & (begin + k < classes))


@triton.jit
def largest(z, place, classes, UP: tl.constexpr, ONE: tl.constexpr, U: tl.constexpr):
    """Find the largest logit, its class, and the sum of the others' exponentials relative to it, times 2^100."""
    top = tl.full(z[0].shape, float("-inf"), tl.float32)
    first = tl.zeros(z[0].shape, tl.int32)
    rest = tl.zeros(z[0].shape, tl.float32)
    for start in range(0, U if ONE else classes, U):
        chunk = z if ONE else read_chunk(place, start, classes, UP, ONE, U)
        for k in tl.static_range(U):
            wins = chunk[k] > top
            if not ONE:
                e = scaled(-tl.abs(chunk[k] - top), 0.0)
                rest = tl.where(wins, e * (1.0 + rest * _SCALE), rest + e)
            top = tl.where(wins, chunk[k], top)
            first = tl.where(wins, start + k, first)
    if ONE:  # all logits are at hand: their exponentials can wait for the largest, and serve the next pass as well
        for k in tl.static_range(U):
            rest += tl.where(first == k, 0.0, scaled(z[k], top))
    return top, first, rest


@triton.jit
def scaled(z, top):
    """Compute exp(z - top) times 2^100."""
    t = (z - top) * _LOG2E
    is_tiny = t < -60.0  # added to others, 100 would cost them their last digits
    return tl.exp2(tl.where(is_tiny, t + 100.0, t)) * tl.where(is_tiny, 1.0, 2.0**100)


@triton.jit
def kept(log2_p, power, KIND: tl.constexpr):
    """Compute p^power from log2 p."""
    return tl.exp2(log2_p if KIND == "one" else power * log2_p)


@triton.jit
def false_alarm(p, power, KIND: tl.constexpr):
    """Compute 1 - (1 - p)^power for p <= 1/2, without cancellation; any number for the larger p of the largest logit."""
    if KIND == "one":
        error = p
    elif KIND == "half":
        error = tl.where(p < 1e-2, p * (0.5 + p * (0.125 + p * 0.0625)), 1.0 - tl.sqrt(1.0 - tl.minimum(p, 0.5)))
    else:
        error = 1.0 - tl.exp2(power * tl.log2(1.0 - tl.minimum(p, 0.5)))
        error = tl.where(p < 1e-3, power * p * (1.0 + 0.5 * (1.0 - power) * p), error)
    return error


@triton.jit
def false_alarm_slope(p, v, power, KIND: tl.constexpr):
    """Compute v p (1 - p)^(power - 1), likewise for p <= 1/2."""
    slope = v * p
    if KIND == "half":
        slope *= tl.rsqrt(1.0 - tl.minimum(p, 0.5))
    elif KIND == "any":
        slope *= tl.exp2((power - 1.0) * tl.log2(1.0 - tl.minimum(p, 0.5)))
    return slope


@triton.jit
def errors_of_largest(rest, power, KIND: tl.constexpr):
    """Compute p and 1 - p of the largest logit, its error as the label, 1 - p^power, and as a rival, 1 - (1 - p)^power."""
    inverse = 1.0 / (1.0 + rest * _SCALE)
    remainder = rest * _SCALE * inverse
    if KIND == "one":
        miss, alarm = remainder, inverse
    elif KIND == "half":
        miss, alarm = remainder / (1.0 + tl.sqrt(inverse)), 1.0 - tl.sqrt(remainder)
    else:
        v = power * _log1p(rest * _SCALE)
        miss = tl.where(v < 1e-3, v * (1.0 - 0.5 * v), 1.0 - tl.exp2(-v * _LOG2E))
        alarm = 1.0 - rest_power(rest, inverse, power)
    return inverse, remainder, miss, alarm


@triton.jit
def rest_power(rest, inverse, power):
    """Compute (1 - p)^power of the largest logit. It may be a float although 1 - p is too small for one."""
    is_tiny = rest < 1.0  # below, 1 - p is no float; above, a logarithm near 100 would lose its last digits
    log2_rest = tl.log2(tl.maximum(tl.where(is_tiny, rest, rest * _SCALE), _TINY)) - tl.where(is_tiny, 100.0, 0.0)
    return tl.where(rest > 0, tl.exp2(power * (log2_rest + tl.log2(inverse))), 0.0)


@triton.jit
def soft_forward(
    z_ptr, y_ptr, counts_ptr, numbers_ptr, classes_ptr, rows_ptr, down_ptr, columns_ptr, across_ptr,
    classes, num_blocks, blocks, pixels, width, coarse_height, total, zn, zc, zp, zh, zw, ignore, power,
    KIND: tl.constexpr, UP: tl.constexpr, ONE: tl.constexpr, U: tl.constexpr, R: tl.constexpr, BP: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """Write each program's sums over its blocks (programs, 3, classes): labels, misses and false alarms.

    Misses start at 0 in memory where there are more than `UNROLLED` classes: only those of classes that occur are written.
    """
    counts_ptr += tl.cast(tl.program_id(0), tl.int64) * 3 * classes
    bins = tl.arange(0, BINS)
    labels = tl.zeros([BINS], tl.int32)
    misses = ()
    alarms = ()
    if ONE:  # each thread sums for itself until the end
        for _k in tl.static_range(U):
            misses = misses + (tl.zeros([BP], tl.float32),)
            alarms = alarms + (tl.zeros([BP], tl.float32),)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        sample, pixel, inside, place = locate(
            block, blocks, z_ptr, rows_ptr, down_ptr, columns_ptr, across_ptr,
            pixels, width, coarse_height, zn, zc, zp, zh, zw, UP, R, BP,
        )  # fmt: skip
        start = sample * pixels
        y, valid, factor = read_labels(y_ptr + start, pixel, inside, classes, ignore)
        z = read_chunk(place, 0, classes, UP, ONE, U)
        top, first, rest = largest(z, place, classes, UP, ONE, U)
        of_label = _at_label(z, place, y, classes, UP, ONE, U)
        inverse, _remainder, miss, alarm_first = errors_of_largest(rest, power, KIND)
        p_label = tl.exp2((of_label - top) * _LOG2E) * inverse
        if KIND == "half":
            miss_label = 1.0 - tl.sqrt(p_label)
        else:
            miss_label = 1.0 - kept((of_label - top) * _LOG2E + tl.log2(inverse), power, KIND)
        miss = tl.where(first == y, miss, miss_label) * factor
        labels += tl.histogram(tl.reshape(tl.where(valid, y, classes), [R * BP]), BINS)
        for begin in range(0, U if ONE else classes, U):
            chunk = z if ONE else read_chunk(place, begin, classes, UP, ONE, U)
            for k in tl.static_range(U):
                c = begin + k
                alarm = false_alarm(scaled(chunk[k], top) * (inverse * _SCALE), power, KIND)
                alarm = tl.where(first == c, alarm_first, alarm)
                alarm = tl.where(valid & (y != c), alarm, 0.0)
                if ONE:
                    misses = misses[:k] + (misses[k] + tl.where(valid & (y == c), miss, 0.0),) + misses[k + 1 :]
                    alarms = alarms[:k] + (alarms[k] + alarm,) + alarms[k + 1 :]
                else:
                    tl.store(counts_ptr + 2 * classes + c, tl.sum(alarm), mask=c < classes)
        if not ONE:  # a block is all that the program has
            left = tl.where(valid, y, -1)
            c = tl.max(left)
            while c >= 0:
                tl.store(counts_ptr + classes + c, tl.sum(tl.where(left == c, miss, 0.0)))
                left = tl.where(left == c, -1, left)
                c = tl.max(left)
            if numbers_ptr is not None:
                at = numbers_ptr + start
                tl.store(at + pixel, top, mask=inside)
                tl.store(at + total + pixel, rest, mask=inside)
                tl.store(classes_ptr + start + pixel, first, mask=inside)
    tl.store(counts_ptr + bins, labels.to(tl.float32), mask=bins < classes)
    if ONE:
        for k in tl.static_range(U):
            tl.store(counts_ptr + classes + k, tl.sum(misses[k]))
            tl.store(counts_ptr + 2 * classes + k, tl.sum(alarms[k]))


@triton.jit
def soft_sums(
    z, place, y, top, first, rest, of_label, u_ptr, v_ptr, classes, power,
    KIND: tl.constexpr, UP: tl.constexpr, ONE: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Compute of every pixel the gradient at the largest logit, R S + A, and h of the label, 0 if it is the largest."""
    inverse, remainder, _, _ = errors_of_largest(rest, 1.0, "one")
    u = power * tl.load(u_ptr + y)
    kept_label = -u * kept((of_label - top) * _LOG2E + tl.log2(inverse), power, KIND)
    if KIND == "one":
        kept_rest = remainder
    elif KIND == "half":
        kept_rest = tl.sqrt(rest) * 2.0**-50 * tl.sqrt(inverse)
    else:
        kept_rest = rest_power(rest, inverse, power)
    of_rival = power * tl.load(v_ptr + first) * inverse * kept_rest
    a = tl.where(first == y, kept_label * remainder, of_rival)
    h_label = tl.where(first == y, 0.0, kept_label)
    s = h_label
    for start in range(0, U if ONE else classes, U):
        chunk = z if ONE else read_chunk(place, start, classes, UP, ONE, U)
        s_chunk = tl.zeros_like(top)
        for k in tl.static_range(U):
            v = power * _constant(v_ptr, start + k, classes, 0.0, ONE)
            h = false_alarm_slope(scaled(chunk[k], top) * (inverse * _SCALE), v, power, KIND)
            s_chunk += tl.where((y == start + k) | (first == start + k), 0.0, h)
        s += s_chunk
    return a - inverse * s, remainder * s + a, h_label


@triton.jit
def soft_backward(
    z_ptr, y_ptr, u_ptr, v_ptr, numbers_ptr, classes_ptr, gradient_ptr,
    classes, blocks, pixels, total, zn, zc, zp, gn, gc, gp, ignore, power,
    KIND: tl.constexpr, ONE: tl.constexpr, U: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write the gradient in the logits; see `margin_backward`."""
    sample, pixel, inside, place = locate(
        tl.program_id(0), blocks, z_ptr, None, None, None, None, pixels, 0, 0, zn, zc, zp, 0, 0, False, 1, BP
    )
    start = sample * pixels
    y, valid, factor = read_labels(y_ptr + start, pixel, inside, classes, ignore)
    z = ()
    if ONE:
        z = read_chunk(place, 0, classes, False, ONE, U)
        top, first, rest = largest(z, place, classes, False, ONE, U)
    else:
        numbers_ptr += start
        top = tl.load(numbers_ptr + pixel, mask=inside, other=0.0)
        rest = tl.load(numbers_ptr + total + pixel, mask=inside, other=0.0)
        first = tl.load(classes_ptr + start + pixel, mask=inside, other=0)
    of_label = _at_label(z, place, y, classes, False, ONE, U)
    at_first, share, h_label = soft_sums(
        z, place, y, top, first, rest, of_label, u_ptr, v_ptr, classes, power, KIND, False, ONE, U
    )
    probability = _SCALE / (1.0 + rest * _SCALE)
    of_rest = 1.0 / tl.maximum(rest, _TINY)
    gradient_ptr += sample * gn
    for begin in range(0, U if ONE else classes, U):
        chunk = z if ONE else read_chunk(place, begin, classes, False, ONE, U)
        found = ()
        for k in tl.static_range(U):
            c = begin + k
            e = scaled(chunk[k], top)
            g = false_alarm_slope(e * probability, power * _constant(v_ptr, c, classes, 0.0, ONE), power, KIND)
            g = tl.where(y == c, h_label, g) - tl.minimum(e, rest) * of_rest * share
            g = tl.where(first == c, at_first, g)
            found = found + (tl.where(valid, g * factor, 0.0),)
        for k in tl.static_range(U):
            at = gradient_ptr + tl.cast(begin + k, tl.int64) * gc + pixel * gp
            tl.store(at, found[k], mask=inside if ONE else inside & (begin + k < classes))
