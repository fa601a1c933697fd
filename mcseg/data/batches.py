"""Datasets and collation: augmented crops for training, whole images for evaluation, skipping of unusable files."""

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
_EMPTY_SIZE = (32, 32)  # height and width of a batch without images; it still passes through the network


class TrainingCrops(Dataset[Batch]):
    """Augmented training crops; with ``skip``, the next usable image replaces an unusable one."""

    def __init__(self, reader: Reader, samples: Sequence[Sample], transform: TrainingTransform, skip: bool = False) -> None:
        self.reader = reader
        self.samples = samples
        self.transform = transform
        self.skip = skip
        self.check_command = "mcseg check"  # for messages

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | Draw) -> Batch:
        if not isinstance(key, Draw):
            return self._usable_crop(key)
        with seeded(key.seed):
            return self._usable_crop(key.image)

    def _usable_crop(self, index: int) -> Batch:
        skipped: dict[str, str] = {}
        for candidate in range(index, index + len(self)):
            sample = self.samples[candidate % len(self)]
            try:
                crop = self._crop(sample)
            except DataError as error:
                if not self.skip:
                    raise
                skipped[sample.name] = str(error)
            else:
                return crop | {"skipped": skipped} if skipped else crop
        raise DataError(
            f"no training image is usable any more, expected at least one; run {self.check_command} (first "
            f"error: {next(iter(skipped.values()))})"
        )

    def _crop(self, sample: Sample) -> Batch:
        params: dict[str, Any] = {}

        def choose(mask: Tensor) -> Window:
            params.update(self.transform.draw(mask))
            window: Window = params["window"]
            return window

        image, mask = self.reader.pair(sample, choose)
        return {
            "image": self.transform.finish_image(image, params),
            "mask": self.transform.finish_mask(mask, params),
            "name": sample.name,
        }


class WholeImages(Dataset[Batch]):
    """Whole images resized by ``image_scale``, with masks at their stored size, or without masks for prediction.

    With ``skip``, an unusable image gives an item without ``image`` whose ``skipped`` is the reason.
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
            return self._load(sample)
        except DataError as error:
            if not self.skip:
                raise
            return {"skipped": {sample.name: str(error)}}

    def _load(self, sample: Sample) -> Batch:
        item: Batch = {"name": sample.name}
        if self.masks:
            image, item["mask"] = self.reader.pair(sample)
        else:
            image = self.reader.image(sample)
            item["size"] = (image.shape[1], image.shape[2])
        item["image"] = resize_image(image, self.image_scale * shrinking(image.shape[1:], self.max_side))
        return item


class WideningLoader(DataLoader[Batch]):
    """Loader that converts masks to int64, which every loss takes, in the main process.

    Workers send them as uint8, an eighth of the bytes.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            batch.pop("dropped", None)
            for reason in batch.pop("skipped", {}).values():
                warn_skipped(reason)
            if "mask" in batch:
                # NumPy, because torch's threads would keep spinning on the cores that the workers need.
                batch["mask"] = torch.from_numpy(batch["mask"].numpy().astype(np.int64))
            yield batch


def warn_skipped(reason: str) -> None:
    """Warn that a sample is skipped; ``reason`` is the message of its error."""
    warnings.warn(f"skipped: {reason}", stacklevel=2)


def collate(items: Sequence[Batch]) -> Batch:
    """Stack items to a batch.

    Returns:
        A batch as `~mcseg.data.datamodule.SegmentationData` describes it; without images if no item has one. If
        samples were skipped, ``skipped`` maps their names to the reasons and ``dropped`` lists the positions of the items
        without an image.

    Raises:
        DataError: The images have different sizes.
    """
    report: Batch = {}
    if skipped := {name: reason for item in items for name, reason in item.get("skipped", {}).items()}:
        report = {"skipped": skipped, "dropped": [index for index, item in enumerate(items) if "image" not in item]}
        items = [item for item in items if "image" in item]
    if not items:
        height, width = _EMPTY_SIZE
        image, mask = torch.zeros(0, 3, height, width, dtype=torch.uint8), torch.zeros(0, height, width, dtype=torch.uint8)
        return {"image": image, "mask": mask, "name": [], "size": []} | report
    sizes = sorted({tuple(item["mask" if "mask" in item else "image"].shape[-2:]) for item in items})
    if len(sizes) > 1:
        raise DataError(
            f"found images of {sizes[0][1]}x{sizes[0][0]} and {sizes[1][1]}x{sizes[1][0]} pixels in one batch, expected "
            "equal sizes; set data.eval_batch_size to 1"
        )
    # default_collate stacks in shared memory, so that the main process need not copy
    stacked = {key: default_collate([item[key] for item in items]) for key in ("image", "mask") if key in items[0]}
    return stacked | {key: [item[key] for item in items] for key in ("name", "size") if key in items[0]} | report
