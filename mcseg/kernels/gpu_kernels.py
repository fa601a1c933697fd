r"""Losses of pixels, soft counts of classes and their gradient as Triton kernels; and predictions and their counts.

A block of pixels with all of its classes is one tile. Three passes over it, of which only the first reads device memory
where the classes fit on chip (up to 256; with more, the tile comes from the cache again):

1. largest logit and runner-up, and ``sum_r``, the sum of ``exp(z_k - runner-up)`` over all but the largest;
2. errors, weighted and summed over the classes of a pixel (hard margins with the log) or over the pixels of a class (soft
   counts); or what the gradient needs of all classes;
3. the gradient, written once.

With the weighted slopes G_k = d loss / d s_k, q1 the largest logit and q2 its runner-up, hard margins give::

    d / d z_k = G_k        d / d z_q1 = G_q1 - sum_{k != q1} G_k        d / d z_q2 = G_q2 - G_q1

and soft counts, with s_k = log(p_k / (1 - p_k)), so that d s_k / d z_j = -p_j / (1 - p_k) for j != k, and
h_k = G_k / (1 - p_k)::

    d / d z_j = G_j - p_j sum_{k != j} h_k

``sum_r`` gives 1 - p of the largest without cancellation: with d = exp(runner-up - largest) it is d sum_r / (1 + d sum_r).

Sums over pixels are made per program, in a fixed order, and then over the programs: two runs are equal bit by bit. The
backward pass computes the gradient from the logits, where the upstream gradient is known, rather than to keep one for an
upstream gradient of 1 and to scale it: three passes over device memory in all instead of four, and nothing is kept.

Label maps consist of runs of equal pixels, so `count` adds once for a run instead of once for a pixel: where pixel i of a
block differs from the one before, i is added to the count of what ended there and taken from that of what begins.
Additions of integers may come in any order, so the counts are exact and the same in every run.
"""

import triton
import triton.language as tl


@triton.jit
def _log1p(x):
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _read(z_ptr, place, c, classes, readable, zc):
    z_ptr += c.to(tl.int64)[:, None] * zc
    return tl.load(z_ptr + place[None, :], mask=(c < classes)[:, None] & readable[None, :], other=0.0).to(tl.float32)


@triton.jit
def _load(z_ptr, place, right, below, to_right, to_below, c, classes, readable, zc, UP: tl.constexpr):
    """Logits (classes, pixels) in float32: 0 where not readable, -inf beyond the last class.

    With UP between four coarse cells: the one at ``place``, those ``right`` of and ``below`` it, and their corner.
    """
    z = _read(z_ptr, place, c, classes, readable, zc)
    if UP:
        z += to_right[None, :] * (_read(z_ptr, place + right, c, classes, readable, zc) - z)
        low = _read(z_ptr, place + below, c, classes, readable, zc)
        low += to_right[None, :] * (_read(z_ptr, place + below + right, c, classes, readable, zc) - low)
        z += to_below[None, :] * (low - z)
    return tl.where((c < classes)[:, None], z, float("-inf"))


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
def _scan(
    z_ptr, place, right, below, to_right, to_below, c, classes, valid, zc,
    UP: tl.constexpr, ONE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Last chunk of logits, which is all where one holds them, and what `_two_largest` says of all."""
    z = _load(z_ptr, place, right, below, to_right, to_below, c, classes, valid, zc, UP)
    top, first, second, other, sum_r = _two_largest(z, c)
    if not ONE:
        for start in range(BC, classes, BC):
            z = _load(z_ptr, place, right, below, to_right, to_below, start + c, classes, valid, zc, UP)
            top, first, second, other, sum_r = _merge(top, first, second, other, sum_r, z, start + c)
    return z, top, first, second, other, sum_r


@triton.jit
def _errors(
    z, c, classes, top, first, second, sum_r, label, valid, fg_ptr, bg_ptr, power, SOFT: tl.constexpr, POWER: tl.constexpr
):  # fmt: skip
    """Errors, their slopes in t, p and 1 - p (soft counts), and which is the label's; (classes, pixels), 0 if not valid."""
    is_label = c[:, None] == label[None, :]
    is_top = c[:, None] == first[None, :]
    valid = valid[None, :] & (c < classes)[:, None]
    z = tl.where(valid, z, 0.0)
    p, rest = z, z
    if SOFT:
        d = tl.exp(second - top)
        total = 1.0 + d * sum_r
        p = tl.where(is_top, (1.0 / total)[None, :], tl.exp(z - top[None, :]) / total[None, :])
        rest = tl.where(is_top, (d * sum_r / total)[None, :], 1.0 - p)
        kept = tl.where(is_label, p, rest)
        lost = tl.where(is_label, rest, p)
        if POWER:
            # in logarithms: where p or 1 - p is below the smallest number, its power is not
            log_total = tl.log(total)
            of_rival = tl.where(is_top, (second - top + tl.log(sum_r) - log_total)[None, :], tl.log(tl.maximum(rest, 0.5)))
            kept = tl.exp(power * tl.where(is_label, z - (top + log_total)[None, :], of_rival))
            error = 1.0 - kept
            slope = power * kept * lost
        else:
            error = lost
            slope = kept * lost
    else:
        s = tl.where(is_top, (top - second)[None, :], z - top[None, :])
        t = tl.where(
            is_label, tl.load(fg_ptr + label)[None, :] - s, tl.load(bg_ptr + c, mask=c < classes, other=0.0)[:, None] + s
        )
        u = tl.exp(-tl.abs(t))
        slope = tl.where(t > 0, 1.0, u) / (1.0 + u)
        error = tl.maximum(t, 0.0) + _log1p(u)
    return tl.where(valid, error, 0.0), tl.where(valid, slope, 0.0), p, rest, is_label


@triton.jit
def _weights(c, classes, is_label, label, wm_ptr, wf_ptr):
    """Weight of the miss for the label, of a false alarm for the others."""
    wm = tl.load(wm_ptr + label)[None, :]
    return tl.where(is_label, wm, tl.load(wf_ptr + c, mask=c < classes, other=0.0)[:, None])


@triton.jit
def _sums(error, slope, rest, c, classes, first, is_label, label, wm_ptr, wf_ptr, SOFT: tl.constexpr):
    """Per pixel: weighted sum of the errors; sum of G (hard) or h (soft) without the largest, and that of the largest."""
    w = _weights(c, classes, is_label, label, wm_ptr, wf_ptr)
    g = tl.where(is_label, -w, w) * slope
    if SOFT:
        g = g / tl.maximum(rest, 1e-37)
    is_top = c[:, None] == first[None, :]
    return tl.sum(w * error, axis=0), tl.sum(tl.where(is_top, 0.0, g), axis=0), tl.sum(tl.where(is_top, g, 0.0), axis=0)


@triton.jit
def _slopes(
    slope, share, rest, c, classes, first, other, of_others, of_top, is_label, label, wm_ptr, wf_ptr, SOFT: tl.constexpr
):  # fmt: skip
    """Gradient in the logits of the weighted errors of a pixel, from their slopes in the margins and the two sums."""
    w = _weights(c, classes, is_label, label, wm_ptr, wf_ptr)
    g = tl.where(is_label, -w, w) * slope
    is_top = c[:, None] == first[None, :]
    if SOFT:
        h = g / tl.maximum(rest, 1e-37)
        g -= share * tl.where(is_top, of_others[None, :], of_others[None, :] - h + of_top[None, :])
    else:
        g -= tl.where(is_top, of_others[None, :], 0.0)
        g -= tl.where(c[:, None] == other[None, :], of_top[None, :], 0.0)
    return g


@triton.jit
def _add(place, values, inside):
    tl.store(place, tl.load(place, mask=inside, other=0.0) + values, mask=inside)


@triton.jit
def _labels(y_ptr, place, inside, classes, ignore):
    """Labels, 0 where there is none; which pixels have one; and a factor: nan where it is no class."""
    y = tl.load(y_ptr + place, mask=inside, other=ignore)
    valid = inside & (y != ignore)
    known = (y >= 0) & (y < classes)
    factor = tl.where(valid, tl.where(known, 1.0, float("nan")), 1.0)
    return tl.where(valid & known, y, 0).to(tl.int32), valid, factor


@triton.jit
def _cells(row, column, inside, rows_ptr, down_ptr, columns_ptr, across_ptr, height, breadth, zh, zw, UP: tl.constexpr):
    """Where the logits of pixels are: place, steps to the right and below, and the weights of these."""
    if UP:
        i = tl.load(rows_ptr + row, mask=inside, other=0).to(tl.int64)
        j = tl.load(columns_ptr + column, mask=inside, other=0).to(tl.int64)
        to_below = tl.load(down_ptr + row, mask=inside, other=0.0)
        to_right = tl.load(across_ptr + column, mask=inside, other=0.0)
        right = tl.where(j + 1 < breadth, zw, 0).to(tl.int64)
        below = tl.where(i + 1 < height, zh, 0).to(tl.int64)
        place = i * zh + j * zw
    else:
        place, right, below = row * zh + column * zw, row, row
        to_right = tl.zeros_like(row).to(tl.float32)
        to_below = to_right
    return place, right, below, to_right, to_below


@triton.jit
def _pixels(
    block, blocks, rows_ptr, down_ptr, columns_ptr, across_ptr,
    pixels, width, height, breadth, zn, zh, zw, FLAT: tl.constexpr, UP: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """A block of pixels: sample, pixels in it, which exist, rows, columns, and where their logits are."""
    sample = (block // blocks).to(tl.int64)
    p = (block % blocks).to(tl.int64) * BP + tl.arange(0, BP)
    inside = p < pixels
    # where all pixels of a sample lie at one stride, the compiler must see it, or it will not read them in vectors
    row, column = (0 * p, p) if FLAT else (p // width, p % width)
    place, right, below, to_right, to_below = _cells(
        row, column, inside, rows_ptr, down_ptr, columns_ptr, across_ptr, height, breadth, zh, zw, UP
    )
    return sample, p, inside, row, column, place + sample * zn, right, below, to_right, to_below


@triton.jit
def _block(
    block, blocks, y_ptr, rows_ptr, down_ptr, columns_ptr, across_ptr,
    pixels, width, height, breadth, classes, zn, zh, zw, ignore, FLAT: tl.constexpr, UP: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """A block of pixels as `_pixels` gives it, and their labels."""
    sample, p, inside, row, column, place, right, below, to_right, to_below = _pixels(
        block, blocks, rows_ptr, down_ptr, columns_ptr, across_ptr,
        pixels, width, height, breadth, zn, zh, zw, FLAT, UP, BP,
    )  # fmt: skip
    label, valid, factor = _labels(y_ptr, sample * pixels + p, inside, classes, ignore)
    return sample, p, inside, row, column, place, right, below, to_right, to_below, label, valid, factor


@triton.jit
def forward(
    z_ptr, y_ptr, fg_ptr, bg_ptr, wm_ptr, wf_ptr, loss_ptr, counts_ptr,
    rows_ptr, down_ptr, columns_ptr, across_ptr,
    num_blocks, blocks, pixels, width, height, breadth, classes, zn, zc, zh, zw, ignore, power,
    SOFT: tl.constexpr, POWER: tl.constexpr, FLAT: tl.constexpr, UP: tl.constexpr,
    ONE: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write the loss of every pixel, or each program's counts (programs, 3, classes), which begin at 0."""
    labels = tl.zeros([BC], tl.float32)
    misses = tl.zeros([BC], tl.float32)
    alarms = tl.zeros([BC], tl.float32)
    sums = counts_ptr
    if counts_ptr is not None:
        sums = counts_ptr + tl.program_id(0).to(tl.int64) * 3 * classes
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        sample, p, inside, _row, _column, place, right, below, to_right, to_below, label, valid, factor = _block(
            block, blocks, y_ptr, rows_ptr, down_ptr, columns_ptr, across_ptr,
            pixels, width, height, breadth, classes, zn, zh, zw, ignore, FLAT, UP, BP,
        )  # fmt: skip
        c = tl.arange(0, BC)
        z, top, first, second, _other, sum_r = _scan(
            z_ptr, place, right, below, to_right, to_below, c, classes, valid, zc, UP, ONE, BC
        )
        loss = tl.zeros([BP], tl.float32)
        for start in range(0, 1 if ONE else classes, BC):
            if not ONE:
                z = _load(z_ptr, place, right, below, to_right, to_below, start + c, classes, valid, zc, UP)
            error, slope, _, rest, is_label = _errors(
                z, start + c, classes, top, first, second, sum_r, label, valid, fg_ptr, bg_ptr, power, SOFT, POWER
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
                    _add(sums + start + c, found_labels, start + c < classes)
                    _add(sums + start + c + classes, found_misses, start + c < classes)
                    _add(sums + start + c + 2 * classes, found_alarms, start + c < classes)
        if counts_ptr is None:
            tl.store(loss_ptr + sample * pixels + p, tl.where(valid, loss * factor, 0.0), mask=inside)
    if ONE and counts_ptr is not None:
        c = tl.arange(0, BC)
        _add(sums + c, labels, c < classes)
        _add(sums + c + classes, misses, c < classes)
        _add(sums + c + 2 * classes, alarms, c < classes)


@triton.jit
def backward(
    z_ptr, y_ptr, fg_ptr, bg_ptr, wm_ptr, wf_ptr, upstream_ptr, gradient_ptr, found_ptr, pair_ptr,
    rows_ptr, down_ptr, columns_ptr, across_ptr,
    blocks, pixels, width, height, breadth, classes, zn, zc, zh, zw, gn, gc, gh, gw, ignore, power,
    SOFT: tl.constexpr, POWER: tl.constexpr, FLAT: tl.constexpr, UP: tl.constexpr,
    ONE: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the weighted errors, times a pixel's upstream gradient where there is one.

    For upsampled logits, which have no place to write it to, write what it needs of a pixel instead: (6, pixels) float32 of
    the largest logit, runner-up, sum_r, the two sums and the factor, and a word of the two largest logits' classes.
    """
    sample, p, inside, row, column, place, right, below, to_right, to_below, label, valid, factor = _block(
        tl.program_id(0), blocks, y_ptr, rows_ptr, down_ptr, columns_ptr, across_ptr,
        pixels, width, height, breadth, classes, zn, zh, zw, ignore, FLAT, UP, BP,
    )  # fmt: skip
    c = tl.arange(0, BC)
    z, top, first, second, other, sum_r = _scan(
        z_ptr, place, right, below, to_right, to_below, c, classes, valid, zc, UP, ONE, BC
    )
    of_others, of_top = tl.zeros([BP], tl.float32), tl.zeros([BP], tl.float32)
    for start in range(0, 1 if ONE else classes, BC):
        if not ONE:
            z = _load(z_ptr, place, right, below, to_right, to_below, start + c, classes, valid, zc, UP)
        error, slope, _, rest, is_label = _errors(
            z, start + c, classes, top, first, second, sum_r, label, valid, fg_ptr, bg_ptr, power, SOFT, POWER
        )
        _, others, largest = _sums(error, slope, rest, start + c, classes, first, is_label, label, wm_ptr, wf_ptr, SOFT)
        of_others += others
        of_top += largest
    if upstream_ptr is not None:
        factor *= tl.load(upstream_ptr + sample * pixels + p, mask=valid, other=0.0)
    if UP:
        pixel = sample * pixels + p
        total = tl.num_programs(0).to(tl.int64) // blocks * pixels
        tl.store(found_ptr + pixel, top, mask=inside)
        tl.store(found_ptr + total + pixel, second, mask=inside)
        tl.store(found_ptr + 2 * total + pixel, sum_r, mask=inside)
        tl.store(found_ptr + 3 * total + pixel, of_others, mask=inside)
        tl.store(found_ptr + 4 * total + pixel, of_top, mask=inside)
        tl.store(found_ptr + 5 * total + pixel, factor, mask=inside)
        tl.store(pair_ptr + pixel, first + (other << 16), mask=inside)
    else:
        for start in range(0, 1 if ONE else classes, BC):
            if not ONE:
                z = _load(z_ptr, place, right, below, to_right, to_below, start + c, classes, valid, zc, UP)
            _, slope, share, rest, is_label = _errors(
                z, start + c, classes, top, first, second, sum_r, label, valid, fg_ptr, bg_ptr, power, SOFT, POWER
            )
            g = _slopes(
                slope,
                share,
                rest,
                start + c,
                classes,
                first,
                other,
                of_others,
                of_top,
                is_label,
                label,
                wm_ptr,
                wf_ptr,
                SOFT,
            )
            g = tl.where(valid[None, :], g * factor[None, :], 0.0)
            target = gradient_ptr + (start + c).to(tl.int64)[:, None] * gc + (sample * gn + row * gh + column * gw)[None, :]
            tl.store(target, g, mask=(start + c < classes)[:, None] & inside[None, :])


@triton.jit
def gather(
    z_ptr, y_ptr, fg_ptr, bg_ptr, wm_ptr, wf_ptr, found_ptr, pair_ptr, gradient_ptr,
    rows_ptr, down_ptr, columns_ptr, across_ptr, row_from_ptr, row_to_ptr, column_from_ptr, column_to_ptr,
    pixels, width, height, breadth, classes, zn, zc, zh, zw, gn, gc, gh, gw, ignore, power, total,
    SOFT: tl.constexpr, POWER: tl.constexpr, MOST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write the gradient of coarse cells, (classes, a run of cells of one row): over the pixels that each has a part in."""
    sample = (tl.program_id(0) // height).to(tl.int64)
    i = (tl.program_id(0) % height).to(tl.int64)
    j = tl.program_id(1).to(tl.int64) * BP + tl.arange(0, BP)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    cells = j < breadth
    left = tl.load(column_from_ptr + j, mask=cells, other=0)
    end = tl.load(column_to_ptr + j, mask=cells, other=0)
    gradient = tl.zeros([BC, BP], tl.float32)
    for row in range(tl.load(row_from_ptr + i), tl.load(row_to_ptr + i)):
        at_row = tl.load(rows_ptr + row)
        down = tl.load(down_ptr + row)
        weight = tl.where(at_row == i, 1.0 - down, 0.0) + tl.where(tl.minimum(at_row + 1, height - 1) == i, down, 0.0)
        for step in range(MOST):
            column = left + step
            inside = cells & (column < end)
            rows = tl.zeros([BP], tl.int64) + row
            place, right, below, to_right, to_below = _cells(
                rows, column, inside, rows_ptr, down_ptr, columns_ptr, across_ptr, height, breadth, zh, zw, True
            )
            at = tl.load(columns_ptr + column, mask=inside, other=0)
            share_of_cell = tl.where(at == j, 1.0 - to_right, 0.0)
            share_of_cell += tl.where(tl.minimum(at + 1, breadth - 1) == j, to_right, 0.0)
            pixel = sample * pixels + row * width + column
            label, valid, _ = _labels(y_ptr, pixel, inside, classes, ignore)
            pair = tl.load(pair_ptr + pixel, mask=valid, other=0)
            first, other = pair & 0xFFFF, pair >> 16
            top = tl.load(found_ptr + pixel, mask=valid, other=0.0)
            second = tl.load(found_ptr + total + pixel, mask=valid, other=0.0)
            sum_r = tl.load(found_ptr + 2 * total + pixel, mask=valid, other=1.0)
            of_others = tl.load(found_ptr + 3 * total + pixel, mask=valid, other=0.0)
            of_top = tl.load(found_ptr + 4 * total + pixel, mask=valid, other=0.0)
            factor = tl.load(found_ptr + 5 * total + pixel, mask=valid, other=0.0) * weight * share_of_cell
            z = _load(z_ptr, place + sample * zn, right, below, to_right, to_below, c, classes, valid, zc, True)
            _, slope, share, rest, is_label = _errors(
                z, c, classes, top, first, second, sum_r, label, valid, fg_ptr, bg_ptr, power, SOFT, POWER
            )
            g = _slopes(
                slope, share, rest, c, classes, first, other, of_others, of_top, is_label, label, wm_ptr, wf_ptr, SOFT
            )
            gradient += tl.where(valid[None, :], g * factor[None, :], 0.0)
    target = gradient_ptr + c.to(tl.int64)[:, None] * gc + (sample * gn + i * gh + j * gw)[None, :]
    tl.store(target, gradient, mask=(c < classes)[:, None] & cells[None, :])


@triton.jit
def predict(
    z_ptr, preds_ptr, rows_ptr, down_ptr, columns_ptr, across_ptr,
    blocks, pixels, width, height, breadth, classes, zn, zc, zh, zw,
    FLAT: tl.constexpr, UP: tl.constexpr, ONE: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write the class of the largest logit of every pixel, of equal ones the lowest."""
    sample, p, inside, _row, _column, place, right, below, to_right, to_below = _pixels(
        tl.program_id(0), blocks, rows_ptr, down_ptr, columns_ptr, across_ptr,
        pixels, width, height, breadth, zn, zh, zw, FLAT, UP, BP,
    )  # fmt: skip
    c = tl.arange(0, BC)
    z = _load(z_ptr, place, right, below, to_right, to_below, c, classes, inside, zc, UP)
    top, first = tl.max(z, axis=0, return_indices=True)
    if not ONE:
        for start in range(BC, classes, BC):
            z = _load(z_ptr, place, right, below, to_right, to_below, start + c, classes, inside, zc, UP)
            other, its = tl.max(z, axis=0, return_indices=True)
            first = tl.where(other > top, start + its, first)
            top = tl.maximum(top, other)
    # among nan the reduction may choose a class beyond the last
    tl.store(preds_ptr + sample * pixels + p, tl.minimum(first, classes - 1), mask=inside)


@triton.jit
def _pair(preds_ptr, target_ptr, place, inside, classes, ignore):
    """Cell of the counts of a pixel: of target and prediction, C * C where one of them is no class, -1 where void."""
    y = tl.load(target_ptr + place, mask=inside, other=ignore).to(tl.int64)
    k = tl.load(preds_ptr + place, mask=inside, other=0).to(tl.int64)
    known = (y >= 0) & (y < classes) & (k >= 0) & (k < classes)
    return tl.where(inside & (y != ignore), tl.where(known, y * classes + k, classes * classes), -1)


@triton.jit
def count(preds_ptr, target_ptr, counts_ptr, pixels, classes, ignore, BP: tl.constexpr):
    """Add a block's pixels to the counts (C * C + 1)."""
    start = tl.program_id(0).to(tl.int64) * BP
    i = tl.arange(0, BP)
    inside = start + i < pixels
    cell = _pair(preds_ptr, target_ptr, start + i, inside, classes, ignore)
    before = _pair(preds_ptr, target_ptr, start + i - 1, inside & (i > 0), classes, ignore)
    begins = inside & (cell != before)
    at = i.to(tl.int64)
    tl.atomic_add(counts_ptr + cell, -at, mask=begins & (cell >= 0) & (i > 0), sem="relaxed")
    tl.atomic_add(counts_ptr + before, at, mask=begins & (before >= 0), sem="relaxed")
    tl.atomic_add(
        counts_ptr + cell, at + 1, mask=inside & (cell >= 0) & ((i == BP - 1) | (start + i == pixels - 1)), sem="relaxed"
    )
