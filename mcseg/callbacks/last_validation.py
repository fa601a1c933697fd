"""A validation after the last step of every training run."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from mcseg.lightning_internals import may_stop, run_validation, validate_after_batch, validation_was_interrupted


class LastValidation(Callback):
    """Validate after the last step of a run, if the Trainer would not, and report before the start that it would not.

    Without this callback a run has no scores of its final weights if ``max_epochs`` is no multiple of
    ``check_val_every_n_epoch``, if ``val_check_interval`` does not divide the epoch, or if ``max_steps`` or ``max_time`` end
    the run between two validations. In a run without validation data there is nothing to add, and a warning reports it.
    """

    def __init__(self) -> None:
        self._former: tuple[Any, ...] | None = None  # the Trainer's settings while a validation is forced
        self._validated = -1  # step of the last validation

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report a missing last validation; repeat one that was interrupted."""
        self._former, self._validated = None, trainer.global_step
        if not trainer.enable_validation:
            rank_zero_warn(
                "the run has no validation, as trainer.limit_val_batches is 0 or there are no validation data: no scores "
                "and no pictures; best.ckpt is the checkpoint of the last epoch"
            )
        elif (note := _missing(trainer)) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info(f"{note}; a validation after the last step is added")
        if trainer.enable_validation and validation_was_interrupted(trainer):
            self._former = validate_after_batch(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Validate after this batch if it is the last one."""
        epochs = trainer.max_epochs
        is_last = trainer.is_last_batch and epochs not in (None, -1) and trainer.current_epoch + 1 >= epochs
        is_last = is_last or 0 <= trainer.max_steps <= trainer.global_step or (trainer.should_stop and may_stop(trainer))
        if is_last and trainer.enable_validation:
            self._former = validate_after_batch(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the Trainer's settings."""
        if self._former is not None:
            trainer.check_val_every_n_epoch, trainer.val_check_batch = self._former
            self._former = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the step."""
        if not trainer.sanity_checking:
            self._validated = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate if a callback stopped the run at the end of an epoch without validation."""
        if trainer.enable_validation and self._validated != trainer.global_step:
            run_validation(trainer)


def _missing(trainer: pl.Trainer) -> str:
    """Describe why the Trainer itself would not validate after the last step; "" if it would, or if that is not known."""
    every, epochs, steps = trainer.check_val_every_n_epoch, trainer.max_epochs or -1, trainer.max_steps
    length, interval = trainer.num_training_batches, trainer.val_check_batch
    if every is not None and 0 < epochs < every:
        return f"trainer.check_val_every_n_epoch {every} is above trainer.max_epochs {epochs}"
    if not isinstance(interval, int) or not isinstance(length, int):
        return ""  # an endless data set, or an interval in time
    batches = epochs * length if epochs > 0 else -1
    if steps >= 0:
        per_epoch = -(-length // trainer.accumulate_grad_batches)
        whole, rest = divmod(steps, per_epoch)
        until = whole * length + rest * trainer.accumulate_grad_batches
        batches = min(until, batches) if epochs > 0 else until
    if batches < 0:
        return ""
    end = f"the run ends after {batches} batches"
    if every is None:
        return f"{end}, which is no multiple of trainer.val_check_interval {interval}" if batches % interval else ""
    epoch, batch = divmod(batches, length)
    if batch == 0:
        epoch, batch = epoch - 1, length
    if (epoch + 1) % every:
        return f"{end}, in epoch {epoch + 1}, which is no multiple of trainer.check_val_every_n_epoch {every}"
    return f"{end}, and the last validation would be {batch % interval} batches before" if batch % interval else ""
