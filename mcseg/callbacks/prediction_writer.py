"""Prediction files: masks, overlays and archives for benchmark servers."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter
from pytorch_lightning.utilities import rank_zero_info

from mcseg import pictures
from mcseg.callbacks.trackers import class_names, class_palette, shown_bands

_OVERLAY_SIDE = 4096  # largest side in pixels of the overlay of an image that is read in windows
Format = Literal["cityscapes", "bdd100k", "sceneparse150", "pascal_voc", "mapillary_vistas"]


class PredictionWriter(BasePredictionWriter):
    """Write each prediction at the image's size as palette PNG (pixel value = train id) and as overlay on its image.

    Files are named after the images, with their subfolders: ``masks/<name>.png`` and ``overlays/<name>.jpg``. The mask of a
    georeferenced TIFF image is ``masks/<name>.tif``, with the same georeference (not with the image's no-data value, which
    would be a class). Overlays of images that are read in windows for their size are reduced to 4096 pixels.

    Args:
        output_dir: Folder of the files; None is the run folder.
        overlays: Whether to write overlays.
        format: Benchmark whose evaluation server gets the label maps. They have its values, names and folders, and are
            written to ``submission`` and packed into ``<format>.zip`` or ``<format>.tar.gz``. None writes train ids.

    Raises:
        ValueError: When prediction starts, the data module does not belong to the benchmark ``format``.
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
        """Check that the data belong to the benchmark."""
        self._written = 0
        if self.format is not None:
            self._submission(trainer)

    def _folder(self, trainer: pl.Trainer) -> Path:
        return Path(self.output_dir or trainer.default_root_dir)

    def _submission(self, trainer: pl.Trainer) -> Any:
        """Return the benchmark's submission format from its data module."""
        data = getattr(trainer, "datamodule", None)
        submission = getattr(data, "submission", None)
        if submission is None or submission.benchmark != self.format:
            raise ValueError(
                f"format {self.format}: the data are {type(data).__name__}, expected those of {self.format}, whose label "
                f"values the submission needs (--config {self.format})"
            )
        return submission

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
        all_tags = batch.get("tags") or [{}] * len(batch["name"])
        for name, image, preds, tags in zip(batch["name"], batch["image"], prediction, all_tags, strict=True):
            if submission is None and tags:
                pictures.save_tiff_mask(preds.cpu(), palette, tags, folder / "masks" / f"{name}.tif")
            elif submission is None:
                pictures.save(pictures.palette_image(preds.cpu(), palette), folder / "masks" / f"{name}.png")
            else:
                values = torch.tensor(submission.values, dtype=torch.uint8)[preds.cpu().long()]
                picture = pictures.palette_image(values, palette) if submission.palette else pictures.grey_image(values)
                pictures.save(picture, folder / "submission" / submission.file.format(name=name))
            if self.overlays:
                shown, labels = image, preds
                if not isinstance(image, torch.Tensor):  # read in windows
                    step = -(-max(preds.shape) // _OVERLAY_SIDE)
                    shown, labels = image.reduced(step), preds[::step, ::step]
                overlay = pictures.overlay(shown_bands(trainer, shown.cpu()), labels.cpu(), palette)
                pictures.save(overlay, folder / "overlays" / f"{name}.jpg")
            self._written += 1

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pack the archive; print the paths and the number of predictions of all processes."""
        folder = self._folder(trainer)
        # also waits for the files of all processes
        written = int(trainer.strategy.reduce(torch.tensor(self._written, device=pl_module.device), reduce_op="sum"))
        if self.format is None:
            rank_zero_info(f"{written} predictions written to {folder / 'masks'}")
            return
        if trainer.is_global_zero:
            kind = self._submission(trainer).archive
            archive = pictures.pack(folder / "submission", folder / f"{self.format}.{kind}")
            rank_zero_info(f"{written} label maps for {self.format} written to {folder / 'submission'}; upload {archive}")
