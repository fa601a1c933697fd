"""Read image and mask files, with errors that name the file."""

import ctypes
import glob
import itertools
import os
import signal
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile
from torch import Tensor

from mcseg.data.images import ImageFormat
from mcseg.data.labels import IGNORE_INDEX, DataError, LabelTable, pack_color
from mcseg.data.sources import MAX_PIXELS, Window, check_pixels, image_extensions, image_size, open_upright

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


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
    """Facts about one mask, which `mcseg.data.check` compares with those of the other masks.

    Args:
        counts: (C,) int64 pixels of each class.
        palette: Index -> packed colour of the indices that a palette file uses; empty if the colours have been read, and
            for other files.
        transparent: Whether a mask of colours has transparent pixels, whose colours are read.
    """

    counts: Tensor
    palette: Mapping[int, int] = {}
    transparent: bool = False


Choice = Callable[[Tensor], Window]  # chooses the window to cut, given the mask (H,W)


class Reader(Protocol):
    """Reads samples as tensors. Readers are pickled for worker processes, so they have settings but no open files.

    All methods raise `~mcseg.data.labels.DataError` for a sample that cannot be used.
    """

    @property
    def table(self) -> LabelTable:
        """Label table: the meaning of the mask values."""

    def image(self, sample: Sample) -> Tensor:
        """Read the image, (bands,H,W) uint8, or float32 in [0, 1]."""

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
    images: ImageFormat = field(default_factory=ImageFormat, kw_only=True, repr=False)  # not part of the masks' cache key

    def image(self, sample: Sample) -> Tensor:
        """Read the image, (bands,H,W) uint8, or float32 in [0, 1], rotated upright by its EXIF orientation."""
        return self.images.read(sample.image)

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
        if path.suffix.lower() == ".npy":
            return MaskSurvey(count_labels(self.mask(sample), table.num_classes))
        with open_upright(path, self.images.max_pixels) as file:
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
        with self.images.open(sample.image) as image:
            self._compare_sizes(sample, image.size, (mask.shape[0], mask.shape[1]))
            if choose is None:
                return image.read(), mask
            window = choose(mask)
            return image.read(window), window.cut(mask)

    def verify(self, sample: Sample, masks: bool = True) -> None:
        """Check that the headers can be read and fit, and the sizes are equal, without decoding the pixels."""
        header = self.images.header(sample.image)
        if masks:
            image = (header.height, header.width)
            self._compare_sizes(sample, image, self._stored_size(mask_path(sample)) or image)

    def _stored(self, path: Path) -> tuple[NDArray[np.integer[Any]], NDArray[np.uint8] | None]:
        """Read the values of a mask file, and the colours (K,3) of a palette file."""
        return read_values(path, self.table.by_color, self.images.max_pixels)

    def _stored_size(self, path: Path) -> tuple[int, int] | None:
        """Return (height, width) of a mask file; None if that needs decoding."""
        return image_size(path)

    @staticmethod
    def _compare_sizes(sample: Sample, image: tuple[int, int], mask: tuple[int, int]) -> None:
        if image != mask:
            turned = " (turned by its EXIF orientation, if it has one)" if image == mask[::-1] else ""
            raise DataError(
                f"{sample.mask}: the mask is {mask[1]}x{mask[0]} pixels but {sample.image} is "
                f"{image[1]}x{image[0]}{turned}; expected equal sizes; save the mask at the image's size"
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


def read_image(path: Path) -> Tensor:
    """Read an image of colours or grey values, rotated upright by its EXIF orientation.

    Returns:
        (3,H,W) RGB, uint8 for files of 8 bits, otherwise float32 in [0, 1]; see `~mcseg.data.images.ImageFormat`.

    Raises:
        DataError: The file cannot be read, or has other bands or values.
    """
    return ImageFormat().read(path)


def read_mask(path: Path, by_color: bool = False, max_pixels: int = MAX_PIXELS) -> NDArray[np.integer[Any]]:
    """Read the stored values of a mask.

    Args:
        path: A lossless file: a palette or grey PNG of 1, 8 or 16 bits, or RGB if colours stand for classes.
        by_color: Whether to read the colours of a grey or palette file instead of its values.
        max_pixels: Largest number of pixels.

    Returns:
        (H,W) integers, or (H,W,3) uint8 for colour files.

    Raises:
        DataError: The file cannot be read, is lossy (JPEG), or has values other than integer indices or 8-bit colours.
    """
    values, palette = read_values(path, by_color, max_pixels)
    if not by_color or palette is None:
        return values
    colors = np.zeros((256, 3), dtype=np.uint8)
    colors[: len(palette)] = palette
    shown: NDArray[np.uint8] = colors[values]
    return shown


def read_values(
    path: Path, by_color: bool = False, max_pixels: int = MAX_PIXELS
) -> tuple[NDArray[np.integer[Any]], NDArray[np.uint8] | None]:
    """Read a mask as `read_mask` does, but a palette file always as indices with its palette.

    Args:
        path: See `read_mask`.
        by_color: Whether to convert grey files to colours.
        max_pixels: Largest number of pixels.

    Returns:
        (H,W) integers, or (H,W,3) uint8 for colour files; and (K,3) uint8 colours of a palette file, K up to 256, or None.

    Raises:
        DataError: See `read_mask`.
    """
    if path.suffix.lower() == ".npy":
        return _mask_array(path, max_pixels), None
    with open_upright(path, max_pixels) as file:
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


def _mask_array(path: Path, max_pixels: int) -> NDArray[np.integer[Any]]:
    """Read a mask from an NPY file."""
    check_pixels(path, image_size(path), max_pixels)
    values: NDArray[Any] = np.load(path, allow_pickle=False)
    colored = values.ndim == 3 and values.shape[-1] == 3 and values.dtype == np.uint8
    if values.dtype.kind not in "biu" or not (values.ndim == 2 or colored):
        raise DataError(
            f"{path}: a mask of {values.dtype} with shape {values.shape}, expected integers (H,W), or 8-bit colours (H,W,3)"
        )
    return values.astype(np.uint8) if values.dtype == np.bool_ else values


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
