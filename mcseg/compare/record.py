"""What a run of a comparison writes down: its training, and the counts of its last weights per validation image."""

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
from mcseg.data import IGNORE_INDEX, SegmentationData
from mcseg.evaluation.inference import labels_at
from mcseg.evaluation.metrics import image_counts
from mcseg.palette import Palette

_LOG_PROBS = 4_000_000  # values (pixels x classes) that a run keeps for the choice of shifts: 8 MB
_SIDE = 480  # pixels of the longer side of a picture in the report


class TrainingRecord(Callback):
    """Curves, time per step, and fingerprints of the initial weights and of the batches in their order.

    Attributes:
        curves: per epoch ``epoch`` (from 1), ``loss`` (mean over the steps), ``miou`` where the epoch was validated, and
            ``seconds``.
        weights: fingerprint of the network before the first step.
    """

    def __init__(self) -> None:
        self.curves: list[dict[str, float]] = []
        self.weights = ""
        self._batches = hashlib.sha256()
        self._losses: list[Tensor] = []
        self._steps: list[float] = []
        self._with_data: list[float] = []
        self._before = self._started = self._epoch = 0.0

    @property
    def batches(self) -> str:
        """Fingerprint of the names in all batches and of the pixels of each epoch's first batch."""
        return self._batches.hexdigest()[:16]

    def seconds_per_step(self) -> dict[str, float | None]:
        """Median seconds of an optimiser step: computing alone, and with the wait for its batch."""
        return {
            "step": statistics.median(self._steps) if self._steps else None,
            "step_with_data": statistics.median(self._with_data) if self._with_data else None,
        }

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the fingerprint of the weights."""
        digest = hashlib.sha256()
        for name, value in pl_module.network.state_dict().items():  # type: ignore[union-attr]
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        self.weights = digest.hexdigest()[:16]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin an epoch."""
        self._losses = []
        self._before = 0.0
        self._epoch = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Note which images the batch has, and the time."""
        self._batches.update("\n".join(batch["name"]).encode())
        if batch_idx == 0:
            self._batches.update(batch["image"].cpu().contiguous().numpy().tobytes())
        _wait(pl_module)
        self._started = time.perf_counter()
        if self._before:
            self._with_data.append(self._started - self._before)
        self._before = self._started

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note loss and time."""
        _wait(pl_module)
        self._steps.append(time.perf_counter() - self._started)
        self._losses.append(outputs["loss"].detach())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch to the curves."""
        point = {
            "epoch": trainer.current_epoch + 1,
            "loss": float(torch.stack(self._losses).double().mean()),
            "seconds": time.perf_counter() - self._epoch,
        }
        miou = trainer.callback_metrics.get("val/miou")
        if miou is not None and (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0:
            point["miou"] = float(miou)
        self.curves.append(point)


class EvaluationRecord(EvaluationCallback):
    """Counts of each validation image, pictures of a few, and a sample of log-probabilities; for ``Trainer.validate``.

    One forward pass serves the predictions without and with the shifts, so shifts and log-probabilities need inference
    that takes the image at once.

    Args:
        shifts: per class, added to the logits before the largest is taken; None leaves the second prediction out.
        pictures: how many images, evenly spread, are drawn into ``folder``; the same ones in every run.
        folder: where they go: ``<i>-image.jpg``, ``<i>-target.png``, ``<i>-prediction.png``, ``<i>-shifted.png``.
        log_probs: keep a sample of pixels for the choice of shifts.

    Attributes:
        names: of the images.
        counts: per image (3,C) int64: pixels predicted right, in the target, in the prediction, void left out.
        counts_shifted: likewise with the shifts.
        sample: log-probabilities (P,C) float16 and labels (P,) uint8, in pieces.
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
        """Listen to the network."""

        def keep(_: Any, __: Any, logits: Tensor) -> None:
            self._logits = logits

        self._hook = pl_module.register_forward_hook(keep)
        pl_module.hparams["fused_upsample"] = False  # it would leave out forward and its logits

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen no longer."""
        self._hook.remove()
        self._logits = None

    def take(self, trainer: pl.Trainer, outputs: Any, batch: Any, batch_idx: int, split: str) -> None:
        """Count a batch."""
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
            place = _place(len(self.names) - 1, images, self._pictures)
            if place is not None:
                found = {"target": target[index], "prediction": preds[index]}
                found |= {} if shifted is None else {"shifted": shifted[index]}
                self._draw(place, batch["image"][index], found, data.palette)

    def _draw(self, place: int, image: Tensor, masks: dict[str, Tensor], palette: Palette) -> None:
        height, width = masks["target"].shape
        scale = min(1.0, _SIDE / max(height, width))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        picture = pictures.image_picture(image.cpu()).resize(size, Image.Resampling.BILINEAR)
        pictures.save(picture, self._folder / f"{place}-image.jpg")
        for name, mask in masks.items():
            small = pictures.palette_image(mask.cpu(), palette).resize(size, Image.Resampling.NEAREST)
            pictures.save(small, self._folder / f"{place}-{name}.png")


def sample_log_probs(
    logits: Tensor, target: Tensor, pixels: int, generator: torch.Generator
) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    """Draw labelled pixels of an image with their log-probabilities, the logits resized bilinearly to the labels' size.

    Args:
        logits: (C,h,w) float32.
        target: (H,W) train ids or 255.
        pixels: how many at most; all where there are fewer.
        generator: on the CPU.

    Returns:
        (P,C) log-probabilities and (P,) labels.
    """
    height, width = target.shape
    found = (target.flatten() != IGNORE_INDEX).nonzero().flatten().cpu()
    found = found[torch.randperm(len(found), generator=generator)[:pixels]].to(target.device)
    # At the drawn pixels alone: the resized logits of a large image take gigabytes. Same positions as F.interpolate's.
    rows, columns = found // width, found % width
    place = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=-1)
    drawn = F.grid_sample(logits[None], place[None, None].to(logits), padding_mode="border", align_corners=False)
    log_probs = drawn[0, :, 0].T.log_softmax(1).clamp(min=-1000)
    return log_probs.half().cpu().numpy(), target.flatten()[found].to(torch.uint8).cpu().numpy()


def _place(index: int, images: int, wanted: int) -> int | None:
    """Which of ``wanted`` evenly spread images this one is."""
    wanted = min(wanted, images)
    chosen = [images * (2 * place + 1) // (2 * wanted) for place in range(wanted)]
    return chosen.index(index) if index in chosen else None


def _wait(module: pl.LightningModule) -> None:
    """Let a GPU finish, or the clock would stop when the work has only been handed over."""
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
