"""SegmentationModule: a network, an objective and an optimiser, trained by the Lightning Trainer."""

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from mcseg.checkpoints.module import CheckpointModule
from mcseg.evaluation.inference import Inference, labels_at, resize_labels
from mcseg.evaluation.metrics import is_repeated
from mcseg.kernels import fuses_upsampling, predicted_classes
from mcseg.lightning_internals import logs_step
from mcseg.losses import CrossEntropyLoss, Upsampling, offered
from mcseg.losses.probe import build_objective
from mcseg.networks import SegmentationNetwork
from mcseg.nonfinite import LossGuard, OnNonFinite
from mcseg.preparation import begin, prepare, set_up
from mcseg.schedules import Interval, WarmupPolynomialLR, optimizer_and_schedule, set_length, step_plateau
from mcseg.seeds import seed_of, seeded


class SegmentationModule(CheckpointModule):
    """Train a segmentation network with an objective; validation and test return predictions, which the callbacks score.

    Hyperparameters are stored as plain types (class paths and their arguments). A checkpoint therefore loads with
    ``weights_only=True``, and `load_from_checkpoint` rebuilds network and objective.

    Args:
        arch: Architecture of segmentation_models_pytorch by name, for example ``unet`` or ``deeplabv3plus``.
        encoder: Name of its encoder.
        encoder_weights: Pretrained weights of the encoder, for example ``imagenet``; None for random weights. They are
            fetched when training starts, never when a checkpoint is loaded.
        init_from: Checkpoint of another run; training starts from its network weights. The last layer is skipped if the
            number of classes differs. Objective, optimiser and epochs start from the beginning.
        num_classes: Number of classes C; the command line takes it from the data.
        in_channels: Number of bands B of the images; the command line takes it from ``data.bands``. For other than 3, the
            mean and standard deviation of the bands are computed from the training images when training starts.
        objective: Module that maps logits ``(N, C, H, W)`` float32 and target ``(N, H, W)`` int64 to a scalar, or a callable
            that builds it. None is `mcseg.losses.default_objective`, power Dice. An objective with a method ``calibrate``
            gets the pixel counts of the training labels when training starts; see `mcseg.losses.ObjectiveProtocol`. For one
            that does not keep its arguments as attributes, give a ``functools.partial`` of its class.
        optimizer: Callable from parameters to optimiser: a class, or a ``functools.partial`` of one.
        lr: Learning rate, instead of the optimiser's; Lightning's learning-rate finder sets it.
        scheduler: Callable from optimiser to learning-rate schedule. A ``torch.optim.lr_scheduler.ReduceLROnPlateau`` is
            stepped with ``val/miou`` after each validation; Lightning's class of that name with its ``monitor``. The default
            decays to 0 by a polynomial over the whole run.
        scheduler_interval: What the schedule counts, ``"step"`` (optimiser steps) or ``"epoch"``. None means steps for
            ``WarmupPolynomialLR`` and torch's ``OneCycleLR`` and ``CyclicLR``, epochs for all others.
        network_options: Further arguments of the architecture, for example ``{"decoder_channels": [64, 32, 16]}``.
        channels_last: Keep the network in the channels-last memory format.
        checkpointing: Recompute the encoder's activations in the backward pass instead of keeping them.
        frozen_batch_norm: Keep statistics and parameters of all batch norms fixed, to fine-tune with small batches.
        aux_weight: Weight of the cross entropy of an auxiliary head, which predictions do not use, on the encoder's
            second-to-last feature map. 0.4 is usual for DeepLab and PSPNet; 0 means no head.
        aux_channels: Width of the auxiliary head.
        fused_upsample: Give the objective the logits before the network's last bilinear upsampling; it upsamples them
            itself, which needs less memory and gives the same loss within rounding. None does so where it is faster: on a
            GPU with Triton, for all strides and numbers of classes. It has no effect if the network does not end in an
            upsampling, if the objective does not accept coarse logits (the margin and soft-count losses do), if masks and
            images differ in size, or in training with an auxiliary head.
        compile: Compile the network for training with `torch.compile`, which takes a minute or more at the start.
            Checkpoints do not change. Evaluation is not compiled, as its images may differ in size.
        on_nonfinite: Policy for a NaN or infinite loss. ``"stop"`` stops training one step later, so that no step waits for
            the GPU, and names the images of the batch. ``"skip"`` skips the batch on all processes, waits for the GPU in
            each step, and reports the number of skipped batches at the end.

    Attributes:
        inference: `mcseg.evaluation.Inference` that labels whole images, by default in one pass; not saved in checkpoints.
            With windows, several scales or mirroring there are no logits of an image, and no ``<split>/loss`` is logged.
        has_weights: True if the weights are trained or loaded from a checkpoint; test and predict raise an error for random
            weights.

    Raises:
        ValueError: Unknown architecture or encoder; when training starts, an objective, optimiser or scheduler that a
            checkpoint could not rebuild, or an objective that fails on a small batch or does not leave out void pixels.

    Example:
        >>> import torch
        >>> from mcseg import SegmentationModule
        >>> module = SegmentationModule("unet", "resnet18", num_classes=3)
        >>> module(torch.zeros(1, 3, 50, 70, dtype=torch.uint8)).shape
        torch.Size([1, 3, 50, 70])
        >>> type(module.objective).__name__
        'DiceLoss'
    """

    def __init__(
        self,
        arch: str = "unet",
        encoder: str = "resnet34",
        encoder_weights: str | None = None,
        *,
        num_classes: int,
        in_channels: int = 3,
        init_from: str | None = None,
        objective: nn.Module | Callable[[], nn.Module] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr: float | None = None,
        scheduler: LRSchedulerCallable = WarmupPolynomialLR,
        scheduler_interval: Interval | None = None,
        network_options: dict[str, Any] | None = None,
        channels_last: bool = True,
        checkpointing: bool = False,
        frozen_batch_norm: bool = False,
        aux_weight: float = 0.0,
        aux_channels: int = 256,
        fused_upsample: bool | None = None,
        compile: bool = False,
        on_nonfinite: OnNonFinite = "stop",
    ) -> None:
        super().__init__()
        if aux_weight < 0:
            raise ValueError(f"aux_weight: found {aux_weight}, expected a weight >= 0")
        self._loss_guard = LossGuard(on_nonfinite)
        self.save_plain_hyperparameters(inspect.currentframe())
        self.network = SegmentationNetwork(
            arch,
            encoder,
            num_classes,
            in_channels=in_channels,
            options=network_options,
            channels_last=channels_last,
            checkpointing=checkpointing,
            frozen_batch_norm=frozen_batch_norm,
            aux_channels=aux_channels if aux_weight else None,
        )
        self.objective = build_objective(objective)
        self.optimizer = optimizer
        self.lr = self.configured_lr = lr
        self.scheduler = scheduler
        self.inference = Inference()
        self._aux_objective = CrossEntropyLoss()
        self._evaluated = torch.zeros(2)  # sum of the losses of the images evaluated so far, and their number

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits ``(N, C, H, W)`` of images ``(N, B, H, W)``, uint8 0..255 or floating point 0..1."""
        return cast(Tensor, self.network(image))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        """Compute the objective of one batch of crops. Return None to skip the batch.

        Random numbers, for example of dropout, depend only on the seed, the epoch, the batch and the process, so that a
        resumed run draws the same numbers as an uninterrupted one.
        """
        self._loss_guard.check()
        image, target = batch["image"], batch["mask"]
        with seeded(seed_of(torch.initial_seed(), self.current_epoch, batch_idx, self.global_rank), self.device):
            loss, terms = self._training_loss(image, target)
        self._log_losses({"train/loss": loss} | {f"train/loss/{name}": term for name, term in terms.items()}, len(target))
        return loss if self._loss_guard.accepts(loss, batch.get("name", ()), self.global_step) else None

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Predict a batch of whole images.

        Returns:
            Train ids ``preds``, uint8, and ``target``, int64, both ``(N, H, W)`` at the size of the masks.
        """
        return self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Predict a batch of whole images; see `validation_step`."""
        return self._evaluate(batch, batch_idx, "test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Tensor]:
        """Predict images at the size of their files: a list of uint8 train ids ``(H, W)``."""
        images = batch["image"]
        return [self.inference(self, images[i : i + 1], size)[0] for i, size in enumerate(batch["size"])]

    def configure_optimizers(self) -> Any:
        """Build the optimiser and its schedule."""
        self.configured_lr = self.lr
        return optimizer_and_schedule(self)

    def _training_loss(self, image: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss, with that of the auxiliary head if there is one, and its terms to log."""
        if self.network.aux_head is None:
            logits, upsampling = self._logits(image, coarse=self._fuses_upsampling)
            loss = self._loss(self.objective, logits, target, upsampling=upsampling)
            return loss, dict(offered(self.objective, "terms"))
        logits, aux_logits = self.network.forward_with_aux(image)
        aux_loss = self._loss(self._aux_objective, cast(Tensor, aux_logits), target)
        loss = self._loss(self.objective, logits, target) + self.hparams["aux_weight"] * aux_loss
        return loss, {"aux": aux_loss.detach(), **offered(self.objective, "terms")}

    def _log_losses(self, losses: dict[str, Tensor], batch_size: int) -> None:
        """Log the loss and its terms; in steps that go to the loggers, the means over the processes, which wait for it."""
        values = torch.stack([value.detach().float() for value in losses.values()])
        if logs_step(self.trainer):
            values = self.trainer.strategy.reduce(values, reduce_op="mean")
        for name, value in zip(losses, values, strict=True):
            self.log(name, value, prog_bar=name == "train/loss", batch_size=batch_size)

    @property
    def _fuses_upsampling(self) -> bool:
        chosen = self.hparams["fused_upsample"]
        fuses = fuses_upsampling(self.device) if chosen is None else chosen
        return bool(fuses and offered(self.objective, "takes_coarse_logits"))

    def _logits(self, image: Tensor, *, coarse: bool) -> tuple[Tensor, Upsampling | None]:
        """Compute logits at the image's size, or with ``coarse`` those before the network's last upsampling, if it has one.

        Returns:
            ``(N, C, H, W)`` logits and None, or ``(N, C, h, w)`` logits and the upsampling.
        """
        if not coarse:
            return self(image), None
        logits, upsampling = self.network.forward_coarse(image)
        return logits, None if upsampling is None else Upsampling(*upsampling)

    def _loss(self, objective: nn.Module, logits: Tensor, target: Tensor, *, upsampling: Upsampling | None = None) -> Tensor:
        # Compute in float32: float16 and bfloat16 cannot represent sums over 1e5 pixels or the log-loss of confident pixels,
        # and third-party losses do not handle this.
        optional = () if upsampling is None else (upsampling,)
        with torch.autocast(logits.device.type, enabled=False):
            return cast(Tensor, objective(logits.float(), target, *optional))

    def _evaluate(self, batch: dict[str, Any], batch_idx: int, split: str) -> dict[str, Tensor]:
        """Predict a batch, and add the loss of its images to ``_evaluated``.

        The loss is computed at the network's resolution, as in training, without the images that a distributed sampler
        repeats. Processes may have different numbers of batches and images, so nothing here communicates.
        """
        image, target = batch["image"], batch["mask"]
        size = target.shape[-2:]
        if not len(image):  # the loader skipped every image of the batch
            return {"preds": target.to(torch.uint8), "target": target}
        if not self.inference.is_plain(image.shape[-2:]):
            return {"preds": self.inference(self, image, size), "target": target}
        logits, upsampling = self._logits(image, coarse=self._fuses_upsampling and size == image.shape[-2:])
        if upsampling is None:
            labels, preds = resize_labels(target, logits.shape[-2:]), labels_at(logits, size)
        else:
            labels, preds = target, predicted_classes(logits, size, upsampling)
        number = len(target)
        if self.trainer.world_size > 1:
            repeated = is_repeated(self.trainer, split, batch, batch_idx=batch_idx, count=number)
            number -= int(repeated.sum())  # the repeated images are the last ones
        if number and offered(self.objective, "is_calibrated"):
            loss = self._loss(self.objective, logits[:number], labels[:number], upsampling=upsampling)
            self._evaluated += torch.stack([number * loss, torch.full_like(loss, number)])
        return {"preds": preds, "target": target}

    def _log_evaluated(self, split: str) -> None:
        """Log the mean loss of the images of all processes, if there are any."""
        total, number = self.trainer.strategy.reduce(self._evaluated, reduce_op="sum")
        if number:
            self.log(f"{split}/loss", total / number)

    def setup(self, stage: str) -> None:
        """Check the callbacks of a fit; prepare the network for FSDP and for compilation."""
        super().setup(stage)
        set_up(self, stage)

    def on_fit_start(self) -> None:
        """Load the weights to start from and calibrate the objective, unless the run is resumed; try the objective."""
        begin(self)

    def on_train_start(self) -> None:
        """Give the schedule the length of the run."""
        if not self._prepared:  # Lightning's finders train before on_fit_start, and restore the module afterwards
            prepare(self)
        super().on_train_start()
        set_length(self.lr_schedulers(), self.trainer, self.hparams["scheduler_interval"])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norm of the gradient, before it is clipped, in steps that go to the loggers."""
        if logs_step(self.trainer):
            gradients = [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]
            self.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))

    def on_train_epoch_end(self) -> None:
        """Check the last loss before a checkpoint is written."""
        self._loss_guard.check()

    def on_fit_end(self) -> None:
        """Warn about skipped batches."""
        self._loss_guard.summarize()

    def on_validation_epoch_start(self) -> None:
        """Check the last training loss before a checkpoint is written; reset the sum of losses."""
        self._loss_guard.check()
        self._evaluated = torch.zeros(2, device=self.device)

    def on_test_epoch_start(self) -> None:
        """Reset the sum of losses."""
        self._evaluated = torch.zeros(2, device=self.device)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss``; in training, step a schedule that monitors a score."""
        self._log_evaluated("val")
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            step_plateau(self.lr_schedulers(), self.trainer.callback_metrics)

    def on_test_epoch_end(self) -> None:
        """Log ``test/loss``."""
        self._log_evaluated("test")
