"""Class names and colours of a run; pictures and the run's configuration for experiment trackers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from mcseg import pictures
from mcseg.palette import Palette, distinct_colors


def class_names(trainer: pl.Trainer, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the class names: the given ones, or the data module's, or the train ids."""
    names = names or getattr(getattr(trainer, "datamodule", None), "class_names", None)
    return tuple(names or map(str, range(trainer.lightning_module.hparams["num_classes"])))


def class_palette(trainer: pl.Trainer, classes: int) -> Palette:
    """Return the class colours: the data module's, or distinct ones."""
    palette = getattr(getattr(trainer, "datamodule", None), "palette", None)
    return tuple(palette) if palette else distinct_colors(classes)


def shown_bands(trainer: pl.Trainer, image: Tensor) -> Tensor:
    """Return the bands of an image (bands,H,W) that pictures show: the data module's, or the first three, or the first."""
    default = (1, 2, 3) if len(image) >= 3 else (1,)
    chosen = getattr(getattr(trainer, "datamodule", None), "show_bands", None) or default
    return image[[band - 1 for band in chosen]]


def log_picture(trainer: pl.Trainer, key: str, picture: Image.Image, file: str) -> None:
    """Write a picture into the run folder and log it to loggers that accept pictures (W&B, TensorBoard).

    Call it only on rank 0.

    Args:
        trainer: Trainer with the run folder and the loggers.
        key: Name for the loggers.
        picture: The picture.
        file: Path in the run folder.
    """
    pictures.save(picture, Path(trainer.default_root_dir) / file)
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):  # W&B and others
            logger.log_image(key=key, images=[picture], step=last_step(trainer))
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(key, pictures.as_array(picture), last_step(trainer), dataformats="HWC")


def log_configuration(trainer: pl.Trainer, settings: dict[str, Any]) -> None:
    """Log all settings of a run, in plain types, to W&B's configuration and as text to TensorBoard.

    Lightning itself logs the module's hyperparameters. Call it only on rank 0.
    """
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.config.update(settings, allow_val_change=True)
        elif isinstance(logger, TensorBoardLogger):
            text = json.dumps(settings, indent=2)
            logger.experiment.add_text("config", "    " + text.replace("\n", "\n    "))


def last_step(trainer: pl.Trainer) -> int:
    """Return the last optimiser step, counted from 0; Lightning logs the scores of an epoch at this step."""
    return max(trainer.global_step - 1, 0)
