"""Pictures of a run: prediction panels, confusion matrices and training curves."""

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from mcseg import pictures
from mcseg.callbacks.base import EvaluationCallback
from mcseg.callbacks.scores import JaccardCallback
from mcseg.callbacks.trackers import class_names, class_palette, log_picture, shown_bands


def _pictures_due(trainer: pl.Trainer, every_n_epochs: int) -> bool:
    """Whether this process draws: in training every ``every_n_epochs`` and in the last epoch, otherwise always."""
    last = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    due = trainer.state.fn != "fit" or last or (trainer.current_epoch + 1) % every_n_epochs == 0
    return due and trainer.is_global_zero and not trainer.sanity_checking


def _find_scorer(trainer: pl.Trainer) -> JaccardCallback | None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, JaccardCallback)), None)


def _picture_file(trainer: pl.Trainer, split: str) -> str:
    return f"{split}-epoch{trainer.current_epoch:03d}.png" if trainer.state.fn == "fit" else f"{split}.png"


class ConfusionPicture(Callback):
    """Draw the confusion matrix of the validation or test split from the counts of the Trainer's `JaccardCallback`.

    The callback writes a PNG into ``<run folder>/confusion`` and logs it to loggers that accept pictures (W&B, TensorBoard).

    Args:
        every_n_epochs: Interval of the pictures in training; the last epoch always gets one.

    Raises:
        ValueError: When a run starts, the Trainer has no `JaccardCallback`.
    """

    def __init__(self, every_n_epochs: int = 5) -> None:
        self.every_n_epochs = every_n_epochs
        self._scorer: JaccardCallback | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the callback that counts."""
        self._scorer = _find_scorer(trainer)
        if self._scorer is None:
            raise ValueError(
                "callbacks: found ConfusionPicture without a JaccardCallback, whose counts it draws; add a JaccardCallback"
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw; by now all callbacks have their scores."""
        self._draw(trainer, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw."""
        self._draw(trainer, "test")

    def _draw(self, trainer: pl.Trainer, split: str) -> None:
        assert self._scorer is not None
        if _pictures_due(trainer, self.every_n_epochs):
            names = class_names(trainer, self._scorer.class_names)
            confusion = self._scorer.scores[split].confusion
            assert confusion is not None  # JaccardCallback counts pairs of classes
            picture = pictures.confusion_picture(confusion, names)
            log_picture(trainer, f"{split}/confusion", picture, file=f"confusion/{_picture_file(trainer, split)}")


class PredictionPanel(EvaluationCallback):
    """Draw images spread over the validation or test split: image, target and prediction, with a legend.

    The callback writes a PNG into ``<run folder>/panels`` and logs it to loggers that accept pictures (W&B, TensorBoard).

    Args:
        images: Number of images in a panel.
        every_n_epochs: Interval of the panels in training; the last epoch always gets one.
    """

    def __init__(self, images: int = 4, every_n_epochs: int = 5) -> None:
        self.images = images
        self.every_n_epochs = every_n_epochs
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def take(self, trainer: pl.Trainer, outputs: Any, batch: Any, batch_idx: int, split: str) -> None:
        """Keep images spread evenly over the split."""
        batches = (trainer.num_val_batches if split == "val" else trainer.num_test_batches)[0]
        if not _pictures_due(trainer, self.every_n_epochs) or batch_idx % max(1, int(batches // self.images)):
            return
        count = min(math.ceil(self.images / batches), self.images - len(self._rows), len(batch["image"]))
        for index in range(count):
            image, target, preds = batch["image"][index], outputs["target"][index], outputs["preds"][index]
            self._rows.append((shown_bands(trainer, image.cpu()), target.cpu(), preds.cpu()))

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule, split: str) -> None:
        """Draw and log the panel."""
        rows, self._rows = self._rows, []
        if not rows:
            return
        names = class_names(trainer)
        panel = pictures.panel(rows, names, class_palette(trainer, len(names)))
        log_picture(trainer, f"{split}/panel", panel, file=f"panels/{_picture_file(trainer, split)}")


class TrainingCurves(Callback):
    """Draw training loss, mIoU and IoU per class over the epochs into ``curves.png`` in the run folder."""

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Append the epoch and redraw the curves."""
        if not trainer.is_global_zero:
            return
        prefixes = ("train/loss", "val/miou", "val/iou/")
        values = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith(prefixes)}
        self.history.append({"epoch": trainer.current_epoch, **values})
        scorer = _find_scorer(trainer)
        names = class_names(trainer, scorer.class_names) if scorer else ()
        path = Path(trainer.default_root_dir) / "curves.png"
        pictures.save_curves(self.history, path=path, names=names, palette=class_palette(trainer, len(names)))

    def state_dict(self) -> dict[str, Any]:
        """Save the history in the checkpoint, so that a resumed run continues it."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the history from a checkpoint."""
        self.history = list(state_dict["history"])
