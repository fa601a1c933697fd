"""Samples as items and batches: crops for training, whole images for evaluation, and what is skipped."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from mcseg.data.files import Reader, Sample, Window
from mcseg.data.labels import DataError
from mcseg.data.order import Draw
from mcseg.data.transforms import TrainingTransform, resize_image, shrinking
from mcseg.seeds import seeded

Batch = dict[str, Any]
_EMPTY = (32, 32)  # height and width of a batch without images, which has to pass a network all the same


class TrainingCrops(Dataset[Batch]):
    """Augmented training crops; with ``skip`` the next image that can be used stands in for one that cannot."""

    def __init__(self, reader: Reader, samples: Sequence[Sample], transform: TrainingTransform, skip: bool = False) -> None:
        self.reader = reader
        self.samples = samples
        self.transform = transform
        self.skip = skip

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | Draw) -> Batch:
        if not isinstance(key, Draw):
            return self._usable_crop(key)
        with seeded(key.seed):
            return self._usable_crop(key.image)

    def _usable_crop(self, index: int) -> Batch:
        skipped: dict[str, str] = {}
        for place in range(index, index + len(self)):
            sample = self.samples[place % len(self)]
            try:
                crop = self._crop(sample)
            except DataError as error:
                if not self.skip:
                    raise
                skipped[sample.name] = str(error)
            else:
                return crop | {"skipped": skipped} if skipped else crop
        raise DataError(f"no training image can be used any more; the first: {next(iter(skipped.values()))}")

    def _crop(self, sample: Sample) -> Batch:
        drawn: dict[str, Any] = {}

        def choose(mask: Tensor) -> Window:
            drawn.update(self.transform.draw(mask))
            window: Window = drawn["window"]
            return window

        image, mask = self.reader.pair(sample, choose)
        return {
            "image": self.transform.finish_image(image, drawn),
            "mask": self.transform.finish_mask(mask, drawn),
            "name": sample.name,
        }


class WholeImages(Dataset[Batch]):
    """Whole images resized by ``image_scale``, with the mask at its own size or, for prediction, without.

    With ``skip`` an image that cannot be used is an item without ``image`` that says why.
    """

    def __init__(
        self,
        reader: Reader,
        samples: Sequence[Sample],
        image_scale: float,
        max_side: int | None = None,
        masks: bool = True,
        skip: bool = False,
    ) -> None:
        self.reader = reader
        self.samples = samples
        self.image_scale = image_scale
        self.max_side = max_side
        self.masks = masks
        self.skip = skip

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Batch:
        sample = self.samples[index]
        try:
            return self._whole(sample)
        except DataError as error:
            if not self.skip:
                raise
            return {"skipped": {sample.name: str(error)}}

    def _whole(self, sample: Sample) -> Batch:
        item: Batch = {"name": sample.name}
        if self.masks:
            image, item["mask"] = self.reader.pair(sample)
        else:
            image = self.reader.image(sample)
            item["size"] = (image.shape[1], image.shape[2])
        item["image"] = resize_image(image, self.image_scale * shrinking(image.shape[1:], self.max_side))
        return item


class WideningLoader(DataLoader[Batch]):
    """Makes masks int64, which every loss takes, on this side of the pipe from the workers: an eighth goes through it."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            batch.pop("dropped", None)
            for why in batch.pop("skipped", {}).values():
                warn_skipped(why)
            if "mask" in batch:
                # By numpy: torch's threads would go on spinning on the cores that the workers need.
                batch["mask"] = torch.from_numpy(batch["mask"].numpy().astype(np.int64))
            yield batch


def warn_skipped(why: str) -> None:
    """Tell of a sample that is skipped, in the words of its error."""
    warnings.warn(f"skipped: {why}", stacklevel=2)


def collate(items: Sequence[Batch]) -> Batch:
    """Stack items to a batch, which is empty where none has an image.

    Where samples were skipped, ``skipped`` has the reason by their names, and ``dropped`` the places of the items without.
    """
    told: Batch = {}
    if skipped := {name: why for item in items for name, why in item.get("skipped", {}).items()}:
        told = {"skipped": skipped, "dropped": [place for place, item in enumerate(items) if "image" not in item]}
        items = [item for item in items if "image" in item]
    if not items:
        height, width = _EMPTY
        image, mask = torch.zeros(0, 3, height, width, dtype=torch.uint8), torch.zeros(0, height, width, dtype=torch.uint8)
        return {"image": image, "mask": mask, "name": [], "size": []} | told
    sizes = sorted({tuple(item["mask" if "mask" in item else "image"].shape[-2:]) for item in items})
    if len(sizes) > 1:
        raise DataError(
            f"images of different sizes ({sizes[0][1]}x{sizes[0][0]}, {sizes[1][1]}x{sizes[1][0]}) cannot form "
            "one batch; set data.eval_batch_size to 1"
        )
    # torch's collation stacks tensors where the main process reads them
    stacked = {key: default_collate([item[key] for item in items]) for key in ("image", "mask") if key in items[0]}
    return stacked | {key: [item[key] for item in items] for key in ("name", "size") if key in items[0]} | told
