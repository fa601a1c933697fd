"""Decode every file of a data set and list the problems."""

import hashlib
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mcseg.data.datamodule import SPLITS, SegmentationData
from mcseg.data.files import Reader, Sample
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

    Problems are unreadable files, masks of another size than their image, masks with unknown values, images without a
    mask, an empty training or validation split, classes without a pixel in the training labels, and the data set's
    ``remarks``. Classes that are absent only from the validation labels, and images that are the same, are warnings.

    Args:
        data: The data set.
        progress: Whether to show progress bars.
    """
    images: dict[str, int] = {}
    pixels: dict[str, Tensor] = {}
    problems: list[str] = []
    listed: dict[str, list[Sample]] = {}
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
        listed[split] = samples
        if not samples and split != "test":
            problems.append(f"the {split} split is empty; {data.expected(split) or 'expected at least one image'}")
        checked = _CheckedSamples(data.reader, samples, masks=split not in data.withheld)
        loader = DataLoader(checked, batch_size=None, num_workers=min(data.num_workers, len(samples)))
        split_problems: list[tuple[Sample, str]] = []
        results = tqdm(loader, f"Checking {split}", unit=" images", disable=not progress, leave=False)
        for sample, (sample_problems, counts) in zip(samples, results, strict=True):
            pixels[split] += counts
            sound[split] += not sample_problems
            split_problems += [(sample, problem) for problem in sample_problems]
        problems += _grouped(split_problems)
    warnings: list[str] = _duplicates(listed)
    if sound["train"]:
        problems.append(absent_classes(data.class_names, pixels["train"], "training", hint=not problems))
    if sound["val"] and "val" not in data.withheld:
        only_val = torch.where(pixels["train"] > 0, pixels["val"], 1)
        if absent := absent_classes(data.class_names, only_val, "validation", hint=False):
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
        line = next(iter(group.values()))
        if len(group) > 1:
            names = ", ".join(file.name for file in list(group)[:3]) + ", ..." * (len(group) > 3)
            line += f"; {len(group)} files have this problem: {names}"
        lines.append(line)
    return lines


class _CheckedSamples(Dataset[tuple[list[str], Tensor]]):
    """Problems and pixel counts (C,) of each sample; the counts are 0 if there is a problem."""

    def __init__(self, reader: Reader, samples: Sequence[Sample], masks: bool) -> None:
        self.reader = reader
        self.samples = samples
        self.masks = masks

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[list[str], Tensor]:
        sample = self.samples[index]
        counts = torch.zeros(self.reader.table.num_classes, dtype=torch.int64)

        def count() -> None:
            counts.copy_(self.reader.counts(sample))

        # Image, mask and sizes are checked separately, so that all problems of a pair are listed.
        steps = [lambda: self.reader.image(sample), lambda: self.reader.verify(sample, self.masks)]
        if self.masks:
            steps.insert(1, count)
        problems = list(dict.fromkeys(problem for step in steps if (problem := _problem(step))))
        return problems, torch.zeros_like(counts) if problems else counts


def _problem(step: Callable[[], object]) -> str:
    """Return the message of the DataError that ``step`` raises, or ""."""
    try:
        step()
    except DataError as error:
        return str(error)
    return ""
