"""Procedurally drawn street scenes: the demonstration data that needs no download.

A scene is a small world in perspective: ground, facades, cars, people, trees, poles and lights have sizes in metres.
Each surface is drawn once into a map of *materials*, from which both the image (a colour per material, then shade,
grain and haze) and the labels (a class per material) follow, so that the two agree. The image is drawn at twice the
resolution and averaged; the labels are every second pixel of the same map.

Only sums, products, quotients and comparisons of IEEE floats touch the pixels (no ``exp``, no matrix product, no
drawing library): their results do not depend on the machine, hence neither do the bytes of a scene.
"""

from collections.abc import Callable, Sequence
from math import ceil, floor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

_T = TypeVar("_T")
_Colour = tuple[float, float, float]
_Span = tuple[float, float]
_Floats = NDArray[np.floating[Any]]  # float32 throughout; NumPy's stubs lose the width in products with a float
_Mask = NDArray[np.bool_]

SCENE_CLASSES: tuple[str, ...] = ("road", "sky", "building", "vegetation", "vehicle", "person", "pole", "light")
# The colours of Okabe and Ito, which colour-blind readers tell apart, and two greys of clearly different lightness
SCENE_PALETTE: tuple[tuple[int, int, int], ...] = (
    (84, 84, 92), (86, 180, 233), (210, 206, 198), (0, 158, 115),
    (0, 90, 170), (213, 94, 0), (240, 228, 66), (204, 121, 167),
)  # fmt: skip
_ROAD, _SKY, _BUILDING, _VEGETATION, _VEHICLE, _PERSON, _POLE, _LIGHT = range(8)
_VOID = 255
_ALL: _Mask = np.ones((1, 1), np.bool_)
_SHADOW = -1  # in place of a material: darken what has been drawn


class _Weather(NamedTuple):
    """Illumination of a scene; colours in 0..255."""

    light: _Colour  # factors of the colours of everything that does not glow
    zenith: _Colour
    haze: _Colour
    reach: float  # metres after which the haze covers one half
    shadow: float  # share of the light in a cast shadow
    lit: float  # share of lit windows


_WEATHERS = (
    _Weather((1.04, 1.00, 0.93), (88, 142, 208), (208, 222, 234), 420, 0.55, 0.06),  # a clear day
    _Weather((0.84, 0.87, 0.90), (150, 161, 176), (204, 208, 213), 230, 0.85, 0.12),  # overcast
    _Weather((0.70, 0.58, 0.59), (74, 80, 132), (238, 170, 124), 260, 0.75, 0.40),  # dusk
    _Weather((0.92, 0.89, 0.82), (186, 188, 186), (214, 210, 200), 75, 0.85, 0.12),  # haze
)
_FACADES: tuple[_Colour, ...] = (
    (168, 104, 84), (206, 190, 160), (150, 146, 142), (196, 160, 110), (118, 122, 132), (178, 186, 190), (140, 96, 88),
)  # fmt: skip
_FOLIAGE: tuple[_Colour, ...] = ((74, 104, 56), (94, 118, 62), (62, 90, 64), (112, 116, 60), (146, 112, 60))
_PAINTS: tuple[_Colour, ...] = (
    (212, 212, 210), (150, 154, 158), (52, 54, 58), (98, 102, 108), (150, 44, 40), (48, 74, 120), (170, 150, 120),
)  # fmt: skip
_CLOTHES: tuple[_Colour, ...] = (
    (60, 62, 74), (120, 110, 100), (150, 66, 60), (70, 92, 130), (176, 168, 150), (88, 100, 76), (44, 42, 46),
)  # fmt: skip
_SKINS: tuple[_Colour, ...] = ((224, 182, 150), (186, 136, 102), (118, 80, 58))
_SIGNALS: tuple[_Colour, ...] = ((255, 60, 44), (255, 186, 50), (70, 240, 130))

# Faces of a vehicle that look at the camera, far ones first, in metres:
# (role, half width, height and depth of the lower edge, the same of the upper edge)
_Panel = tuple[str, float, float, float, float, float, float]
_CAR: tuple[_Panel, ...] = (
    ("roof", 0.66, 1.42, 1.1, 0.64, 1.45, 2.9),
    ("glass", 0.80, 0.95, 0.5, 0.66, 1.42, 1.1),
    ("roof", 0.88, 0.90, 0.0, 0.84, 0.95, 0.5),
    ("body", 0.90, 0.25, 0.0, 0.88, 0.90, 0.0),
)
_VAN: tuple[_Panel, ...] = (
    ("roof", 0.88, 2.05, 0.1, 0.86, 2.05, 4.2),
    ("body", 0.95, 0.25, 0.0, 0.88, 2.05, 0.1),
    ("glass", 0.78, 1.20, 0.0, 0.74, 1.85, 0.1),
)
# Boxes on the near face of either: (role, left, right, low, high)
_FITTINGS: tuple[tuple[str, float, float, float, float], ...] = (
    ("tyre", -0.86, -0.62, 0.0, 0.3),
    ("tyre", 0.62, 0.86, 0.0, 0.3),
    ("trim", -0.90, 0.90, 0.25, 0.40),
    ("lamp", -0.86, -0.58, 0.60, 0.78),
    ("lamp", 0.58, 0.86, 0.60, 0.78),
    ("plate", -0.24, 0.24, 0.46, 0.57),
)
# A figure of 1.75 m: (role, low, high, left and right at the lower edge, the same at the upper edge)
_FIGURE: tuple[_Panel, ...] = (
    ("legs", 0.0, 0.86, -0.26, -0.11, -0.19, 0.02),
    ("legs", 0.0, 0.86, 0.11, 0.26, -0.02, 0.19),
    ("coat", 0.72, 1.42, -0.22, 0.22, -0.21, 0.21),
    ("sleeve", 0.75, 1.38, -0.29, -0.19, -0.24, -0.12),
    ("sleeve", 0.75, 1.38, 0.19, 0.29, 0.12, 0.24),
    ("coat", 1.42, 1.48, -0.21, 0.21, -0.09, 0.09),
)


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    """A uniform number in [low, high)."""
    return low + (high - low) * rng.random()


def _pick(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    """One of the options, all equally likely."""
    return options[int(rng.random() * len(options))]


def _mix(first: _Colour, second: _Colour, share: float) -> _Colour:
    """The colour that holds ``share`` of ``second`` and the rest of ``first``."""
    (a, b, c), (d, e, f) = first, second
    return a + (d - a) * share, b + (e - b) * share, c + (f - c) * share


def _frac(values: _Floats) -> _Floats:
    """The part of the values behind the decimal point, in [0, 1)."""
    return values - np.floor(values)


def _upsample(grid: _Floats, rows: _Floats, cols: _Floats) -> _Floats:
    """Bilinear samples (H, W) of a ``grid`` (h, w), repeated without end, at ``rows`` (H,) and ``cols`` (W,) >= 0."""
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


class _Scene:
    """Camera, weather and the maps that everything is drawn into, at twice the final resolution.

    World coordinates are metres: ``x`` to the right of the camera, ``y`` above the ground, ``z`` ahead.

    Attributes:
        mat: Material of each pixel, (2H, 2W) uint16.
        shade: Brightness factor of each pixel, (2H, 2W) float32.
        fog: Share of the haze in each pixel, (2H, 2W) float32 in [0, 1].
        leaf: Noise for ragged outlines, (2H, 2W) float32 in [-1, 1).
        grain: Noise of the surfaces, on the ground in perspective, (2H, 2W) float32 in about [-2, 2).
    """

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng, self.height, self.width = rng, 2 * height, 2 * width
        self.weather = _pick(rng, _WEATHERS)
        self.focal = 1.3 * self.height
        self.horizon = self.height * _between(rng, 0.29, 0.38)
        self.centre = self.width * _between(rng, 0.38, 0.62)
        self.eye = _between(rng, 2.3, 2.9)
        self.kerb = _between(rng, 4.6, 6.4)  # half the width of the carriageway
        self.sun = _pick(rng, (-1, 1))  # the side of the street that is lit
        shape = (self.height, self.width)
        self.mat = np.zeros(shape, np.uint16)
        self.shade = np.ones(shape, np.float32)
        self.fog = np.zeros(shape, np.float32)
        self.materials: list[tuple[int, float, _Colour]] = []
        self.rows = np.arange(self.height, dtype=np.float32) + np.float32(0.5)
        self.cols = np.arange(self.width, dtype=np.float32) + np.float32(0.5)
        self.distance: _Floats = (self.focal * self.eye) / (self.rows - self.horizon).clip(0.5)  # of the ground

        self.leaf = self.noise(self.rows * (60 / self.height), self.cols * (60 / self.height))
        along = np.where(self.rows > self.horizon, self.distance, self.rows * (30 / self.height))
        self.grain = self.noise(along, self.cols * (30 / self.width))
        self.grain += rng.integers(0, 256, shape, np.uint8) * np.float32(1 / 160)
        self.grain += self.leaf * 0.5
        self.grain -= 0.8

    def noise(self, rows: _Floats, cols: _Floats) -> _Floats:
        """Value noise of two octaves, in [-1, 1), whose finer cells have the size 1."""
        cells = np.arange(64, dtype=np.float32) * np.float32(0.25)
        grid = _upsample(self.rng.random((16, 16), np.float32) * np.float32(1.2) - 1, cells, cells)
        return _upsample(grid + self.rng.random((64, 64), np.float32) * np.float32(0.8), rows, cols)

    def px(self, x: float, z: float) -> float:
        """Column of a point ``x`` metres to the right and ``z`` ahead."""
        return self.centre + self.focal * x / z

    def py(self, y: float, z: float) -> float:
        """Row of a point ``y`` metres above the ground and ``z`` ahead."""
        return self.horizon + self.focal * (self.eye - y) / z

    def material(self, label: int, colour: _Colour, rough: float = 0.08, glow: bool = False) -> int:
        """Register a material and return its number; one that glows is independent of the illumination."""
        (r, g, b), (x, y, z) = colour, self.weather.light
        self.materials.append((label, rough, colour if glow else (r * x, g * y, b * z)))
        return len(self.materials) - 1

    def paint(self, part: tuple[slice, slice], mask: _Mask, mat: int, z: float, shade: float | _Floats = 1.0) -> None:
        """Set the three maps where the mask of that part of the picture is true."""
        if mat == _SHADOW:
            np.multiply(self.shade[part], shade, out=self.shade[part], where=mask)
            return
        for layer, value in ((self.mat, np.uint16(mat)), (self.fog, z / (z + self.weather.reach)), (self.shade, shade)):
            if mask is _ALL:  # most boxes; several times faster than with a mask
                layer[part] = value
            else:
                np.copyto(layer[part], value, where=mask)

    def quad(
        self, span: _Span, first: _Span, last: _Span, mat: int, z: float, shade: float = 1.0, upright: bool = False
    ) -> None:
        """Fill a trapezoid.

        Args:
            span: First and last row, or column where ``upright``.
            first: Left and right end in the first row, or top and bottom in the first column.
            last: The same in the last row or column.
            mat: Material, or ``_SHADOW``.
            z: Distance in metres, for the haze.
            shade: Brightness factor.
            upright: Whether the two parallel edges stand.
        """
        along, across = (self.cols, self.rows) if upright else (self.rows, self.cols)
        a, b = max(0, ceil(span[0] - 0.5)), min(len(along), ceil(span[1] - 0.5))
        c = max(0, ceil(min(first[0], last[0]) - 0.5))
        d = min(len(across), ceil(max(first[1], last[1]) - 0.5))
        if a >= b or c >= d:
            return
        mask = _ALL
        if first != last:
            t = (along[a:b, None] - span[0]) / (span[1] - span[0])
            mask = across[c:d] >= first[0] + (last[0] - first[0]) * t
            mask &= across[c:d] < first[1] + (last[1] - first[1]) * t
        part = (slice(a, b), slice(c, d))
        self.paint(part[::-1] if upright else part, mask.T if upright else mask, mat, z, shade)

    def box(self, left: float, right: float, low: float, high: float, z: float, mat: int, shade: float = 1.0) -> None:
        """Fill an upright rectangle given in metres that faces the camera."""
        edges = (self.px(left, z), self.px(right, z))
        self.quad((self.py(high, z), self.py(low, z)), edges, edges, mat, z, shade)

    def bar(self, left: float, right: float, low: float, high: float, z: float, mat: int) -> None:
        """Fill the same on the grid of the labels, at least one of their pixels wide and high: for thin objects."""
        x, y = 2 * round(self.px(left, z) / 2), 2 * round(self.py(high, z) / 2)
        edges = (x, max(x + 2, 2 * round(self.px(right, z) / 2)))
        self.quad((y, max(y + 2, 2 * round(self.py(low, z) / 2))), edges, edges, mat, z)

    def blob(self, x: float, y: float, z: float, rx: float, ry: float, mat: int, ragged: float = 0.0) -> None:
        """Fill an ellipse with half axes in metres; ``ragged`` > 0 frays its outline and shades it like foliage."""
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
        self.paint(part, mask, mat, z, shade)


def _draw_sky(s: _Scene) -> None:
    """A gradient from the zenith to the haze at the horizon, with clouds of the colour of the haze."""
    end = ceil(s.horizon)
    t = s.rows[:end, None] / s.horizon
    clouds = s.noise(s.rows[:end] * (24 / s.horizon), s.cols * (20 / s.width)) * 1.2 + s.leaf[:end] * 0.2
    clouds += _between(s.rng, -0.3, 0.7)
    s.mat[:end] = s.material(_SKY, s.weather.zenith, 0.015, glow=True)
    s.fog[:end] = np.maximum(t * t, clouds.clip(0, 1) * 0.75)


def _draw_ground(s: _Scene) -> None:
    """Carriageway with marks and crossings, kerbs and slabs of the pavement; all of it is ``road``."""
    rng, start = s.rng, ceil(s.horizon)
    grey, pave, warm = _between(rng, 84, 118), _between(rng, 128, 168), _between(rng, 0.88, 1)
    base = s.material(_ROAD, (grey, grey * 0.99, grey * 1.01), 0.13)
    s.material(_ROAD, (pave, pave * (1 + warm) / 2, pave * warm), 0.1)
    s.material(_ROAD, (pave * 1.1, pave * 1.1, pave * 1.08), 0.1)
    s.material(_ROAD, (206, 206, 198), 0.14)

    z = s.distance[start:, None]
    x = (s.cols - s.centre) * (z / s.focal)
    off = np.abs(x)
    kind = (off > s.kerb).astype(np.uint16)
    kind[np.abs(off - s.kerb) < 0.14] = 2
    marks = (off < _between(rng, 0.06, 0.12)) & (_frac(z / _between(rng, 6, 10)) < 0.45)
    if rng.random() < 0.6:
        marks |= np.abs(off - (s.kerb - 0.5)) < 0.07
    if rng.random() < 0.5:
        marks |= (np.abs(z - _between(rng, 7, 26)) < 1.5) & (_frac(x) < 0.5) & (off < s.kerb - 0.3)
    kind[marks] = 3
    s.mat[start:] = kind + np.uint16(base)
    s.fog[start:] = z / (z + s.weather.reach)
    near = start + int(np.searchsorted(-z[:, 0], -25.0))  # slabs further away are smaller than a pixel
    x, z, off = x[near - start :], z[near - start :], off[near - start :]
    joints = (off > s.kerb + 0.2) & ((_frac(x / 1.2) < 0.05) | (_frac(z / 1.2) < 0.07))
    s.shade[near:][joints] = 0.88
    s.shade[near:][np.abs(off - s.kerb * 0.5) < 0.7] = 0.95  # worn by tyres


class _Block(NamedTuple):
    """A house (or hedge) of the street: the first of its six materials and its measures."""

    first: int
    top: float  # metres
    storey: float  # metres
    bay: float  # metres from window to window
    wide: float  # half width of a window as a share of a bay; negative: no windows
    tall: float  # half height of a window as a share of a storey
    ragged: float  # how far the upper edge frays, metres
    tone: float  # brightness


def _block(s: _Scene, tone: float) -> _Block:
    """Choose the measures and register the materials of a house or, sometimes, of a hedge."""
    rng = s.rng
    planted = rng.random() < 0.2
    label = _VEGETATION if planted else _BUILDING
    wall = _pick(rng, _FOLIAGE) if planted else _mix(_pick(rng, _FACADES), (150, 148, 144), _between(rng, 0, 0.5))
    first = s.material(label, wall, 0.3 if planted else 0.07)
    if planted:
        return _Block(first, _between(rng, 2.5, 8), 3, 3, -1, 0.3, 1.2, tone)
    s.material(label, _mix(wall, _pick(rng, ((225, 222, 214), (90, 88, 86))), 0.6))  # frames, cornices, downpipes
    s.material(label, (58, 64, 74))  # dark panes
    s.material(label, _mix(s.weather.zenith, (60, 64, 70), 0.5), glow=True)  # panes that mirror the sky
    s.material(label, _mix((255, 214, 140), wall, _between(rng, 0, 0.4)), glow=True)  # lit panes
    s.material(label, _pick(rng, _SIGNALS + _PAINTS), glow=True)  # letters of a shop sign, not unlike a traffic light
    wide, tall = _between(rng, 0.2, 0.34), _between(rng, 0.22, 0.34)
    return _Block(first, _between(rng, 6, 15), _between(rng, 2.8, 3.5), _between(rng, 1.9, 3.4), wide, tall, 0, tone)


def _draw_walls(s: _Scene) -> None:
    """The houses on both sides of the street and the one that closes it, and the shadow that they cast."""
    end = _between(s.rng, 60, 115)
    # per column: distance, metres along the wall, number of the block
    z, along, block = np.empty_like(s.cols), np.empty_like(s.cols), np.empty(s.width, np.intp)
    blocks: list[_Block] = []
    for side in (-1, 1):
        wall, edges, first = s.kerb + _between(s.rng, 3.5, 6.5), [8.0], len(blocks)
        while edges[-1] < end:
            edges.append(edges[-1] + _between(s.rng, 8, 18))
        blocks += [_block(s, 1.08 if side == s.sun else 0.72 + 0.25 * s.weather.shadow) for _ in edges]
        starts = np.asarray(edges[1:], np.float32)
        here = (s.cols - s.centre) * side > 0
        z[here] = along[here] = (s.focal * wall) / np.abs(s.cols[here] - s.centre).clip(0.25)
        block[here] = first + np.searchsorted(starts, z[here], side="right")
        for start, house in reversed(list(zip(edges, blocks[first:], strict=True))):
            if house.wide > 0 and start < end:  # the gable that rises above a lower neighbour
                left, right = sorted((wall * side, (wall + 9) * side))
                s.box(left, right, 0, house.top, start, house.first, 0.9)
        if side != s.sun:
            tops = np.asarray([house.top for house in blocks[first:]], np.float32)
            reach = tops[np.searchsorted(starts, s.distance, side="right")] * _between(s.rng, 0.2, 0.8)
            limit = s.centre * side + (wall - reach) * s.focal / s.distance
            dark = (s.cols * side > limit[:, None]) & (s.rows[:, None] > s.horizon)
            np.multiply(s.shade, s.weather.shadow, out=s.shade, where=dark)
    blocks.append(_block(s, 0.95))
    closed = z >= end
    block[closed], z[closed] = len(blocks) - 1, end
    along[closed] = np.abs(s.cols[closed] - s.centre) * (end / s.focal)
    _draw_facades(s, z, along, np.asarray(blocks, np.float32)[block].T)


def _draw_facades(s: _Scene, z: _Floats, along: _Floats, table: _Floats) -> None:
    """Draw walls, windows, shops and cornices of all columns at once.

    Args:
        s: The scene.
        z: Distance of the wall in each column, (2W,).
        along: Metres along the wall, (2W,).
        table: Fields of :class:`_Block` by column, (8, 2W).
    """
    first, top, storey, bay, wide, tall, ragged, tone = table
    rows = min(s.height, ceil(s.horizon + s.focal * s.eye / float(z.min())) + 1)
    y = s.eye + (s.horizon - s.rows[:rows, None]) * (z / s.focal)  # metres above the ground
    level = y / storey
    floors = np.floor(level)
    up, across = np.abs(level - floors - 0.5), np.abs(_frac(along / bay) - 0.5)
    house = wide > 0
    glazed = house & (z < 100)  # further away, windows are smaller than a pixel

    panes = 2 + (s.rng.random((16, 64)) < 0.3).astype(np.uint16)
    panes[s.rng.random((16, 64)) < s.weather.lit] = 4
    pane = np.take(panes, (floors * 64 + (along / bay).astype(np.int32) % 64).astype(np.int32), mode="clip")
    kind = ((up < tall + 0.05) & (across < wide + 0.04) & glazed).astype(np.uint16)
    np.copyto(kind, pane, where=(up < tall) & (across < wide) & glazed)
    shop = (floors == 0) & glazed
    np.copyto(kind, pane, where=shop & (y > 0.4) & (y < 2.4) & (across < 0.42))
    np.copyto(kind, 5, where=shop & (np.abs(y - 2.65) < 0.18) & (_frac(along * 1.4) < 0.4))
    np.copyto(kind, 1, where=(house & (top - y < 0.45)) | (glazed & (across > 0.47)))

    leaf = s.leaf[:rows]
    seen = (y > 0) & (y < top + leaf * ragged)
    kind += first.astype(np.uint16)
    np.copyto(s.mat[:rows], kind, where=seen)
    np.copyto(s.fog[:rows], z / (z + s.weather.reach), where=seen)
    np.copyto(s.shade[:rows], tone + leaf * (ragged * 0.15), where=seen)


def _vehicle(s: _Scene, x: float, z: float) -> None:
    """A car or van: its rear on the right of the road, its front on the left, and the side that faces the camera."""
    rng, side = s.rng, (-1 if x > 0 else 1)
    van, size = rng.random() < 0.25, _between(rng, 0.92, 1.1)
    paint = _mix(_pick(rng, _PAINTS), (128, 128, 130), _between(rng, 0, 0.3))
    mats = {
        "body": s.material(_VEHICLE, paint),
        "roof": s.material(_VEHICLE, _mix(paint, s.weather.zenith, 0.3)),
        "glass": s.material(_VEHICLE, _mix((44, 50, 58), s.weather.zenith, 0.15)),
        "tyre": s.material(_VEHICLE, (34, 34, 36)),
        "trim": s.material(_VEHICLE, _mix(paint, (60, 60, 62), 0.6)),
        "lamp": s.material(_VEHICLE, (196, 40, 36) if x > 0 else (240, 238, 220), glow=rng.random() < 0.4),
        "plate": s.material(_VEHICLE, (214, 210, 180)),
    }

    def flank(role: str, out: float, near: float, far: float, low: float, high: float, shade: float = 1.0) -> None:
        ends = [(s.px(x + side * out * size, d), s.py(high * size, d), s.py(low * size, d))
                for d in (z + near * size, z + far * size)]  # fmt: skip
        (a, *first), (b, *last) = sorted(ends)
        s.quad((a, b), (first[0], first[1]), (last[0], last[1]), mats[role], z, shade, upright=True)

    if abs(x) > 0.95 * size:  # else the camera looks at the rear only
        tone = 1.05 if side != s.sun else 0.75
        flank("body", 0.9, 0, 4.2, 0.25, 2.05 if van else 0.9, tone)
        flank("body", 0.83, 0.2, 4.1, 0.6, 0.97, tone)
        flank("glass", 0.9 if van else 0.76, 0.7, 3.4, 1.2 if van else 0.9, 1.85 if van else 1.41)
        flank("tyre", 0.9, 0.45, 1.1, 0, 0.55)
        flank("tyre", 0.9, 3.1, 3.7, 0, 0.55)
    for role, half, low, depth, half2, high, depth2 in _VAN if van else _CAR:
        near, far = z + depth * size, z + depth2 * size
        upper = (s.px(x - half2 * size, far), s.px(x + half2 * size, far))
        lower = (s.px(x - half * size, near), s.px(x + half * size, near))
        s.quad((s.py(high * size, far), s.py(low * size, near)), upper, lower, mats[role], z)
    for role, left, right, low, high in _FITTINGS if z < 45 else ():  # further away, smaller than a pixel
        s.box(x + left * size, x + right * size, low * size, high * size, z, mats[role])


def _person(s: _Scene, x: float, z: float) -> None:
    """A standing or walking figure."""
    rng = s.rng
    size, turn, stride = _between(rng, 0.85, 1.08), _pick(rng, (-1, 1)), _between(rng, 0.4, 1.3)
    coat = _pick(rng, _CLOTHES)
    mats = {
        "legs": s.material(_PERSON, _mix(_pick(rng, _CLOTHES), (60, 62, 70), 0.6)),
        "coat": s.material(_PERSON, coat),
        "sleeve": s.material(_PERSON, _mix(coat, (30, 30, 34), 0.3)),
    }
    for role, low, high, a, b, a2, b2 in _FIGURE:
        wide = size * turn * (stride if role == "legs" else 1)
        left, right = sorted((s.px(x + a * wide, z), s.px(x + b * wide, z)))
        left2, right2 = sorted((s.px(x + a2 * size * turn, z), s.px(x + b2 * size * turn, z)))
        s.quad((s.py(high * size, z), s.py(low * size, z)), (left2, right2), (left, right), mats[role], z)
    hair = s.material(_PERSON, _mix((40, 34, 30), (150, 130, 110), rng.random()))
    s.blob(x, 1.62 * size, z, 0.12 * size, 0.15 * size, hair)
    s.blob(x + 0.03 * turn, 1.59 * size, z, 0.085 * size, 0.11 * size, s.material(_PERSON, _pick(rng, _SKINS)))


def _tree(s: _Scene, x: float, z: float) -> None:
    """A tree, a shrub, or a sapling whose trunk resembles a pole."""
    rng = s.rng
    trunk, low, high, small, large = _pick(rng, _TREES)
    radius, height = _between(rng, small, large), _between(rng, low, high)
    if trunk > 0:
        bark = _mix((96, 84, 70), (120, 118, 116), rng.random())
        s.bar(x - trunk, x + trunk, 0, height, z, s.material(_VEGETATION, bark, 0.15))
    s.blob(x, height, z, radius, radius * 0.9, s.material(_VEGETATION, _pick(rng, _FOLIAGE), 0.22), ragged=0.45)


def _pole(s: _Scene, x: float, z: float) -> None:
    """A street lamp, a traffic light, a bare mast or a bollard; greyish, like what stands behind it."""
    rng = s.rng
    kind, low, high = _pick(rng, _POLES)
    height, half = _between(rng, low, high), _between(rng, 0.05, 0.085)
    grey = _mix((74, 76, 78), (160, 160, 158), rng.random())
    behind = _mix(_pick(rng, _FACADES), _pick(rng, _FOLIAGE), rng.random())
    metal = s.material(_POLE, _mix(grey, behind, 0.45))
    s.bar(x - half, x + half, 0, height, z, metal)
    if kind == "lamp":
        tip = x + _between(rng, 0.8, 1.5) * (-1 if x > 0 else 1)
        s.bar(min(x, tip), max(x, tip), height - 0.08, height, z, metal)
        on = rng.random() < 0.1 + 1.5 * s.weather.lit
        dull = _mix((222, 222, 212), (150, 152, 150), rng.random())
        lamp = s.material(_LIGHT, (255, 236, 186) if on else dull, glow=on)
        s.bar(tip - 0.3, tip + 0.3, height - 0.16, height + 0.06, z, lamp)
    elif kind == "signal":
        s.bar(x - 0.17, x + 0.17, height, height + 0.85, z, s.material(_LIGHT, (36, 38, 38)))
        phase = int(rng.integers(3))
        s.blob(x, height + 0.7 - 0.27 * phase, z, 0.14, 0.14, s.material(_LIGHT, _SIGNALS[phase], glow=True))


def _clutter(s: _Scene, x: float, z: float) -> None:
    """A bin or crate, which has no class."""
    rng = s.rng
    colour = _mix(_pick(rng, _PAINTS), _pick(rng, _FOLIAGE), rng.random())
    half, height = _between(rng, 0.2, 0.5), _between(rng, 0.5, 1.1)
    s.box(x - half, x + half, 0, height, z, s.material(_VOID, colour, 0.12))
    s.box(x - half, x + half, height * 0.85, height, z, s.material(_VOID, _mix(colour, (40, 40, 40), 0.4)))


# (half width of the trunk, least and greatest height of the crown's middle, least and greatest radius), in metres
_TREES = ((0.06, 2.6, 3.6, 0.5, 0.8), (0.0, 0.5, 0.9, 0.6, 1.2), (0.16, 3.4, 5.2, 1.3, 2.1), (0.13, 3.2, 4.4, 1.2, 1.8))
_POLES = (("lamp", 5.0, 7.0), ("lamp", 4.2, 6.0), ("signal", 2.7, 3.3), ("mast", 2.4, 6.0), ("bollard", 0.9, 1.2))
_Draw = Callable[[_Scene, float, float], None]
# What stands beside the kerbs: (how it is drawn, probability that a scene has any, most in a scene, nearest and
# farthest, least and greatest offset outwards from the kerb, half width and length of its shadow), in metres
_BESIDE: tuple[tuple[_Draw, float, int, float, float, float, float, float, float], ...] = (
    (_person, 0.85, 8, 10, 32, 0.3, 2.8, 0.3, 0.6),
    (_person, 0.4, 3, 9, 26, -4.5, 0, 0.3, 0.6),
    (_tree, 0.9, 9, 13, 70, 0.5, 2.8, 1.2, 1.5),
    (_pole, 0.9, 7, 12, 50, 0.4, 1, 0.15, 0.5),
    (_clutter, 0.7, 4, 12, 40, 0.4, 2.8, 0.4, 0.4),
)


def _draw_things(s: _Scene) -> None:
    """Place vehicles in four lanes and the rest on the pavements; draw all shadows, then from far to near."""
    rng = s.rng
    things: list[tuple[float, float, float, float, _Draw]] = []
    for lane in (-0.8, -0.3, 0.3, 0.8):
        z = _between(rng, 8, 38)
        while z < 80:
            if rng.random() < 0.6:
                things.append((z, lane * s.kerb + _between(rng, -0.2, 0.2), 1.0, 4.3, _vehicle))
            z += _between(rng, 7, 30)
    for draw, chance, most, near, far, low, high, half, length in _BESIDE:
        for _ in range(int(rng.integers(1, most + 1)) if rng.random() < chance else 0):
            z, x = near + (far - near) * rng.random() * rng.random(), s.kerb + _between(rng, low, high)
            things.append((z, x * _pick(rng, (-1, 1)), half, length, draw))
    reach = 2.2  # metres; no object is wider to either side
    things = [t for t in things if s.px(t[1] + reach, t[0] + t[3]) > 0 and s.px(t[1] - reach, t[0] + t[3]) < s.width]
    things.sort(key=lambda thing: -thing[0])
    for z, x, half, length, _ in things:
        back, front = z + length, z - 0.15
        top, bottom = s.py(0, back), s.py(0, front)
        lean = (top - bottom) * s.sun  # away from the sun
        edge = (s.px(x - half, back) + lean, s.px(x + half, back) + lean)
        s.quad((top, bottom), edge, (s.px(x - half, front), s.px(x + half, front)), _SHADOW, z, s.weather.shadow * 0.7)
    for z, x, _, _, draw in things:
        draw(s, x, z)


def _label(s: _Scene) -> NDArray[np.uint8]:
    """The classes at the final resolution; outlines of vehicles are void, at the expense of common classes only."""
    labels = np.asarray([label for label, _, _ in s.materials], np.uint8)[s.mat[::2, ::2]]
    vehicle = labels == _VEHICLE
    near = vehicle.copy()
    near[1:] |= vehicle[:-1]
    near[:-1] |= vehicle[1:]
    near[:, 1:] |= vehicle[:, :-1]
    near[:, :-1] |= vehicle[:, 1:]
    labels[near & (labels < _VEHICLE)] = _VOID
    return labels


def _halve(full: _Floats) -> _Floats:
    """Sums of the blocks of 2x2 pixels."""
    rows = full[::2] + full[1::2]
    halved: _Floats = rows[:, ::2] + rows[:, 1::2]
    return halved


def _develop(s: _Scene) -> NDArray[np.uint8]:
    """The image: colour, shade and grain of the materials, haze, then blur and noise of the camera."""
    rng, index = s.rng, s.mat.astype(np.intp)
    table = np.asarray([(rough, *colour) for _, rough, colour in s.materials], np.float32).T.copy()
    gain, blur, noise = _between(rng, 0.85, 1.1) / 4, _between(rng, 0.05, 0.18), _between(rng, 3, 8) / 104
    # in place throughout: at this size fresh memory costs as much as the arithmetic
    shade, full = np.take(table[0], index), np.empty_like(s.shade)
    shade *= s.grain
    shade += 1
    shade *= s.shade
    shade *= np.subtract(gain, np.multiply(s.fog, gain, out=full), out=full)
    fog = _halve(s.fog) * gain
    image = np.empty((*fog.shape, 3), np.uint8)
    static = rng.integers(0, 256, (2, 3, *fog.shape), np.uint8)
    for channel in range(3):
        np.take(table[channel + 1], index, out=full, mode="clip")
        full *= shade
        plane = _halve(full)
        plane += fog * s.weather.haze[channel]
        plane[1:-1] += (plane[:-2] + plane[2:] - 2 * plane[1:-1]) * blur
        plane[:, 1:-1] += (plane[:, :-2] + plane[:, 2:] - 2 * plane[:, 1:-1]) * blur
        grit = static[0, channel].astype(np.int16) - static[1, channel]  # triangular, its deviation is 104
        plane += grit * np.float32(noise)
        image[..., channel] = (plane + 0.5).clip(0, 255)
    return image


def draw_scene(seed: Sequence[int], height: int = 128, width: int = 192) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one street scene.

    Args:
        seed: Non-negative integers; the same ones give the same bytes on every machine. Use tuples of one length:
            for NumPy's SeedSequence a zero at the end adds nothing, (1,) and (1, 0) are one seed.
        height: Rows of the image, from about 32.
        width: Columns of the image, from about 32.

    Returns:
        The image, (height, width, 3) uint8 RGB, and its labels, (height, width) uint8: an index into
        :data:`SCENE_CLASSES`, or 255 where a pixel has no label (outlines of vehicles, clutter).
    """
    scene = _Scene(np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(seed)))), height, width)
    for draw in (_draw_sky, _draw_ground, _draw_walls, _draw_things):
        draw(scene)
    return _develop(scene), _label(scene)
