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


class _Pictures(EvaluationCallback):
    """A callback that draws in training every ``every_n_epochs`` epochs and after the last validation, otherwise always.

    If there are validations in other epochs only, it draws at the first one after each interval. Subclasses implement
    `draw`.
    """

    def __init__(self, every_n_epochs: int) -> None:
        self.every_n_epochs = every_n_epochs
        self._drawn = 0  # completed epochs at the last picture
        self._pending: tuple[str, str] | None = None  # split and file of the last validation if it is not drawn yet

    def draw(self, trainer: pl.Trainer, split: str, file: str) -> None:
        """Draw the last validation or test into a file of this name."""
        raise NotImplementedError

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin an interval."""
        self._drawn, self._pending = trainer.current_epoch, None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw if it is due; by now all callbacks have their scores."""
        if trainer.sanity_checking:
            return
        in_training, epochs = trainer.state.fn == "fit", trainer.current_epoch + 1
        self._pending = "val", f"val-epoch{trainer.current_epoch:03d}.png" if in_training else "val.png"
        if not in_training or epochs // self.every_n_epochs > self._drawn // self.every_n_epochs:
            self._drawn = epochs
            self._draw_pending(trainer)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw."""
        self._pending = "test", "test.png"
        self._draw_pending(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the last validation."""
        self._draw_pending(trainer)

    def _draw_pending(self, trainer: pl.Trainer) -> None:
        pending, self._pending = self._pending, None
        if pending is not None and trainer.is_global_zero:
            self.draw(trainer, *pending)


def _find_scorer(trainer: pl.Trainer) -> JaccardCallback | None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, JaccardCallback)), None)


class ConfusionPicture(_Pictures):
    """Draw the confusion matrix of the validation or test split from the counts of the Trainer's `JaccardCallback`.

    The callback writes a PNG into ``<run folder>/confusion`` and logs it to loggers that accept pictures (W&B, TensorBoard).

    Args:
        every_n_epochs: Interval of the pictures in training; the last validation always gets one.

    Raises:
        ValueError: When a run starts, the Trainer has no `JaccardCallback`.
    """

    def __init__(self, every_n_epochs: int = 5) -> None:
        super().__init__(every_n_epochs)
        self._scorer: JaccardCallback | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the callback that counts."""
        self._scorer = _find_scorer(trainer)
        if self._scorer is None:
            raise ValueError(
                "callbacks: found ConfusionPicture without a JaccardCallback, whose counts it draws; add a JaccardCallback"
            )

    def draw(self, trainer: pl.Trainer, split: str, file: str) -> None:
        """Draw and log the matrix."""
        assert self._scorer is not None
        names = class_names(trainer, self._scorer.class_names)
        confusion = self._scorer.scores[split].confusion
        assert confusion is not None  # JaccardCallback counts pairs of classes
        picture = pictures.confusion_picture(confusion, names)
        log_picture(trainer, f"{split}/confusion", picture, file=f"confusion/{file}")


class PredictionPanel(_Pictures):
    """Draw images spread over the validation or test split: image, target and prediction, with a legend.

    The callback writes a PNG into ``<run folder>/panels`` and logs it to loggers that accept pictures (W&B, TensorBoard).

    Args:
        images: Number of images in a panel.
        every_n_epochs: Interval of the panels in training; the last validation always gets one.
    """

    def __init__(self, images: int = 4, every_n_epochs: int = 5) -> None:
        super().__init__(every_n_epochs)
        self.images = images
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, split: str) -> None:
        """Forget the images of the last epoch."""
        self._rows = []

    def take(self, trainer: pl.Trainer, outputs: Any, batch: Any, batch_idx: int, split: str) -> None:
        """Keep images spread evenly over the split."""
        batches = (trainer.num_val_batches if split == "val" else trainer.num_test_batches)[0]
        if trainer.sanity_checking or not trainer.is_global_zero or batch_idx % max(1, int(batches // self.images)):
            return
        count = min(math.ceil(self.images / batches), self.images - len(self._rows), len(batch["image"]))
        for index in range(count):
            image, target, preds = batch["image"][index], outputs["target"][index], outputs["preds"][index]
            self._rows.append((shown_bands(trainer, image.cpu()), target.cpu(), preds.cpu()))

    def draw(self, trainer: pl.Trainer, split: str, file: str) -> None:
        """Draw and log the panel."""
        rows, self._rows = self._rows, []
        if rows:
            names = class_names(trainer)
            panel = pictures.panel(rows, names, class_palette(trainer, len(names)))
            log_picture(trainer, f"{split}/panel", panel, file=f"panels/{file}")


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
        if self.history and self.history[-1]["epoch"] == trainer.current_epoch:  # the part before max_steps ended the run
            self.history.pop()
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
