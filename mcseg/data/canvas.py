"""Canvas of a drawn scene: a perspective camera, weather, noise, and the pixel maps to paint into.

Pixels are computed by sums, products, quotients and comparisons of IEEE floats only (no ``exp``, no matrix product, no
drawing library). The results of these are the same on every machine, so the bytes of a scene are too.
"""

from collections.abc import Sequence
from math import ceil, floor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

_T = TypeVar("_T")
Colour = tuple[float, float, float]
_Span = tuple[float, float]
Floats = NDArray[np.floating[Any]]  # float32 throughout; NumPy's stubs lose the width in products with a float
Mask = NDArray[np.bool_]

ALL: Mask = np.ones((1, 1), np.bool_)
SHADOW = -1  # pseudo-material that darkens the pixels below it


class Weather(NamedTuple):
    """Illumination of a scene; colours in 0..255."""

    light: Colour  # factors of the colours of all materials that do not glow
    zenith: Colour
    haze: Colour
    reach: float  # distance in metres at which the haze covers one half
    shadow: float  # share of the light in a cast shadow
    lit: float  # share of lit windows


_WEATHERS = (
    Weather((1.04, 1.00, 0.93), (88, 142, 208), (208, 222, 234), 420, 0.55, 0.06),  # a clear day
    Weather((0.84, 0.87, 0.90), (150, 161, 176), (204, 208, 213), 230, 0.85, 0.12),  # overcast
    Weather((0.70, 0.58, 0.59), (74, 80, 132), (238, 170, 124), 260, 0.75, 0.40),  # dusk
    Weather((0.92, 0.89, 0.82), (186, 188, 186), (214, 210, 200), 75, 0.85, 0.12),  # haze
)


def between(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw a uniform number in [low, high)."""
    return low + (high - low) * rng.random()


def pick(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    """Draw one of the options with equal probability."""
    return options[int(rng.random() * len(options))]


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Mix two colours, with weight ``share`` for ``second``."""
    (a, b, c), (d, e, f) = first, second
    return a + (d - a) * share, b + (e - b) * share, c + (f - c) * share


def frac(values: Floats) -> Floats:
    """Return the fractional part of the values, in [0, 1)."""
    return values - np.floor(values)


def upsample(grid: Floats, rows: Floats, cols: Floats) -> Floats:
    """Sample a periodic ``grid`` (h,w) bilinearly at ``rows`` (H,) and ``cols`` (W,) >= 0; returns (H,W)."""
    for axis, at in ((1, cols), (0, rows)):
        index = at.astype(np.intp)
        t = (at - index).astype(np.float32)
        size = grid.shape[axis]
        first, second = (np.take(grid, (index + k) % size, axis) for k in (0, 1))
        second -= first
        second *= t if axis else t[:, None]
        grid = first
        grid += second
    return grid


class Scene:
    """Camera, weather and pixel maps of a scene, at twice the final resolution.

    World coordinates are in metres: ``x`` to the right of the camera, ``y`` above the ground, ``z`` ahead.

    Args:
        rng: source of all random numbers.
        height: rows H of the final image.
        width: columns W of the final image.

    Attributes:
        mat: material of each pixel, (2H,2W) uint16.
        shade: brightness factor of each pixel, (2H,2W) float32.
        fog: share of the haze in each pixel, (2H,2W) float32 in [0, 1].
        leaf: noise for ragged outlines, (2H,2W) float32 in [-1, 1).
        grain: noise of the surfaces, in perspective on the ground, (2H,2W) float32 in about [-2, 2).
    """

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng, self.height, self.width = rng, 2 * height, 2 * width
        self.weather = pick(rng, _WEATHERS)
        self.focal = 1.3 * self.height
        self.horizon = self.height * between(rng, 0.29, 0.38)
        self.centre = self.width * between(rng, 0.38, 0.62)
        self.eye = between(rng, 2.3, 2.9)
        self.kerb = between(rng, 4.6, 6.4)  # half the width of the carriageway
        self.sun = pick(rng, (-1, 1))  # side of the street that is lit: -1 left, 1 right
        shape = (self.height, self.width)
        self.mat = np.zeros(shape, np.uint16)
        self.shade = np.ones(shape, np.float32)
        self.fog = np.zeros(shape, np.float32)
        self.materials: list[tuple[int, float, Colour]] = []
        self.rows = np.arange(self.height, dtype=np.float32) + np.float32(0.5)
        self.cols = np.arange(self.width, dtype=np.float32) + np.float32(0.5)
        self.distance: Floats = (self.focal * self.eye) / (self.rows - self.horizon).clip(0.5)  # of the ground

        self.leaf = self.noise(self.rows * (60 / self.height), self.cols * (60 / self.height))
        along = np.where(self.rows > self.horizon, self.distance, self.rows * (30 / self.height))
        self.grain = self.noise(along, self.cols * (30 / self.width))
        self.grain += rng.integers(0, 256, shape, np.uint8) * np.float32(1 / 160)
        self.grain += self.leaf * 0.5
        self.grain -= 0.8

    def noise(self, rows: Floats, cols: Floats) -> Floats:
        """Return value noise of two octaves in [-1, 1); the finer cells have size 1."""
        cells = np.arange(64, dtype=np.float32) * np.float32(0.25)
        grid = upsample(self.rng.random((16, 16), np.float32) * np.float32(1.2) - 1, cells, cells)
        return upsample(grid + self.rng.random((64, 64), np.float32) * np.float32(0.8), rows, cols)

    def px(self, x: float, z: float) -> float:
        """Return the column of a point ``x`` metres to the right and ``z`` metres ahead."""
        return self.centre + self.focal * x / z

    def py(self, y: float, z: float) -> float:
        """Return the row of a point ``y`` metres above the ground and ``z`` metres ahead."""
        return self.horizon + self.focal * (self.eye - y) / z

    def material(self, label: int, colour: Colour, rough: float = 0.08, glow: bool = False) -> int:
        """Register a material and return its number; a material that glows is not affected by the weather's light."""
        (r, g, b), (x, y, z) = colour, self.weather.light
        self.materials.append((label, rough, colour if glow else (r * x, g * y, b * z)))
        return len(self.materials) - 1

    def paint(self, part: tuple[slice, slice], mask: Mask, *, mat: int, z: float, shade: float | Floats = 1.0) -> None:
        """Set material, shade and fog in the pixels of ``part`` whose ``mask`` is true."""
        if mat == SHADOW:
            np.multiply(self.shade[part], shade, out=self.shade[part], where=mask)
            return
        for layer, value in ((self.mat, np.uint16(mat)), (self.fog, z / (z + self.weather.reach)), (self.shade, shade)):
            if mask is ALL:  # most boxes; several times faster than copying with a mask
                layer[part] = value
            else:
                np.copyto(layer[part], value, where=mask)

    def quad(
        self, span: _Span, first: _Span, last: _Span, *, mat: int, z: float, shade: float = 1.0, upright: bool = False
    ) -> None:
        """Fill a trapezoid.

        Args:
            span: first and last row, or column if ``upright``.
            first: left and right end in the first row, or top and bottom in the first column if ``upright``.
            last: the same in the last row or column.
            mat: material, or ``SHADOW``.
            z: distance in metres, for the haze.
            shade: brightness factor.
            upright: whether the two parallel edges are vertical.
        """
        along, across = (self.cols, self.rows) if upright else (self.rows, self.cols)
        a, b = max(0, ceil(span[0] - 0.5)), min(len(along), ceil(span[1] - 0.5))
        c = max(0, ceil(min(first[0], last[0]) - 0.5))
        d = min(len(across), ceil(max(first[1], last[1]) - 0.5))
        if a >= b or c >= d:
            return
        mask = ALL
        if first != last:
            t = (along[a:b, None] - span[0]) / (span[1] - span[0])
            mask = across[c:d] >= first[0] + (last[0] - first[0]) * t
            mask &= across[c:d] < first[1] + (last[1] - first[1]) * t
        part = (slice(a, b), slice(c, d))
        self.paint(part[::-1] if upright else part, mask.T if upright else mask, mat=mat, z=z, shade=shade)

    def box(self, left: float, right: float, low: float, high: float, *, z: float, mat: int, shade: float = 1.0) -> None:
        """Fill a rectangle in metres that faces the camera."""
        edges = (self.px(left, z), self.px(right, z))
        self.quad((self.py(high, z), self.py(low, z)), edges, edges, mat=mat, z=z, shade=shade)

    def bar(self, left: float, right: float, low: float, high: float, *, z: float, mat: int) -> None:
        """Fill a thin rectangle in metres, aligned to the pixels of the labels and at least one of them wide and high."""
        x, y = 2 * round(self.px(left, z) / 2), 2 * round(self.py(high, z) / 2)
        edges = (x, max(x + 2, 2 * round(self.px(right, z) / 2)))
        self.quad((y, max(y + 2, 2 * round(self.py(low, z) / 2))), edges, edges, mat=mat, z=z)

    def blob(self, x: float, y: float, z: float, *, rx: float, ry: float, mat: int, ragged: float = 0.0) -> None:
        """Fill an ellipse with half axes in metres; ``ragged`` > 0 roughens its outline and shades it like foliage."""
        scale, x, y = self.focal / z, self.px(x, z), self.py(y, z)
        rx, ry = max(rx * scale, 0.7), max(ry * scale, 0.7)
        a, b = max(0, floor(y - ry * 1.3)), min(self.height, ceil(y + ry * 1.3))
        c, d = max(0, floor(x - rx * 1.3)), min(self.width, ceil(x + rx * 1.3))
        if a >= b or c >= d:
            return
        part = (slice(a, b), slice(c, d))
        dx, dy, leaf = (self.cols[c:d] - x) / rx, (self.rows[a:b, None] - y) / ry, self.leaf[part]
        mask = dx * dx + dy * dy + leaf * ragged < 1
        shade = 0.95 - dy * 0.22 + dx * (0.15 * self.sun) + leaf * 0.25 if ragged else 1.0
        self.paint(part, mask, mat=mat, z=z, shade=shade)
