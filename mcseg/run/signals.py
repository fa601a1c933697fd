"""SIGTERM and Ctrl-C: save a checkpoint, then stop."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, WeightAveraging
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import SIGTERMException

from mcseg.lightning_internals import accumulates_gradient, request_stop, restart_validation


class CheckpointOnSignal(Callback):
    """Saves a checkpoint and stops training after SIGTERM or Ctrl-C to any of its processes.

    Training stops when no gradient accumulation is in progress: after an optimiser step, or, with one process, between two
    batches of a validation. Several processes stop after the same step, about a second after the signal, because they ask
    each other only once a second; they finish a validation first. A second Ctrl-C stops immediately.

    Lightning's own handler runs a collective inside the signal handler, which deadlocks if other processes wait in another
    collective at that time.

    Args:
        path: File of the checkpoint; None saves none. A run resumed from it continues with the next batch, and repeats a
            validation that was interrupted.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self._signal = 0  # its number; 0 if none
        self._steps, self._period, self._exchanged = 0, 1, time.monotonic()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the signal of an earlier run."""
        self._signal = 0
        self._steps, self._period, self._exchanged = 0, 1, time.monotonic()

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the signal handlers."""
        self._install_handlers(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the signal handlers."""
        self._install_handlers(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop all processes after this step if any of them received a signal."""
        self._stop_after_signal(trainer)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Stop one process after this batch; several may have different numbers of batches, so they stop in training."""
        if trainer.world_size == 1:
            self._stop_after_signal(trainer)

    def _install_handlers(self, trainer: pl.Trainer) -> None:
        def handle(number: int, _: Any) -> None:
            self._signal = number
            if number == signal.SIGINT:
                signal.signal(number, signal.default_int_handler)
                if trainer.is_global_zero:  # print is not reentrant: the signal may have interrupted one
                    os.write(
                        2,
                        b"\nCtrl-C: stopping after this step and saving a checkpoint; press Ctrl-C again to stop now "
                        b"without saving\n",
                    )

        if threading.current_thread() is threading.main_thread():  # only the main thread may install handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, handle)  # the Trainer restores the previous handlers at its end

    def _stop_after_signal(self, trainer: pl.Trainer) -> None:
        if accumulates_gradient(trainer):  # a checkpoint contains no gradient
            return
        if self._signal if trainer.world_size == 1 else self._any_process_has_signal(trainer):
            request_stop(trainer)

    def _any_process_has_signal(self, trainer: pl.Trainer) -> bool:
        """Ask all processes about once a second, and before a validation; each answer makes the host wait for the GPU.

        All processes ask after the same steps: the period in steps follows from the slowest process.
        """
        self._steps += 1
        if self._steps < self._period and not trainer.is_last_batch:
            return False
        now = time.monotonic()
        seconds_per_step = (now - self._exchanged) / self._steps
        values = torch.tensor([float(self._signal != 0), seconds_per_step], device=trainer.strategy.root_device)
        has_signal, seconds_per_step = trainer.strategy.reduce(values, reduce_op="max").tolist()
        self._steps, self._period, self._exchanged = 0, max(1, round(1 / max(seconds_per_step, 0.01))), now
        return bool(has_signal)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write the checkpoint and set the exit code, 128 + the number of the signal."""
        if not isinstance(exception, SIGTERMException) or trainer.state.fn != "fit":
            return
        exception.code = 128 + (self._signal or signal.SIGTERM)
        if trainer.validating:
            restart_validation(trainer)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):  # restores the weights, replaced by averages during validation
                    callback.on_validation_epoch_end(trainer, pl_module)
        if self.path is None:
            rank_zero_info("stopped by a signal; nothing was saved, as trainer.enable_checkpointing is false")
        elif trainer.training or trainer.validating:
            trainer.save_checkpoint(self.path, weights_only=False)
            rank_zero_info(f"stopped by a signal; resume with: mcseg fit --resume {trainer.default_root_dir}")
