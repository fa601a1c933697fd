"""Batches: order of the training images, augmented crops for training, whole images for evaluation, collation."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pytorch_lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from mcseg.data.files import FileReader, Reader, Sample
from mcseg.data.images import LargeImage
from mcseg.data.labels import DataError
from mcseg.data.sources import Window
from mcseg.data.transforms import TrainingTransform, resize_image, shrinking
from mcseg.lightning_internals import training_position
from mcseg.seeds import seed_of, seeded


class Draw(NamedTuple):
    """Index of an image, and the seed of its crop."""

    image: int
    seed: int


class TrainingOrder(DistributedSampler[Any]):
    """Sampler that shuffles the images for each epoch and divides them among the processes.

    Order and seeds depend only on the run's seed and the epoch, so a run resumed in the middle of an epoch gets the batches
    of an uninterrupted run, regardless of what its loader had prefetched. Without a running Trainer, each iteration is
    an epoch.

    Args:
        dataset: The training images.
        batch_size: Images per step and process.
        trainer: Source of the number of processes, the epoch and the number of finished batches; None is a single
            process.
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int, trainer: Trainer | None) -> None:
        world, rank = (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)
        self._seed = torch.initial_seed()
        super().__init__(dataset, world, rank, shuffle=True, seed=self._seed % 2**31)
        self._batch_size, self._trainer = batch_size, trainer

    def __iter__(self) -> Iterator[Draw]:
        """Iterate over the images of this process that remain in the epoch."""
        start = 0
        if self._trainer is not None and self._trainer.training:
            self.epoch, finished_batches = training_position(self._trainer)
            start = finished_batches * self._batch_size
        indices = list(super().__iter__())[start:]
        epoch = self.epoch
        self.epoch = epoch + 1
        return iter([Draw(index, seed_of(self._seed, epoch, index)) for index in indices])


Batch = dict[str, Any]
_WINDOWED_PIXELS = 1 << 26  # an image of more pixels is read in windows for prediction, if its file allows it
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
            if isinstance(self.reader, FileReader):
                size, item["tags"], windowed = self.reader.images.layout(sample.image)
                unscaled = self.image_scale * shrinking(size, self.max_side) == 1
                if windowed and unscaled and size[0] * size[1] > _WINDOWED_PIXELS:
                    return item | {"size": size, "image": LargeImage(sample.image, self.reader.images)}
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


def collate(items: Sequence[Batch], bands: int = 3) -> Batch:
    """Stack items to a batch; uint8 images beside images of floating point become floating point.

    Args:
        items: The items.
        bands: Number of bands of a batch without images.

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
        image, mask = (torch.zeros(0, *size, dtype=torch.uint8) for size in ((bands, height, width), (height, width)))
        return {"image": image, "mask": mask, "name": [], "size": [], "tags": []} | report
    sizes = sorted({tuple(item["mask" if "mask" in item else "image"].shape[-2:]) for item in items})
    if len(sizes) > 1:
        raise DataError(
            f"found images of {sizes[0][1]}x{sizes[0][0]} and {sizes[1][1]}x{sizes[1][0]} pixels in one batch, expected "
            "equal sizes; set data.eval_batch_size to 1"
        )
    if isinstance(large := items[0]["image"], LargeImage):  # in prediction, one per batch
        return {"image": large} | {key: [items[0][key]] for key in ("name", "size", "tags")} | report
    if len({item["image"].dtype for item in items}) > 1:  # files of 8 and of 16 bits
        items = [item | {"image": _in_unit_range(item["image"])} for item in items]
    # default_collate stacks in shared memory, so that the main process need not copy
    stacked = {key: default_collate([item[key] for item in items]) for key in ("image", "mask") if key in items[0]}
    return stacked | {key: [item[key] for item in items] for key in ("name", "size", "tags") if key in items[0]} | report


def _in_unit_range(image: Tensor) -> Tensor:
    """Return uint8 values as floating point in [0, 1], and other values unchanged."""
    return image.float() / 255 if image.dtype == torch.uint8 else image
