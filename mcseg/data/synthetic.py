"""The built-in data set: street scenes drawn on the fly from a seed."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcseg.data.datamodule import SegmentationData
from mcseg.data.files import Choice, Sample, count_labels
from mcseg.data.labels import DataError, LabelTable
from mcseg.data.scenes import SCENE_CLASSES, SCENE_PALETTE, draw_scene


@dataclass(frozen=True)
class SceneReader:
    """Reader that draws a scene from the seed and the sample's name; the same two give the same scene."""

    table: LabelTable
    height: int
    width: int
    seed: int

    def pair(self, sample: Sample, choose: Choice | None = None) -> tuple[Tensor, Tensor]:
        """Draw image (3,H,W) uint8 and labels (H,W) uint8, void 255; with ``choose``, cut both to the window it returns."""
        pixels, labels = draw_scene((self.seed, *sample.name.encode()), self.height, self.width)
        image, mask = torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(labels)
        if choose is None:
            return image, mask
        window = choose(mask)
        return window.cut(image), window.cut(mask)

    def image(self, sample: Sample) -> Tensor:
        """Draw the image, (3,H,W) uint8."""
        return self.pair(sample)[0]

    def mask(self, sample: Sample) -> Tensor:
        """Draw the labels, (H,W) uint8, void 255."""
        return self.pair(sample)[1]

    def counts(self, sample: Sample) -> Tensor:
        """Count the pixels of each class, (C,) int64."""
        return count_labels(self.mask(sample), self.table.num_classes)

    def verify(self, sample: Sample, masks: bool = True) -> None:
        """Do nothing: every scene can be drawn."""


class SyntheticData(SegmentationData):
    """Street scenes of 8 classes with pixel shares from over 50 % down to about 0.1 %, drawn from a seed; no files needed.

    Args:
        train_scenes: Number of training scenes.
        val_scenes: Number of validation scenes.
        test_scenes: Number of test scenes.
        size: (height, width) of a scene in pixels.
        seed: Seed of all scenes; the splits differ for every seed.
        **options: See `~mcseg.data.datamodule.SegmentationData`; ``root`` is refused.

    Raises:
        DataError: A setting is out of range, or ``root`` is given.

    Example:
        >>> from mcseg.data import SyntheticData
        >>> data = SyntheticData(train_scenes=4, batch_size=2, crop_size=(64, 64), num_workers=0)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["image"].shape, batch["mask"].shape
        (torch.Size([2, 3, 64, 64]), torch.Size([2, 64, 64]))
    """

    def __init__(
        self,
        train_scenes: int = 256,
        val_scenes: int = 64,
        test_scenes: int = 64,
        size: tuple[int, int] = (128, 192),
        seed: int = 0,
        **options: Any,
    ) -> None:
        if (root := options.get("root")) is not None:
            raise DataError(
                f"data.root: found {root}, but the drawn scenes have no folder; name a recipe, for example "
                f"`mcseg check folder --root {shlex.quote(str(root))}`"
            )
        for name in ("bands", "value_range", "max_pixels"):
            if options.get(name) not in (None, 3):
                raise DataError(f"data.{name}: found {options[name]}, but the drawn scenes are RGB of 8 bits; remove it")
        raw_ids = {index: index for index in range(len(SCENE_CLASSES))}
        super().__init__(LabelTable(SCENE_CLASSES, SCENE_PALETTE, raw_ids), **options)
        self.reader = SceneReader(self.reader.table, *size, seed)
        self.scenes = {"train": train_scenes, "val": val_scenes, "test": test_scenes}

    @property
    def recipe(self) -> str:
        """Name of the packaged recipe of these data, for messages."""
        return "synthetic"

    def samples(self, split: str) -> list[Sample]:
        """List the scenes of a split; they have names but no files."""
        return [Sample(f"{split}-{index:04d}", Path(f"{split}-{index:04d}")) for index in range(self.scenes[split])]
