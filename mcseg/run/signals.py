"""SIGTERM and Ctrl-C: save a checkpoint, then stop."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, WeightAveraging
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import SIGTERMException


class CheckpointOnSignal(Callback):
    """Writes a checkpoint when a training is told to end by SIGTERM or Ctrl-C; of several processes, when any of them is.

    It ends where no gradient is half collected: behind an optimiser's step, or between two batches of a validation where
    there is one process. Several end together, behind the same step; a validation that is under way is finished before.
    Lightning's own handler talks to the other processes from within, wherever they are: they may be waiting for something
    else, and then all wait for ever. The second Ctrl-C ends at once.

    Args:
        path: where; a run that goes on from it has the next batch that it would have had, and repeats a validation that
            was under way.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._told = 0  # the signal

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew."""
        self._told = 0

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to listen."""
        self._listen(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to listen."""
        self._listen(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End all processes behind this step where one was told to."""
        self._end_if_told(trainer)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """End behind this batch; several processes have different numbers of them, and end later."""
        if trainer.world_size == 1:
            self._end_if_told(trainer)

    def _listen(self, trainer: pl.Trainer) -> None:
        def hear(number: int, _: Any) -> None:
            self._told = number
            if number == signal.SIGINT:
                signal.signal(number, signal.default_int_handler)
                if trainer.is_global_zero:  # not by print, which may be what the signal came into
                    os.write(2, b"\nCtrl-C: ends behind this step, with a checkpoint; once more ends at once, without\n")

        if threading.current_thread() is threading.main_thread():  # no other one may
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, hear)  # until the Trainer puts back what was there before it

    def _end_if_told(self, trainer: pl.Trainer) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate():  # no checkpoint holds a gradient
            return
        told = bool(self._told)
        if trainer.world_size > 1:
            told = trainer.strategy.reduce_boolean_decision(told, all=False)
        if told:
            trainer._signal_connector.received_sigterm = True

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write it, and give the exit code that is usual for the signal."""
        if not isinstance(exception, SIGTERMException) or trainer.state.fn != "fit":
            return
        exception.code = 128 + (self._told or signal.SIGTERM)
        if trainer.validating:
            # what Lightning takes for a validation that has begun, with none of its batches done
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset()
            progress.increment_ready()
            progress.increment_started()
            progress.current.reset()
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):  # has put its average in the module's place until the end
                    callback.on_validation_epoch_end(trainer, pl_module)
        if trainer.training or trainer.validating:
            trainer.save_checkpoint(self.path, weights_only=False)
            rank_zero_info(f"told to end; to go on: mcseg fit --resume {trainer.default_root_dir}")
