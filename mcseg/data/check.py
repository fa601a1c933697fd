"""Open every file of a data set and list what is wrong with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mcseg.data.datamodule import SPLITS, SegmentationData
from mcseg.data.files import Reader, Sample
from mcseg.data.labels import DataError


@dataclass(frozen=True)
class Report:
    """What :func:`check` found: images per split, pixels per class and split, and the problems, one line each."""

    images: dict[str, int]
    pixels: dict[str, Tensor]
    problems: list[str]


def check(data: SegmentationData, progress: bool = True) -> Report:
    """Decode every image and mask of all splits.

    Problems are unreadable files, masks of another size than their image, masks with unknown values, images without a
    mask, an empty training or validation split, and classes without a pixel in the training labels.
    """
    images: dict[str, int] = {}
    pixels: dict[str, Tensor] = {}
    problems: list[str] = []
    for split in SPLITS:
        images[split] = 0
        pixels[split] = torch.zeros(data.num_classes, dtype=torch.int64)
        try:
            samples = data.samples(split)
            problems += data.remarks(split)
        except DataError as error:  # lists and folders that do not fit; the other splits may
            problems.append(str(error))
            continue
        images[split] = len(samples)
        if not samples and split != "test":
            problems.append(f"the {split} split is empty")
        decoded = _Decoded(data.reader, samples, split not in data.withheld)
        loader = DataLoader(decoded, batch_size=None, num_workers=min(data.num_workers, len(samples)))
        for found, counts in tqdm(loader, f"Checking {split}", unit=" images", disable=not progress, leave=False):
            pixels[split] += counts
            problems += found
    if images["train"]:
        # Masks of tools that save a shape in white hold 255, which is void.
        shape = data.num_classes == 2 and not problems
        hint = "; if it has the value 255 in the masks, say so in classes.toml (id = 255)" if shape else ""
        problems += [
            f"class {name} (train id {index}) has no pixel in the training labels{hint}"
            for index, name in enumerate(data.class_names)
            if pixels["train"][index] == 0
        ]
    return Report(images, pixels, list(dict.fromkeys(problems)))


class _Decoded(Dataset[tuple[list[str], Tensor]]):
    """(problems, pixel counts) of each sample."""

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

        # Image, mask and their sizes are tried one by one, so that a pair with several faults shows them all.
        tried = [lambda: self.reader.image(sample), lambda: self.reader.verify(sample, self.masks)]
        if self.masks:
            tried.insert(1, count)
        problems = list(dict.fromkeys(problem for step in tried if (problem := _fault(step))))
        return problems, torch.zeros_like(counts) if problems else counts


def _fault(step: Callable[[], object]) -> str:
    try:
        step()
    except DataError as error:
        return str(error)
    return ""
