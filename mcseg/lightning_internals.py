"""Every private or undocumented part of Lightning, jsonargparse and torch that mcseg uses, each behind a function.

An upgrade that changes one of them breaks here and nowhere else: ``tests/test_lightning_internals.py`` has a test for each,
which names the version that it was seen in, and another one that finds such parts in the rest of the package.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.cloud_io import _load
from pytorch_lightning.cli import LightningCLI, instantiate_module
from pytorch_lightning.core.saving import CHECKPOINT_PAST_HPARAMS_KEYS
from pytorch_lightning.utilities.model_helpers import _restricted_classmethod

# Key of a module's hyperparameters, and value: the only instantiator that Lightning trusts in a checkpoint. It makes the
# objects that class paths name. Lightning 2.6.6.
INSTANTIATOR_KEY = "_instantiator"
INSTANTIATOR = f"{instantiate_module.__module__}.{instantiate_module.__name__}"
# Key of the hyperparameters that names the class of the module, if it is a subclass. Lightning 2.6.6.
CLASS_PATH_KEY = "_class_path"

if TYPE_CHECKING:
    classmethod_of_the_class = classmethod
else:

    def classmethod_of_the_class(method: Any) -> Any:
        """Decorate a class method that must not be called on an instance, as Lightning does its ``load_from_checkpoint``.

        Without it ``module.load_from_checkpoint(path)`` would return another module and leave this one as it is. Lightning
        2.6.6.
        """
        return _restricted_classmethod(method)


def argument_keys(kind: type[pl.LightningModule]) -> tuple[str, ...]:
    """List the keys of a checkpoint that Lightning takes a module's arguments from, later ones first. Lightning 2.6.6."""
    return (*CHECKPOINT_PAST_HPARAMS_KEYS, kind.CHECKPOINT_HYPER_PARAMS_KEY)


def load_from_url(url: str | Path) -> Any:
    """Load a checkpoint of tensors and plain types from a URL to the CPU, as Lightning does. Lightning 2.6.6."""
    return _load(url, map_location="cpu", weights_only=True)


class CheckpointSettingsCLI(LightningCLI):
    """A LightningCLI whose subclass puts the settings of ``--ckpt_path`` over those of the command.

    Lightning does so in a method of its own between parsing and making the objects, and leaves no way to change what a
    checkpoint holds. Lightning 2.6.6.
    """

    def take_checkpoint_settings(self, verb: str, path: Path) -> None:
        """Put the settings of a checkpoint file into ``self.config[verb]``."""
        raise NotImplementedError

    def _parse_ckpt_path(self) -> None:
        verb = self.config.get("subcommand")
        path = self.config[verb].get("ckpt_path") if verb else None
        if path and Path(path).is_file():
            self.take_checkpoint_settings(verb, Path(path))


def as_settings(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the hyperparameters of a checkpoint into settings that Lightning's parser takes for a module. Lightning 2.6.6."""
    settings = {name: value for name, value in hyperparameters.items() if name != INSTANTIATOR_KEY}
    if path := settings.pop(CLASS_PATH_KEY, None):  # the module is of a subclass
        return {"class_path": path, "dict_kwargs": settings}
    return settings


def accumulates_gradient(trainer: pl.Trainer) -> bool:
    """Whether the last training batch left a gradient that no optimiser step has used yet. Lightning 2.6.6."""
    return bool(trainer.fit_loop.epoch_loop._should_accumulate())


def request_stop(trainer: pl.Trainer) -> None:
    """Make the loops raise ``SIGTERMException`` after the batch, as after a SIGTERM.

    ``Trainer.should_stop`` would first finish the epoch's hooks and run a validation. Lightning 2.6.6.
    """
    trainer._signal_connector.received_sigterm = True


def restart_validation(trainer: pl.Trainer) -> None:
    """Mark the validation that is running as begun with no batch done, so that a resumed run repeats it whole.

    Lightning 2.6.6.
    """
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    progress.reset()
    progress.increment_ready()
    progress.increment_started()
    progress.current.reset()


def training_position(trainer: pl.Trainer) -> tuple[int, int]:
    """Return the epoch whose training batches come next, and how many of them are done in a resumed run.

    Asked for while Lightning makes the iterator of the training loader; its progress is in the loops alone. Lightning 2.6.6.
    """
    loop: Any = trainer.fit_loop
    epoch, batches = int(loop.epoch_progress.current.processed), loop.epoch_loop.batch_progress
    total = loop.epoch_progress.total
    if loop.restarting and total.started == total.ready == total.processed + 1:  # in the middle of an epoch
        return (epoch + 1, 0) if batches.is_last_batch else (epoch, int(batches.current.processed))
    return epoch, 0


def set_csv_columns(writer: Any, names: Sequence[str]) -> None:
    """Tell the writer of Lightning's ``CSVLogger`` the columns of the file that it appends to. Lightning 2.6.6."""
    writer.metrics_keys = list(names)


def cpu_computes_bfloat16() -> bool:
    """Whether the CPU has instructions for matrix products in bfloat16 (AVX-512 or AMX). torch 2.10 to 2.14.

    torch does not promise to keep the names; without them the answer is no.
    """
    features = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, feature, lambda: False)() for feature in features)
