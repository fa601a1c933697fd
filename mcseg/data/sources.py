"""Open image files: headers and stored values of Pillow's formats, TIFF and NPY files."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from mcseg.data.labels import DataError, MissingFileError

_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSING = (5, 6, 7, 8)  # orientations that swap height and width
# Formats of 8- or 16-bit images. Pillow reads more, but some of them run other programs (EPS) or contain other data.
_FORMATS = ("JPEG", "MPO", "PNG", "TIFF", "WEBP", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "AVIF", "TGA")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # first bytes of a TIFF file; the last two of BigTIFF
_UINT8: np.dtype[Any] = np.dtype(np.uint8)
_NPY = b"\x93NU"
MAX_PIXELS = 2 * 89_478_485  # limit of Pillow


class Window(NamedTuple):
    """Part of an image: rows ``top`` to ``bottom - 1``, columns ``left`` to ``right - 1``."""

    top: int
    left: int
    bottom: int
    right: int

    def cut(self, pixels: Tensor) -> Tensor:
        """Cut this part out of ``pixels``, (...,H,W)."""
        return pixels[..., self.top : self.bottom, self.left : self.right]


class Header(NamedTuple):
    """Size and type of a stored image.

    Args:
        height: Rows of the image as displayed.
        width: Columns of the image as displayed.
        bands: Number of bands in the file, with alpha; colours of a palette are three bands.
        dtype: Type of the stored values; uint8 for files of fewer bits.
        alpha: Whether the last band is alpha (opacity).
    """

    height: int
    width: int
    bands: int
    dtype: np.dtype[Any]
    alpha: bool


class Source(Protocol):
    """An open image file."""

    header: Header
    nodata: float | None  # stored value of pixels without data, as in GDAL's tag of a TIFF file
    windowed: bool  # whether a window is read without decoding the rest of the file
    tags: dict[int, Any]  # georeferencing tags of a TIFF file

    def values(self, window: Window | None) -> NDArray[Any]:
        """Read the stored values of all bands, (bands,h,w)."""


def check_pixels(path: Path, size: tuple[int, int], limit: int) -> None:
    """Raise DataError if an image of (height, width) has more pixels than the limit."""
    pixels = size[0] * size[1]
    if pixels > limit:
        raise DataError(
            f"{path}: has {pixels:,} pixels ({size[1]}x{size[0]}), expected at most {limit:,} (data.max_pixels), as a small "
            f"file may fill the memory; if you trust it, set data.max_pixels to {pixels}"
        )


@contextmanager
def open_source(path: Path, bands: int = 3) -> Iterator[Source]:
    """Open an image file; any error while it is open becomes a DataError of one line that names the file.

    Args:
        path: A file that tifffile, Pillow or NumPy reads.
        bands: Number of bands, which tells rows from bands in an array file.
    """
    start = _first_bytes(path)
    if start in _TIFF:
        from mcseg.data.tiff import open_tiff  # imported at first use, as few data sets need it

        with _errors_of(path), open_tiff(path, bands) as source:
            if source is not None:  # otherwise colours that Pillow converts, such as CMYK
                yield source
                return
    if start.startswith(_NPY):
        with _errors_of(path):
            yield ArraySource(path, bands)
        return
    with _open(path) as file:
        yield PillowSource(path, file)


def _first_bytes(path: Path) -> bytes:
    try:
        if path.is_file():  # opening a pipe would block
            with path.open("rb") as file:
                return file.read(4)
    except OSError:  # opening the image raises the error again, with the name of the file
        pass
    return b""


class PillowSource:
    """Image that Pillow decodes; RGB PNG files of 16 bits, which Pillow cuts to 8, are decoded by imagecodecs."""

    nodata: float | None = None
    windowed = False

    def __init__(self, path: Path, file: ImageFile.ImageFile) -> None:
        self.tags: dict[int, Any] = {}
        self._path, self._picture = path, file
        self._orientation = file.getexif().get(_ORIENTATION, 1) if "exif" in file.info else 1
        mode, dtype = file.mode, _UINT8
        stored, _, bits = str(file.tile[0][3] if file.tile else "").partition(";")
        self._decodes = file.format == "PNG" and bits.startswith("16") and mode in ("LA", "RGB", "RGBA")
        # Some versions of Pillow open 16-bit grey images in mode I.
        if mode.startswith("I;16") or (mode == "I" and file.format in ("PNG", "PPM")):
            mode, dtype = "L", np.dtype(np.uint16)
        elif mode in ("I", "F"):
            mode, dtype = "L", np.dtype(np.int32 if mode == "I" else np.float32)
        elif self._decodes:
            mode, dtype = stored, np.dtype(np.uint16)  # Pillow opens grey and alpha of 16 bits in mode RGBA
        transparent_palette = mode == "P" and "transparency" in file.info
        alpha = mode in ("LA", "La", "PA", "RGBA", "RGBa") or transparent_palette
        colors = 1 if mode in ("1", "L", "LA", "La") else 3
        self._mode = ("L" if colors == 1 else "RGB") + "A" * alpha
        height, width = image_size_of(file)
        self.header = Header(height, width, colors + alpha, dtype, alpha)

    def values(self, window: Window | None) -> NDArray[Any]:
        """Read the stored values, (bands,h,w)."""
        if self._decodes:
            import imagecodecs

            return _bands_first(_cut(upright(imagecodecs.png_decode(self._path.read_bytes()), self._orientation), window))
        if self._orientation != 1:
            ImageOps.exif_transpose(self._picture, in_place=True)
        picture: Image.Image = self._picture
        # Pillow cuts, because converting a whole photo to a tensor takes a third as long as decoding it.
        if window is not None:
            picture = picture.crop((window.left, window.top, window.right, window.bottom))
        if self.header.dtype != np.uint8:
            return np.array(picture).astype(self.header.dtype, copy=False)[None]
        if picture.mode == "P" and self._mode == "RGB" and "transparency" in picture.info:
            picture = picture.convert("RGBA")  # otherwise Pillow warns about some palettes with transparency
        if picture.mode == "PA" or (picture.mode == "P" and self._mode == "RGBA"):
            picture = picture.convert("RGBA")
        return _bands_first(np.array(picture if picture.mode == self._mode else picture.convert(self._mode)))


class ArraySource:
    """Array in an NPY file: (H,W), (H,W,bands) or (bands,H,W)."""

    nodata: float | None = None
    windowed = True

    def __init__(self, path: Path, bands: int) -> None:
        self.tags: dict[int, Any] = {}
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        if values.ndim == 2:
            values = values[..., None]
        if values.ndim != 3 or 0 in values.shape or values.dtype.kind not in "biuf":
            raise DataError(
                f"{path}: an array of {values.dtype} with shape {values.shape}, expected numbers of shape (H,W), "
                "(H,W,bands) or (bands,H,W); save the image in this form"
            )
        if not bands_are_last(values.shape, bands):
            values = np.moveaxis(values, 0, -1)
        self._values = values
        height, width, found = values.shape
        dtype = np.dtype(np.uint8) if values.dtype == np.bool_ else values.dtype.newbyteorder("=")
        self.header = Header(height, width, found, dtype, alpha=False)

    def values(self, window: Window | None) -> NDArray[Any]:
        """Read the stored values, (bands,h,w)."""
        values = np.array(_cut(self._values, window))
        if values.dtype == np.bool_:
            values = values.astype(np.uint8) * np.uint8(255)  # as Pillow reads files of 1 bit
        return _bands_first(values.astype(self.header.dtype, copy=False))


def bands_are_last(shape: tuple[int, ...], bands: int) -> bool:
    """Whether an array of three axes is (H,W,bands), not (bands,H,W); of other bands, the shorter axis is theirs."""
    return shape[-1] == bands or (shape[0] != bands and shape[-1] <= shape[0])


def _cut(values: NDArray[Any], window: Window | None) -> NDArray[Any]:
    return values if window is None else values[window.top : window.bottom, window.left : window.right]


def _bands_first(values: NDArray[Any]) -> NDArray[Any]:
    """Return (H,W) or (H,W,bands) as (bands,H,W)."""
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def upright(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn (H,W,...) as EXIF's or TIFF's orientation tag says."""
    if orientation in _TRANSPOSING:
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return np.ascontiguousarray(values)


def _unreadable(path: Path, error: Exception) -> DataError:
    detail = " ".join(str(getattr(error, "strerror", None) or error).split()).replace(f" '{path}'", "")
    return DataError(f"{path}: cannot be read ({detail or type(error).__name__}); replace or remove the file")


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Turn any error of a decoder into a DataError of one line that names the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # on a broken file the decoders of tifffile and imagecodecs can raise any exception
        raise _unreadable(path, error) from None


@contextmanager
def _open(path: Path) -> Iterator[ImageFile.ImageFile]:
    """Open a file with Pillow; any error while it is open becomes a DataError of one line that names the file."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # check_pixels checks the size
    try:
        if not path.is_file() and path.exists():  # opening a pipe would block
            raise DataError(f"{path}: is not a file; expected an image; remove or rename it")
        # str, because Pillow before 11 resolves a Path, which raises another type of error for a link to itself.
        with Image.open(str(path), formats=_readable_formats()) as file:
            images = getattr(file, "n_frames", 1)
            if images > 1 and file.format != "MPO":  # MPO: a photo with previews or other views of itself
                raise DataError(f"{path}: contains {images} images; expected one; save each in a separate file")
            yield file
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise _unreadable(path, error) from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@functools.cache
def _readable_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # this build of Pillow may lack some


@functools.cache
def image_extensions() -> frozenset[str]:
    """Return the extensions of the readable image formats, such as ``.png``, in lower case."""
    formats = _readable_formats()
    known = (extension for extension, name in Image.registered_extensions().items() if name in formats)
    return frozenset(known) | {".npy"}


def image_size(path: Path) -> tuple[int, int]:
    """Read (height, width) as displayed from the header. Raises DataError if the header cannot be read."""
    with open_source(path) as source:
        return source.header.height, source.header.width


def image_size_of(file: ImageFile.ImageFile) -> tuple[int, int]:
    """Return (height, width) as displayed of a file that Pillow opened."""
    transposed = "exif" in file.info and file.getexif().get(_ORIENTATION) in _TRANSPOSING
    return (file.width, file.height) if transposed else (file.height, file.width)


def image_mode(path: Path) -> str:
    """Read Pillow's mode of an image, such as ``RGB``, from the header. Raises DataError if the header cannot be read."""
    if _first_bytes(path).startswith(_NPY):
        with open_source(path) as source:
            return "RGB" if source.header.bands == 3 else "L"
    with _open(path) as file:
        return file.mode


@contextmanager
def open_upright(path: Path, max_pixels: int = MAX_PIXELS) -> Iterator[ImageFile.ImageFile]:
    """Open a file with Pillow and apply its EXIF orientation.

    Raises:
        DataError: The file cannot be read, or has too many pixels; also raised while it is open.
    """
    with _open(path) as file:
        check_pixels(path, image_size_of(file), max_pixels)
        if "exif" in file.info:
            ImageOps.exif_transpose(file, in_place=True)
        yield file
