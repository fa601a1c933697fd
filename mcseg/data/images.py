"""Read images of any number of bands as tensors: headers, whole images, or windows of them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mcseg.data.labels import DataError
from mcseg.data.sources import MAX_PIXELS, Header, Source, Window, check_pixels, open_source

_MANY_PIXELS = 1 << 24  # an image of more is looked at in a window, if its file allows it


@dataclass(frozen=True)
class ImageFormat:
    """Bands and values of the images of a data set.

    An image is read as (bands,H,W): uint8 for files of 8 bits, otherwise float32 in [0, 1], where 0 and 1 are the ends of
    ``value_range``. Values outside of the range become 0 or 1; pixels without data (NaN, or GDAL's no-data value of a TIFF
    file) become 0.

    Args:
        bands: Number of bands. A grey file is repeated for 3 bands. A palette file has 3 bands. An alpha band that is
            opaque everywhere is left out if the bands before it are as many as expected.
        value_range: Stored values that become 0 and 1. None is 0..255 for uint8, 0..65535 for uint16 and 0..1 for
            floating point; other types need a range.
        max_pixels: Largest number of pixels of an image.

    Raises:
        DataError: A setting is out of range.
    """

    bands: int = 3
    value_range: tuple[float, float] | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        for name, value in {"bands": self.bands, "max_pixels": self.max_pixels}.items():
            if value < 1:
                raise DataError(f"data.{name}: found {value}, expected a positive number")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise DataError(
                f"data.value_range: found {list(self.value_range)}, expected [smallest, largest], such as [0, 4095]"
            )

    @contextmanager
    def open(self, path: Path) -> Iterator["OpenImage"]:
        """Open an image and check its header.

        Raises:
            DataError: The file cannot be read, or has other bands or values; also raised while the image is open.
        """
        with open_source(path, self.bands) as source:
            self.check(path, source.header)
            yield OpenImage(path, source, self)

    def read(self, path: Path) -> Tensor:
        """Read a whole image, (bands,H,W) uint8, or float32 in [0, 1].

        Raises:
            DataError: The file cannot be read, or has other bands or values.
        """
        with self.open(path) as image:
            return image.read()

    def look(self, path: Path) -> tuple[Header, int | None]:
        """Read an image, or the middle of a large one; return its header and largest value, see `largest_value`."""
        with self.open(path) as image:
            height, width = image.size
            window = None
            if image.windowed and height * width > _MANY_PIXELS:
                top, left = max(0, height // 2 - 512), max(0, width // 2 - 512)
                window = Window(top, left, min(height, top + 1024), min(width, left + 1024))
            return image.header, largest_value(image.read(window), image.header.dtype)

    def header(self, path: Path) -> Header:
        """Read and check a header. Raises DataError like `open`."""
        with open_source(path, self.bands) as source:
            self.check(path, source.header)
            return source.header

    def layout(self, path: Path) -> tuple[tuple[int, int], dict[int, Any], bool]:
        """Return (height, width), the georeferencing tags, and whether windows are read without decoding the whole file."""
        with self.open(path) as image:
            return image.size, image.tags, image.windowed

    def check(self, path: Path, header: Header) -> None:
        """Raise DataError if an image of this header cannot be read with these settings."""
        check_pixels(path, (header.height, header.width), self.max_pixels)
        colors = header.bands - header.alpha
        if self.bands not in (header.bands, colors) and (self.bands, colors) != (3, 1):
            kind = "bands" if colors != 1 else "band"
            alpha = " and alpha" if header.alpha else ""
            raise DataError(
                f"{path}: has {colors} {kind}{alpha}, expected {self.bands} (data.bands) in every image; set data.bands to "
                f"{header.bands}, or convert the images, as a trained network takes {self.bands} only"
            )
        if self.value_range is None:
            if header.dtype.kind != "f" and header.dtype not in (np.uint8, np.uint16):
                raise DataError(
                    f"{path}: an image of {_type_name(header.dtype)}, which may have any range of values; expected 8 or 16 "
                    "bits; set data.value_range to the smallest and largest value of all images"
                )
        elif header.dtype.kind in "iu" and np.iinfo(header.dtype).max < self.value_range[1]:
            raise DataError(
                f"{path}: an image of {_type_name(header.dtype)}, whose largest value is {np.iinfo(header.dtype).max}, but "
                f"data.value_range is {list(self.value_range)}, so it would be too dark; convert it to the type of the "
                f"other images, or set data.value_range to [0, {np.iinfo(header.dtype).max}]"
            )


class OpenImage:
    """An open image whose header was checked.

    Args:
        path: The file, for messages.
        source: The stored values.
        settings: Expected bands and values.
    """

    def __init__(self, path: Path, source: Source, settings: ImageFormat) -> None:
        self._path, self._source, self._settings = path, source, settings
        self.header = source.header
        self.size = (source.header.height, source.header.width)
        self.windowed = source.windowed
        self.tags = source.tags

    def read(self, window: Window | None = None) -> Tensor:
        """Read the image or a window of it, (bands,h,w) uint8, or float32 in [0, 1]."""
        header, bands = self.header, self._settings.bands
        leaves_alpha_out = header.alpha and bands != header.bands
        # Transparent pixels anywhere are refused, not only those of the window, except in images of windows for their size
        whole = leaves_alpha_out and not (self.windowed and header.height * header.width > _MANY_PIXELS)
        values = self._source.values(None if whole else window)
        if leaves_alpha_out:
            self._refuse_transparency(values[-1])
            values = values[:-1]
            if whole and window is not None:
                values = values[:, window.top : window.bottom, window.left : window.right]
        pixels = self._scaled(values)
        return pixels.expand(3, -1, -1) if len(pixels) != bands else pixels  # a grey image

    def _refuse_transparency(self, alpha: NDArray[Any]) -> None:
        opaque = np.iinfo(alpha.dtype).max if alpha.dtype.kind in "iu" else 1
        if (alpha != opaque).any():
            raise DataError(
                f"{self._path}: has transparent pixels (alpha from {alpha.min()} to {alpha.max()}, {opaque} is opaque), "
                f"which {self._settings.bands} bands leave out; set data.bands to {self._source.header.bands} if it is a "
                "band of its own, or save the images without alpha"
            )

    def _scaled(self, values: NDArray[Any]) -> Tensor:
        """Map the value range to 0..1, unless the values are those of an 8-bit image."""
        value_range, nodata = self._settings.value_range, self._source.nodata
        if nodata is not None and values.dtype.kind in "iu":
            lowest = values.dtype.type(0 if value_range is None else value_range[0])
            values = np.where(values == nodata, lowest, values)
        if values.dtype == np.uint8 and value_range in (None, (0, 255)):
            return torch.from_numpy(values)
        low, high = value_range or (0, 65535 if values.dtype == np.uint16 else 1)
        scaled = values.astype(np.float32)
        if values.dtype.kind == "f":
            unknown = ~np.isfinite(scaled)
            if nodata is not None:
                unknown |= scaled == np.float32(nodata)
            if unknown.any():
                scaled[unknown] = low
        # The default range of integers is that of their type
        is_certain = value_range is None and values.dtype.kind != "f"
        if not is_certain and (found := self._wrong_range(scaled, low, high, values.dtype)) is not None:
            raise DataError(
                f"{self._path}: has values from {found[0]:.6g} to {found[1]:.6g}, which do not fit the range {low:g} to "
                f"{high:g} (data.value_range); set it to the smallest and largest value of all images"
            )
        scaled -= low
        scaled *= 1 / (high - low)
        return torch.from_numpy(scaled.clip(0, 1, out=scaled))

    def _wrong_range(
        self, values: NDArray[np.float32], low: float, high: float, dtype: np.dtype[Any]
    ) -> tuple[float, float] | None:
        """Return the smallest and largest value if the range is wrong.

        Without a setting these are numbers far from 0..1. With one they are values that are mostly above the range, or
        numbers of a floating-point file that were scaled to 0..1 before, and would be black in the range.
        """
        smallest, largest = float(values.min()), float(values.max())
        if self._settings.value_range is None:  # reflectances from 0 to 1 may exceed them a little
            return (smallest, largest) if smallest < -1 or largest > 2 else None
        is_scaled = dtype.kind == "f" and high - low >= 100 and low >= 0 and 0 < largest <= 1
        if not is_scaled and (largest <= high or (values > high).mean() <= 0.5):
            return None
        return smallest, largest


class LargeImage:
    """Image (1,bands,H,W) that stays in its file; only the requested windows are read.

    Like a tensor, it is indexed by slices, moved to a device and iterated over; it can be sent to another process.

    Args:
        path: A file whose windows can be read, see `ImageFormat.layout`.
        settings: How the image is read.
        device: Device of the windows.
    """

    def __init__(self, path: Path, settings: ImageFormat, device: torch.device | str = "cpu") -> None:
        self._path, self._settings, self.device = path, settings, torch.device(device)
        header = settings.header(path)
        self.shape = torch.Size((1, settings.bands, header.height, header.width))
        self.ndim = 4
        self._files = ExitStack()
        self._image: OpenImage | None = None

    def to(self, device: torch.device | str, **_options: Any) -> "LargeImage":
        """Return the image on another device."""
        return LargeImage(self._path, self._settings, device)

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator["LargeImage"]:
        yield self

    def __getitem__(self, key: slice | tuple[slice, slice, slice, slice]) -> Any:
        """Return itself for a slice of the images, or the tensor of a window, (1,bands,h,w)."""
        if isinstance(key, slice):
            return self
        (top, bottom, _), (left, right, _) = key[2].indices(self.shape[2]), key[3].indices(self.shape[3])
        return self._read(Window(top, left, bottom, right))[None].to(self.device)

    def reduced(self, step: int) -> Tensor:
        """Return every step-th row and column, (bands,h,w), on the CPU."""
        height, width = self.shape[2:]
        rows = max(1, 1024 // step) * step
        parts = []
        for top in range(0, height, rows):
            parts.append(self._read(Window(top, 0, min(top + rows, height), width))[:, ::step, ::step].clone())
        return torch.cat(parts, 1)

    def _read(self, window: Window) -> Tensor:
        if self._image is None:
            self._image = self._files.enter_context(self._settings.open(self._path))
        return self._image.read(window)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": ExitStack(), "_image": None}

    def __del__(self) -> None:
        self._files.close()


def largest_value(pixels: Tensor, dtype: np.dtype[Any]) -> int | None:
    """Return the largest stored value of an image of 8- or 16-bit integers that was read without a value range.

    Args:
        pixels: The image as read.
        dtype: Type of the file.
    """
    if dtype not in (np.uint8, np.uint16):
        return None
    largest = float(pixels.numpy().max())  # torch takes ten times as long for pixels stored interleaved
    return round(largest * np.iinfo(dtype).max) if pixels.is_floating_point() else int(largest)


# A largest value of all images below these is far below that of the type
USUAL_VALUES: dict[np.dtype[Any], int] = {np.dtype(np.uint8): 1 << 5, np.dtype(np.uint16): 1 << 14}


class UsedValues:
    """Largest stored values of images, to find a range that is far below that of the type, such as 12 bits in 16.

    Args:
        settings: How the images are read; with a value range, nothing is ever reported.
    """

    def __init__(self, settings: ImageFormat) -> None:
        self._settings = settings
        self._found: dict[np.dtype[Any], tuple[int, int, Path]] = {}  # type -> largest value, number of images, brightest

    def add(self, path: Path, dtype: np.dtype[Any], largest: int | None) -> None:
        """Add an image by the type of its file and its largest value, see `largest_value`."""
        if largest is not None and self._settings.value_range is None:
            known, number, brightest = self._found.get(dtype, (-1, 0, path))
            self._found[dtype] = (largest, number + 1, path) if largest > known else (known, number + 1, brightest)

    def problems(self) -> list[str]:
        """Describe each type whose range is hardly used, one line each."""
        lines = []
        for dtype, (largest, number, path) in self._found.items():
            bits = 8 * dtype.itemsize
            if 0 < largest < USUAL_VALUES[dtype]:
                images = "1 image" if number == 1 else f"{number} images"
                lines.append(
                    f"{path}: {largest} is the largest value in {images} of {bits} bits, which would be nearly black; "
                    f"set data.value_range to [0, {(1 << largest.bit_length()) - 1}], or to [0, {(1 << bits) - 1}] to read "
                    "them as they are"
                )
        return lines


def _type_name(dtype: np.dtype[Any]) -> str:
    kind = {"f": "floating-point values", "i": "signed integers", "u": "integers"}.get(dtype.kind, str(dtype))
    return f"{8 * dtype.itemsize}-bit {kind}"
