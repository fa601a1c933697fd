"""Decode every file of a data set and list the problems."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mcseg.data.datamodule import SPLITS, SegmentationData
from mcseg.data.files import FileReader, Reader, Sample
from mcseg.data.images import USUAL_VALUES, UsedValues, largest_value
from mcseg.data.labels import DataError
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
    mask, an empty training or validation split, classes without a pixel in the training labels, and the data set's
    ``remarks``. Classes that are absent only from the validation labels are a warning.

    Args:
        data: The data set.
        progress: Whether to show progress bars.
    """
    images: dict[str, int] = {}
    pixels: dict[str, Tensor] = {}
    problems: list[str] = []
    used = UsedValues(data.images)
    sound: dict[str, int] = dict.fromkeys(SPLITS, 0)  # number of samples without a problem
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
        if not samples and split != "test":
            problems.append(f"the {split} split is empty; {data.expected(split) or 'expected at least one image'}")
        checked = _CheckedSamples(data.reader, samples, masks=split not in data.withheld)
        loader = DataLoader(checked, batch_size=None, num_workers=min(data.num_workers, len(samples)))
        split_problems: list[tuple[Sample, str]] = []
        results = tqdm(loader, f"Checking {split}", unit=" images", disable=not progress, leave=False)
        for sample, (sample_problems, counts, dtype, largest) in zip(samples, results, strict=True):
            used.add(sample.image, np.dtype(dtype), largest)
            pixels[split] += counts
            sound[split] += not sample_problems
            split_problems += [(sample, problem) for problem in sample_problems]
        problems += _grouped(split_problems)
    problems += used.problems()
    warnings: list[str] = []
    if sound["train"]:
        problems.append(absent_classes(data.class_names, pixels["train"], "training", hint=not problems))
    if sound["val"] and "val" not in data.withheld:
        only_val = torch.where(pixels["train"] > 0, pixels["val"], 1)
        if absent := absent_classes(data.class_names, only_val, "validation", hint=False):
            warnings.append(f"{absent}; val/miou counts such classes only if they are predicted")
    return Report(images, pixels, list(dict.fromkeys(filter(None, problems))), warnings)


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
        line = next(iter(group.values()))
        if len(group) > 1:
            names = ", ".join(file.name for file in list(group)[:3]) + ", ..." * (len(group) > 3)
            line += f"; {len(group)} files have this problem: {names}"
        lines.append(line)
    return lines


class _CheckedSamples(Dataset[tuple[list[str], Tensor, str, int | None]]):
    """Problems, pixel counts (C,), type and largest value of each sample; the counts are 0 if there is a problem."""

    def __init__(self, reader: Reader, samples: Sequence[Sample], masks: bool) -> None:
        self.reader = reader
        self.samples = samples
        self.masks = masks
        self._usual: set[np.dtype[Any]] = set()  # types with an image that uses the range of the type

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[list[str], Tensor, str, int | None]:
        sample = self.samples[index]
        counts = torch.zeros(self.reader.table.num_classes, dtype=torch.int64)
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

        def count() -> None:
            counts.copy_(self.reader.counts(sample))

        # Image, mask and sizes are checked separately, so that all problems of a pair are listed.
        steps = [look, lambda: self.reader.verify(sample, self.masks)]
        if self.masks:
            steps.insert(1, count)
        problems = list(dict.fromkeys(problem for step in steps if (problem := _problem(step))))
        return problems, torch.zeros_like(counts) if problems else counts, str(dtype), largest


def _problem(step: Callable[[], object]) -> str:
    """Return the message of the DataError that ``step`` raises, or ""."""
    try:
        step()
    except DataError as error:
        return str(error)
    return ""
