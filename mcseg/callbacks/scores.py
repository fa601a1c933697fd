"""Scores of a split: mIoU, IoU per class, and their table."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from mcseg.callbacks.base import EvaluationCallback
from mcseg.callbacks.trackers import class_names
from mcseg.evaluation.metrics import IGNORE_INDEX, Scores, SegmentationScores, is_repeated, rarest_third


class JaccardCallback(EvaluationCallback):
    """Compute the scores of validation and test from one confusion matrix over the whole split.

    The callback logs ``<split>/miou`` (mean over the classes with target or predicted pixels), ``<split>/iou/<class>``,
    ``<split>/pixel_accuracy`` and ``<split>/classes_averaged``, and prints a table of the classes at the end of ``fit``,
    ``validate`` and ``test``. ``fit`` also logs ``val/miou_tail``, the mean over the rarest third of the classes by their
    pixels in the training labels, and warns once about classes that the targets contain and the module never predicts.

    The step must return a dict with ``preds`` and ``target``, both ``(N, H, W)``. Images that a distributed sampler repeats
    are counted once.

    Args:
        class_names: Names for the keys and the table; None means the data module's ``class_names``, or the train ids.
    """

    def __init__(self, class_names: list[str] | None = None) -> None:
        self.class_names = class_names
        self.scores: dict[str, Scores] = {}
        self._metric: SegmentationScores | None = None
        self._tail: Tensor | None = None
        self._silent: set[str] = set()
        self._reported_void = False

    def score_names(self, trainer: pl.Trainer, split: str) -> list[str]:
        """Return the names under which the scores of a split are logged."""
        totals = ("miou", "miou_tail", "pixel_accuracy", "classes_averaged")
        return [f"{split}/{name}" for name in (*totals, *(f"iou/{name}" for name in class_names(trainer, self.class_names)))]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Determine the rarest third of the classes."""
        class_pixels = getattr(getattr(trainer, "datamodule", None), "class_pixels", None)
        self._silent = set()
        self._tail = None
        if class_pixels is not None:
            self._tail = rarest_third(class_pixels())

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, split: str) -> None:
        """Reset the counts."""
        classes = len(class_names(trainer, self.class_names))
        self._metric = SegmentationScores(classes, IGNORE_INDEX).to(module.device)

    def take(self, trainer: pl.Trainer, outputs: Any, batch: Any, batch_idx: int, split: str) -> None:
        """Count a batch."""
        assert self._metric is not None
        target = outputs["target"]
        if trainer.world_size > 1:
            repeated = is_repeated(trainer, split, batch, batch_idx=batch_idx, count=len(target))
            target = target.masked_fill(repeated.to(target.device).view(-1, 1, 1), IGNORE_INDEX)
        self._metric.update(outputs["preds"], target)

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule, split: str) -> None:
        """Log the scores."""
        assert self._metric is not None
        scores = self._metric.scores()
        if trainer.sanity_checking:
            return
        self.scores[split] = scores
        if not (scores.share > 0).any() and not self._reported_void:
            self._reported_void = True
            rank_zero_warn(
                f"{split}: no pixel of the targets has a class, all are void (255), so the scores have no meaning; expected "
                "labelled images; mcseg check names the masks"
            )
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
            self._warn_of_silent_classes(trainer, scores, split)

    def _warn_of_silent_classes(self, trainer: pl.Trainer, scores: Scores, split: str) -> None:
        """Warn about classes that are never predicted, once each."""
        names = class_names(trainer, self.class_names)
        # precision is NaN without a predicted pixel
        silent = {names[index] for index in ((scores.share > 0) & scores.precision.isnan()).nonzero().flatten().tolist()}
        if silent - self._silent:
            rank_zero_warn(
                f"{split}: never predicted although the targets contain them: {', '.join(sorted(silent))}; if this lasts, "
                "warm up with cross entropy, or give these classes a larger weight"
            )
        self._silent = silent

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the table after ``validate``; in training, `on_fit_end` prints it."""
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


def score_table(scores: Scores, names: Sequence[str], split: str) -> str:
    """Format the scores as text: share of the pixels, IoU, precision and recall of each class in percent."""
    width = max(len("class"), *map(len, names))
    rows = [f"{'class':<{width}}  {'pixels %':>8}  {'IoU %':>6}  {'precision %':>11}  {'recall %':>8}"]
    for index in range(len(names)):
        share, iou, precision, recall = (
            "-" if column[index].isnan() else f"{100 * float(column[index]):.{digits}f}"
            for column, digits in ((scores.share, 3), (scores.iou, 1), (scores.precision, 1), (scores.recall, 1))
        )
        rows.append(f"{names[index]:<{width}}  {share:>8}  {iou:>6}  {precision:>11}  {recall:>8}")
    line = "-" * max(map(len, rows))
    excluded = len(names) - scores.classes_averaged
    note = f" ({excluded} without a pixel in targets and predictions excluded)" if excluded else ""
    total = (
        f"{split}: mIoU {100 * scores.miou:.2f} % over {scores.classes_averaged} of {len(names)} classes{note}, "
        f"pixel accuracy {100 * scores.pixel_accuracy:.2f} %"
    )
    return "\n".join([rows[0], line, *rows[1:], line, total])
