"""The hooks that evaluation callbacks share."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class EvaluationCallback(Callback):
    """Runs validation and test through the same three methods, which subclasses override.

    ``split`` is ``val`` or ``test``.
    """

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, split: str) -> None:
        """Start an epoch."""

    def take(self, trainer: pl.Trainer, outputs: Any, batch: Any, batch_idx: int, split: str) -> None:
        """Process a batch and the output of the step."""

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule, split: str) -> None:
        """Finish the epoch; may log values."""

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Call :meth:`start`."""
        self.start(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Call :meth:`start`."""
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
        """Call :meth:`take`."""
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
        """Call :meth:`take`."""
        self.take(trainer, outputs, batch, batch_idx, "test")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Call :meth:`finish`."""
        self.finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Call :meth:`finish`."""
        self.finish(trainer, pl_module, "test")
