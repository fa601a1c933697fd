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

from mcseg.lightning_internals import accumulates_gradient, request_stop, restart_validation


class CheckpointOnSignal(Callback):
    """Saves a checkpoint and stops the training after SIGTERM or Ctrl-C to any of its processes.

    Training stops when no gradient is partly accumulated: after an optimiser step, or, with one process, between two
    batches of a validation. Several processes stop after the same step; a validation in progress is finished first.
    Lightning's own handler communicates with the other processes from inside the signal handler. They may be waiting in
    another collective at that time, and then all of them deadlock. A second Ctrl-C stops immediately.

    Args:
        path: file of the checkpoint. A run resumed from it continues with the next batch, and repeats a validation that
            was interrupted.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._told = 0  # the signal

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget a signal of an earlier run."""
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
        """Stop all processes after this step if any of them received a signal."""
        self._end_if_told(trainer)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Stop after this batch with one process; several may have different numbers of batches and stop later."""
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
        if accumulates_gradient(trainer):  # no checkpoint holds a gradient
            return
        told = bool(self._told)
        if trainer.world_size > 1:
            told = trainer.strategy.reduce_boolean_decision(told, all=False)
        if told:
            request_stop(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write it, and give the exit code that is usual for the signal."""
        if not isinstance(exception, SIGTERMException) or trainer.state.fn != "fit":
            return
        exception.code = 128 + (self._told or signal.SIGTERM)
        if trainer.validating:
            restart_validation(trainer)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):  # has put its average in the module's place until the end
                    callback.on_validation_epoch_end(trainer, pl_module)
        if trainer.training or trainer.validating:
            trainer.save_checkpoint(self.path, weights_only=False)
            rank_zero_info(f"told to end; to go on: mcseg fit --resume {trainer.default_root_dir}")
