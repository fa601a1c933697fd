"""CheckpointModule: a LightningModule whose checkpoints contain only plain types and load only into a matching module."""

import warnings
from pathlib import Path
from types import FrameType
from typing import Any, Self

import pytorch_lightning as pl
from pytorch_lightning.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder
from pytorch_lightning.strategies import FSDPStrategy

from mcseg.checkpoints.compatibility import (
    check_bands,
    check_network,
    check_num_classes,
    drop_removed_parameters,
    warn_of_other_classes,
    warn_of_other_split,
)
from mcseg.checkpoints.files import VERSION
from mcseg.checkpoints.hyperparameters import changed_arguments, plain_hyperparameters
from mcseg.checkpoints.translate import (
    drop_unused_offsets,
    rename_checkpoint_callbacks,
    translate_hyperparameters,
)
from mcseg.checkpoints.unavailable import UnavailableObjective
from mcseg.lightning_internals import begin_next_epoch, classmethod_of_the_class, continue_epoch
from mcseg.version import __version__

_HAD_WEIGHTS = "had_weights"  # key of a checkpoint that was written before on_fit_start


def finders(trainer: pl.Trainer | None) -> list[str]:
    """Return the names of Lightning's callbacks that search a learning rate or a batch size before the training."""
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    return [type(callback).__name__ for callback in callbacks if isinstance(callback, LearningRateFinder | BatchSizeFinder)]


def _refuse_finders(trainer: pl.Trainer) -> None:
    """Raise ValueError: a finder would lose the progress of a resumed run, which has learning rate and batch size."""
    for name in finders(trainer):
        raise ValueError(f"{name}: found in a resumed run, which keeps what its start found; remove it")


def _keep_patience(trainer: pl.Trainer, states: dict[str, Any]) -> None:
    """Keep the patience of the callbacks, which Lightning would replace by that of the checkpoint."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and callback.state_key in states:
            states[callback.state_key]["patience"] = callback.patience


class CheckpointModule(pl.LightningModule):
    """Base of a module whose network is ``self.network`` and whose arguments include ``objective`` and ``num_classes``.

    A subclass calls `save_plain_hyperparameters` in its constructor.

    Attributes:
        has_weights: Whether the weights are trained, or loaded from a checkpoint; test and predict raise an error for
            random weights.
    """

    network: Any  # a `mcseg.networks.SegmentationNetwork`, which this package does not import

    def __init__(self) -> None:
        super().__init__()
        self.has_weights = False
        self._resumed = False  # True from restoring a checkpoint for training until on_fit_start
        self._prepared = True  # False from the setup of a fit until on_fit_start
        self._not_plain: dict[str, str] = {}  # argument that cannot be stored in a checkpoint -> reason

    def save_plain_hyperparameters(self, frame: FrameType | None) -> None:
        """Store the constructor's arguments as plain types: class paths and their arguments.

        Args:
            frame: The constructor's frame, from ``inspect.currentframe()``.
        """
        with warnings.catch_warnings():  # Lightning warns about a module among the arguments; it becomes plain below
            warnings.filterwarnings("ignore", message=".*is an instance of `nn.Module`.*")
            self.save_hyperparameters(frame=frame)
        plain, self._not_plain = plain_hyperparameters(dict(self.hparams))
        self.save_hyperparameters(plain)

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
        """Rebuild the module of a checkpoint, with its weights.

        The checkpoint names the classes of its objective, optimiser and scheduler, which are imported and instantiated.
        Any other class or function raises ValueError before it is called, as do objects other than tensors and plain types.
        If one of the three classes no longer exists, the module labels images nevertheless, and ``fit`` raises ValueError.

        Args:
            checkpoint_path: Path, URL or open file.
            map_location: Device of the tensors, as in ``torch.load``.
            hparams_file: YAML file with arguments to use instead of the checkpoint's.
            strict: Whether the names of all tensors must agree.
            weights_only: False unpickles any object in the file.
            **options: Arguments of the class, which replace those in the checkpoint.

        Raises:
            ValueError: The file is not a checkpoint, contains other objects, or has unknown arguments.
        """
        changed = changed_arguments(cls, checkpoint_path, options)
        if hparams_file is None:  # the file would replace all stored arguments
            options = {**changed, **options}
        return super().load_from_checkpoint(
            checkpoint_path,
            map_location=map_location,
            hparams_file=hparams_file,
            strict=strict,
            weights_only=weights_only,
            **options,
        )

    def setup(self, stage: str) -> None:
        """Raise ValueError before training if checkpoints could not rebuild the module."""
        if stage == "fit" and self._not_plain:
            raise ValueError("; ".join(self._not_plain.values()))
        if stage == "fit" and isinstance(self.objective, UnavailableObjective):
            raise ValueError(self.objective.message)

    def on_train_start(self) -> None:
        """Set ``has_weights``: checkpoints contain trained weights from here on."""
        self.has_weights = True
        begin_next_epoch(self.trainer)

    def on_test_start(self) -> None:
        """Raise RuntimeError if the weights are random."""
        self._require_weights("test")

    def on_predict_start(self) -> None:
        """Raise RuntimeError if the weights are random."""
        self._require_weights("predict")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the version, and what prediction needs of the data: names and colours of the classes, and settings.

        Loading for data with other names gives a warning.
        """
        checkpoint[VERSION] = __version__
        if not self._prepared:  # by one of Lightning's finders, which restores the module from it
            checkpoint[_HAD_WEIGHTS] = self.has_weights
        if names := self._class_names():
            checkpoint["class_names"] = names
        data = self.attached_data
        if palette := getattr(data, "palette", None):
            checkpoint["palette"] = [list(color) for color in palette]
        if settings := getattr(data, "prediction_settings", None):
            checkpoint["prediction_settings"] = dict(settings)
        if data is not None and hasattr(data, "random_split"):
            checkpoint["random_split"] = data.random_split

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint fits, and set ``has_weights``.

        Raises:
            ValueError: The checkpoint's network has another number of classes or bands, or other tensors.
        """
        check_num_classes(checkpoint, self.hparams["num_classes"])
        check_bands(checkpoint, self.hparams["in_channels"])
        warn_of_other_classes(checkpoint, self._class_names())
        trainer = self.attached_trainer
        if trainer is not None and trainer.state.fn != "predict":
            warn_of_other_split(checkpoint, getattr(self.attached_data, "random_split", None))
        drop_unused_offsets(checkpoint.get("state_dict", {}), self.state_dict())
        if trainer is None or not isinstance(trainer.strategy, FSDPStrategy):  # FSDP gives the tensors other names
            check_network(checkpoint, self.state_dict(), self.network.removed)
            drop_removed_parameters(checkpoint, self.network)
        if trainer is not None:
            keys = {callback.state_key for callback in trainer.callbacks}  # type: ignore[attr-defined]
            rename_checkpoint_callbacks(checkpoint.get("callbacks", {}), keys)
            _keep_patience(trainer, checkpoint.get("callbacks", {}))
        self.has_weights = checkpoint.get(_HAD_WEIGHTS, True)
        self._resumed = trainer is not None and trainer.state.fn == "fit" and _HAD_WEIGHTS not in checkpoint
        if trainer is not None and self._resumed:
            _refuse_finders(trainer)
            if trainer.max_steps != -1:
                continue_epoch(checkpoint)
        if self._resumed and self.hparams.get("scheduler_interval") is None:  # an earlier version counted steps
            stored, _ = translate_hyperparameters(checkpoint["hyper_parameters"])
            self.hparams["scheduler_interval"] = stored.get("scheduler_interval")
        for name in self._not_plain:  # an object that the instantiator created from the checkpoint's plain argument
            self.hparams[name] = checkpoint["hyper_parameters"][name]
        self._not_plain = {}

    @property
    def attached_trainer(self) -> pl.Trainer | None:
        """The Trainer; None if there is none."""
        try:
            return self.trainer
        except RuntimeError:
            return None

    @property
    def attached_data(self) -> Any:
        """The data module of the Trainer; None if there is none."""
        return getattr(self.attached_trainer, "datamodule", None)

    def _class_names(self) -> list[str]:
        return list(getattr(self.attached_data, "class_names", ()))

    def _require_weights(self, verb: str) -> None:
        if not self.has_weights:
            raise RuntimeError(
                f"{verb}: the weights are random; give a checkpoint (ckpt_path), or set module.has_weights = True after "
                "loading weights yourself"
            )
