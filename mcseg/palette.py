"""Default colours of classes, and the colour of void."""

from collections.abc import Sequence

Color = tuple[int, int, int]  # RGB, 0..255
Palette = Sequence[Color]


def distinct_colors(count: int) -> tuple[Color, ...]:
    """Return ``count`` distinguishable colours: the bit-interleaved colour map of PASCAL VOC without black.

    Black is left out because it looks like a missing label in an overlay.
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
    """Return black; if black is the colour of a class, return the light colour that PASCAL VOC uses for void."""
    return (224, 224, 192) if (0, 0, 0) in map(tuple, palette) else (0, 0, 0)
