"""Label tables: map the values of mask files to train ids 0..C-1 and void 255."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcseg.palette import Color

IGNORE_INDEX = 255
_UNKNOWN = 254  # marks mask values without an entry during the mapping, so there are at most 254 classes
_FEW = 4  # unknown colours that may be mistakes of the class list
_MANY = 32  # unknown values that are hardly labels
_NEAR = 24  # distance in RGB of a colour that smoothing or compression may have changed
_PAIRS = 4096  # pairs of colours of the list to compare with
_DIRECT_TABLE = 1 << 16  # size of the look-up table of mask values; packed colours are looked up by bisection


class DataError(ValueError):
    """Raised for unusable input; the message says in one line what was found, where, what was expected and what to do."""


class MissingFileError(DataError):
    """Raised if a file of a data set does not exist."""


def pack_color(color: Iterable[int]) -> int:
    """Pack an RGB colour, three values 0..255, into the number r * 65536 + g * 256 + b.

    Raises:
        DataError: A value is outside 0..255.
    """
    r, g, b = (int(v) for v in color)
    if not all(0 <= v <= 255 for v in (r, g, b)):
        raise DataError(f"found the colour ({r}, {g}, {b}), expected three values from 0 to 255")
    return (r << 16) | (g << 8) | b


def unpack_color(packed: int) -> Color:
    """Return the RGB colour of a number from `pack_color`."""
    return (int(packed) >> 16, (int(packed) >> 8) & 255, int(packed) & 255)


@dataclass(frozen=True)
class LabelTable:
    """Map from the values of mask files to classes.

    Args:
        names: Names of the C classes, 2 to 254 different ones; the position of a name is its train id.
        palette: RGB colour of each class, for pictures and palette PNGs.
        raw_ids: Value in the mask file -> train id, 0..C-1 or 255 for void. Values are below 65536, or colours packed by
            `pack_color` if ``by_color`` is set.
        by_color: Whether the masks are RGB images whose colours stand for classes.
        colors: Packed colour -> train id, or 255, for the colour and palette files among masks of indices; empty if a class
            has no colour of its own. Not used if ``by_color`` is set.
        unlisted: Train id, or 255, of all values without an entry in ``raw_ids``; None makes such values an error.

    Raises:
        DataError: There are fewer than 2 or more than 254 classes, a name is repeated, ``palette`` and ``names`` differ in
            length, or a mask value or a train id is out of range.
    """

    names: tuple[str, ...]
    palette: tuple[Color, ...]
    raw_ids: Mapping[int, int]
    by_color: bool = False
    unlisted: int | None = None
    colors: Mapping[int, int] = field(default_factory=dict)
    _keys: NDArray[np.int32] = field(init=False, repr=False, compare=False)
    _color_ids: NDArray[np.uint8] = field(init=False, repr=False, compare=False)
    _values: NDArray[np.uint8] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        count = len(self.names)
        if not 2 <= count < _UNKNOWN + 1:
            raise DataError(f"found {count} classes, expected 2 to {_UNKNOWN}")
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise DataError(f"class names must differ, found more than once: {', '.join(repeated)}")
        if len(self.palette) != count:
            raise DataError(f"found {len(self.palette)} colours for {count} classes, expected one colour per class")
        for raw, train in self.raw_ids.items():
            if not (0 <= train < count or train == IGNORE_INDEX):
                raise DataError(
                    f"mask value {raw} is mapped to train id {train}; expected 0 to {count - 1}, or 255 for void"
                )
        colors = self.raw_ids if self.by_color else self.colors
        keys = np.array(sorted(colors), dtype=np.int32)
        color_ids = np.array([colors[int(key)] for key in keys], dtype=np.uint8)
        values = np.empty(0, dtype=np.uint8)
        if not self.by_color:
            values = np.full(_DIRECT_TABLE, self._fallback, dtype=np.uint8)
            for raw, train in self.raw_ids.items():
                if not 0 <= raw < _DIRECT_TABLE:
                    raise DataError(f"found the mask value {raw}, expected 0 to {_DIRECT_TABLE - 1}")
                values[raw] = train
        object.__setattr__(self, "_keys", keys)
        object.__setattr__(self, "_color_ids", color_ids)
        object.__setattr__(self, "_values", values)

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.names)

    @property
    def _fallback(self) -> np.uint8:
        return np.uint8(_UNKNOWN if self.unlisted is None else self.unlisted)

    def train_ids(
        self, raw: NDArray[np.integer[Any]], where: Path | str, palette: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """Map the values of one mask to train ids.

        Args:
            raw: (H,W) integers, or (H,W,3) uint8 for an RGB mask. An RGB mask with three equal channels counts as grey,
                unless the table has its colours.
            where: Path or name of the mask, for error messages.
            palette: (K,3) uint8 colours of the values of a palette file, K up to 256.

        Returns:
            (H,W) uint8 train ids, 0..C-1 and void 255.

        Raises:
            DataError: The mask is coloured but the table has indices, the mask has one channel but the table has colours,
                a value has no entry, or palette and table contradict each other.
        """
        if palette is not None and len(self._keys):
            indices = bytearray(raw.astype(np.uint8))
            translated = indices.translate(self._palette_colors(palette)[1].tobytes())
            if _UNKNOWN in translated:  # only then count the indices
                ids = self.palette_ids(palette, np.bincount(raw.ravel(), minlength=256), where)
                translated = indices.translate(ids.tobytes())
            return np.frombuffer(translated, np.uint8).reshape(raw.shape)
        if raw.ndim == 3 and not self.by_color:
            if len(self._keys):
                mapped = self._by_color(raw, np.uint8(_UNKNOWN))
                if not (mapped == _UNKNOWN).any():
                    return mapped
            # Grey masks saved as RGB are common and unambiguous.
            if not (np.array_equal(raw[..., 0], raw[..., 1]) and np.array_equal(raw[..., 0], raw[..., 2])):
                if len(self._keys):
                    raise DataError(self._unknown_colors(_packed(raw[mapped == _UNKNOWN]), where))
                raise DataError(
                    f"{where}: the mask is coloured, expected one channel of class indices; "
                    "if its colours stand for classes, give each class its colour in the class list (`name R G B` in "
                    "classes.txt)"
                )
            raw = raw[..., 0]
        if raw.ndim == 2 and self.by_color:
            raise DataError(
                f"{where}: the mask has one channel, expected RGB colours; if the masks contain class indices, remove the "
                "colours from the class list"
            )
        mapped = self._by_color(raw, self._fallback) if self.by_color else self._by_index(raw)
        if self.unlisted is None:
            unknown = mapped == _UNKNOWN
            if unknown.any():
                found = raw[unknown]
                raise DataError(
                    self._unknown_colors(_packed(found), where) if self.by_color else self._unknown_values(found, raw, where)
                )
        return mapped

    def palette_ids(self, palette: NDArray[np.uint8], histogram: NDArray[np.int64], where: Path | str) -> NDArray[np.uint8]:
        """Map the indices of one palette file to train ids: by colour if the table has all colours that the file uses.

        Programs write palettes in any order, so an index may stand for different classes in different files. Indices are
        mapped as they are if the table has no colours, or if no used index has the colour of another class.

        Args:
            palette: (K,3) uint8 colours, K up to 256.
            histogram: (256,) number of pixels of each index.
            where: Path or name of the mask, for error messages.

        Returns:
            (256,) uint8 train ids; `unlisted`, or 254 for an unused index without an entry.

        Raises:
            DataError: A used colour has no entry, or palette and table contradict each other.
        """
        used = histogram > 0
        packed, by_color = self._palette_colors(palette)
        known = by_color != _UNKNOWN
        if known[used].all():
            return by_color
        unknown = np.flatnonzero(used & ~known)
        if self.by_color:
            if self.unlisted is None:
                raise DataError(self._unknown_colors(np.repeat(packed[unknown], histogram[unknown]), where))
            return np.where(known, by_color, self._fallback)
        by_index = self._values[:256]
        contradicting = np.flatnonzero(used & known & (by_color != by_index))
        if len(contradicting):
            index, other = int(contradicting[0]), int(unknown[0])
            color, other_color = unpack_color(packed[index]), unpack_color(packed[other])
            raise DataError(
                f"{where}: palette and class list contradict each other: index {index} has the colour {color} of "
                f"{self._class_name(by_color[index])}, but index {other} ({int(histogram[other])} pixels) has the colour "
                f"{other_color}, which is not in the list; add this colour to the list, or remove all colours from the list "
                "if the indices are the classes"
            )
        return by_index

    def class_counts(self, histogram: NDArray[np.int64], ids: NDArray[np.uint8] | None = None) -> NDArray[np.int64] | None:
        """Convert a histogram of mask values to pixel counts of the classes.

        Args:
            histogram: (256,) int64, number of pixels of each mask value.
            ids: (256,) uint8 train ids of the values, from `palette_ids`; None takes the values as they are.

        Returns:
            (C,) int64, or None if the mask contains a value without an entry and ``unlisted`` is None.
        """
        train = self._values[: len(histogram)] if ids is None else ids
        if self.unlisted is None and (histogram[train == _UNKNOWN] > 0).any():
            return None
        counts = np.zeros(IGNORE_INDEX + 1, dtype=np.int64)
        np.add.at(counts, train, histogram)
        return counts[: self.num_classes]

    def _class_name(self, train: int) -> str:
        return "void" if train == IGNORE_INDEX else f"class {self.names[train]}"

    def _by_index(self, raw: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        if raw.dtype == np.uint8:  # the common case; `translate` is twice as fast as indexing
            mapped = bytearray(raw).translate(self._values[:256].tobytes())
            return np.frombuffer(mapped, dtype=np.uint8).reshape(raw.shape)
        outside = (raw < 0) | (raw >= _DIRECT_TABLE)
        return np.where(outside, self._fallback, self._values[np.where(outside, 0, raw).astype(np.int64)])

    def _by_color(self, raw: NDArray[np.integer[Any]], fallback: np.uint8) -> NDArray[np.uint8]:
        return self._colors_to_ids(_packed(raw), fallback)

    def _colors_to_ids(self, packed: NDArray[np.int32], fallback: np.uint8) -> NDArray[np.uint8]:
        if not len(self._keys):
            return np.full(packed.shape, fallback, dtype=np.uint8)
        position = np.searchsorted(self._keys, packed).clip(max=len(self._keys) - 1)
        return np.where(self._keys[position] == packed, self._color_ids[position], fallback)

    def _palette_colors(self, palette: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Return the packed colours (256,) of a palette, -1 beyond its end, and their train ids, 254 without an entry."""
        packed = np.full(256, -1, dtype=np.int32)
        packed[: len(palette)] = _packed(palette)
        return packed, self._colors_to_ids(packed, np.uint8(_UNKNOWN))

    def _unknown_values(self, found: NDArray[np.integer[Any]], raw: NDArray[np.integer[Any]], where: Path | str) -> str:
        values = np.unique(found)
        known = f"{len(self.raw_ids)} known values" if len(self.raw_ids) > 40 else _ranges(self.raw_ids)
        advice = "correct the mask, or add the values to the class list as classes or void"
        last = self.num_classes
        if len(values) > _MANY:
            advice = "a mask with so many values is a photo, or was smoothed or compressed; export the labels again as PNG"
        elif raw.max() > 255 and (raw % 257 == 0).all():
            advice = "all values are multiples of 257, as after scaling 8 to 16 bits; divide them by 257, or export 8 bits"
        elif values.tolist() == [last] and all(self.raw_ids.get(value) == value for value in range(last)):
            advice = (
                f"the values seem to begin at 1; if 0 is the background, add it to the class list as the first class; if 0 "
                f"is void, write the ids 1 to {last} and void = [0] into a classes.toml"
            )
        return (
            f"{where}: {len(found)} pixels of the mask have the unknown values {_listed(map(str, values.tolist()))}; "
            f"expected {known}; {advice}"
        )

    def _unknown_colors(self, packed: NDArray[np.int32], where: Path | str) -> str:
        colors, numbers = np.unique(packed, return_counts=True)
        order = np.argsort(-numbers, kind="stable")
        shown = _listed(
            f"{unpack_color(colors[index])}" + (f" on {int(numbers[index])} pixels" if len(colors) > 1 else "")
            for index in order
        )
        advice = "correct the mask, or add the colours to the class list as classes or void"
        if len(colors) > _FEW and _are_mixtures(colors, self._keys):
            advice = (
                "most of them lie between or near the colours of the list, as in masks that were anti-aliased, resized "
                "smoothly or saved as JPEG; export the masks again without smoothing, as PNG"
            )
        return (
            f"{where}: {len(packed)} pixels of the mask have the unknown colours {shown}; expected {len(self._keys)} known "
            f"colours; {advice}"
        )


def _packed(colors: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
    """Pack colours (...,3) as `pack_color` does."""
    packed = colors[..., 0].astype(np.int32)
    for channel in (1, 2):
        packed <<= 8
        packed |= colors[..., channel]
    return packed


def _unpacked(packed: NDArray[np.int32]) -> NDArray[np.float64]:
    return np.stack([packed >> 16, (packed >> 8) & 255, packed & 255], axis=-1).astype(np.float64)


def _are_mixtures(colors: NDArray[np.int32], listed: NDArray[np.int32]) -> bool:
    """Whether most colours are close to a line between two colours of the list, or to one of them."""
    points = _unpacked(colors[:: -(-len(colors) // 256)])[:, None]  # at most 256 of them
    ends = _unpacked(listed)
    first, second = np.triu_indices(len(ends))
    if len(first) > _PAIRS:
        first = second = np.arange(len(ends))
    start, along = ends[first], ends[second] - ends[first]
    share = ((points - start) * along).sum(-1) / np.maximum((along**2).sum(-1), 1)
    nearest = start + share.clip(0, 1)[..., None] * along
    distance = np.sqrt(((points - nearest) ** 2).sum(-1)).min(1)
    return bool((distance <= _NEAR).mean() > 0.5)


def _listed(texts: Iterable[str]) -> str:
    """Join the first 8 texts by commas, with the number of further ones."""
    all_texts = list(texts)
    return ", ".join(all_texts[:8]) + (f" and {len(all_texts) - 8} more" if len(all_texts) > 8 else "")


def _ranges(values: Iterable[int]) -> str:
    """Format integers as sorted ranges, such as ``0-10, 255``."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
