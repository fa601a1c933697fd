"""Read TIFF files of any number of bands with tifffile, whole or in windows, and their georeferencing tags."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from mcseg.data.labels import DataError
from mcseg.data.sources import Header, Window, bands_are_last, upright

# ModelPixelScale, ModelTiepoint, ModelTransformation, GeoKeyDirectory, GeoDoubleParams, GeoAsciiParams
_GEOREFERENCE = (33550, 33922, 34264, 34735, 34736, 34737)
_NODATA = 42113  # GDAL's tag of the value of pixels without data, as text
_JPEG = 7
_CACHE = 128 << 20  # bytes of decoded tiles or strips that are kept, so that overlapping windows decode each of them once
_WHOLE = 64 << 20  # bytes of a strip above which the file is read as a whole


@contextmanager
def open_tiff(path: Path, bands: int) -> Iterator["TiffSource | None"]:
    """Open a TIFF file; yields None for colours that Pillow converts to RGB, such as those of a palette or CMYK.

    Args:
        path: The file.
        bands: Number of bands, which tells rows from bands in an array of pages.

    Raises:
        DataError: The file contains several images.
        Exception: The file is broken; any type.
    """
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        photometric = tifffile.PHOTOMETRIC
        plain = page.photometric in (photometric.MINISBLACK, photometric.RGB)
        is_jpeg = page.photometric == photometric.YCBCR and page.compression == _JPEG
        yield TiffSource(path, file, bands) if (plain or is_jpeg) and page.bitspersample > 1 else None


class TiffSource:
    """Image of a TIFF file, whose bands are samples of one page, or pages of one array.

    Reduced copies and masks of the image, as in cloud-optimised GeoTIFF files, are not read.

    Args:
        path: The file, for messages.
        file: The open file.
        bands: Number of bands, which tells rows from bands in an array of pages.
    """

    def __init__(self, path: Path, file: tifffile.TiffFile, bands: int) -> None:
        self._path = path
        page = file.pages.first
        pages = [each for each in file.pages if not each.aspage().subfiletype & 0b101]  # reduced images, masks
        series = file.series[0]
        # Several pages are bands only if their writer says that they are one array
        self._series = series if len(pages) > 1 and _is_one_array(series, len(pages)) else None
        if len(pages) > 1 and self._series is None:
            raise DataError(f"{path}: contains {len(pages)} images; expected one; save each in a separate file")
        if page.imagedepth > 1 or page.dtype is None:
            raise DataError(f"{path}: a volume, or values of an unknown type; expected an image of numbers; convert it")
        self._page = page
        self._file = file.filehandle
        height, width = page.imagelength, page.imagewidth
        orientation = page.tags.get(274)
        self._orientation = int(orientation.value) if orientation is not None else 1
        self.windowed = self._orientation == 1 and self._series is None and self._reads_windows()
        self._memory = page.asarray(out="memmap") if page.is_memmappable and self._series is None else None
        self._segments: OrderedDict[int, tuple[NDArray[Any] | None, tuple[int, ...]]] = OrderedDict()
        self._kept = 0
        samples = page.samplesperpixel
        if self._series is not None:
            self._last = bands_are_last(self._series.shape, bands)
            height, width, samples = _moved(self._series.shape, self._last)
        alpha = self._series is None and bool(page.extrasamples) and int(page.extrasamples[-1]) in (1, 2)
        if self._orientation in (5, 6, 7, 8):
            height, width = width, height
        self.header = Header(height, width, samples, page.dtype.newbyteorder("="), alpha)
        self.nodata = _number(page.tags.get(_NODATA))
        # A turned image no longer fits its georeference
        tags = {code: page.tags.get(code) for code in _GEOREFERENCE} if self._orientation == 1 else {}
        self.tags = {code: (int(tag.dtype), tag.count, tag.value) for code, tag in tags.items() if tag is not None}

    def values(self, window: Window | None) -> NDArray[Any]:
        """Read the stored values, (bands,h,w)."""
        if self._series is not None:
            values = self._series.asarray()
            values = values.transpose(2, 0, 1) if self._last else values
        elif self._orientation != 1 or not self.windowed:
            values = self._window(Window(0, 0, self._page.imagelength, self._page.imagewidth))
        else:
            return self._window(window or Window(0, 0, self.header.height, self.header.width))
        values = upright(values.transpose(1, 2, 0), self._orientation).transpose(2, 0, 1)
        return values if window is None else values[:, window.top : window.bottom, window.left : window.right]

    def _reads_windows(self) -> bool:
        page = self._page
        if page.is_memmappable or page.is_tiled:
            return True
        strip = page.rowsperstrip * page.imagewidth * page.samplesperpixel * page.bitspersample // 8
        return page.rowsperstrip < page.imagelength and strip <= _WHOLE

    def _window(self, window: Window) -> NDArray[Any]:
        """Read a window of the stored image, (bands,h,w), from the tiles or strips that it meets."""
        page, (top, left, bottom, right) = self._page, window
        if self._memory is not None:
            shape = page.shaped[0], page.imagelength, page.imagewidth, page.shaped[-1]
            part = self._memory.reshape(shape)[:, top:bottom, left:right]
            return np.concatenate([np.moveaxis(plane, -1, 0) for plane in part]).astype(self.header.dtype)
        planes, samples = page.shaped[0], page.shaped[-1]
        values = np.zeros((planes * samples, bottom - top, right - left), self.header.dtype)
        height = page.tilelength if page.is_tiled else page.rowsperstrip
        width = page.tilewidth if page.is_tiled else page.imagewidth
        down, across = -(-page.imagelength // height), -(-page.imagewidth // width)
        for plane in range(planes):
            for row in range(top // height, -(-bottom // height)):
                for column in range(left // width, -(-right // width)):
                    segment, (_, _, first, start, _) = self._segment((plane * down + row) * across + column)
                    if segment is None:  # a tile without data, which is not stored
                        continue
                    a, b = max(top, first), min(bottom, first + segment.shape[0])
                    c, d = max(left, start), min(right, start + segment.shape[1])
                    part = segment[a - first : b - first, c - start : d - start]
                    target = values[plane * samples : (plane + 1) * samples, a - top : b - top, c - left : d - left]
                    target[:] = np.moveaxis(part, -1, 0)
        return values

    def _segment(self, index: int) -> tuple[NDArray[Any] | None, tuple[int, ...]]:
        """Decode a tile or strip, (h,w,samples), and return it with its position in the image; None is one without data."""
        if index in self._segments:
            self._segments.move_to_end(index)
            return self._segments[index]
        page = self._page
        offset, size = page.dataoffsets[index], page.databytecounts[index]
        data = None
        if size:
            self._file.seek(offset)
            data = self._file.read(size)
            if len(data) != size:
                raise DataError(f"{self._path}: cannot be read (truncated); replace or remove the file")
        values, position, _ = page.decode(data, index, jpegtables=page.jpegtables)
        found = (None if values is None else values[0], position)
        self._segments[index] = found
        self._kept += 0 if values is None else values.nbytes
        while self._kept > _CACHE and len(self._segments) > 1:
            _, (old, _) = self._segments.popitem(last=False)
            self._kept -= 0 if old is None else old.nbytes
        return found


def _is_one_array(series: Any, pages: int) -> bool:
    """Whether a series of tifffile is one array of three axes, stored as pages of its first axis."""
    one = series.kind == "shaped" or "C" in series.axes
    return one and len(series.shape) == 3 and series.shape[0] == pages == len(series.pages)


def _moved(shape: tuple[int, ...], last: bool) -> tuple[int, ...]:
    return shape if last else (*shape[1:], shape[0])


def _number(tag: Any) -> float | None:
    """Return the number in a text tag; None if there is none."""
    try:
        return None if tag is None else float(str(tag.value).strip("\0 "))
    except ValueError:
        return None
