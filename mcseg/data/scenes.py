"""Procedurally drawn street scenes, the demonstration data that needs no download.

A scene is a small world in perspective: ground, facades, cars, people, trees, poles and lights have sizes in metres.
Each surface is drawn once into a map of *materials*. Both the image (a colour per material, then shade, grain and haze)
and the labels (a class per material) are computed from this map, so that the two agree. The image is drawn at twice the
resolution and averaged; the labels are every second pixel of the map.
"""

from collections.abc import Callable, Sequence
from math import ceil
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mcseg.data.canvas import SHADOW, Colour, Floats, Scene, between, frac, mix, pick

SCENE_CLASSES: tuple[str, ...] = ("road", "sky", "building", "vegetation", "vehicle", "person", "pole", "light")
# Colours of Okabe and Ito, which colour-blind readers can distinguish, and two greys of clearly different lightness
SCENE_PALETTE: tuple[tuple[int, int, int], ...] = (
    (84, 84, 92), (86, 180, 233), (210, 206, 198), (0, 158, 115),
    (0, 90, 170), (213, 94, 0), (240, 228, 66), (204, 121, 167),
)  # fmt: skip
_ROAD, _SKY, _BUILDING, _VEGETATION, _VEHICLE, _PERSON, _POLE, _LIGHT = range(8)
_VOID = 255

_FACADES: tuple[Colour, ...] = (
    (168, 104, 84), (206, 190, 160), (150, 146, 142), (196, 160, 110), (118, 122, 132), (178, 186, 190), (140, 96, 88),
)  # fmt: skip
_FOLIAGE: tuple[Colour, ...] = ((74, 104, 56), (94, 118, 62), (62, 90, 64), (112, 116, 60), (146, 112, 60))
_PAINTS: tuple[Colour, ...] = (
    (212, 212, 210), (150, 154, 158), (52, 54, 58), (98, 102, 108), (150, 44, 40), (48, 74, 120), (170, 150, 120),
)  # fmt: skip
_CLOTHES: tuple[Colour, ...] = (
    (60, 62, 74), (120, 110, 100), (150, 66, 60), (70, 92, 130), (176, 168, 150), (88, 100, 76), (44, 42, 46),
)  # fmt: skip
_SKINS: tuple[Colour, ...] = ((224, 182, 150), (186, 136, 102), (118, 80, 58))
_SIGNALS: tuple[Colour, ...] = ((255, 60, 44), (255, 186, 50), (70, 240, 130))

# Faces of a vehicle towards the camera, far ones first, in metres:
# (role, then half width, height and depth of the lower edge, then of the upper edge)
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
# Boxes on the near face of cars and vans, in metres: (role, left, right, low, high)
_FITTINGS: tuple[tuple[str, float, float, float, float], ...] = (
    ("tyre", -0.86, -0.62, 0.0, 0.3),
    ("tyre", 0.62, 0.86, 0.0, 0.3),
    ("trim", -0.90, 0.90, 0.25, 0.40),
    ("lamp", -0.86, -0.58, 0.60, 0.78),
    ("lamp", 0.58, 0.86, 0.60, 0.78),
    ("plate", -0.24, 0.24, 0.46, 0.57),
)
# A figure of 1.75 m: (role, low, high, then left and right end of the lower edge, then of the upper edge)
_FIGURE: tuple[_Panel, ...] = (
    ("legs", 0.0, 0.86, -0.26, -0.11, -0.19, 0.02),
    ("legs", 0.0, 0.86, 0.11, 0.26, -0.02, 0.19),
    ("coat", 0.72, 1.42, -0.22, 0.22, -0.21, 0.21),
    ("sleeve", 0.75, 1.38, -0.29, -0.19, -0.24, -0.12),
    ("sleeve", 0.75, 1.38, 0.19, 0.29, 0.12, 0.24),
    ("coat", 1.42, 1.48, -0.21, 0.21, -0.09, 0.09),
)


def _draw_sky(s: Scene) -> None:
    """Draw a gradient from the zenith to the haze at the horizon, with clouds in the colour of the haze."""
    end = ceil(s.horizon)
    t = s.rows[:end, None] / s.horizon
    clouds = s.noise(s.rows[:end] * (24 / s.horizon), s.cols * (20 / s.width)) * 1.2 + s.leaf[:end] * 0.2
    clouds += between(s.rng, -0.3, 0.7)
    s.mat[:end] = s.material(_SKY, s.weather.zenith, 0.015, glow=True)
    s.fog[:end] = np.maximum(t * t, clouds.clip(0, 1) * 0.75)


def _draw_ground(s: Scene) -> None:
    """Draw the carriageway with markings and crossings, kerbs and paving slabs; all of it has the class ``road``."""
    rng, start = s.rng, ceil(s.horizon)
    grey, pave, warm = between(rng, 84, 118), between(rng, 128, 168), between(rng, 0.88, 1)
    base = s.material(_ROAD, (grey, grey * 0.99, grey * 1.01), 0.13)
    s.material(_ROAD, (pave, pave * (1 + warm) / 2, pave * warm), 0.1)
    s.material(_ROAD, (pave * 1.1, pave * 1.1, pave * 1.08), 0.1)
    s.material(_ROAD, (206, 206, 198), 0.14)

    z = s.distance[start:, None]
    x = (s.cols - s.centre) * (z / s.focal)
    off = np.abs(x)
    kind = (off > s.kerb).astype(np.uint16)
    kind[np.abs(off - s.kerb) < 0.14] = 2
    marks = (off < between(rng, 0.06, 0.12)) & (frac(z / between(rng, 6, 10)) < 0.45)
    if rng.random() < 0.6:
        marks |= np.abs(off - (s.kerb - 0.5)) < 0.07
    if rng.random() < 0.5:
        marks |= (np.abs(z - between(rng, 7, 26)) < 1.5) & (frac(x) < 0.5) & (off < s.kerb - 0.3)
    kind[marks] = 3
    s.mat[start:] = kind + np.uint16(base)
    s.fog[start:] = z / (z + s.weather.reach)
    near = start + int(np.searchsorted(-z[:, 0], -25.0))  # more distant slabs are smaller than a pixel
    x, z, off = x[near - start :], z[near - start :], off[near - start :]
    joints = (off > s.kerb + 0.2) & ((frac(x / 1.2) < 0.05) | (frac(z / 1.2) < 0.07))
    s.shade[near:][joints] = 0.88
    s.shade[near:][np.abs(off - s.kerb * 0.5) < 0.7] = 0.95  # worn by tyres


class _Block(NamedTuple):
    """A house or hedge of the street: the first of its six materials and its dimensions."""

    first: int
    top: float  # metres
    storey: float  # metres
    bay: float  # metres from window to window
    wide: float  # half width of a window as a share of a bay; negative without windows
    tall: float  # half height of a window as a share of a storey
    ragged: float  # roughness of the upper edge, metres
    tone: float  # brightness


def _block(s: Scene, tone: float) -> _Block:
    """Draw the dimensions and register the materials of a house or, with probability 0.2, a hedge."""
    rng = s.rng
    planted = rng.random() < 0.2
    label = _VEGETATION if planted else _BUILDING
    wall = pick(rng, _FOLIAGE) if planted else mix(pick(rng, _FACADES), (150, 148, 144), between(rng, 0, 0.5))
    first = s.material(label, wall, 0.3 if planted else 0.07)
    if planted:
        return _Block(first, between(rng, 2.5, 8), 3, 3, -1, 0.3, 1.2, tone)
    s.material(label, mix(wall, pick(rng, ((225, 222, 214), (90, 88, 86))), 0.6))  # frames, cornices, downpipes
    s.material(label, (58, 64, 74))  # dark panes
    s.material(label, mix(s.weather.zenith, (60, 64, 70), 0.5), glow=True)  # panes that reflect the sky
    s.material(label, mix((255, 214, 140), wall, between(rng, 0, 0.4)), glow=True)  # lit panes
    s.material(label, pick(rng, _SIGNALS + _PAINTS), glow=True)  # letters of a shop sign, similar to a traffic light
    wide, tall = between(rng, 0.2, 0.34), between(rng, 0.22, 0.34)
    return _Block(first, between(rng, 6, 15), between(rng, 2.8, 3.5), between(rng, 1.9, 3.4), wide, tall, 0, tone)


def _draw_walls(s: Scene) -> None:
    """Draw the houses on both sides and at the end of the street, and the shadow that they cast."""
    end = between(s.rng, 60, 115)
    # Per column: distance, metres along the wall, index of the block
    z, along, block = np.empty_like(s.cols), np.empty_like(s.cols), np.empty(s.width, np.intp)
    blocks: list[_Block] = []
    for side in (-1, 1):
        wall, edges, first = s.kerb + between(s.rng, 3.5, 6.5), [8.0], len(blocks)
        while edges[-1] < end:
            edges.append(edges[-1] + between(s.rng, 8, 18))
        blocks += [_block(s, 1.08 if side == s.sun else 0.72 + 0.25 * s.weather.shadow) for _ in edges]
        starts = np.asarray(edges[1:], np.float32)
        here = (s.cols - s.centre) * side > 0
        z[here] = along[here] = (s.focal * wall) / np.abs(s.cols[here] - s.centre).clip(0.25)
        block[here] = first + np.searchsorted(starts, z[here], side="right")
        for start, house in reversed(list(zip(edges, blocks[first:], strict=True))):
            if house.wide > 0 and start < end:  # the gable above a lower neighbour
                left, right = sorted((wall * side, (wall + 9) * side))
                s.box(left, right, 0, house.top, z=start, mat=house.first, shade=0.9)
        if side != s.sun:
            tops = np.asarray([house.top for house in blocks[first:]], np.float32)
            reach = tops[np.searchsorted(starts, s.distance, side="right")] * between(s.rng, 0.2, 0.8)
            limit = s.centre * side + (wall - reach) * s.focal / s.distance
            dark = (s.cols * side > limit[:, None]) & (s.rows[:, None] > s.horizon)
            np.multiply(s.shade, s.weather.shadow, out=s.shade, where=dark)
    blocks.append(_block(s, 0.95))
    closed = z >= end
    block[closed], z[closed] = len(blocks) - 1, end
    along[closed] = np.abs(s.cols[closed] - s.centre) * (end / s.focal)
    _draw_facades(s, z, along, np.asarray(blocks, np.float32)[block].T)


def _draw_facades(s: Scene, z: Floats, along: Floats, table: Floats) -> None:
    """Draw walls, windows, shops and cornices of all columns at once.

    Args:
        s: the scene.
        z: distance of the wall in each column, (2W,).
        along: metres along the wall, (2W,).
        table: fields of :class:`_Block` in each column, (8,2W).
    """
    first, top, storey, bay, wide, tall, ragged, tone = table
    rows = min(s.height, ceil(s.horizon + s.focal * s.eye / float(z.min())) + 1)
    y = s.eye + (s.horizon - s.rows[:rows, None]) * (z / s.focal)  # metres above the ground
    level = y / storey
    floors = np.floor(level)
    up, across = np.abs(level - floors - 0.5), np.abs(frac(along / bay) - 0.5)
    house = wide > 0
    glazed = house & (z < 100)  # more distant windows are smaller than a pixel

    panes = 2 + (s.rng.random((16, 64)) < 0.3).astype(np.uint16)
    panes[s.rng.random((16, 64)) < s.weather.lit] = 4
    pane = np.take(panes, (floors * 64 + (along / bay).astype(np.int32) % 64).astype(np.int32), mode="clip")
    kind = ((up < tall + 0.05) & (across < wide + 0.04) & glazed).astype(np.uint16)
    np.copyto(kind, pane, where=(up < tall) & (across < wide) & glazed)
    shop = (floors == 0) & glazed
    np.copyto(kind, pane, where=shop & (y > 0.4) & (y < 2.4) & (across < 0.42))
    np.copyto(kind, 5, where=shop & (np.abs(y - 2.65) < 0.18) & (frac(along * 1.4) < 0.4))
    np.copyto(kind, 1, where=(house & (top - y < 0.45)) | (glazed & (across > 0.47)))

    leaf = s.leaf[:rows]
    seen = (y > 0) & (y < top + leaf * ragged)
    kind += first.astype(np.uint16)
    np.copyto(s.mat[:rows], kind, where=seen)
    np.copyto(s.fog[:rows], z / (z + s.weather.reach), where=seen)
    np.copyto(s.shade[:rows], tone + leaf * (ragged * 0.15), where=seen)


def _vehicle(s: Scene, x: float, z: float) -> None:
    """Draw a car or van: its rear on the right of the road, its front on the left, and the side towards the camera."""
    rng, side = s.rng, (-1 if x > 0 else 1)
    van, size = rng.random() < 0.25, between(rng, 0.92, 1.1)
    paint = mix(pick(rng, _PAINTS), (128, 128, 130), between(rng, 0, 0.3))
    mats = {
        "body": s.material(_VEHICLE, paint),
        "roof": s.material(_VEHICLE, mix(paint, s.weather.zenith, 0.3)),
        "glass": s.material(_VEHICLE, mix((44, 50, 58), s.weather.zenith, 0.15)),
        "tyre": s.material(_VEHICLE, (34, 34, 36)),
        "trim": s.material(_VEHICLE, mix(paint, (60, 60, 62), 0.6)),
        "lamp": s.material(_VEHICLE, (196, 40, 36) if x > 0 else (240, 238, 220), glow=rng.random() < 0.4),
        "plate": s.material(_VEHICLE, (214, 210, 180)),
    }

    def flank(role: str, out: float, near: float, far: float, low: float, high: float, shade: float = 1.0) -> None:
        ends = [(s.px(x + side * out * size, d), s.py(high * size, d), s.py(low * size, d))
                for d in (z + near * size, z + far * size)]  # fmt: skip
        (a, *first), (b, *last) = sorted(ends)
        s.quad((a, b), (first[0], first[1]), (last[0], last[1]), mat=mats[role], z=z, shade=shade, upright=True)

    if abs(x) > 0.95 * size:  # otherwise no side is visible
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
        s.quad((s.py(high * size, far), s.py(low * size, near)), upper, lower, mat=mats[role], z=z)
    for role, left, right, low, high in _FITTINGS if z < 45 else ():  # more distant ones are smaller than a pixel
        s.box(x + left * size, x + right * size, low * size, high * size, z=z, mat=mats[role])


def _person(s: Scene, x: float, z: float) -> None:
    """Draw a standing or walking figure."""
    rng = s.rng
    size, turn, stride = between(rng, 0.85, 1.08), pick(rng, (-1, 1)), between(rng, 0.4, 1.3)
    coat = pick(rng, _CLOTHES)
    mats = {
        "legs": s.material(_PERSON, mix(pick(rng, _CLOTHES), (60, 62, 70), 0.6)),
        "coat": s.material(_PERSON, coat),
        "sleeve": s.material(_PERSON, mix(coat, (30, 30, 34), 0.3)),
    }
    for role, low, high, a, b, a2, b2 in _FIGURE:
        wide = size * turn * (stride if role == "legs" else 1)
        left, right = sorted((s.px(x + a * wide, z), s.px(x + b * wide, z)))
        left2, right2 = sorted((s.px(x + a2 * size * turn, z), s.px(x + b2 * size * turn, z)))
        s.quad((s.py(high * size, z), s.py(low * size, z)), (left2, right2), (left, right), mat=mats[role], z=z)
    hair = s.material(_PERSON, mix((40, 34, 30), (150, 130, 110), rng.random()))
    s.blob(x, 1.62 * size, z, rx=0.12 * size, ry=0.15 * size, mat=hair)
    skin = s.material(_PERSON, pick(rng, _SKINS))
    s.blob(x + 0.03 * turn, 1.59 * size, z, rx=0.085 * size, ry=0.11 * size, mat=skin)


def _tree(s: Scene, x: float, z: float) -> None:
    """Draw a tree, a shrub, or a sapling whose trunk resembles a pole."""
    rng = s.rng
    trunk, low, high, small, large = pick(rng, _TREES)
    radius, height = between(rng, small, large), between(rng, low, high)
    if trunk > 0:
        bark = mix((96, 84, 70), (120, 118, 116), rng.random())
        s.bar(x - trunk, x + trunk, 0, height, z=z, mat=s.material(_VEGETATION, bark, 0.15))
    crown = s.material(_VEGETATION, pick(rng, _FOLIAGE), 0.22)
    s.blob(x, height, z, rx=radius, ry=radius * 0.9, mat=crown, ragged=0.45)


def _pole(s: Scene, x: float, z: float) -> None:
    """Draw a street lamp, a traffic light, a bare mast or a bollard, in a grey close to the colours of the background."""
    rng = s.rng
    kind, low, high = pick(rng, _POLES)
    height, half = between(rng, low, high), between(rng, 0.05, 0.085)
    grey = mix((74, 76, 78), (160, 160, 158), rng.random())
    behind = mix(pick(rng, _FACADES), pick(rng, _FOLIAGE), rng.random())
    metal = s.material(_POLE, mix(grey, behind, 0.45))
    s.bar(x - half, x + half, 0, height, z=z, mat=metal)
    if kind == "lamp":
        tip = x + between(rng, 0.8, 1.5) * (-1 if x > 0 else 1)
        s.bar(min(x, tip), max(x, tip), height - 0.08, height, z=z, mat=metal)
        on = rng.random() < 0.1 + 1.5 * s.weather.lit
        dull = mix((222, 222, 212), (150, 152, 150), rng.random())
        lamp = s.material(_LIGHT, (255, 236, 186) if on else dull, glow=on)
        s.bar(tip - 0.3, tip + 0.3, height - 0.16, height + 0.06, z=z, mat=lamp)
    elif kind == "signal":
        s.bar(x - 0.17, x + 0.17, height, height + 0.85, z=z, mat=s.material(_LIGHT, (36, 38, 38)))
        phase = int(rng.integers(3))
        signal = s.material(_LIGHT, _SIGNALS[phase], glow=True)
        s.blob(x, height + 0.7 - 0.27 * phase, z, rx=0.14, ry=0.14, mat=signal)


def _clutter(s: Scene, x: float, z: float) -> None:
    """Draw a bin or crate, labelled void."""
    rng = s.rng
    colour = mix(pick(rng, _PAINTS), pick(rng, _FOLIAGE), rng.random())
    half, height = between(rng, 0.2, 0.5), between(rng, 0.5, 1.1)
    s.box(x - half, x + half, 0, height, z=z, mat=s.material(_VOID, colour, 0.12))
    lid = s.material(_VOID, mix(colour, (40, 40, 40), 0.4))
    s.box(x - half, x + half, height * 0.85, height, z=z, mat=lid)


# (half width of the trunk, smallest and largest height of the crown's centre, smallest and largest radius), in metres
_TREES = ((0.06, 2.6, 3.6, 0.5, 0.8), (0.0, 0.5, 0.9, 0.6, 1.2), (0.16, 3.4, 5.2, 1.3, 2.1), (0.13, 3.2, 4.4, 1.2, 1.8))
_POLES = (("lamp", 5.0, 7.0), ("lamp", 4.2, 6.0), ("signal", 2.7, 3.3), ("mast", 2.4, 6.0), ("bollard", 0.9, 1.2))
_Draw = Callable[[Scene, float, float], None]
# Objects beside the kerbs: (function that draws it, probability that a scene has any, largest number in a scene, nearest
# and farthest distance, smallest and largest offset outwards from the kerb, half width and length of its shadow), in metres
_BESIDE: tuple[tuple[_Draw, float, int, float, float, float, float, float, float], ...] = (
    (_person, 0.85, 8, 10, 32, 0.3, 2.8, 0.3, 0.6),
    (_person, 0.4, 3, 9, 26, -4.5, 0, 0.3, 0.6),
    (_tree, 0.9, 9, 13, 70, 0.5, 2.8, 1.2, 1.5),
    (_pole, 0.9, 7, 12, 50, 0.4, 1, 0.15, 0.5),
    (_clutter, 0.7, 4, 12, 40, 0.4, 2.8, 0.4, 0.4),
)


def _draw_objects(s: Scene) -> None:
    """Place vehicles in four lanes and other objects beside the kerbs; draw the shadows, then the objects by distance."""
    rng = s.rng
    objects: list[tuple[float, float, float, float, _Draw]] = []
    for lane in (-0.8, -0.3, 0.3, 0.8):
        z = between(rng, 8, 38)
        while z < 80:
            if rng.random() < 0.6:
                objects.append((z, lane * s.kerb + between(rng, -0.2, 0.2), 1.0, 4.3, _vehicle))
            z += between(rng, 7, 30)
    for draw, chance, most, near, far, low, high, half, length in _BESIDE:
        for _ in range(int(rng.integers(1, most + 1)) if rng.random() < chance else 0):
            z, x = near + (far - near) * rng.random() * rng.random(), s.kerb + between(rng, low, high)
            objects.append((z, x * pick(rng, (-1, 1)), half, length, draw))
    reach = 2.2  # metres; no object is wider to either side
    objects = [o for o in objects if s.px(o[1] + reach, o[0] + o[3]) > 0 and s.px(o[1] - reach, o[0] + o[3]) < s.width]
    objects.sort(key=lambda entry: -entry[0])
    for z, x, half, length, _ in objects:
        back, front = z + length, z - 0.15
        top, bottom = s.py(0, back), s.py(0, front)
        lean = (top - bottom) * s.sun  # away from the sun
        far_edge = (s.px(x - half, back) + lean, s.px(x + half, back) + lean)
        near_edge = (s.px(x - half, front), s.px(x + half, front))
        s.quad((top, bottom), far_edge, near_edge, mat=SHADOW, z=z, shade=s.weather.shadow * 0.7)
    for z, x, _, _, draw in objects:
        draw(s, x, z)


def _label(s: Scene) -> NDArray[np.uint8]:
    """Return the labels at the final resolution; pixels of common classes that touch a vehicle become void."""
    labels = np.asarray([label for label, _, _ in s.materials], np.uint8)[s.mat[::2, ::2]]
    vehicle = labels == _VEHICLE
    near = vehicle.copy()
    near[1:] |= vehicle[:-1]
    near[:-1] |= vehicle[1:]
    near[:, 1:] |= vehicle[:, :-1]
    near[:, :-1] |= vehicle[:, 1:]
    labels[near & (labels < _VEHICLE)] = _VOID
    return labels


def _halve(full: Floats) -> Floats:
    """Sum the blocks of 2x2 pixels."""
    rows = full[::2] + full[1::2]
    halved: Floats = rows[:, ::2] + rows[:, 1::2]
    return halved


def _develop(s: Scene) -> NDArray[np.uint8]:
    """Compute the image: colour, shade and grain of the materials, haze, then blur and noise of the camera."""
    rng, index = s.rng, s.mat.astype(np.intp)
    table = np.asarray([(rough, *colour) for _, rough, colour in s.materials], np.float32).T.copy()
    gain, blur, noise = between(rng, 0.85, 1.1) / 4, between(rng, 0.05, 0.18), between(rng, 3, 8) / 104
    # In place throughout, because at this size new memory costs as much as the arithmetic.
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
        grit = static[0, channel].astype(np.int16) - static[1, channel]  # triangular, standard deviation 104
        plane += grit * np.float32(noise)
        image[..., channel] = (plane + 0.5).clip(0, 255)
    return image


def draw_scene(seed: Sequence[int], height: int = 128, width: int = 192) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one street scene.

    Args:
        seed: non-negative integers; the same integers give the same bytes on every machine. Use tuples of equal length:
            NumPy's SeedSequence ignores zeros at the end, so (1,) and (1, 0) are the same seed.
        height: rows of the image, about 32 or more.
        width: columns of the image, about 32 or more.

    Returns:
        The image, (height,width,3) uint8 RGB, and its labels, (height,width) uint8: indices into :data:`SCENE_CLASSES`, or
        void 255 (outlines of vehicles, clutter).
    """
    scene = Scene(np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(seed)))), height, width)
    for draw in (_draw_sky, _draw_ground, _draw_walls, _draw_objects):
        draw(scene)
    return _develop(scene), _label(scene)
