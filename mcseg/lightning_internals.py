"""Every private or undocumented part of Lightning, jsonargparse and torch that mcseg uses, each in a function or constant.

An upgrade that changes one of them breaks this file only. ``tests/test_lightning_internals.py`` tests each part and names
the version in which it was seen; another test searches the rest of the package for private parts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.cloud_io import _load
from pytorch_lightning.cli import LightningCLI, instantiate_module
from pytorch_lightning.core.saving import CHECKPOINT_PAST_HPARAMS_KEYS
from pytorch_lightning.loops.loop import _Loop
from pytorch_lightning.utilities.model_helpers import _restricted_classmethod

# Key and value among a module's hyperparameters: the only instantiator that Lightning accepts from a checkpoint. It
# instantiates the classes that class paths name. Lightning 2.6.6.
INSTANTIATOR_KEY = "_instantiator"
INSTANTIATOR = f"{instantiate_module.__module__}.{instantiate_module.__name__}"
# Key among the hyperparameters: the class path of the module if it is a subclass. Lightning 2.6.6.
CLASS_PATH_KEY = "_class_path"

if TYPE_CHECKING:
    classmethod_of_the_class = classmethod
else:

    def classmethod_of_the_class(method: Any) -> Any:
        """Decorate a class method that refuses calls on an instance, as Lightning decorates ``load_from_checkpoint``.

        Otherwise ``module.load_from_checkpoint(path)`` would return another module and not change ``module``. Lightning
        2.6.6.
        """
        return _restricted_classmethod(method)


def argument_keys(kind: type[pl.LightningModule]) -> tuple[str, ...]:
    """List the keys of a checkpoint with a module's arguments; later keys override earlier ones. Lightning 2.6.6."""
    return (*CHECKPOINT_PAST_HPARAMS_KEYS, kind.CHECKPOINT_HYPER_PARAMS_KEY)


def load_from_url(url: str | Path) -> Any:
    """Load a checkpoint of tensors and plain types from a URL to the CPU. Lightning 2.6.6."""
    return _load(url, map_location="cpu", weights_only=True)


class CheckpointSettingsCLI(LightningCLI):
    """A LightningCLI whose subclass merges the settings of ``--ckpt_path`` into those of the command.

    Lightning merges them in a private method between parsing and instantiation, which cannot translate the settings of an
    older checkpoint. Lightning 2.6.6.
    """

    def take_checkpoint_settings(self, verb: str, path: Path) -> None:
        """Merge the settings of a checkpoint file into ``self.config[verb]``."""
        raise NotImplementedError

    def _parse_ckpt_path(self) -> None:
        verb = self.config.get("subcommand")
        path = self.config[verb].get("ckpt_path") if verb else None
        if path and Path(path).is_file():
            self.take_checkpoint_settings(verb, Path(path))


def as_settings(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the hyperparameters of a checkpoint to settings of a module for Lightning's parser. Lightning 2.6.6."""
    settings = {name: value for name, value in hyperparameters.items() if name != INSTANTIATOR_KEY}
    if path := settings.pop(CLASS_PATH_KEY, None):  # the module is of a subclass
        return {"class_path": path, "dict_kwargs": settings}
    return settings


def accumulates_gradient(trainer: pl.Trainer) -> bool:
    """Whether the gradient of the last training batch still waits for its optimiser step. Lightning 2.6.6."""
    return bool(trainer.fit_loop.epoch_loop._should_accumulate())


def logs_step(trainer: pl.Trainer) -> bool:
    """Whether the loggers get the values of the current training step, or it is the last of its epoch. Lightning 2.6.6."""
    return bool(trainer._logger_connector.should_update_logs or trainer.is_last_batch)


def request_stop(trainer: pl.Trainer) -> None:
    """Make the Trainer raise ``SIGTERMException`` after the current batch, as after a SIGTERM.

    ``Trainer.should_stop`` would first call the epoch's hooks and validate. Lightning 2.6.6.
    """
    trainer._signal_connector.received_sigterm = True


def restart_validation(trainer: pl.Trainer) -> None:
    """Reset the progress of the running validation, so that a resumed run repeats all of it. Lightning 2.6.6."""
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    progress.reset()
    progress.increment_ready()
    progress.increment_started()
    progress.current.reset()


def may_stop(trainer: pl.Trainer) -> bool:
    """Whether the least numbers of epochs and steps are done, so that ``trainer.should_stop`` counts. Lightning 2.6.6."""
    return bool(trainer.fit_loop._can_stop_early)


def validate_after_batch(trainer: pl.Trainer) -> tuple[int | None, Any]:
    """Make the Trainer validate after the current training batch, whatever its settings.

    Returns:
        The former ``check_val_every_n_epoch`` and ``val_check_batch``, to be restored when the validation starts. Lightning
        2.6.6.
    """
    former = trainer.check_val_every_n_epoch, trainer.val_check_batch
    trainer.check_val_every_n_epoch, trainer.val_check_batch = None, 1  # every training batch, counted over all epochs
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        trainer._last_val_time = -float("inf")  # type: ignore[attr-defined]
    return former


def validation_was_interrupted(trainer: pl.Trainer) -> bool:
    """Whether a resumed run begins in the middle of a validation. For use in ``on_train_start``. Lightning 2.6.6."""
    return bool(trainer.fit_loop.epoch_loop.val_loop.restarted_mid_evaluation)


def run_validation(trainer: pl.Trainer) -> None:
    """Validate after the last epoch of a training; the scores are logged at its last step. Lightning 2.6.6."""
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped -= 1  # Lightning counts on before `on_train_end`
    trainer.validating = True
    loop.val_loop.run()
    trainer.training = True
    loop._batches_that_stepped += 1


def training_position(trainer: pl.Trainer) -> tuple[int, int]:
    """Return the epoch of the next training batch, and the number of that epoch's batches that a resumed run has done.

    For use while Lightning makes the iterator of the training loader; only its loops know the progress. Lightning 2.6.6.
    """
    loop: Any = trainer.fit_loop
    epoch, batches = int(loop.epoch_progress.current.processed), loop.epoch_loop.batch_progress
    total = loop.epoch_progress.total
    if loop.restarting and total.started == total.ready == total.processed + 1:  # in the middle of an epoch
        return (epoch + 1, 0) if batches.is_last_batch else (epoch, int(batches.current.processed))
    return epoch, 0


def continue_epoch(checkpoint: Mapping[str, Any]) -> None:
    """Make a run with ``max_steps`` continue the epoch in which an earlier ``max_steps`` ended it, in the loaded checkpoint.

    Lightning counts the epoch as processed, and once more after the remaining batches. Lightning 2.6.6.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    if not loop or loop["epoch_loop.batch_progress"]["is_last_batch"]:
        return
    for count in (loop["epoch_progress"]["total"], loop["epoch_progress"]["current"]):
        if count["processed"] == count["started"]:
            count["processed"] -= 1


def begin_next_epoch(trainer: pl.Trainer) -> None:
    """Begin the next epoch in a run with ``max_steps`` that is resumed at the end of one; for use in ``on_train_start``.

    Lightning would call the hooks of the finished epoch again and count it twice. Lightning 2.6.6.
    """
    loop = trainer.fit_loop
    if loop._iteration_based_training() and loop.restarted_on_epoch_end and loop.epoch_loop.batch_progress.is_last_batch:
        loop.epoch_progress.increment_completed()
        _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]
        loop.reset_restart_stage()
        loop.epoch_loop.reset_restart_stage()


def batches_of_unfinished_epoch(checkpoint: Mapping[str, Any]) -> int:
    """Return the batches that a checkpoint within an epoch has done of it; 0 at the end of an epoch. Lightning 2.6.6."""
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    progress = loop.get("epoch_loop.batch_progress", {})
    return 0 if not loop or progress["is_last_batch"] else int(progress["current"]["processed"])


def begin_after_search(trainer: pl.Trainer) -> None:
    """Begin the training after a search by ``BatchSizeFinder``, which leaves the loops as if the run were resumed.

    They would count one step too many for the loggers. For use in ``on_fit_start``. Lightning 2.6.6.
    """
    _Loop.restarting.fset(trainer.fit_loop, False)  # type: ignore[attr-defined]


def batches_done(trainer: pl.Trainer) -> int:
    """Return the batches of the current epoch that are done when a resumed training starts. Lightning 2.6.6."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return 0 if progress.is_last_batch else int(progress.current.processed)


def set_csv_columns(writer: Any, names: Sequence[str]) -> None:
    """Set the columns of the existing file to which the writer of Lightning's ``CSVLogger`` appends. Lightning 2.6.6."""
    writer.metrics_keys = list(names)


def cpu_computes_bfloat16() -> bool:
    """Whether the CPU has instructions for matrix products in bfloat16 (AVX-512 or AMX). torch 2.10 to 2.14.

    torch may remove these private functions; the result is then False.
    """
    features = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, feature, lambda: False)() for feature in features)
