"""Colours of classes that have none, and of void."""

from collections.abc import Sequence

Color = tuple[int, int, int]  # RGB, 0..255
Palette = Sequence[Color]


def distinct_colors(count: int) -> tuple[Color, ...]:
    """Return ``count`` distinguishable colours, the bit-interleaved map of PASCAL VOC.

    The first colour of that map, black, is left out: it reads as "nothing" in an overlay.
    """
    colors: list[Color] = []
    for index in range(1, count + 1):
        rgb = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                rgb[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
        colors.append((rgb[0], rgb[1], rgb[2]))
    return tuple(colors)


def void_color(palette: Palette) -> Color:
    """Return black, or the light colour that PASCAL VOC has for void if black stands for a class."""
    return (224, 224, 192) if (0, 0, 0) in map(tuple, palette) else (0, 0, 0)
