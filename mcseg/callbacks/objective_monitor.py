"""Logs the constants and statistics of each class that an objective offers."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from mcseg import pictures
from mcseg.callbacks.trackers import class_names, class_palette, last_step, log_picture


class ObjectiveMonitor(Callback):
    """Logs what the objective says of each class: constants when training starts, statistics after every epoch.

    An objective may have ``class_constants`` (what calibration set: offsets, weights) and ``class_statistics`` (what its
    last call found), both mappings from names to (C,) tensors; those of mcseg do, where they have any. Logged are
    ``objective/<constant>/<class>`` with a picture, ``objective.png`` in the run folder, and ``train/<statistic>/<class>``,
    the mean over the epoch's steps in which the statistic is not NaN. Rank 0 logs what it has: summing over processes is
    the objective's own business.

    Args:
        class_names: names for the keys; None takes the data module's ``class_names``, or the train ids.
    """

    def __init__(self, class_names: list[str] | None = None) -> None:
        self.class_names = class_names
        self._sums: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the constants: the objective is calibrated by now, or was loaded."""
        constants = getattr(getattr(pl_module, "objective", None), "class_constants", {})
        if not constants or not trainer.is_global_zero or trainer.global_step > 0:  # a run that goes on has them already
            return
        self._log(trainer, "objective", constants)
        names = class_names(trainer, self.class_names)
        picture = pictures.class_values_picture(constants, names, class_palette(trainer, len(names)))
        log_picture(trainer, "objective/constants", picture, "objective.png")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin a run; one that goes on gets its sums from the checkpoint after this."""
        self._sums = {}

    def state_dict(self) -> dict[str, Any]:
        """Give the sums of an epoch that is under way to the checkpoint."""
        return {"sums": {name: sums.cpu() for name, sums in self._sums.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them from a checkpoint."""
        self._sums = dict(state_dict["sums"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a step's statistics, on their device: the host does not wait for them."""
        if not trainer.is_global_zero:
            return
        for name, values in getattr(getattr(pl_module, "objective", None), "class_statistics", {}).items():
            known = ~values.isnan()
            step = torch.stack([values.masked_fill(~known, 0), known.to(values.dtype)])
            self._sums[name] = self._sums[name].to(step.device) + step if name in self._sums else step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the means."""
        self._log(trainer, "train", {name: sums / steps for name, (sums, steps) in self._sums.items()})
        self._sums = {}

    def _log(self, trainer: pl.Trainer, prefix: str, found: Mapping[str, Tensor]) -> None:
        """Give the values that are not NaN to all loggers."""
        names = class_names(trainer, self.class_names)
        scalars: dict[str, float] = {}
        for key, values in found.items():
            if len(values) != len(names):
                raise ValueError(
                    f"class_names: found {len(names)} names, expected {len(values)}: one for each class of the objective "
                    f"({key})"
                )
            scalars |= {
                f"{prefix}/{key}/{name}": value
                for name, value in zip(names, values.tolist(), strict=True)
                if value == value  # not NaN
            }
        if scalars:
            for logger in trainer.loggers:
                logger.log_metrics({**scalars, "epoch": trainer.current_epoch}, step=last_step(trainer))
                logger.save()  # before the checkpoint: a run that is killed behind it and goes on does not log this again
