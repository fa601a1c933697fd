"""Logging of an objective's class constants and class statistics."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from mcseg import pictures
from mcseg.callbacks.trackers import class_names, class_palette, last_step, log_picture


class ObjectiveMonitor(Callback):
    """Logs an objective's class constants when training starts, and its class statistics after every epoch.

    An objective may have ``class_constants`` (set by calibration, for example offsets) and ``class_statistics`` (of its last
    call), both mappings from names to (C,) tensors. The keys are ``objective/<constant>/<class>`` and
    ``train/<statistic>/<class>``, the latter a mean over the epoch's steps in which the statistic is not NaN. The constants
    are also drawn into ``objective.png`` in the run folder. Only rank 0 logs; the objective itself sums over processes.

    Args:
        class_names: names for the keys; None takes the data module's ``class_names``, or the train ids.

    Raises:
        ValueError: in training, the number of names is not that of the objective's classes.
    """

    def __init__(self, class_names: list[str] | None = None) -> None:
        self.class_names = class_names
        self._sums: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the constants; the objective is calibrated at this time."""
        constants = getattr(getattr(pl_module, "objective", None), "class_constants", {})
        if not constants or not trainer.is_global_zero or trainer.global_step > 0:  # a resumed run has logged them
            return
        self._log(trainer, "objective", constants)
        names = class_names(trainer, self.class_names)
        picture = pictures.class_values_picture(constants, names, class_palette(trainer, len(names)))
        log_picture(trainer, "objective/constants", picture, "objective.png")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reset the sums; a resumed run loads them from its checkpoint later."""
        self._sums = {}

    def state_dict(self) -> dict[str, Any]:
        """Save the sums of the current epoch in the checkpoint."""
        return {"sums": {name: sums.cpu() for name, sums in self._sums.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the sums from a checkpoint."""
        self._sums = dict(state_dict["sums"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a step's statistics on their device, without a synchronisation."""
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

    def _log(self, trainer: pl.Trainer, prefix: str, class_values: Mapping[str, Tensor]) -> None:
        """Log the values that are not NaN."""
        names = class_names(trainer, self.class_names)
        scalars: dict[str, float] = {}
        for key, values in class_values.items():
            if len(values) != len(names):
                raise ValueError(
                    f"class_names: found {len(names)} names, expected {len(values)}, one for each class of the objective "
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
                logger.save()  # before the checkpoint, as a run resumed from that does not log this again
