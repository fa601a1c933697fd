r"""Gradients of the losses of upsampled logits in the coarse ones, as Triton kernels without atomics.

The forward passes are those of `gpu_pixels` on tiles of R rows and BP columns of pixels. In the backward pass a program owns
a run of cells of one coarse row and a block of classes. It reads the rows of pixels that its coarse row contributes to,
computes the gradients of their pixels, and adds them up with the weight of its row. One matrix product with the weights of
the columns then folds the sum into the cells. Each pixel is evaluated for two coarse rows, each cell has one owner, and two
runs give the same bits.

Soft counts need sums over all classes before any gradient; `soft_statistics` writes them (3, N * pixels) for the fold.
Arguments as in `gpu_pixels`, and:

    row_start_ptr, row_end_ptr        first row of pixels that a coarse row contributes to, and the one after the last
    column_start_ptr, column_end_ptr  likewise of coarse columns
"""

import triton
import triton.language as tl

from mcseg.kernels.gpu_pixels import (
    _SCALE,
    _TINY,
    _at_label,
    false_alarm_slope,
    locate,
    read_chunk,
    read_labels,
    scaled,
    soft_sums,
    softplus,
)


@triton.jit
def soft_statistics(
    z_ptr, y_ptr, u_ptr, v_ptr, numbers_ptr, classes_ptr, statistics_ptr, rows_ptr, down_ptr, columns_ptr, across_ptr,
    classes, blocks, pixels, width, coarse_height, total, zn, zc, zh, zw, ignore, power,
    KIND: tl.constexpr, R: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write what `soft_sums` computes of every pixel, 0 if void."""
    sample, pixel, inside, place = locate(
        tl.program_id(0), blocks, z_ptr, rows_ptr, down_ptr, columns_ptr, across_ptr,
        pixels, width, coarse_height, zn, zc, 0, zh, zw, True, R, BP,
    )  # fmt: skip
    start = sample * pixels
    y, valid, factor = read_labels(y_ptr + start, pixel, inside, classes, ignore)
    top = tl.load(numbers_ptr + start + pixel, mask=inside, other=0.0)
    rest = tl.load(numbers_ptr + start + total + pixel, mask=inside, other=0.0)
    first = tl.load(classes_ptr + start + pixel, mask=inside, other=0)
    z = read_chunk(place, 0, classes, True, False, 1)
    of_label = _at_label(z, place, y, classes, True, False, 1)
    at_first, share, h_label = soft_sums(
        z, place, y, top, first, rest, of_label, u_ptr, v_ptr, classes, power, KIND, True, False, 1
    )
    statistics_ptr += start
    tl.store(statistics_ptr + pixel, tl.where(valid, at_first * factor, 0.0), mask=inside)
    tl.store(statistics_ptr + total + pixel, tl.where(valid, share * factor, 0.0), mask=inside)
    tl.store(statistics_ptr + 2 * total + pixel, tl.where(valid, h_label * factor, 0.0), mask=inside)


@triton.jit
def _coarse_row(z_ptr, i, c, left, across, zc, zh, zw, mask):
    """Read a coarse row (classes, columns of pixels), interpolated along the row."""
    z_ptr += i * zh + c[:, None] * zc + (left * zw)[None, :]
    z = tl.load(z_ptr, mask=mask, other=0.0).to(tl.float32)
    return z + across[None, :] * (tl.load(z_ptr + zw, mask=mask, other=0.0).to(tl.float32) - z)


@triton.jit
def fold(
    z_ptr, y_ptr, fg_ptr, bg_ptr, u_ptr, v_ptr, upstream_ptr, numbers_ptr, classes_ptr, statistics_ptr, gradient_ptr,
    rows_ptr, down_ptr, columns_ptr, across_ptr, row_start_ptr, row_end_ptr, column_start_ptr, column_end_ptr,
    classes, pixels, width, coarse_height, coarse_width, total, zn, zc, zh, zw, gn, gc, gh, gw,
    upstream_step, ignore, weight, power,
    KIND: tl.constexpr, PRECISION: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, CELLS: tl.constexpr, BX: tl.constexpr,
):  # fmt: skip
    """Write the gradient of CELLS coarse cells of a row (of BX in the product) and BC classes.

    KIND is "margin", or the power of soft counts: "one", "half" or "any".
    """
    runs = tl.cdiv(coarse_width, CELLS)
    sample = tl.cast(tl.program_id(0) // (coarse_height * runs), tl.int64)
    i = tl.cast((tl.program_id(0) // runs) % coarse_height, tl.int64)
    j = (tl.program_id(0) % runs) * CELLS
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    exists = c < classes
    cells = j + tl.arange(0, BX)
    z_ptr += sample * zn
    y_ptr += sample * pixels
    numbers_ptr += sample * pixels
    classes_ptr += sample * pixels
    zc, zh = tl.cast(zc, tl.int64), tl.cast(zh, tl.int64)
    margin: tl.constexpr = KIND == "margin"
    if margin:
        fg = tl.load(fg_ptr + c, mask=exists, other=0.0)[:, None]
        bg = tl.load(bg_ptr + c, mask=exists, other=0.0)[:, None]
        u = tl.load(u_ptr + c, mask=exists, other=0.0)[:, None]
        v = weight if v_ptr is None else tl.load(v_ptr + c, mask=exists, other=0.0)[:, None]
    else:
        v = power * tl.load(v_ptr + c, mask=exists, other=0.0)[:, None]
    gradient = tl.zeros([BC, BX], tl.float32)
    end = tl.load(column_end_ptr + tl.minimum(j + CELLS, coarse_width) - 1)
    for begin in range(tl.load(column_start_ptr + j), end, BP):  # once, unless a cell is wider than BP pixels
        column = begin + tl.arange(0, BP)
        columns = column < end
        left = tl.load(columns_ptr + column, mask=columns, other=0)
        across = tl.load(across_ptr + column, mask=columns, other=0.0)
        mask = exists[:, None] & columns[None, :]
        above = _coarse_row(z_ptr, tl.maximum(i - 1, 0), c, left, across, zc, zh, zw, mask)
        here = _coarse_row(z_ptr, i, c, left, across, zc, zh, zw, mask)
        below = _coarse_row(z_ptr, tl.minimum(i + 1, coarse_height - 1), c, left, across, zc, zh, zw, mask)
        summed = tl.zeros([BC, BP], tl.float32)
        for row in range(tl.load(row_start_ptr + i), tl.load(row_end_ptr + i)):
            down = tl.load(down_ptr + row)
            is_upper = tl.load(rows_ptr + row) == i  # whether this coarse row is the upper neighbour, or the lower one
            z = tl.where(is_upper, 0.0, 1.0 - down) * above
            z += tl.where(is_upper, 1.0 - down, down) * here
            z += tl.where(is_upper, down, 0.0) * below
            pixel = row * width + column
            y, valid, factor = read_labels(y_ptr, pixel, columns, classes, ignore)
            top = tl.load(numbers_ptr + pixel, mask=columns, other=0.0)
            if margin:
                slopes = tl.load(numbers_ptr + total + pixel, mask=columns, other=0.0)
                slope_first = tl.load(numbers_ptr + 2 * total + pixel, mask=columns, other=0.0)
                pair = tl.load(classes_ptr + pixel, mask=columns, other=0)
                upstream = (sample * pixels + pixel) * upstream_step
                factor *= tl.load(upstream_ptr + upstream, mask=valid, other=0.0)
                s = z - top[None, :]
                is_label = c[:, None] == y[None, :]
                is_first = c[:, None] == (pair & 0xFFFF)[None, :]
                slope = softplus(tl.where(is_label, fg - s, bg + s))[1]
                g = tl.where(is_label, -u, v) * slope
                g = tl.where(is_first, (slope_first - slopes)[None, :], g)
                g -= tl.where(c[:, None] == (pair >> 16)[None, :], slope_first[None, :], 0.0)
                g = tl.where(valid[None, :], g * factor[None, :], 0.0)
            else:
                rest = tl.load(numbers_ptr + total + pixel, mask=columns, other=0.0)
                first = tl.load(classes_ptr + pixel, mask=columns, other=0)
                at = statistics_ptr + sample * pixels
                at_first = tl.load(at + pixel, mask=valid, other=0.0)
                share = tl.load(at + total + pixel, mask=valid, other=0.0)
                h_label = tl.load(at + 2 * total + pixel, mask=valid, other=0.0)
                e = scaled(z, top[None, :])
                probability = tl.where(valid, _SCALE / (1.0 + rest * _SCALE), 0.0)
                g = false_alarm_slope(e * probability[None, :], v, power, KIND)
                g = tl.where(c[:, None] == y[None, :], h_label[None, :], g)
                g -= tl.minimum(e, rest[None, :]) * (1.0 / tl.maximum(rest, _TINY))[None, :] * share[None, :]
                g = tl.where(c[:, None] == first[None, :], at_first[None, :], g)
                g = tl.where(valid[None, :], g, 0.0)
            summed += tl.where(is_upper, 1.0 - down, down) * g
        weights = tl.where(left[:, None] == cells[None, :], (1.0 - across)[:, None], 0.0)
        weights += tl.where(left[:, None] + 1 == cells[None, :], across[:, None], 0.0)
        gradient += tl.dot(summed, tl.where(columns[:, None], weights, 0.0), input_precision=PRECISION)
    gradient_ptr += sample * gn + i * gh
    at = gradient_ptr + c[:, None].to(tl.int64) * gc + (cells * gw)[None, :]
    owned = (cells < j + CELLS) & (cells < coarse_width)
    tl.store(at, gradient, mask=exists[:, None] & owned[None, :])
