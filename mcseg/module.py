"""SegmentationModule: a network, an objective and an optimiser under the Lightning Trainer."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.strategies import FSDPStrategy
from torch import Tensor, nn

from mcseg.checkpoints.compatibility import check_network, check_num_classes, initialize_network, warn_of_other_classes
from mcseg.checkpoints.files import VERSION
from mcseg.checkpoints.hyperparameters import changed_arguments, plain_hyperparameters
from mcseg.checkpoints.translate import drop_unused_offsets
from mcseg.evaluation.inference import Inference, labels_at, resize_labels
from mcseg.evaluation.metrics import is_repeated
from mcseg.kernels import predicted_classes
from mcseg.lightning_internals import classmethod_of_the_class
from mcseg.losses import CrossEntropyLoss, Upsampling, default_objective, offered
from mcseg.networks import SegmentationNetwork
from mcseg.nonfinite import LossGuard, OnNonFinite
from mcseg.schedules import WarmupPolynomialLR, lightning_schedule, set_length, step_plateau
from mcseg.seeds import seed_of, seeded
from mcseg.version import __version__


class SegmentationModule(pl.LightningModule):
    """Trains a segmentation network with an objective; validation and test give predictions to the callbacks.

    Hyperparameters are kept as plain types (class paths and their arguments), so that a checkpoint loads with
    ``weights_only=True`` and :meth:`load_from_checkpoint` rebuilds network and objective, whether the module was made by
    the command line or in Python.

    Args:
        arch: architecture of segmentation_models_pytorch by name, for example ``unet`` or ``deeplabv3plus``.
        encoder: its encoder by name.
        encoder_weights: pretrained weights of the encoder, for example ``imagenet``; None starts from random ones. They are
            fetched when a training run begins, never when a checkpoint is loaded.
        init_from: checkpoint of another run whose network this one starts from, for example one trained with cross entropy.
            Its last layer is left out where the number of classes differs. Objective, optimiser and epochs start anew.
        num_classes: number of classes C; the command line takes it from the data.
        objective: any module called with logits (N,C,H,W) float32 and target (N,H,W) int64 that returns a scalar. None is
            power Dice, :func:`~mcseg.losses.default_objective`. One with a method ``calibrate`` gets the pixel counts of
            the training labels when training starts; :class:`~mcseg.losses.ObjectiveProtocol` says what else is asked for.
            In Python, a ``functools.partial`` of a class serves for objectives that do not keep their arguments.
        optimizer: callable from parameters to optimiser: a class, or a ``functools.partial`` of one.
        scheduler: callable from optimiser to learning-rate schedule, stepped after every optimiser step;
            ``torch.optim.lr_scheduler.ReduceLROnPlateau`` after every validation, by ``val/miou``, and Lightning's class of
            that name by its own ``monitor``. The default decays to 0 by a polynomial over the whole run.
        network_options: further arguments of the architecture, for example ``{"decoder_channels": [64, 32, 16]}``.
        channels_last: keep the network in channels-last memory.
        checkpointing: compute the encoder's activations anew in the backward pass instead of keeping them.
        frozen_batch_norm: leave statistics and parameters of all batch norms as they are, to fine-tune with small batches.
        aux_weight: weight of the cross entropy of an auxiliary head on the encoder's second-to-last feature map, which is
            trained along and not used for predictions; 0.4 is usual for DeepLab and PSPNet, 0 is no such head.
        aux_channels: width of the auxiliary head.
        fused_upsample: train and validate on the coarse logits of a network that ends in a bilinear upsampling, which the
            objective then does a strip of rows at a time: less memory, the same loss within rounding. Where the network or
            the objective cannot (those of margins and of soft counts can; in training not beside an auxiliary head), or the
            masks have another size than the images, nothing changes.
        on_nonfinite: what to do about a loss that is NaN or infinite: ``"stop"`` ends the training with the names of the
            batch's images, one step later, so that no GPU waits for the check; ``"skip"`` leaves the batch out on all
            processes, tells at the end how many there were, and makes the host wait for each step.

    Attributes:
        inference: how validation, test and prediction label whole images, an :class:`~mcseg.evaluation.Inference`; by
            default the network sees an image at once. It belongs to the evaluation and not to the weights: checkpoints do
            not hold it. With windows, several scales or mirroring there are no logits of a whole image, and no
            ``<split>/loss``.

    Raises:
        ValueError: unknown architecture or encoder; when training starts, an objective, optimiser or scheduler that a
            checkpoint could not rebuild.

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
        init_from: str | None = None,
        objective: nn.Module | Callable[[], nn.Module] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable = WarmupPolynomialLR,
        network_options: dict[str, Any] | None = None,
        channels_last: bool = True,
        checkpointing: bool = False,
        frozen_batch_norm: bool = False,
        aux_weight: float = 0.0,
        aux_channels: int = 256,
        fused_upsample: bool = False,
        on_nonfinite: OnNonFinite = "stop",
    ) -> None:
        super().__init__()
        if aux_weight < 0:
            raise ValueError(f"aux_weight: found {aux_weight}, expected a weight >= 0")
        self._loss_guard = LossGuard(on_nonfinite)
        with warnings.catch_warnings():  # Lightning warns of the module among the arguments, which the next lines make plain
            warnings.filterwarnings("ignore", message=".*is an instance of `nn.Module`.*")
            self.save_hyperparameters()
        plain, self._not_plain = plain_hyperparameters(dict(self.hparams))
        self.save_hyperparameters(plain)
        self.network = SegmentationNetwork(
            arch,
            encoder,
            num_classes,
            options=network_options,
            channels_last=channels_last,
            checkpointing=checkpointing,
            frozen_batch_norm=frozen_batch_norm,
            aux_channels=aux_channels if aux_weight else None,
        )
        self.inference = Inference()
        if not isinstance(objective, nn.Module):
            objective = default_objective() if objective is None else objective()
        self.objective = objective
        self._aux_objective = CrossEntropyLoss()
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.has_weights = False  # set by training and by loading a checkpoint; test and predict refuse without
        self._resumed = False  # set while a Trainer restores a run that it goes on with
        self._evaluated = torch.zeros(2)  # sum of the losses of evaluation's images so far, and their number

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits (N,C,H,W) of an image (N,3,H,W), uint8 0..255 or floating point 0..1, RGB."""
        return cast(Tensor, self.network(image))

    @classmethod_of_the_class
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **options: Any,
    ) -> Self:
        """Make the module of a checkpoint again, with its weights.

        A checkpoint names the classes of its objective, optimiser and scheduler, which are imported and made; one that names
        anything else is refused before it is called, as is one with other objects than tensors and plain types.

        Args:
            checkpoint_path: path, URL or open file.
            map_location: where the tensors go, as in ``torch.load``.
            hparams_file: YAML file with arguments to use instead of the checkpoint's.
            strict: whether the names of all tensors have to agree.
            weights_only: False unpickles whatever the file holds.
            **options: arguments of the class, which go before those in the checkpoint.

        Raises:
            ValueError: not a checkpoint, or one that holds or names what it must not, or arguments that are unknown here.
        """
        changed = changed_arguments(cls, checkpoint_path, options)
        if hparams_file is None:  # which replaces all that is stored
            options = {**changed, **options}
        return super().load_from_checkpoint(checkpoint_path, map_location, hparams_file, strict, weights_only, **options)

    def setup(self, stage: str) -> None:
        """Refuse to train what no checkpoint could hold."""
        if isinstance(self.trainer.strategy, FSDPStrategy):
            self.network.to(memory_format=torch.contiguous_format)  # weights are shared out only as they lie in a row
        if stage == "fit" and self._not_plain:
            raise ValueError("; ".join(self._not_plain.values()))

    def on_fit_start(self) -> None:
        """Calibrate the objective from the training labels and load the weights to start from.

        A run that goes on from a checkpoint has both from there. One that starts from loaded weights is calibrated anew, as
        its training labels may be others.
        """
        resumed, self._resumed = self._resumed, False
        if resumed:
            return
        if self.hparams["init_from"] and not self.has_weights:
            initialize_network(self.network, self.hparams["init_from"])
        elif self.hparams["encoder_weights"] and not self.has_weights:
            self.network.load_pretrained_encoder(self.hparams["encoder_weights"])
        calibrate = offered(self.objective, "calibrate")
        if calibrate is None:
            return
        class_pixels = getattr(getattr(self.trainer, "datamodule", None), "class_pixels", None)
        if class_pixels is not None:
            calibrate(class_pixels())
        elif not offered(self.objective, "is_calibrated"):
            raise RuntimeError(
                "the objective is not calibrated and the data module has no class_pixels(); call "
                "module.objective.calibrate(class_pixels) with the pixel counts of the training labels before fit"
            )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        """Compute the objective of one batch of crops; None leaves the batch out.

        Random numbers, of dropout for example, follow from the seed, the epoch, the batch and the process alone, so that a
        run that goes on from a checkpoint draws what it would have drawn.
        """
        seed = seed_of(torch.initial_seed(), self.current_epoch, batch_idx, self.global_rank)
        self._loss_guard.check()
        with seeded(seed, self.device):
            loss = self._training_step(batch)
        return loss if self._loss_guard.accepts(loss, batch.get("name", ()), self.global_step) else None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norm of the gradient, before it is clipped."""
        gradients = [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]
        self.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))

    def on_train_epoch_end(self) -> None:
        """Look at the last loss, before its weights go into a checkpoint."""
        self._loss_guard.check()

    def on_validation_epoch_start(self) -> None:
        """Look at the last loss, before its weights go into a checkpoint."""
        self._loss_guard.check()
        self._evaluated = torch.zeros(2, device=self.device)

    def on_test_epoch_start(self) -> None:
        """Begin to add up losses."""
        self._evaluated = torch.zeros(2, device=self.device)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss``; lower the learning rate if the score no longer rises."""
        self._log_evaluated("val")
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            step_plateau(self.lr_schedulers(), self.trainer.callback_metrics)

    def on_test_epoch_end(self) -> None:
        """Log ``test/loss``."""
        self._log_evaluated("test")

    def on_fit_end(self) -> None:
        """Warn of the batches that were left out."""
        self._loss_guard.summarize()

    def _training_step(self, batch: dict[str, Any]) -> Tensor:
        target = batch["mask"]
        if self.network.aux_head is None:
            logits, upsampling = self._logits(batch["image"], coarse=self._fuses_upsampling)
            loss, terms = self._loss(self.objective, logits, target, upsampling), {}
        else:
            logits, aux_logits = self.network.forward_with_aux(batch["image"])
            assert aux_logits is not None  # in training mode
            aux = self._loss(self._aux_objective, aux_logits, target)
            loss = self._loss(self.objective, logits, target) + self.hparams["aux_weight"] * aux
            terms = {"aux": aux.detach()}
        self.log("train/loss", loss, prog_bar=True, batch_size=len(target), sync_dist=True)
        terms |= offered(self.objective, "terms")
        for name, term in terms.items():
            self.log(f"train/loss/{name}", term, batch_size=len(target), sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Predict a batch of whole images; see :meth:`_evaluate`."""
        return self._evaluate(batch, batch_idx, self.trainer.val_dataloaders)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Predict a batch of whole images; see :meth:`_evaluate`."""
        return self._evaluate(batch, batch_idx, self.trainer.test_dataloaders)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Tensor]:
        """Predict images at their files' own size: a list of (H,W) uint8 train ids."""
        images = batch["image"]
        return [self.inference(self, images[i : i + 1], size)[0] for i, size in enumerate(batch["size"])]

    def configure_optimizers(self) -> Any:
        """Build the optimiser and its schedule per step."""
        optimizer = self.optimizer(self.network.parameters())
        schedule = self.scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": lightning_schedule(schedule, self.trainer)}

    def on_train_start(self) -> None:
        """Note that the weights are trained ones from here on; tell the schedule how long the run is."""
        self.has_weights = True
        set_length(self.lr_schedulers(), self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note that the weights are trained ones; take over what only the checkpoint knows in plain types.

        Raises:
            ValueError: the checkpoint has another number of classes, or its network other tensors.
        """
        check_num_classes(checkpoint, self.hparams["num_classes"])
        warn_of_other_classes(checkpoint, self._class_names())
        drop_unused_offsets(checkpoint.get("state_dict", {}), self.state_dict())
        trainer = self._attached_trainer
        if trainer is None or not isinstance(trainer.strategy, FSDPStrategy):  # which has other names for the tensors
            check_network(checkpoint, self.state_dict())
        self.has_weights = True
        self._resumed = trainer is not None and trainer.state.fn == "fit"
        for name in self._not_plain:  # this module was made from the checkpoint, from objects that keep no record
            self.hparams[name] = checkpoint["hyper_parameters"][name]
        self._not_plain = {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the version, and the classes' names, so that weights are not taken for those of other classes unnoticed."""
        checkpoint[VERSION] = __version__
        if names := self._class_names():
            checkpoint["class_names"] = names

    @property
    def _attached_trainer(self) -> pl.Trainer | None:
        try:
            return self.trainer
        except RuntimeError:
            return None

    def _class_names(self) -> list[str]:
        return list(getattr(getattr(self._attached_trainer, "datamodule", None), "class_names", ()))

    def on_test_start(self) -> None:
        """Refuse to score random weights."""
        self._require_weights("test")

    def on_predict_start(self) -> None:
        """Refuse to predict with random weights."""
        self._require_weights("predict")

    def _require_weights(self, verb: str) -> None:
        if not self.has_weights:
            raise RuntimeError(
                f"{verb}: the weights are random; give a checkpoint (ckpt_path), or set module.has_weights = "
                "True after loading weights yourself"
            )

    @property
    def _fuses_upsampling(self) -> bool:
        return bool(self.hparams["fused_upsample"] and offered(self.objective, "takes_coarse_logits"))

    def _logits(self, image: Tensor, *, coarse: bool) -> tuple[Tensor, Upsampling | None]:
        """Compute logits of the image's size; or coarse ones, if the network ends in the upsampling that is returned."""
        if not coarse:
            return self(image), None
        logits, upsampling = self.network.forward_coarse(image)
        return logits, None if upsampling is None else Upsampling(*upsampling)

    def _loss(self, objective: nn.Module, logits: Tensor, target: Tensor, upsampling: Upsampling | None = None) -> Tensor:
        # Whatever the precision of the network, an objective computes in float32: sums over 1e5 pixels and log-losses of
        # confident pixels are beyond float16 and bfloat16, and third-party objectives do not handle this themselves.
        more = () if upsampling is None else (upsampling,)
        with torch.autocast(logits.device.type, enabled=False):
            return cast(Tensor, objective(logits.float(), target, *more))

    def _evaluate(self, batch: dict[str, Any], batch_idx: int, loader: Any) -> dict[str, Tensor]:
        """Give ``preds`` (N,H,W) uint8 and ``target`` (N,H,W) int64 to the callbacks, at the size of the masks.

        The loss is taken at the network's resolution, as in training, of the batch's images that no other process has. A
        process may have none of them, or a batch less than others: nothing here waits for another.
        """
        image, target = batch["image"], batch["mask"]
        if not len(image):  # all of them were skipped
            return {"preds": target.to(torch.uint8), "target": target}
        if not self.inference.is_plain(image.shape[-2:]):
            return {"preds": self.inference(self, image, target.shape[-2:]), "target": target}
        size = target.shape[-2:]
        logits, upsampling = self._logits(image, coarse=self._fuses_upsampling and size == image.shape[-2:])
        if upsampling is None:
            labels, preds = resize_labels(target, logits.shape[-2:]), labels_at(logits, size)
        else:
            labels, preds = target, predicted_classes(logits, size, upsampling)
        number = len(target)
        if self.trainer.world_size > 1:  # images that are repeated are the last ones
            dropped = batch.get("dropped", ())
            repeated = is_repeated(loader, number, batch_idx, self.trainer.world_size, self.global_rank, dropped)
            number -= int(repeated.sum())
        if number and offered(self.objective, "is_calibrated"):
            loss = self._loss(self.objective, logits[:number], labels[:number], upsampling)
            self._evaluated += torch.stack([number * loss, torch.full_like(loss, number)])
        return {"preds": preds, "target": target}

    def _log_evaluated(self, split: str) -> None:
        """Log the mean loss of the images of all processes, unless there is none."""
        total, number = self.trainer.strategy.reduce(self._evaluated, reduce_op="sum")
        if number:
            self.log(f"{split}/loss", total / number)
