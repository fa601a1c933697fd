"""Read image and mask files, with errors that name the file."""

import ctypes
import functools
import glob
import itertools
import os
import signal
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from mcseg.data.labels import IGNORE_INDEX, DataError, LabelTable, MissingFileError, pack_color

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSING = (5, 6, 7, 8)  # orientations that swap height and width
# Formats of 8- or 16-bit images. Pillow reads more, but some of them run other programs (EPS) or contain other data.
_FORMATS = ("JPEG", "MPO", "PNG", "TIFF", "WEBP", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "AVIF", "TGA")


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Args:
        name: Unique name within the split; may contain ``/``.
        image: Path of the image file.
        mask: Path of the mask file; None if there is no mask (prediction) or no file (drawn scenes).
        more_masks: Further mask files to merge with ``mask``.
        expected_mask: Path that a missing mask should have, for messages.
    """

    name: str
    image: Path
    mask: Path | None = None
    more_masks: tuple[Path, ...] = ()
    expected_mask: Path | None = None


class MaskSurvey(NamedTuple):
    """What `mcseg.data.check` compares between the masks of a data set.

    Args:
        counts: (C,) int64 pixels of each class.
        palette: Index -> packed colour of the indices that a palette file uses; empty if the colours have been read, and
            for other files.
        transparent: Whether a mask of colours has transparent pixels, whose colours are read.
    """

    counts: Tensor
    palette: Mapping[int, int] = {}
    transparent: bool = False


class Window(NamedTuple):
    """Part of an image: rows ``top`` to ``bottom - 1``, columns ``left`` to ``right - 1``."""

    top: int
    left: int
    bottom: int
    right: int

    def cut(self, pixels: Tensor) -> Tensor:
        """Cut this part out of ``pixels``, (...,H,W)."""
        return pixels[..., self.top : self.bottom, self.left : self.right]


Choice = Callable[[Tensor], Window]  # chooses the window to cut, given the mask (H,W)


class Reader(Protocol):
    """Reads samples as tensors. Readers are pickled for worker processes, so they have settings but no open files.

    All methods raise `~mcseg.data.labels.DataError` for a sample that cannot be used.
    """

    @property
    def table(self) -> LabelTable:
        """Label table: the meaning of the mask values."""

    def image(self, sample: Sample) -> Tensor:
        """Read the image, (3,H,W) uint8 RGB."""

    def mask(self, sample: Sample) -> Tensor:
        """Read the mask, (H,W) uint8 train ids, void 255."""

    def pair(self, sample: Sample, choose: Choice | None = None) -> tuple[Tensor, Tensor]:
        """Read image and mask, which must have the same size; with ``choose``, cut both to the window it returns."""

    def counts(self, sample: Sample) -> Tensor:
        """Count the pixels of each class in the mask, (C,) int64."""

    def verify(self, sample: Sample, masks: bool = True) -> None:
        """Check the headers of image and mask, or of the image only, without decoding the pixels."""


@dataclass(frozen=True)
class FileReader:
    """Reader of image and mask files that Pillow supports; ``table`` maps the mask values to train ids."""

    table: LabelTable

    def image(self, sample: Sample) -> Tensor:
        """Read the image, (3,H,W) uint8 RGB, rotated upright by its EXIF orientation."""
        return read_image(sample.image)

    def mask(self, sample: Sample) -> Tensor:
        """Read the mask, (H,W) uint8 train ids, void 255."""
        path = mask_path(sample)
        values, palette = self._stored(path)
        return torch.from_numpy(self.table.train_ids(values, path, palette))

    def counts(self, sample: Sample) -> Tensor:
        """Count the pixels of each class in the mask, (C,) int64."""
        return self.survey(sample).counts

    def survey(self, sample: Sample) -> MaskSurvey:
        """Count the pixels of each class, and describe palette and transparency; decodes the mask once.

        Raises:
            DataError: The mask cannot be used.
        """
        path, table = mask_path(sample), self.table
        with _open_upright(path) as file:
            palette = _palette(file)
            # Counting the values of an 8-bit PNG is faster than through an array. Other files need the checks of read_mask.
            plain = file.format == "PNG" and (file.mode == "P" or (file.mode == "L" and not table.by_color))
            histogram = np.array(file.histogram(), dtype=np.int64) if plain else None
            values = None if plain else _values(file, path, table.by_color)
            transparent = file.mode in ("RGBA", "LA") and np.array(file.getchannel("A")).min() < 255
        if palette is not None and histogram is None and values is not None:
            histogram = np.bincount(values.ravel(), minlength=256)
        counted = None
        if histogram is not None:
            reads_colors = palette is not None and (table.by_color or table.colors)
            ids = table.palette_ids(palette, histogram, path) if palette is not None and reads_colors else None
            counted = table.class_counts(histogram, ids)
        if counted is None:  # mapping the mask also raises the error that names an unknown value and its number of pixels
            values, palette = (values, palette) if values is not None else self._stored(path)
            mask = torch.from_numpy(table.train_ids(values, path, palette))
            counts = count_labels(mask, table.num_classes)
        else:
            counts = torch.from_numpy(counted)
        if palette is None or histogram is None or table.by_color or table.colors:
            return MaskSurvey(counts, transparent=bool(transparent))
        used = np.flatnonzero(histogram[: len(palette)]).tolist()
        return MaskSurvey(counts, {index: pack_color(palette[index]) for index in used})

    def pair(self, sample: Sample, choose: Choice | None = None) -> tuple[Tensor, Tensor]:
        """Read image and mask, which must have the same size; with ``choose``, cut both to the window it returns."""
        mask = self.mask(sample)
        with _open_upright(sample.image) as file:
            self._compare_sizes(sample, (file.height, file.width), (mask.shape[0], mask.shape[1]))
            picture = _to_8_bits(file, sample.image)
            if choose is None:
                return _pixels(picture), mask
            window = choose(mask)
            # Pillow cuts, because converting a whole photo to a tensor takes a third as long as decoding it.
            return _pixels(picture.crop((window.left, window.top, window.right, window.bottom))), window.cut(mask)

    def verify(self, sample: Sample, masks: bool = True) -> None:
        """Check that the headers can be read and the sizes are equal, without decoding the pixels."""
        image = image_size(sample.image)
        if masks:
            self._compare_sizes(sample, image, self._stored_size(mask_path(sample)) or image)

    def _stored(self, path: Path) -> tuple[NDArray[np.integer[Any]], NDArray[np.uint8] | None]:
        """Read the values of a mask file, and the colours (K,3) of a palette file."""
        return read_values(path, self.table.by_color)

    def _stored_size(self, path: Path) -> tuple[int, int] | None:
        """Return (height, width) of a mask file; None if that needs decoding."""
        return image_size(path)

    @staticmethod
    def _compare_sizes(sample: Sample, image: tuple[int, int], mask: tuple[int, int]) -> None:
        if image != mask:
            raise DataError(
                f"{sample.mask}: the mask is {mask[1]}x{mask[0]} pixels but {sample.image} is "
                f"{image[1]}x{image[0]}; expected equal sizes; save the mask at the image's size"
            )


def mask_path(sample: Sample) -> Path:
    """Return the path of the mask. Raises DataError if the sample has none."""
    if sample.mask is None:
        expected = f", expected {sample.expected_mask}" if sample.expected_mask else ""
        raise DataError(f"{sample.image}: has no mask{expected}; add one or remove the image")
    return sample.mask


def count_labels(mask: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of each class in a mask of train ids (H,W) uint8; returns (C,) int64 without void."""
    return torch.bincount(mask.flatten(), minlength=IGNORE_INDEX + 1)[:num_classes]


@contextmanager
def _open(path: Path) -> Iterator[ImageFile.ImageFile]:
    """Open a file with Pillow; any error while it is open becomes a DataError of one line that names the file."""
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
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        detail = " ".join(str(getattr(error, "strerror", None) or error).split()).replace(f" '{path}'", "")
        raise DataError(f"{path}: cannot be read ({detail or type(error).__name__}); replace or remove the file") from None


@functools.cache
def _readable_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # this build of Pillow may lack some


@functools.cache
def image_extensions() -> frozenset[str]:
    """Return the extensions of the readable image formats, such as ``.png``, in lower case."""
    formats = _readable_formats()
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in formats)


def image_size(path: Path) -> tuple[int, int]:
    """Read (height, width) as displayed from the header. Raises DataError if the header cannot be read."""
    with _open(path) as file:
        width, height = file.size
        transposed = "exif" in file.info and file.getexif().get(_ORIENTATION) in _TRANSPOSING
        return (width, height) if transposed else (height, width)


def image_mode(path: Path) -> str:
    """Read Pillow's mode of an image, such as ``RGB``, from the header. Raises DataError if the header cannot be read."""
    with _open(path) as file:
        return file.mode


def read_image(path: Path) -> Tensor:
    """Read an image, rotated upright by its EXIF orientation.

    Args:
        path: Image file of 8 or 16 bits per channel; 16-bit grey values are divided by 257.

    Returns:
        (3,H,W) uint8 RGB; transparency is dropped.

    Raises:
        DataError: The file cannot be read, or has 32-bit integers or floating-point values, whose range is not defined.
    """
    with _open_upright(path) as file:
        return _pixels(_to_8_bits(file, path))


@contextmanager
def _open_upright(path: Path) -> Iterator[ImageFile.ImageFile]:
    """Open an image or a mask and apply its EXIF orientation."""
    with _open(path) as file:
        if "exif" in file.info:
            ImageOps.exif_transpose(file, in_place=True)
        yield file


def _pixels(picture: Image.Image) -> Tensor:
    """Convert to (3,H,W) uint8 RGB without transparency."""
    if picture.mode == "P":
        picture = picture.convert("RGBA")  # otherwise Pillow warns about some palettes with transparency
    return torch.from_numpy(np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))).permute(2, 0, 1)


def _to_8_bits(file: Image.Image, path: Path) -> Image.Image:
    """Scale 16-bit values to 0..255, where Pillow would clip them at 255; other images are returned unchanged."""
    # Some versions of Pillow open 16-bit grey images in mode I.
    if file.mode.startswith("I;16") or (file.mode == "I" and file.format in ("PNG", "PPM")):
        return Image.fromarray((np.array(file) // 257).astype(np.uint8))
    if file.mode in ("I", "F"):
        kind = "integers" if file.mode == "I" else "floating-point values"
        raise DataError(f"{path}: an image of 32-bit {kind}; expected 8 or 16 bits; convert it")
    return file


def read_mask(path: Path, by_color: bool = False) -> NDArray[np.integer[Any]]:
    """Read the stored values of a mask.

    Args:
        path: A lossless file: a palette or grey PNG of 1, 8 or 16 bits, or RGB if colours stand for classes.
        by_color: Whether to read the colours of a grey or palette file instead of its values.

    Returns:
        (H,W) integers, or (H,W,3) uint8 for colour files.

    Raises:
        DataError: The file cannot be read, is lossy (JPEG), or has values other than integer indices or 8-bit colours.
    """
    values, palette = read_values(path, by_color)
    if not by_color or palette is None:
        return values
    colors = np.zeros((256, 3), dtype=np.uint8)
    colors[: len(palette)] = palette
    shown: NDArray[np.uint8] = colors[values]
    return shown


def read_values(path: Path, by_color: bool = False) -> tuple[NDArray[np.integer[Any]], NDArray[np.uint8] | None]:
    """Read a mask as `read_mask` does, but a palette file always as indices with its palette.

    Args:
        path: See `read_mask`.
        by_color: Whether to convert grey files to colours.

    Returns:
        (H,W) integers, or (H,W,3) uint8 for colour files; and (K,3) uint8 colours of a palette file, K up to 256, or None.

    Raises:
        DataError: See `read_mask`.
    """
    with _open_upright(path) as file:
        return _values(file, path, by_color), _palette(file)


def _values(file: ImageFile.ImageFile, path: Path, by_color: bool) -> NDArray[np.integer[Any]]:
    """Return the values of an open mask file, see `read_values`."""
    if "JPEG" in (file.format, str(file.info.get("compression")).upper()):
        raise DataError(f"{path}: JPEG changes label values; expected a lossless mask; export it again as PNG")
    if file.mode in ("F", "CMYK", "YCbCr", "LAB", "HSV"):
        raise DataError(f"{path}: mask of mode {file.mode}; expected integer indices or RGB colours; convert it")
    if any(";16" in str(tile[3]) for tile in file.tile) and file.mode in ("RGB", "RGBA", "LA"):
        raise DataError(f"{path}: a 16-bit mask of several channels; expected one channel or 8-bit colours; convert it")
    if file.mode in ("RGB", "RGBA") or (by_color and file.mode not in ("P", "PA")):
        return np.array(file.convert("RGB"))
    if file.mode in ("LA", "PA"):
        return np.array(file.getchannel(0))
    values = np.array(file)
    return values.astype(np.uint8) if values.dtype == np.bool_ else values


def _palette(file: Image.Image) -> NDArray[np.uint8] | None:
    """Return the colours (K,3) of a palette file, K up to 256; None for other files."""
    if file.mode not in ("P", "PA"):
        return None
    return np.array(file.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)


def prepare_worker(_worker: int) -> None:
    """Initialise a loader worker: ignore signals sent to the whole run, and keep freed memory."""
    _ignore_run_wide_signals()
    _keep_freed_memory()


def _ignore_run_wide_signals() -> None:
    """Ignore SIGINT and SIGTERM in a worker, except a SIGTERM from the process that owns the loader.

    Ctrl-C, SLURM and systemd signal all processes of a run. The training process then finishes its step, for which it may
    still need batches, writes a checkpoint and terminates its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows; it reports the sender of a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_of_parent, daemon=True).start()


def _exit_on_sigterm_of_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory in this process; other C libraries are left as they are.

    By default, the memory of an image returns to the system and is mapped again, zeroed page by page, for the next image.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        # The first call fails and changes nothing if the value exceeds glibc's maximum, 32 MB in some versions.
        if mallopt(_M_MMAP_THRESHOLD, 1 << 28) or mallopt(_M_MMAP_THRESHOLD, 1 << 25):
            mallopt(_M_TRIM_THRESHOLD, 1 << 29)


def image_files(folder: Path) -> list[Path]:
    """List the files directly in ``folder`` with the extension of an image, sorted by name, without hidden files.

    Raises:
        DataError: The folder cannot be listed, or a name contains control characters or is not valid UTF-8.
    """
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); expected a folder of images") from None
    files = [path for path in entries if path.suffix.lower() in image_extensions()]
    for path in files:
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in path.name):
            raise DataError(f"{folder}: a file is named {path.name!r}; expected UTF-8 without control characters; rename it")
    return files


def images_below(*roots: Path) -> list[Sample]:
    """List image files, the image files in folders and their subfolders, and those that glob patterns match.

    The samples have different names: the path below the folder, or below the part of a pattern before the first wildcard,
    without extension. Files that differ in their extension only keep it: ``a_jpg`` and ``a_png``.

    Raises:
        DataError: A file or folder does not exist, or there is no readable image.
    """
    tops, files = zip(*map(_top_and_files, roots), strict=True)
    top = Path(os.path.commonpath([path.absolute() for path in tops]))
    unique = dict.fromkeys(path for found in files for path in found)
    if not unique:
        raise DataError(
            f"data.predict_root: no readable image in {', '.join(map(str, roots))}; expected files such as .jpg or .png"
        )
    stems = {path: path.absolute().relative_to(top).with_suffix("").as_posix() for path in unique}
    # Upper and lower case are the same name on some systems.
    occurrences = Counter(stem.lower() for stem in stems.values())
    taken: set[str] = set()
    names: dict[Path, str] = {}
    # Names without a double come first, so that a_jpg.png keeps its name beside a.jpg and a.png.
    for path, stem in sorted(stems.items(), key=lambda item: occurrences[item[1].lower()] > 1):
        name = stem if occurrences[stem.lower()] == 1 else f"{stem}_{path.suffix[1:]}"
        while name.lower() in taken:
            name += "_"
        taken.add(name.lower())
        names[path] = name
    return [Sample(names[path], path) for path in unique]


def _top_and_files(root: Path) -> tuple[Path, list[Path]]:
    """Return the images of a file, a folder or a pattern, and the folder that their names are relative to."""
    if root.is_file():
        return root.parent, [root]
    if root.is_dir():
        return root, [path for folder in _with_subfolders(root) for path in image_files(folder)]
    fixed = list(itertools.takewhile(lambda part: not any(mark in part for mark in "*?["), root.parts))
    if len(fixed) == len(root.parts):
        raise DataError(f"data.predict_root: no such file or folder: {root}; expected an image or a folder of images")
    found = sorted(map(Path, glob.glob(str(root), recursive=True)))
    readable = {folder: set(image_files(folder)) for folder in {path.parent for path in found if path.is_file()}}
    files = [path for path in found if path in readable.get(path.parent, ())]
    folders = [inner for path in found if path.is_dir() for inner in _with_subfolders(path)]
    return Path(*fixed), [*files, *(path for folder in folders for path in image_files(folder))]


def _with_subfolders(folder: Path) -> list[Path]:
    """List a folder and all below it, also through links, without hidden ones and without following a loop of links."""
    found: list[Path] = []
    visited: set[str] = set()
    for current, inner, _ in os.walk(folder, followlinks=True):
        real = os.path.realpath(current)
        if real in visited:
            inner.clear()
            continue
        visited.add(real)
        inner[:] = [name for name in inner if name[0] != "." and name != "__MACOSX"]
        found.append(Path(current))
    return sorted(found)
