"""Decode every file of a data set and list the problems."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mcseg.data.datamodule import SPLITS, SegmentationData
from mcseg.data.files import FileReader, MaskSurvey, Reader, Sample
from mcseg.data.images import USUAL_VALUES, UsedValues, largest_value
from mcseg.data.labels import DataError, unpack_color
from mcseg.data.statistics import absent_classes

_NUMBERS = re.compile(r"\d+(, \d+)*")


@dataclass(frozen=True)
class Report:
    """Result of `check`.

    Args:
        images: Split -> number of images.
        pixels: Split -> (C,) int64 labelled pixels of each class.
        problems: One line per problem; equal problems of several files of a split are one line.
        warnings: One line per weakness of usable data.
    """

    images: dict[str, int]
    pixels: dict[str, Tensor]
    problems: list[str]
    warnings: list[str]


def check(data: SegmentationData, progress: bool = True) -> Report:
    """Decode every image and mask of all splits.

    Problems are unreadable files, images of other bands than ``data.bands``, with transparency or with a range of values far
    below that of their type, masks of another size than their image, masks with unknown values, images without a
    mask, an empty training or validation split, classes without a pixel in the training labels, validation labels that are
    all void, palettes that give one colour to different indices if the class list has no colours, and the data set's
    ``remarks``. Classes that are absent only from the validation labels, images that are the same, other differences between
    palettes, and masks of colours with transparent pixels are warnings.

    Args:
        data: The data set.
        progress: Whether to show progress bars.
    """
    images: dict[str, int] = {}
    pixels: dict[str, Tensor] = {}
    problems: list[str] = []
    used = UsedValues(data.images)
    listed: dict[str, list[Sample]] = {}
    sound: dict[str, int] = dict.fromkeys(SPLITS, 0)  # number of samples without a problem
    palettes = _Palettes()
    transparent: list[Path] = []
    for split in SPLITS:
        images[split] = 0
        pixels[split] = torch.zeros(data.num_classes, dtype=torch.int64)
        try:
            samples = data.samples(split)
            problems += data.remarks(split)
        except DataError as error:  # a bad list or folder; the other splits may be sound
            problems.append(str(error))
            continue
        images[split] = len(samples)
        listed[split] = samples
        if not samples and split != "test":
            problems.append(f"the {split} split is empty; {data.expected(split) or 'expected at least one image'}")
        checked = _CheckedSamples(data.reader, samples, masks=split not in data.withheld)
        loader = DataLoader(checked, batch_size=None, num_workers=min(data.num_workers, len(samples)))
        split_problems: list[tuple[Sample, str]] = []
        results = tqdm(loader, f"Checking {split}", unit=" images", disable=not progress, leave=False)
        for sample, (sample_problems, survey, dtype, largest) in zip(samples, results, strict=True):
            used.add(sample.image, np.dtype(dtype), largest)
            pixels[split] += survey.counts
            if sample.mask is not None:
                palettes.add(sample.mask, survey.palette)
                transparent += [sample.mask] * survey.transparent
            sound[split] += not sample_problems
            split_problems += [(sample, problem) for problem in sample_problems]
        problems += _grouped(split_problems)
    problems += used.problems()
    warnings: list[str] = _duplicates(listed)
    if sound["train"]:
        problems.append(absent_classes(data.class_names, pixels["train"], "training", hint=not problems))
    if palettes.contradiction:
        problems.append(palettes.contradiction)
    elif palettes.difference:
        warnings.append(palettes.difference)
    if transparent:
        warnings.append(
            f"{transparent[0]}: the mask has transparent pixels, and their colours are read as labels; if transparent means "
            f"void, give these pixels a void colour or the value 255{_in_files(transparent)}"
        )
    if sound["val"] and "val" not in data.withheld:
        only_val = torch.where(pixels["train"] > 0, pixels["val"], 1)
        if not pixels["val"].any():
            problems.append(absent_classes(data.class_names, pixels["val"], "validation", hint=False))
        elif absent := absent_classes(data.class_names, only_val, "validation", hint=False):
            warnings.append(f"{absent}; val/miou counts such classes only if they are predicted")
    return Report(images, pixels, list(dict.fromkeys(filter(None, problems))), warnings)


def _duplicates(listed: dict[str, list[Sample]]) -> list[str]:
    """Report images whose files have the same content: one line for each pair of splits.

    Only files of one size are read, first their beginning and end.
    """
    files = {sample.image: split for split in reversed(listed) for sample in reversed(listed[split])}
    groups: list[list[Path]] = [list(files)]
    for key in (_size, partial(_digest, part=1 << 14), _digest):
        finer: dict[tuple[int, object], list[Path]] = {}
        for number, group in enumerate(groups):
            for path in group:
                if (value := key(path)) is not None:
                    finer.setdefault((number, value), []).append(path)
        groups = [group for group in finer.values() if len(group) > 1]
    pairs: dict[tuple[str, str], list[tuple[Path, Path]]] = {}
    for group in sorted(groups, key=min):
        first, *others = sorted(group, key=lambda path: (SPLITS.index(files[path]), path))
        for path in others:
            pairs.setdefault((files[first], files[path]), []).append((first, path))
    return [
        f"{path} and {first} contain the same image"
        + (f"; {len(found)} such pairs" if len(found) > 1 else "")
        + (f" in {one} and {other}: scores on training images are too high" if one == "train" != other else "")
        for (one, other), found in pairs.items()
        for first, path in found[:1]
    ]


def _size(path: Path) -> int | None:
    with suppress(OSError):  # a problem of its own
        return path.stat().st_size or None
    return None


def _digest(path: Path, part: int | None = None) -> bytes | None:
    """Return a hash of a file's content, or of its first and last ``part`` bytes."""
    with suppress(OSError), path.open("rb") as file:
        if part is None:
            return hashlib.file_digest(file, "blake2b").digest()
        content = file.read(part)
        file.seek(-min(part, path.stat().st_size), 2)
        return hashlib.blake2b(content + file.read(part)).digest()
    return None


def _grouped(problems: Sequence[tuple[Sample, str]]) -> list[str]:
    """Return one line for problems that differ only in files and numbers: the first, the number of files and three names."""
    groups: dict[str, dict[Path, str]] = {}  # problem without files and numbers -> file -> problem
    for sample, problem in problems:
        kind = problem
        for name, path in (("IMAGE", sample.image), ("MASK", sample.mask), ("EXPECTED", sample.expected_mask)):
            kind = kind.replace(str(path), name) if path else kind
        file = sample.mask if sample.mask and kind.startswith("MASK") else sample.image
        groups.setdefault(_NUMBERS.sub("N", kind), {})[file] = problem
    lines = []
    for group in groups.values():
        lines.append(next(iter(group.values())) + _in_files(list(group)))
    return lines


def _in_files(files: Sequence[Path]) -> str:
    if len(files) == 1:
        return ""
    names = ", ".join(file.name for file in files[:3]) + ", ..." * (len(files) > 3)
    return f"; {len(files)} files have this problem: {names}"


class _Palettes:
    """Compares the palettes of masks that are read as indices."""

    def __init__(self) -> None:
        self._colors: dict[int, dict[int, Path]] = {}  # index -> packed colour -> first file
        self._indices: dict[int, set[int]] = {}  # packed colour -> indices

    def add(self, path: Path, palette: Mapping[int, int]) -> None:
        """Add the colours of the indices that a file uses."""
        for index, color in palette.items():
            self._colors.setdefault(index, {}).setdefault(color, path)
            self._indices.setdefault(color, set()).add(index)

    @property
    def contradiction(self) -> str:
        """One line if a colour has another index in another file; "" if not."""
        shared = {
            index: {color: path for color, path in colors.items() if len(self._indices[color]) > 1}
            for index, colors in self._colors.items()
            if len(colors) > 1
        }
        index = next((index for index, colors in sorted(shared.items()) if colors), None)
        if index is None:
            return ""
        return (
            f"the palettes of the masks contradict each other: {self._example(index)}; if colours stand for classes, give "
            "each class its colour in the class list, and the masks are read by colour; otherwise save all masks with one "
            "palette"
        )

    @property
    def difference(self) -> str:
        """One line if an index has different colours; "" if not."""
        index = next((index for index, colors in sorted(self._colors.items()) if len(colors) > 1), None)
        if index is None:
            return ""
        return f"the palettes of the masks differ: {self._example(index)}; the masks are read by their indices"

    def _example(self, index: int) -> str:
        (color, path), (other, other_path) = list(self._colors[index].items())[:2]
        return f"index {index} is {unpack_color(color)} in {path} and {unpack_color(other)} in {other_path}"


class _CheckedSamples(Dataset[tuple[list[str], MaskSurvey, str, int | None]]):
    """Problems, survey, type and largest value of each sample; the counts are 0 if there is a problem."""

    def __init__(self, reader: Reader, samples: Sequence[Sample], masks: bool) -> None:
        self.reader = reader
        self.samples = samples
        self.masks = masks
        self._usual: set[np.dtype[Any]] = set()  # types with an image that uses the range of the type

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[list[str], MaskSurvey, str, int | None]:
        sample = self.samples[index]
        surveys: list[MaskSurvey] = []
        dtype, largest = np.dtype(np.uint8), None

        def look() -> None:
            nonlocal dtype, largest
            image = self.reader.image(sample)
            if isinstance(self.reader, FileReader):
                if image.is_floating_point():
                    dtype = self.reader.images.header(sample.image).dtype
                if dtype not in self._usual:  # one image decides, which saves the time for the others
                    largest = largest_value(image, dtype)
                if largest is not None and largest >= USUAL_VALUES[dtype]:
                    self._usual.add(dtype)

        # Image, mask and sizes are checked separately, so that all problems of a pair are listed.
        steps: list[Callable[[], object]] = [look, lambda: self.reader.verify(sample, self.masks)]
        if self.masks:
            steps.insert(1, lambda: surveys.append(_survey(self.reader, sample)))
        problems = list(dict.fromkeys(problem for step in steps if (problem := _problem(step))))
        if problems or not surveys:
            surveys = [MaskSurvey(torch.zeros(self.reader.table.num_classes, dtype=torch.int64))]
        return problems, surveys[0], str(dtype), largest


def _survey(reader: Reader, sample: Sample) -> MaskSurvey:
    """Survey the mask; a reader with a count of its own only counts."""
    if isinstance(reader, FileReader) and type(reader).counts is FileReader.counts:
        return reader.survey(sample)
    return MaskSurvey(reader.counts(sample))


def _problem(step: Callable[[], object]) -> str:
    """Return the message of the DataError that ``step`` raises, or ""."""
    try:
        step()
    except DataError as error:
        return str(error)
    return ""
