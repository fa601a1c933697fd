"""Reading image and mask files, with errors that name the file."""

import ctypes
import functools
import os
import signal
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from mcseg.data.labels import IGNORE_INDEX, DataError, LabelTable, MissingFileError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_ORIENTATION = 0x0112  # EXIF tag
_TURNED = (5, 6, 7, 8)  # its values that swap height and width
# Those that hold images of 8 or 16 bits. Pillow knows more; some of them start other programs (EPS), or are other data.
_FORMATS = ("JPEG", "MPO", "PNG", "TIFF", "WEBP", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "AVIF", "TGA")


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Args:
        name: unlike that of any other sample of the split; may hold ``/``.
        image: file of the image.
        mask: file of the mask; None where there is none (prediction) or it is not a file.
        more_masks: further files that the mask is made of.
    """

    name: str
    image: Path
    mask: Path | None = None
    more_masks: tuple[Path, ...] = ()


class Window(NamedTuple):
    """Part of an image: rows ``top`` to ``bottom - 1``, columns ``left`` to ``right - 1``."""

    top: int
    left: int
    bottom: int
    right: int

    def cut(self, pixels: Tensor) -> Tensor:
        """This part of pixels (...,H,W)."""
        return pixels[..., self.top : self.bottom, self.left : self.right]


Choice = Callable[[Tensor], Window]


class Reader(Protocol):
    """Turns samples into tensors. A reader travels to worker processes, so it holds settings and no open files."""

    @property
    def table(self) -> LabelTable:
        """What the mask values mean."""

    def image(self, sample: Sample) -> Tensor:
        """(3,H,W) uint8 RGB."""

    def mask(self, sample: Sample) -> Tensor:
        """(H,W) uint8 train ids, void 255."""

    def pair(self, sample: Sample, choose: Choice | None = None) -> tuple[Tensor, Tensor]:
        """Image and mask of one size, or the window of both that ``choose`` takes from the mask."""

    def counts(self, sample: Sample) -> Tensor:
        """(C,) int64: pixels of each class in the mask."""

    def verify(self, sample: Sample, masks: bool = True) -> None:
        """Raise DataError where the headers already show that the sample, or its image alone, cannot be used."""


@dataclass(frozen=True)
class FileReader:
    """Reads image and mask files that Pillow can read; the mask's values go through ``table``."""

    table: LabelTable

    def image(self, sample: Sample) -> Tensor:
        """(3,H,W) uint8 RGB, turned upright by its EXIF orientation."""
        return read_image(sample.image)

    def mask(self, sample: Sample) -> Tensor:
        """(H,W) uint8 train ids, void 255."""
        path = mask_path(sample)
        return torch.from_numpy(self.table.train_ids(self._stored(path), path))

    def counts(self, sample: Sample) -> Tensor:
        """(C,) int64: pixels of each class in the mask."""
        path = mask_path(sample)
        histogram = None if self.table.by_color else self._histogram(path)
        # Where a value has no class, mapping the mask itself says how many pixels have it.
        counts = None if histogram is None else self.table.class_counts(histogram)
        return count_labels(self.mask(sample), self.table.num_classes) if counts is None else torch.from_numpy(counts)

    def pair(self, sample: Sample, choose: Choice | None = None) -> tuple[Tensor, Tensor]:
        """Image and mask of one size, or the window of both that ``choose`` takes from the mask."""
        mask = self.mask(sample)
        with _upright(sample.image) as file:
            self._compare(sample, (file.height, file.width), (mask.shape[0], mask.shape[1]))
            picture = _of_8_bits(file, sample.image)
            if choose is None:
                return _pixels(picture), mask
            window = choose(mask)
            # Cut by Pillow: turning all of a decoded photo into a tensor takes a third as long as decoding it.
            return _pixels(picture.crop((window.left, window.top, window.right, window.bottom))), window.cut(mask)

    def verify(self, sample: Sample, masks: bool = True) -> None:
        """Open the headers: readable, and of one size. The pixels are not decoded."""
        image = image_size(sample.image)
        if masks:
            self._compare(sample, image, self._stored_size(mask_path(sample)) or image)

    def _stored(self, path: Path) -> NDArray[np.integer[Any]]:
        """Values of a mask file."""
        return read_mask(path, self.table.by_color)

    def _stored_size(self, path: Path) -> tuple[int, int] | None:
        """(height, width) of a mask file; None where only decoding would tell."""
        return image_size(path)

    def _histogram(self, path: Path) -> NDArray[np.int64] | None:
        """(256,) pixels of each value in a mask of 8 bits, in less time than an array of it takes; None for others."""
        with _upright(path) as file:
            plain = file.mode in ("L", "P") and file.format == "PNG"  # others have more to be looked at, see read_mask
            return np.array(file.histogram(), dtype=np.int64) if plain else None

    @staticmethod
    def _compare(sample: Sample, image: tuple[int, int], mask: tuple[int, int]) -> None:
        if image != mask:
            raise DataError(
                f"{sample.mask}: the mask is {mask[1]}x{mask[0]} pixels but {sample.image} is "
                f"{image[1]}x{image[0]}; expected equal sizes, save the mask at the image's size"
            )


def mask_path(sample: Sample) -> Path:
    """Path of the mask. Raises DataError where the sample has none."""
    if sample.mask is None:
        raise DataError(f"{sample.image}: has no mask; add one or remove the image")
    return sample.mask


def count_labels(mask: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of each class in a mask (H,W) uint8 of train ids; (C,) int64, void left out."""
    return torch.bincount(mask.flatten(), minlength=IGNORE_INDEX + 1)[:num_classes]


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """Open with Pillow; whatever goes wrong while open becomes one line that names the file."""
    try:
        if not path.is_file() and path.exists():  # opening a pipe would wait for ever
            raise DataError(f"{path}: is not a file; expected an image, remove or rename it")
        # not as a Path, which Pillow before 11 resolves first: a link to itself is an error of another kind there
        with Image.open(str(path), formats=_readable_formats()) as file:
            images = getattr(file, "n_frames", 1)
            if images > 1 and file.format != "MPO":  # a photo with other versions of itself
                raise DataError(f"{path}: holds {images} images; expected one, save each as a file of its own")
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
    return tuple(form for form in _FORMATS if form in Image.OPEN)  # as Pillow was built


@functools.cache
def image_extensions() -> frozenset[str]:
    """Extensions of the image files that can be read, such as ``.png``, in lower case."""
    formats = _readable_formats()
    return frozenset(ending for ending, form in Image.registered_extensions().items() if form in formats)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) as displayed, from the header alone. Raises DataError where the header cannot be read."""
    with _opened(path) as file:
        width, height = file.size
        turned = "exif" in file.info and file.getexif().get(_ORIENTATION) in _TURNED
        return (width, height) if turned else (height, width)


def image_mode(path: Path) -> str:
    """Pillow's mode of a file, such as ``RGB``, from the header alone. Raises DataError where it cannot be read."""
    with _opened(path) as file:
        return file.mode


def read_image(path: Path) -> Tensor:
    """Read an image as (3,H,W) uint8 RGB, turned upright by its EXIF orientation. Raises DataError.

    Values of 16 bits are divided by 257; floating-point values and whole numbers of 32 bits have no such scale and are
    refused.
    """
    with _upright(path) as file:
        return _pixels(_of_8_bits(file, path))


@contextmanager
def _upright(path: Path) -> Iterator[ImageFile.ImageFile]:
    """Open an image or a mask as it is displayed."""
    with _opened(path) as file:
        if "exif" in file.info:
            ImageOps.exif_transpose(file, in_place=True)
        yield file


def _pixels(picture: Image.Image) -> Tensor:
    """(3,H,W) uint8 RGB; transparency is left out."""
    if picture.mode == "P":
        picture = picture.convert("RGBA")  # Pillow warns of some palettes with transparency otherwise
    return torch.from_numpy(np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))).permute(2, 0, 1)


def _of_8_bits(file: Image.Image, path: Path) -> Image.Image:
    """The image, its values brought to 0..255 where they have 16 bits: Pillow would cut them off at 255."""
    # Grey images of 16 bits have the mode I in some versions of Pillow.
    if file.mode.startswith("I;16") or (file.mode == "I" and file.format in ("PNG", "PPM")):
        return Image.fromarray((np.array(file) // 257).astype(np.uint8))
    if file.mode in ("I", "F"):
        kind = "whole" if file.mode == "I" else "floating-point"
        raise DataError(f"{path}: an image of {kind} numbers of 32 bits; expected 8 or 16 bits, save it as such")
    return file


def read_mask(path: Path, by_color: bool = False) -> NDArray[np.integer[Any]]:
    """Read the stored values of a mask.

    Args:
        path: a lossless file: palette or grey PNG of 1, 8 or 16 bits, RGB where colours stand for classes.
        by_color: palette files give their colours instead of their indices.

    Returns:
        (H,W) integers, or (H,W,3) uint8 for colour files.

    Raises:
        DataError: unreadable, lossy (JPEG) or floating-point file.
    """
    with _upright(path) as file:
        if "JPEG" in (file.format, str(file.info.get("compression")).upper()):
            raise DataError(f"{path}: JPEG changes label values; expected a lossless mask such as PNG")
        if file.mode in ("F", "CMYK", "YCbCr", "LAB", "HSV"):
            raise DataError(f"{path}: mask of mode {file.mode}; expected integer indices or RGB colours")
        if any(";16" in str(tile[3]) for tile in file.tile) and file.mode in ("RGB", "RGBA", "LA"):
            raise DataError(f"{path}: a mask of 16 bits in several channels; expected one channel, or 8 bits of each colour")
        if by_color or file.mode in ("RGB", "RGBA"):
            return np.array(file.convert("RGB"))
        if file.mode in ("LA", "PA"):
            return np.array(file.getchannel(0))
        values = np.array(file)
        return values.astype(np.uint8) if values.dtype == np.bool_ else values


def prepare_worker(_worker: int) -> None:
    """Set a loader's worker process up: what its loader's process decides about ending, and memory that it keeps."""
    _leave_signals_to_the_loader()
    _keep_freed_memory()


def _leave_signals_to_the_loader() -> None:
    """Let a worker outlive a signal that reaches all processes of a run, unless its loader's process sends it.

    Ctrl-C, SLURM and systemd signal them all. The process that trains ends its step and writes a checkpoint, for which it
    may still need batches; then it ends its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # which tells who sent a signal, where the system has it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_loader, daemon=True).start()


def _end_with_the_loader() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _keep_freed_memory() -> None:
    """Let a process keep the memory that it frees, where the C library is glibc.

    By default an image's memory goes back to the system and is fetched, page by page and zeroed, for the next image.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        # The first fails for a value beyond the C library's maximum (32 MB in some versions); then nothing is changed.
        if mallopt(_M_MMAP_THRESHOLD, 1 << 28) or mallopt(_M_MMAP_THRESHOLD, 1 << 25):
            mallopt(_M_TRIM_THRESHOLD, 1 << 29)


def image_files(folder: Path) -> list[Path]:
    """List the files directly in ``folder`` that have the extension of an image, sorted by name; hidden ones are left out.

    Raises:
        DataError: the folder cannot be listed, or a name could not be printed or written to a file.
    """
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); expected a folder of images") from None
    files = [path for path in entries if path.suffix.lower() in image_extensions()]
    for path in files:
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in path.name):
            raise DataError(
                f"{folder}: a file is named {path.name!r}; expected letters in UTF-8 and no line break, rename it"
            )
    return files


def images_below(root: Path) -> list[Sample]:
    """Samples of an image file, or of all image files in a folder and below, named by their path in it."""
    if root.is_file():
        return [Sample(root.stem, root)]
    if not root.is_dir():
        raise DataError(f"data.predict_root: {root} is neither an image nor a folder of images")
    folders = [root, *sorted(path for path in root.rglob("*") if path.is_dir())]
    files = [path for folder in folders for path in image_files(folder)]
    if not files:
        raise DataError(f"data.predict_root: no image that can be read in {root}; expected files such as .jpg or .png")
    stems = [path.relative_to(root).with_suffix("").as_posix() for path in files]
    # Two files that differ only in their extension keep it, or one result would overwrite the other.
    occurrences = Counter(stems)
    names = [
        stem if occurrences[stem] == 1 else path.relative_to(root).as_posix().replace(".", "_")
        for stem, path in zip(stems, files, strict=True)
    ]
    return [Sample(name, path) for name, path in zip(names, files, strict=True)]
