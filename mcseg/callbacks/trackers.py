"""Pictures and the run's configuration for experiment trackers, beside Lightning's own scalars."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

from mcseg import pictures
from mcseg.palette import Palette, distinct_colors


def class_names(trainer: pl.Trainer, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Class names: given, or the data module's, or the train ids."""
    found = names or getattr(getattr(trainer, "datamodule", None), "class_names", None)
    return tuple(found or map(str, range(trainer.lightning_module.hparams["num_classes"])))


def class_palette(trainer: pl.Trainer, classes: int) -> Palette:
    """Class colours: the data module's, or distinguishable ones."""
    found = getattr(getattr(trainer, "datamodule", None), "palette", None)
    return tuple(found) if found else distinct_colors(classes)


def log_picture(trainer: pl.Trainer, key: str, picture: Image.Image, file: str) -> None:
    """Write a picture into the run folder as ``file``, and give it to the loggers that take pictures (W&B, TensorBoard).

    To be called on the process of rank 0 alone.
    """
    pictures.save(picture, Path(trainer.default_root_dir) / file)
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):  # W&B and others
            logger.log_image(key=key, images=[picture], step=last_step(trainer))
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(key, pictures.as_array(picture), last_step(trainer), dataformats="HWC")


def log_configuration(trainer: pl.Trainer, settings: dict[str, Any]) -> None:
    """Give all settings of a run, in plain types, to W&B's configuration and as text to TensorBoard.

    Beside them Lightning gives the module's hyperparameters to every logger. To be called on rank 0 alone.
    """
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.config.update(settings, allow_val_change=True)
        elif isinstance(logger, TensorBoardLogger):
            text = json.dumps(settings, indent=2)  # which is YAML as well
            logger.experiment.add_text("config", "    " + text.replace("\n", "\n    "))


def last_step(trainer: pl.Trainer) -> int:
    """The last optimiser step, counted from 0, at which Lightning logs the scores of an epoch as well."""
    return max(trainer.global_step - 1, 0)
