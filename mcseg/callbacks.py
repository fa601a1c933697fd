"""Callbacks: mIoU and its table, pictures of predictions and confusions, curves, and prediction files."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter, Callback
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from mcseg import pictures
from mcseg.metrics import Scores, SegmentationScores, is_repeated, rarest_third
from mcseg.tracking import class_names, class_palette, log_picture

IGNORE_INDEX = 255

Format = Literal["cityscapes", "bdd100k", "sceneparse150", "pascal_voc", "mapillary_vistas"]


def _pictures_due(trainer: pl.Trainer, every_n_epochs: int) -> bool:
    """Whether this process draws: in a training run every so many epochs and at the last, otherwise always."""
    last = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    due = trainer.state.fn != "fit" or last or (trainer.current_epoch + 1) % every_n_epochs == 0
    return due and trainer.is_global_zero and not trainer.sanity_checking


def _picture_file(trainer: pl.Trainer, split: str) -> str:
    return f"{split}-epoch{trainer.current_epoch:03d}.png" if trainer.state.fn == "fit" else f"{split}.png"


class EvaluationCallback(Callback):
    """Takes validation and test through the same three methods, which subclasses fill."""

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, split: str) -> None:
        """Begin an epoch of ``split`` (``val`` or ``test``)."""

    def take(self, trainer: pl.Trainer, outputs: Any, batch: Any, batch_idx: int, split: str) -> None:
        """Take a batch and what the step returned for it."""

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule, split: str) -> None:
        """End the epoch; values may be logged."""

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning's hook."""
        self.start(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning's hook."""
        self.start(trainer, pl_module, "test")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Lightning's hook."""
        self.take(trainer, outputs, batch, batch_idx, "val")

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Lightning's hook."""
        self.take(trainer, outputs, batch, batch_idx, "test")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning's hook."""
        self.finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning's hook."""
        self.finish(trainer, pl_module, "test")


class JaccardCallback(EvaluationCallback):
    """Scores validation and test from one confusion matrix over the whole split.

    Logs ``<split>/miou`` (classes with neither target nor predicted pixels left out), ``<split>/iou/<class>``,
    ``<split>/pixel_accuracy`` and ``<split>/classes_averaged``, and prints a table per class at the end of ``validate`` and
    ``test`` and of a training run. In a training run, ``val/miou_tail`` is the mean over the rarest third of the classes by
    their pixels in the training labels, and classes that the targets contain and that are never predicted are named in a
    warning once. The step must return a dict with ``preds`` and ``target``, both (N,H,W). Duplicates that
    a distributed sampler adds to give each process as many images are not counted.

    Args:
        class_names: names for the keys and the table; None takes the data module's ``class_names``, or the train ids.
    """

    def __init__(self, class_names: list[str] | None = None) -> None:
        self.class_names = class_names
        self.scores: dict[str, Scores] = {}
        self._metric: SegmentationScores | None = None
        self._tail: Tensor | None = None
        self._silent: set[str] = set()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the rarest third of the classes."""
        class_pixels = getattr(getattr(trainer, "datamodule", None), "class_pixels", None)
        self._silent = set()
        self._tail = None
        if class_pixels is not None:
            self._tail = rarest_third(class_pixels())

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, split: str) -> None:
        """Begin to count."""
        classes = len(class_names(trainer, self.class_names))
        self._metric = SegmentationScores(classes, IGNORE_INDEX).to(module.device)

    def take(self, trainer: pl.Trainer, outputs: Any, batch: Any, batch_idx: int, split: str) -> None:
        """Count a batch."""
        assert self._metric is not None
        target = outputs["target"]
        if trainer.world_size > 1:
            loader: Any = trainer.val_dataloaders if split == "val" else trainer.test_dataloaders
            dropped = batch.get("dropped", ())
            repeated = is_repeated(loader, len(target), batch_idx, trainer.world_size, trainer.global_rank, dropped)
            target = target.masked_fill(repeated.to(target.device).view(-1, 1, 1), IGNORE_INDEX)
        self._metric.update(outputs["preds"], target)

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule, split: str) -> None:
        """Log the scores."""
        assert self._metric is not None
        scores = self._metric.scores()
        if trainer.sanity_checking:
            return
        self.scores[split] = scores
        module.log(f"{split}/miou", scores.miou, prog_bar=True)
        values = {"pixel_accuracy": scores.pixel_accuracy, "classes_averaged": float(scores.classes_averaged)}
        values |= {
            f"iou/{name}": float(value)
            for name, value in zip(class_names(trainer, self.class_names), scores.iou, strict=True)
            if not value.isnan()
        }
        if self._tail is not None:
            tail = scores.iou[self._tail.to(scores.iou.device)].nanmean()
            values |= {} if tail.isnan() else {"miou_tail": float(tail)}
        module.log_dict({f"{split}/{name}": value for name, value in values.items()})
        if trainer.state.fn == "fit":
            self._alarm(trainer, scores, split)

    def _alarm(self, trainer: pl.Trainer, scores: Scores, split: str) -> None:
        """Name classes that have collapsed, each once."""
        names = class_names(trainer, self.class_names)
        # Without a single predicted pixel a class has no precision.
        silent = {names[index] for index in ((scores.share > 0) & scores.precision.isnan()).nonzero().flatten().tolist()}
        if silent - self._silent:
            rank_zero_warn(
                f"{split}: never predicted although the targets contain them: {', '.join(sorted(silent))}; if that lasts, "
                "warm up with cross entropy, or weigh these classes more"
            )
        self._silent = silent

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the table, unless a training run goes on."""
        if trainer.state.fn == "validate":
            self._print(trainer, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the table."""
        self._print(trainer, "test")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the table of the last validation."""
        self._print(trainer, "val")

    def _print(self, trainer: pl.Trainer, split: str) -> None:
        if split in self.scores:
            rank_zero_info("\n" + score_table(self.scores[split], class_names(trainer, self.class_names), split))


def score_names(split: str, names: Sequence[str]) -> list[str]:
    """Under which names :class:`JaccardCallback` logs the scores of a split with classes of these names."""
    whole = ("miou", "miou_tail", "pixel_accuracy", "classes_averaged")
    return [f"{split}/{name}" for name in (*whole, *(f"iou/{name}" for name in names))]


def score_table(scores: Scores, names: Sequence[str], split: str) -> str:
    """Lay the scores out as text: a row per class with its share of the pixels, IoU, precision and recall in percent."""
    width = max(len("class"), *map(len, names))
    rows = [f"{'class':<{width}}  {'pixels %':>8}  {'IoU %':>6}  {'precision %':>11}  {'recall %':>8}"]
    for index in range(len(names)):
        share, iou, precision, recall = (
            "-" if column[index].isnan() else f"{100 * float(column[index]):.{digits}f}"
            for column, digits in ((scores.share, 3), (scores.iou, 1), (scores.precision, 1), (scores.recall, 1))
        )
        rows.append(f"{names[index]:<{width}}  {share:>8}  {iou:>6}  {precision:>11}  {recall:>8}")
    line = "-" * max(map(len, rows))
    left_out = len(names) - scores.classes_averaged
    note = f" ({left_out} without a pixel in targets and predictions left out)" if left_out else ""
    total = (
        f"{split}: mIoU {100 * scores.miou:.2f} % over {scores.classes_averaged} of {len(names)} classes{note}, "
        f"pixel accuracy {100 * scores.pixel_accuracy:.2f} %"
    )
    return "\n".join([rows[0], line, *rows[1:], line, total])


class ConfusionPicture(Callback):
    """Draws the confusion matrix of the validation or test split, from the counts of the :class:`JaccardCallback` beside it.

    Each is written as PNG into ``<run folder>/confusion`` and given to loggers that take pictures (W&B, TensorBoard).

    Args:
        every_n_epochs: how often a training run makes one; the last epoch always does.

    Raises:
        ValueError: in a run without a :class:`JaccardCallback`.
    """

    def __init__(self, every_n_epochs: int = 5) -> None:
        self.every_n_epochs = every_n_epochs
        self._scorer: JaccardCallback | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the callback that counts."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._scorer = next((callback for callback in callbacks if isinstance(callback, JaccardCallback)), None)
        if self._scorer is None:
            raise ValueError("callbacks: found ConfusionPicture alone, expected a JaccardCallback beside it, which counts")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw: all callbacks have scored by now."""
        self._draw(trainer, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Likewise."""
        self._draw(trainer, "test")

    def _draw(self, trainer: pl.Trainer, split: str) -> None:
        assert self._scorer is not None
        if _pictures_due(trainer, self.every_n_epochs):
            names = class_names(trainer, self._scorer.class_names)
            confusion = self._scorer.scores[split].confusion
            assert confusion is not None  # the scorer counts pairs of classes
            picture = pictures.confusion_picture(confusion, names)
            log_picture(trainer, f"{split}/confusion", picture, f"confusion/{_picture_file(trainer, split)}")


class PredictionPanel(EvaluationCallback):
    """Pictures of images spread over the validation or test split: image | target | prediction, with a legend.

    Each is written as PNG into ``<run folder>/panels`` and given to loggers that take pictures (W&B, TensorBoard).

    Args:
        images: how many images a panel shows.
        every_n_epochs: how often a training run makes one; the last epoch always does.
    """

    def __init__(self, images: int = 4, every_n_epochs: int = 5) -> None:
        self.images = images
        self.every_n_epochs = every_n_epochs
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def take(self, trainer: pl.Trainer, outputs: Any, batch: Any, batch_idx: int, split: str) -> None:
        """Keep images, evenly spread."""
        batches = (trainer.num_val_batches if split == "val" else trainer.num_test_batches)[0]
        if not _pictures_due(trainer, self.every_n_epochs) or batch_idx % max(1, int(batches // self.images)):
            return
        each = min(math.ceil(self.images / batches), self.images - len(self._rows), len(batch["image"]))
        for index in range(each):
            image, target, preds = batch["image"][index], outputs["target"][index], outputs["preds"][index]
            self._rows.append((image.cpu(), target.cpu(), preds.cpu()))

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule, split: str) -> None:
        """Draw and log the panel."""
        rows, self._rows = self._rows, []
        if not rows:
            return
        names = class_names(trainer)
        panel = pictures.panel(rows, names, class_palette(trainer, len(names)))
        log_picture(trainer, f"{split}/panel", panel, f"panels/{_picture_file(trainer, split)}")


class TrainingCurves(Callback):
    """Keeps ``curves.png`` in the run folder: training loss, mIoU and IoU per class over the epochs."""

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch and draw anew."""
        if not trainer.is_global_zero:
            return
        wanted = ("train/loss", "val/miou", "val/iou/")
        values = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith(wanted)}
        self.history.append({"epoch": trainer.current_epoch, **values})
        pictures.save_curves(self.history, Path(trainer.default_root_dir) / "curves.png")

    def state_dict(self) -> dict[str, Any]:
        """Give the history to the checkpoint, so that a resumed run goes on with it."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the history from a checkpoint."""
        self.history = list(state_dict["history"])


class PredictionWriter(BasePredictionWriter):
    """Writes each prediction as palette PNG (pixel value = train id) and as overlay on its image, at the image's size.

    Files are named after the images, sub-folders kept: ``masks/<name>.png`` and ``overlays/<name>.jpg``.

    Args:
        output_dir: where to write; None is the run folder.
        overlays: write the overlays as well.
        format: benchmark whose evaluation server the label maps are meant for. They then have its values, names and folders
            and lie in ``submission``, and are packed into ``<format>.zip`` or ``<format>.tar.gz``. The data must be that
            benchmark's. None writes train ids.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        overlays: bool = True,
        format: Format | None = None,
    ) -> None:
        super().__init__(write_interval="batch")
        self.output_dir = output_dir
        self.overlays = overlays
        self.format = format
        self._written = 0

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a format that does not fit the data."""
        self._written = 0
        if self.format is not None:
            self._submission(trainer)

    def _folder(self, trainer: pl.Trainer) -> Path:
        return Path(self.output_dir or trainer.default_root_dir)

    def _submission(self, trainer: pl.Trainer) -> Any:
        """Benchmark's own format, from its data module."""
        data = getattr(trainer, "datamodule", None)
        found = getattr(data, "submission", None)
        if found is None or found.benchmark != self.format:
            raise ValueError(
                f"format {self.format}: the data are {type(data).__name__}, expected those of {self.format}, whose label "
                f"values the submission needs (--config {self.format})"
            )
        return found

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the files of a batch."""
        folder = self._folder(trainer)
        palette = class_palette(trainer, len(class_names(trainer)))
        submission = None if self.format is None else self._submission(trainer)
        for name, image, preds in zip(batch["name"], batch["image"], prediction, strict=True):
            if submission is None:
                pictures.save(pictures.palette_image(preds.cpu(), palette), folder / "masks" / f"{name}.png")
            else:
                values = torch.tensor(submission.values, dtype=torch.uint8)[preds.cpu().long()]
                picture = pictures.palette_image(values, palette) if submission.palette else pictures.grey_image(values)
                pictures.save(picture, folder / "submission" / submission.file.format(name=name))
            if self.overlays:
                pictures.save(pictures.overlay(image.cpu(), preds.cpu(), palette), folder / "overlays" / f"{name}.jpg")
            self._written += 1

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pack the archive; say where the files are."""
        folder = self._folder(trainer)
        if self.format is None:
            rank_zero_info(f"{self._written} predictions written to {folder / 'masks'}")
            return
        trainer.strategy.barrier()  # the archive holds the files of all processes
        if trainer.is_global_zero:
            kind = self._submission(trainer).archive
            archive = pictures.pack(folder / "submission", folder / f"{self.format}.{kind}")
            rank_zero_info(
                f"{self._written} label maps for {self.format} written to {folder / 'submission'}; upload {archive}"
            )
