"""SegmentationModule: a network, an objective and an optimiser under the Lightning Trainer."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self, cast

import pytorch_lightning as pl
import torch
import torch.distributed
from lightning_fabric.utilities.cloud_io import _load
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.core.saving import CHECKPOINT_PAST_HPARAMS_KEYS
from pytorch_lightning.strategies import FSDPStrategy
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.model_helpers import _restricted_classmethod
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from mcseg.checkpoints.files import VERSION, differing_tensors, read_checkpoint, written_by
from mcseg.checkpoints.hyperparameters import plain_hyperparameters, refuse_calls
from mcseg.checkpoints.translate import drop_unused_offsets, translated
from mcseg.evaluation.inference import Inference, labels_at
from mcseg.evaluation.metrics import is_repeated
from mcseg.kernels import predicted_classes
from mcseg.losses import CrossEntropyLoss, Upsampling, default_objective, offered
from mcseg.networks import SegmentationNetwork
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
            that name by its own ``monitor``. None is the polynomial schedule lr * (1 - step / steps)^lr_power over the whole
            run.
        lr_power: exponent of the polynomial schedule.
        warmup_steps: optimiser steps over which the polynomial schedule first rises linearly.
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
        scheduler: LRSchedulerCallable | None = None,
        lr_power: float = 0.9,
        warmup_steps: int = 0,
        network_options: dict[str, Any] | None = None,
        channels_last: bool = True,
        checkpointing: bool = False,
        frozen_batch_norm: bool = False,
        aux_weight: float = 0.0,
        aux_channels: int = 256,
        fused_upsample: bool = False,
        on_nonfinite: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__()
        if aux_weight < 0:
            raise ValueError(f"aux_weight: found {aux_weight}, expected a weight >= 0")
        if on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"on_nonfinite: found {on_nonfinite!r}, expected 'stop' or 'skip'")
        with warnings.catch_warnings():  # Lightning warns of the module among the arguments, which the next lines make plain
            warnings.filterwarnings("ignore", message=".*is an instance of `nn.Module`.*")
            self.save_hyperparameters()
        plain, self._not_plain = plain_hyperparameters(dict(self.hparams))
        self.save_hyperparameters(plain)
        self.network = SegmentationNetwork(
            arch,
            encoder,
            num_classes,
            network_options,
            channels_last,
            checkpointing,
            frozen_batch_norm,
            aux_channels if aux_weight else None,
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
        self._last_loss: tuple[Tensor, list[str], int] | None = None  # with the batch's names and its step
        self._skipped: list[str] = []
        self._evaluated = torch.zeros(2)  # sum of the losses of evaluation's images so far, and their number

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits (N,C,H,W) of an image (N,3,H,W), uint8 0..255 or floating point 0..1, RGB."""
        return cast(Tensor, self.network(image))

    @_restricted_classmethod  # of the class, as Lightning's own is: called on an instance it would not change that
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
        if isinstance(checkpoint_path, str | Path) and "://" not in str(checkpoint_path):
            checkpoint = read_checkpoint(checkpoint_path, mmap=True)
        else:
            checkpoint = _load(checkpoint_path, map_location="cpu", weights_only=True)
            if hasattr(checkpoint_path, "seek"):
                checkpoint_path.seek(0)
        keys = (*CHECKPOINT_PAST_HPARAMS_KEYS, cls.CHECKPOINT_HYPER_PARAMS_KEY)  # all that Lightning takes arguments from
        stored = {name: value for key in keys for name, value in checkpoint.get(key, {}).items() if name not in options}
        try:
            arguments, remarks = translated(stored)
            refuse_calls(cls, arguments, options)
        except ValueError as error:
            raise ValueError(f"{checkpoint_path} ({written_by(checkpoint)}): {error}") from None
        for remark in remarks:
            rank_zero_info(f"{checkpoint_path}: {remark}")
        options |= {name: value for name, value in arguments.items() if value != stored[name]}
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
            self._init_from(self.hparams["init_from"])
        elif self.hparams["encoder_weights"] and not self.has_weights:
            names = (self.hparams[name] for name in ("arch", "encoder", "encoder_weights", "network_options"))
            self.network.load_pretrained_encoder(*names)
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
        self._stop_if_not_finite()
        with seeded(seed, self.device):
            loss = self._training_step(batch)
        names = list(batch.get("name", []))
        if self.hparams["on_nonfinite"] == "stop":
            self._last_loss = (loss.detach(), names, self.global_step)
        elif self._is_skipped(loss.detach(), names):
            return None
        return loss

    def _stop_if_not_finite(self) -> None:
        last, self._last_loss = self._last_loss, None
        if last is None or last[0].isfinite():
            return
        value, names, step = last
        raise RuntimeError(
            f"train/loss is {float(value)} in step {step}, of the images {', '.join(names) or '(without names)'}; the "
            "weights are lost, those of the last checkpoint are whole. Lower the learning rate or clip gradients "
            "(trainer.gradient_clip_val), look at these images (mcseg check), or set model.on_nonfinite to skip"
        )

    def _is_skipped(self, loss: Tensor, names: list[str]) -> bool:
        """Whether any process has a loss that is not finite: then all leave the step out."""
        found = (~loss.isfinite()).float()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(found)
        if not found:
            return False
        self._skipped.append(", ".join(names) or "(without names)")
        return True

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norm of the gradient, before it is clipped."""
        gradients = [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]
        self.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))

    def on_train_epoch_end(self) -> None:
        """Look at the last loss, before its weights go into a checkpoint."""
        self._stop_if_not_finite()

    def on_validation_epoch_start(self) -> None:
        """Look at the last loss, before its weights go into a checkpoint."""
        self._stop_if_not_finite()
        self._evaluated = torch.zeros(2, device=self.device)

    def on_test_epoch_start(self) -> None:
        """Begin to add up losses."""
        self._evaluated = torch.zeros(2, device=self.device)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss``; lower the learning rate where the score no longer rises."""
        self._log_evaluated("val")
        training = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        if training and isinstance(plateau := self.lr_schedulers(), ReduceLROnPlateau):
            monitor, found = _monitor(plateau), self.trainer.callback_metrics
            if monitor not in found:
                raise ValueError(f"model.scheduler: no score {monitor}; expected one of {', '.join(found)}")
            plateau.step(found[monitor])

    def on_test_epoch_end(self) -> None:
        """Log ``test/loss``."""
        self._log_evaluated("test")

    def on_fit_end(self) -> None:
        """Tell which batches were left out."""
        if self._skipped:
            shown = "; ".join(self._skipped[:10]) + ("; ..." if len(self._skipped) > 10 else "")
            rank_zero_warn(f"{len(self._skipped)} steps were skipped, as the loss was not finite, of the images: {shown}")
        self._skipped = []

    def _training_step(self, batch: dict[str, Any]) -> Tensor:
        target = batch["mask"]
        if self.network.aux_head is None:
            loss, terms = self._training_loss(batch["image"], target), {}
        else:
            logits, aux_logits = self.network.forward_with_aux(batch["image"])
            assert aux_logits is not None  # in training mode
            aux = self._loss(self._aux_objective, aux_logits, target)
            loss, terms = self._loss(self.objective, logits, target), {"aux": aux.detach()}
            loss = loss + self.hparams["aux_weight"] * aux
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
        schedule: LRScheduler | Any = self._polynomial(optimizer) if self.scheduler is None else self.scheduler(optimizer)
        interval: dict[str, Any] = {"scheduler": schedule, "interval": "step"}
        if isinstance(schedule, ReduceLROnPlateau):
            # Never by Lightning, which does it behind the epoch's checkpoint, and not at all in a run that goes on from that
            interval |= {"interval": "epoch", "frequency": sys.maxsize, "monitor": _monitor(schedule)}
        return {"optimizer": optimizer, "lr_scheduler": interval}

    def on_train_start(self) -> None:
        """Note that the weights are trained ones from here on."""
        self.has_weights = True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note that the weights are trained ones; take over what only the checkpoint knows in plain types.

        Raises:
            ValueError: the checkpoint has another number of classes, or its network other tensors.
        """
        stored = checkpoint.get("hyper_parameters", {}).get("num_classes", self.hparams["num_classes"])
        if stored != self.hparams["num_classes"]:
            raise ValueError(
                f"the checkpoint is of a network for {stored} classes, the data have {self.hparams['num_classes']}; give "
                "the data that it was trained on, or start a training from it by model.init_from"
            )
        self._compare_classes(checkpoint.get("class_names"))
        drop_unused_offsets(checkpoint.get("state_dict", {}), self.state_dict())
        self._compare_networks(checkpoint)
        self.has_weights = True
        self._resumed = self._trainer is not None and self._trainer.state.fn == "fit"
        for name in self._not_plain:  # this module was made from the checkpoint, from objects that keep no record
            self.hparams[name] = checkpoint["hyper_parameters"][name]
        self._not_plain = {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the version, and the classes' names, so that weights are not taken for those of other classes unnoticed."""
        checkpoint[VERSION] = __version__
        if names := self._class_names():
            checkpoint["class_names"] = names

    def _class_names(self) -> list[str]:
        return list(getattr(getattr(self._trainer, "datamodule", None), "class_names", ()))

    def _compare_classes(self, stored: list[str] | None) -> None:
        names = self._class_names()
        if stored and names and stored != names:
            there, here = next((a, b) for a, b in zip(stored, names, strict=True) if a != b)
            rank_zero_warn(
                f"the checkpoint was trained on other classes ({there} where the data have {here}): predictions are taken "
                "for the classes of the data by their order"
            )

    def _compare_networks(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None and isinstance(self._trainer.strategy, FSDPStrategy):
            return  # its names are others
        found, own = (
            {name: value for name, value in state.items() if name.startswith("network.")}
            for state in (checkpoint.get("state_dict", {}), self.state_dict())
        )
        differ = differing_tensors(found, own)
        if found and differ:
            raise ValueError(
                f"the checkpoint's network is another one ({len(differ)} tensors differ, for example {differ[0]}; "
                f"{written_by(checkpoint)}); expected one of the same arch, encoder and network_options"
            )

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
        can = self.network.ends_in_upsampling and offered(self.objective, "takes_coarse_logits")
        return bool(self.hparams["fused_upsample"] and can)

    def _training_loss(self, image: Tensor, target: Tensor) -> Tensor:
        if self._fuses_upsampling:
            logits, upsampling = self.network.forward_coarse(image)
            return self._loss(self.objective, logits, target, Upsampling(*upsampling))
        return self._loss(self.objective, self(image), target)

    def _loss(self, objective: nn.Module, logits: Tensor, target: Tensor, *upsampling: Upsampling) -> Tensor:
        # Whatever the precision of the network, an objective computes in float32: sums over 1e5 pixels and log-losses of
        # confident pixels are beyond float16 and bfloat16, and foreign objectives do not look after that themselves.
        with torch.autocast(logits.device.type, enabled=False):
            return cast(Tensor, objective(logits.float(), target, *upsampling))

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
        fused: tuple[Upsampling, ...] = ()
        if self._fuses_upsampling and size == image.shape[-2:]:
            logits, upsampling = self.network.forward_coarse(image)
            labels, fused = target, (Upsampling(*upsampling),)
            preds = predicted_classes(logits, size, *fused)
        else:
            logits = self(image)
            labels, preds = _nearest(target, logits.shape[-2:]), labels_at(logits, size)
        number = len(target)
        if self.trainer.world_size > 1:  # images that are repeated are the last ones
            dropped = batch.get("dropped", ())
            repeated = is_repeated(loader, number, batch_idx, self.trainer.world_size, self.global_rank, dropped)
            number -= int(repeated.sum())
        if number and offered(self.objective, "is_calibrated"):
            loss = self._loss(self.objective, logits[:number], labels[:number], *fused)
            self._evaluated += torch.stack([number * loss, torch.full_like(loss, number)])
        return {"preds": preds, "target": target}

    def _log_evaluated(self, split: str) -> None:
        """Log the mean loss of the images of all processes, unless there is none."""
        total, number = self.trainer.strategy.reduce(self._evaluated, reduce_op="sum")
        if number:
            self.log(f"{split}/loss", total / number)

    def _init_from(self, path: str) -> None:
        """Copy the network of another run's checkpoint."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"model.init_from: no checkpoint {path}; expected the path of a .ckpt file")
        state = read_checkpoint(path)["state_dict"]
        found = {name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")}
        own = self.network.state_dict()
        other = differing_tensors(found, own)
        # a last layer that the file has not, or of another shape, starts anew
        beyond = [name for name in other if "aux_head" not in name and ("segmentation_head" not in name or name not in own)]
        if beyond:
            raise ValueError(
                f"model.init_from: {path} holds another network ({len(beyond)} tensors differ, for example {beyond[0]}); "
                "expected one of the same arch, encoder and network_options"
            )
        fitting = {name: value for name, value in found.items() if name in own and name not in other}
        self.network.load_state_dict(fitting, strict=False)
        differs = any("segmentation_head" in name for name in other)
        head = "; its last layer is left out, as the number of classes differs" if differs else ""
        rank_zero_info(f"network initialised from {path}{head}")

    def _polynomial(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        trainer, warmup, power = self.trainer, self.hparams["warmup_steps"], self.hparams["lr_power"]
        if trainer.max_epochs == -1 and trainer.max_steps == -1:
            raise ValueError(
                "the polynomial schedule needs the length of the run; set trainer.max_epochs or trainer.max_steps, or "
                "give model.scheduler"
            )

        def factor(step: int) -> float:
            # Not before the first step: the Trainer would make the loader's iterator before it knows that a run goes on
            done = step / max(1, trainer.estimated_stepping_batches) if step else 0.0
            rise = (step + 1) / (warmup + 1) if step < warmup else 1.0
            return float(rise * max(0.0, 1 - done) ** power)

        return LambdaLR(optimizer, factor)


def _monitor(plateau: ReduceLROnPlateau) -> str:
    """The score that a schedule follows: its own choice, or ``val/miou``.

    Raises:
        ValueError: it would lower the learning rate when the score gets better.
    """
    monitor = str(getattr(plateau, "monitor", "val/miou"))
    mode = "min" if monitor == "val/loss" else "max"
    if monitor.startswith("val/") and plateau.mode != mode:
        raise ValueError(
            f"model.scheduler: found ReduceLROnPlateau in mode {plateau.mode} for {monitor}, expected mode {mode}; set "
            f"model.scheduler.init_args.mode to {mode}"
        )
    return monitor


def _nearest(target: Tensor, size: torch.Size) -> Tensor:
    """Resize (N,H,W) labels to ``size`` by the nearest pixel, as training does."""
    if target.shape[-2:] == size:
        return target
    rows, columns = (
        torch.arange(new, device=target.device) * old // new for new, old in zip(size, target.shape[-2:], strict=True)
    )
    return target[:, rows[:, None], columns]
