"""Order of the training images in each epoch, and the seed of each image's crop."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Trainer
from torch.utils.data import Dataset, DistributedSampler

from mcseg.lightning_internals import training_position
from mcseg.seeds import seed_of


class Draw(NamedTuple):
    """Index of an image, and the seed of its crop."""

    image: int
    seed: int


class TrainingOrder(DistributedSampler[Any]):
    """Sampler that shuffles the images for each epoch and divides them among the processes.

    Order and seeds depend only on the run's seed and the epoch, so a run resumed in the middle of an epoch gets the batches
    of an uninterrupted run, whatever its loader had prefetched. Without a running Trainer, each iteration is an epoch.

    Args:
        dataset: the training images.
        batch_size: images per step and process.
        trainer: gives the number of processes, the epoch and the number of finished batches; None is a single process.
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
