"""The order of the training images of each epoch, and the seed of what is drawn for each."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Trainer
from torch.utils.data import Dataset, DistributedSampler

from mcseg.lightning_internals import training_position
from mcseg.seeds import seed_of


class Draw(NamedTuple):
    """An image by its index, and the seed of its crop."""

    image: int
    seed: int


class TrainingOrder(DistributedSampler[Any]):
    """Shuffles the images anew for each epoch and shares them out over the processes.

    Order and seeds follow from the run's seed and the epoch alone: a run that goes on in the middle of an epoch has the
    batches that it would have had, whatever its loader had read ahead. Without a running Trainer each iteration is an epoch.

    Args:
        dataset: of training images.
        batch_size: images per step of a process.
        trainer: knows processes, epoch and the batches that are done.
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int, trainer: Trainer | None) -> None:
        world, rank = (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)
        self._seed = torch.initial_seed()
        super().__init__(dataset, world, rank, shuffle=True, seed=self._seed % 2**31)
        self._batch_size, self._trainer = batch_size, trainer

    def __iter__(self) -> Iterator[Draw]:
        """Give the images of this process that are left of the epoch."""
        start = 0
        if self._trainer is not None and self._trainer.training:
            self.epoch, batches = training_position(self._trainer)
            start = batches * self._batch_size
        indices = list(super().__iter__())[start:]
        epoch = self.epoch
        self.epoch = epoch + 1
        return iter([Draw(index, seed_of(self._seed, epoch, index)) for index in indices])
