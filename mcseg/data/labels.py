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


@dataclass(frozen=True)
class LabelTable:
    """Map from the values of mask files to classes.

    Args:
        names: Names of the C classes, 2 to 254 different ones; the position of a name is its train id.
        palette: RGB colour of each class, for pictures and palette PNGs.
        raw_ids: Value in the mask file -> train id, 0..C-1 or 255 for void. Values are below 65536, or colours packed by
            `pack_color` if ``by_color`` is set.
        by_color: Whether the masks are RGB images whose colours stand for classes.
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
    _keys: NDArray[np.int64] = field(init=False, repr=False, compare=False)
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
        if self.by_color:
            keys = np.array(sorted(self.raw_ids), dtype=np.int64)
            values = np.array([self.raw_ids[int(key)] for key in keys], dtype=np.uint8)
        else:
            keys = np.empty(0, dtype=np.int64)
            values = np.full(_DIRECT_TABLE, self._fallback, dtype=np.uint8)
            for raw, train in self.raw_ids.items():
                if not 0 <= raw < _DIRECT_TABLE:
                    raise DataError(f"found the mask value {raw}, expected 0 to {_DIRECT_TABLE - 1}")
                values[raw] = train
        object.__setattr__(self, "_keys", keys)
        object.__setattr__(self, "_values", values)

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.names)

    @property
    def _fallback(self) -> np.uint8:
        return np.uint8(_UNKNOWN if self.unlisted is None else self.unlisted)

    def train_ids(self, raw: NDArray[np.integer[Any]], where: Path | str) -> NDArray[np.uint8]:
        """Map the values of one mask to train ids.

        Args:
            raw: (H,W) integers, or (H,W,3) uint8 for an RGB mask. An RGB mask with three equal channels counts as grey.
            where: Path or name of the mask, for error messages.

        Returns:
            (H,W) uint8 train ids, 0..C-1 and void 255.

        Raises:
            DataError: The mask is coloured but the table has indices, the mask has one channel but the table has colours,
                or a value has no entry.
        """
        if raw.ndim == 3 and not self.by_color:
            # Grey masks saved as RGB are common and unambiguous.
            if not (np.array_equal(raw[..., 0], raw[..., 1]) and np.array_equal(raw[..., 0], raw[..., 2])):
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
        mapped = self._by_color(raw) if self.by_color else self._by_index(raw)
        if self.unlisted is None:
            unknown = mapped == _UNKNOWN
            if unknown.any():
                raise DataError(self._unknown_values(raw, unknown, where))
        return mapped

    def class_counts(self, histogram: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Convert a histogram of mask values to pixel counts of the classes.

        Args:
            histogram: (256,) int64, number of pixels of each mask value.

        Returns:
            (C,) int64, or None if the mask contains a value without an entry and ``unlisted`` is None.
        """
        train = self._values[: len(histogram)]
        if self.unlisted is None and (histogram[train == _UNKNOWN] > 0).any():
            return None
        counts = np.zeros(IGNORE_INDEX + 1, dtype=np.int64)
        np.add.at(counts, train, histogram)
        return counts[: self.num_classes]

    def _by_index(self, raw: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        if raw.dtype == np.uint8:  # the common case; `translate` is twice as fast as indexing
            mapped = bytearray(raw).translate(self._values[:256].tobytes())
            return np.frombuffer(mapped, dtype=np.uint8).reshape(raw.shape)
        outside = (raw < 0) | (raw >= _DIRECT_TABLE)
        return np.where(outside, self._fallback, self._values[np.where(outside, 0, raw).astype(np.int64)])

    def _by_color(self, raw: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        packed = (raw[..., 0].astype(np.int64) << 16) | (raw[..., 1].astype(np.int64) << 8) | raw[..., 2].astype(np.int64)
        position = np.searchsorted(self._keys, packed).clip(max=len(self._keys) - 1)
        return np.where(self._keys[position] == packed, self._values[position], self._fallback)

    def _unknown_values(self, raw: NDArray[np.integer[Any]], unknown: NDArray[np.bool_], where: Path | str) -> str:
        values = np.unique(raw[unknown], axis=0)
        shown = ", ".join(str(tuple(map(int, v)) if self.by_color else int(v)) for v in values[:8])
        more = f" and {len(values) - 8} more" if len(values) > 8 else ""
        kind = "colours" if self.by_color else "values"
        known = f"{len(self.raw_ids)} known {kind}" if self.by_color or len(self.raw_ids) > 40 else _ranges(self.raw_ids)
        return (
            f"{where}: {int(unknown.sum())} pixels of the mask have the unknown {kind} {shown}{more}; "
            f"expected {known}; correct the mask, or add the {kind} to the class list as classes or void"
        )


def _ranges(values: Iterable[int]) -> str:
    """Format integers as sorted ranges, such as ``0-10, 255``."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
