"""The hooks that evaluation callbacks share."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class EvaluationCallback(Callback):
    """Takes validation and test through the same three methods, which subclasses fill."""

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, split: str) -> None:
        """Begin an epoch of ``split`` (``val`` or ``test``)."""

    def take(self, trainer: pl.Trainer, outputs: Any, batch: Any, batch_idx: int, split: str) -> None:
        """Take a batch and what the step returned for it."""

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule, split: str) -> None:
        """End the epoch; values may be logged."""

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning's hook."""
        self.start(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning's hook."""
        self.start(trainer, pl_module, "test")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Lightning's hook."""
        self.take(trainer, outputs, batch, batch_idx, "val")

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Lightning's hook."""
        self.take(trainer, outputs, batch, batch_idx, "test")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning's hook."""
        self.finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning's hook."""
        self.finish(trainer, pl_module, "test")
