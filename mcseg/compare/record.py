"""Callbacks that record a run of a study: its training, and pixel counts per validation image of its last weights."""

import hashlib
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from mcseg import pictures
from mcseg.callbacks.base import EvaluationCallback
from mcseg.callbacks.trackers import shown_bands
from mcseg.data import IGNORE_INDEX, SegmentationData
from mcseg.evaluation.inference import labels_at
from mcseg.evaluation.metrics import image_counts
from mcseg.palette import Palette

_LOG_PROBS = 4_000_000  # values (pixels x classes) that a run saves to fit shifts: 8 MB
_SIDE = 480  # pixels of the longer side of a picture in the report


class TrainingRecord(Callback):
    """Record curves, time per step, and hashes of the initial weights and of the batches in their order.

    Attributes:
        curves: per epoch, ``epoch`` (from 1), ``loss`` (mean over steps), ``seconds`` and, if it was validated, ``miou``.
        weights: hash of the network before the first step.
    """

    def __init__(self) -> None:
        self.curves: list[dict[str, float]] = []
        self.weights = ""
        self._batches = hashlib.sha256()
        self._losses: list[Tensor] = []
        self._steps: list[float] = []
        self._with_data: list[float] = []
        self._last_start = self._start = self._epoch_start = 0.0

    @property
    def batches(self) -> str:
        """Hash of the names in all batches and of the pixels of each epoch's first batch."""
        return self._batches.hexdigest()[:16]

    def seconds_per_step(self) -> dict[str, float | None]:
        """Return median seconds of an optimiser step, without and with the wait for its batch; None if there was no step."""
        return {
            "step": statistics.median(self._steps) if self._steps else None,
            "step_with_data": statistics.median(self._with_data) if self._with_data else None,
        }

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hash the weights."""
        digest = hashlib.sha256()
        for name, value in pl_module.network.state_dict().items():  # type: ignore[union-attr]
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        self.weights = digest.hexdigest()[:16]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset the losses and the clock."""
        self._losses = []
        self._last_start = 0.0
        self._epoch_start = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Hash the batch and start its clock."""
        self._batches.update("\n".join(batch["name"]).encode())
        if batch_idx == 0:
            self._batches.update(batch["image"].cpu().contiguous().numpy().tobytes())
        _synchronize(pl_module)
        self._start = time.perf_counter()
        if self._last_start:
            self._with_data.append(self._start - self._last_start)
        self._last_start = self._start

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the step's loss and time."""
        _synchronize(pl_module)
        self._steps.append(time.perf_counter() - self._start)
        self._losses.append(outputs["loss"].detach())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch to the curves."""
        point = {
            "epoch": trainer.current_epoch + 1,
            "loss": float(torch.stack(self._losses).double().mean()),
            "seconds": time.perf_counter() - self._epoch_start,
        }
        miou = trainer.callback_metrics.get("val/miou")
        if miou is not None and (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0:
            point["miou"] = float(miou)
        self.curves.append(point)


class EvaluationRecord(EvaluationCallback):
    """Record pixel counts of each validation image, pictures of a few, and a sample of log-probabilities.

    For ``Trainer.validate``. One forward pass gives the predictions without and with shifts, so shifts and log-probabilities
    need inference on whole images.

    Args:
        shifts: shift of each class's logit for a second prediction; None for no second prediction.
        pictures: number of evenly spaced images to draw, the same in every run.
        folder: folder of the pictures ``<i>-image.jpg``, ``<i>-target.png``, ``<i>-prediction.png``, ``<i>-shifted.png``.
        log_probs: whether to sample log-probabilities, to fit shifts.

    Attributes:
        names: names of the images.
        counts: per image, (3,C) int64: pixels predicted correctly, in the target, in the prediction, without void.
        counts_shifted: counts of the predictions with shifts.
        sample: per image, log-probabilities (P,C) float16 and labels (P,) uint8.
    """

    def __init__(self, shifts: list[float] | None, pictures: int, folder: Path, log_probs: bool) -> None:
        self.names: list[str] = []
        self.counts: list[NDArray[np.int64]] = []
        self.counts_shifted: list[NDArray[np.int64]] = []
        self.sample: list[tuple[NDArray[np.float16], NDArray[np.uint8]]] = []
        self._shifts = None if shifts is None else torch.tensor(shifts)
        self._pictures = pictures
        self._folder = folder
        self._log_probs = log_probs
        self._generator = torch.Generator().manual_seed(0)
        self._logits: Tensor | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hook the forward pass to see the logits."""

        def keep(_: Any, __: Any, logits: Tensor) -> None:
            self._logits = logits

        self._hook = pl_module.register_forward_hook(keep)
        pl_module.hparams["fused_upsample"] = False  # the fused path does not call forward

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the hook."""
        self._hook.remove()
        self._logits = None

    def take(self, trainer: pl.Trainer, outputs: Any, batch: Any, batch_idx: int, split: str) -> None:
        """Count the pixels of a batch, and sample and draw its images."""
        assert self._logits is not None
        logits, target, preds = self._logits.detach(), outputs["target"], outputs["preds"]
        data: SegmentationData = trainer.datamodule  # type: ignore[attr-defined]
        images = len(trainer.val_dataloaders.dataset)  # type: ignore[union-attr]
        classes = data.num_classes
        shifted = None
        if self._shifts is not None:
            shifts = self._shifts.to(logits.device)[:, None, None]
            shifted = labels_at(logits.float() + shifts, target.shape[-2:])
        for index, name in enumerate(batch["name"]):
            self.names.append(name)
            self.counts.append(image_counts(preds[index], target[index], classes).cpu().numpy())
            if shifted is not None:
                self.counts_shifted.append(image_counts(shifted[index], target[index], classes).cpu().numpy())
            if self._log_probs:
                pixels = max(1, _LOG_PROBS // (classes * images))
                self.sample.append(sample_log_probs(logits[index].float(), target[index], pixels, self._generator))
            picture = _picture_index(len(self.names) - 1, images, self._pictures)
            if picture is not None:
                masks = {"target": target[index], "prediction": preds[index]}
                masks |= {} if shifted is None else {"shifted": shifted[index]}
                self._draw(picture, shown_bands(trainer, batch["image"][index].cpu()), masks, data.palette)

    def _draw(self, index: int, image: Tensor, masks: dict[str, Tensor], palette: Palette) -> None:
        height, width = masks["target"].shape
        scale = min(1.0, _SIDE / max(height, width))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        picture = pictures.image_picture(image).resize(size, Image.Resampling.BILINEAR)
        pictures.save(picture, self._folder / f"{index}-image.jpg")
        for name, mask in masks.items():
            small = pictures.palette_image(mask.cpu(), palette).resize(size, Image.Resampling.NEAREST)
            pictures.save(small, self._folder / f"{index}-{name}.png")


def sample_log_probs(
    logits: Tensor, target: Tensor, pixels: int, generator: torch.Generator
) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    """Sample labelled pixels of an image with their log-probabilities. Logits are resized bilinearly to the target's size.

    Args:
        logits: (C,h,w) float32.
        target: (H,W) train ids or 255.
        pixels: largest number of pixels to sample.
        generator: random generator on the CPU.

    Returns:
        Log-probabilities (P,C) float16 and labels (P,) uint8.
    """
    height, width = target.shape
    labelled = (target.flatten() != IGNORE_INDEX).nonzero().flatten().cpu()
    sampled = labelled[torch.randperm(len(labelled), generator=generator)[:pixels]].to(target.device)
    # Resized logits of a large image take gigabytes: interpolate only at the sampled pixels, positioned as by F.interpolate
    rows, columns = sampled // width, sampled % width
    positions = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=-1)
    resized = F.grid_sample(logits[None], positions[None, None].to(logits), padding_mode="border", align_corners=False)
    log_probs = resized[0, :, 0].T.log_softmax(1).clamp(min=-1000)
    return log_probs.half().cpu().numpy(), target.flatten()[sampled].to(torch.uint8).cpu().numpy()


def _picture_index(index: int, images: int, pictures: int) -> int | None:
    """Position of image ``index`` among ``pictures`` evenly spaced ones; None if it is not one of them."""
    pictures = min(pictures, images)
    chosen = [images * (2 * picture + 1) // (2 * pictures) for picture in range(pictures)]
    return chosen.index(index) if index in chosen else None


def _synchronize(module: pl.LightningModule) -> None:
    """Wait for the GPU: its kernels run asynchronously, and the clock must include them."""
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
