"""Read image and mask files, with errors that name the file."""

import ctypes
import os
import signal
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mcseg.data.images import ImageFormat
from mcseg.data.labels import IGNORE_INDEX, DataError, LabelTable
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
        return torch.from_numpy(self.table.train_ids(self._stored(path), path))

    def counts(self, sample: Sample) -> Tensor:
        """Count the pixels of each class in the mask, (C,) int64."""
        path = mask_path(sample)
        histogram = None if self.table.by_color else self._histogram(path)
        # No counts if a value has no class; mapping the mask then raises an error that names value and number of pixels.
        counts = None if histogram is None else self.table.class_counts(histogram)
        return count_labels(self.mask(sample), self.table.num_classes) if counts is None else torch.from_numpy(counts)

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

    def _stored(self, path: Path) -> NDArray[np.integer[Any]]:
        """Read the values of a mask file."""
        return read_mask(path, self.table.by_color, self.images.max_pixels)

    def _stored_size(self, path: Path) -> tuple[int, int] | None:
        """Return (height, width) of a mask file; None if that needs decoding."""
        return image_size(path)

    def _histogram(self, path: Path) -> NDArray[np.int64] | None:
        """Count the pixels of each value in an 8-bit PNG, (256,), faster than through an array; None for other files."""
        if path.suffix.lower() == ".npy":
            return None
        with open_upright(path, self.images.max_pixels) as file:
            plain = file.mode in ("L", "P") and file.format == "PNG"  # read_mask checks other files further
            return np.array(file.histogram(), dtype=np.int64) if plain else None

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
        by_color: Whether to read the colours of a palette file instead of its indices.
        max_pixels: Largest number of pixels.

    Returns:
        (H,W) integers, or (H,W,3) uint8 for colour files.

    Raises:
        DataError: The file cannot be read, is lossy (JPEG), or has values other than integer indices or 8-bit colours.
    """
    if path.suffix.lower() == ".npy":
        return _mask_array(path, max_pixels)
    with open_upright(path, max_pixels) as file:
        if "JPEG" in (file.format, str(file.info.get("compression")).upper()):
            raise DataError(f"{path}: JPEG changes label values; expected a lossless mask; export it again as PNG")
        if file.mode in ("F", "CMYK", "YCbCr", "LAB", "HSV"):
            raise DataError(f"{path}: mask of mode {file.mode}; expected integer indices or RGB colours; convert it")
        if any(";16" in str(tile[3]) for tile in file.tile) and file.mode in ("RGB", "RGBA", "LA"):
            raise DataError(f"{path}: a 16-bit mask of several channels; expected one channel or 8-bit colours; convert it")
        if by_color or file.mode in ("RGB", "RGBA"):
            return np.array(file.convert("RGB"))
        if file.mode in ("LA", "PA"):
            return np.array(file.getchannel(0))
        values = np.array(file)
        return values.astype(np.uint8) if values.dtype == np.bool_ else values


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


def images_below(root: Path) -> list[Sample]:
    """List an image file, or all image files in a folder and its subfolders, as samples named by their relative path.

    Raises:
        DataError: The file or folder does not exist, or contains no readable image.
    """
    if root.is_file():
        return [Sample(root.stem, root)]
    if not root.is_dir():
        raise DataError(f"data.predict_root: no such file or folder: {root}; expected an image or a folder of images")
    folders = [root, *sorted(path for path in root.rglob("*") if path.is_dir())]
    files = [path for folder in folders for path in image_files(folder)]
    if not files:
        raise DataError(f"data.predict_root: no readable image in {root}; expected files such as .jpg or .png")
    stems = [path.relative_to(root).with_suffix("").as_posix() for path in files]
    # Files that differ only in their extension keep it, so that no prediction overwrites another.
    occurrences = Counter(stems)
    names = [
        stem if occurrences[stem] == 1 else path.relative_to(root).as_posix().replace(".", "_")
        for stem, path in zip(stems, files, strict=True)
    ]
    return [Sample(name, path) for name, path in zip(names, files, strict=True)]
