"""Before the first step of a fit: weights to start from, and the calibration of the objective."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder

from mcseg.checkpoints.compatibility import initialize_network
from mcseg.lightning_internals import begin_after_search
from mcseg.losses import offered


def prepare(module: Any) -> None:
    """Load the weights that a `SegmentationModule` starts from, unless it has weights, and calibrate its objective.

    Args:
        module: The module, with a Trainer.

    Raises:
        RuntimeError: The objective needs a calibration, and the data module does not count pixels.
    """
    if module.hparams["init_from"] and not module.has_weights:
        initialize_network(module.network, module.hparams["init_from"])
    elif module.hparams["encoder_weights"] and not module.has_weights:
        module.network.load_pretrained_encoder(module.hparams["encoder_weights"])
    calibrate = offered(module.objective, "calibrate")
    if calibrate is None:
        return
    class_pixels = getattr(getattr(module.trainer, "datamodule", None), "class_pixels", None)
    if class_pixels is not None:
        calibrate(class_pixels())
    elif not offered(module.objective, "is_calibrated"):
        raise RuntimeError(
            "the objective is not calibrated and the data module has no class_pixels(); call "
            "module.objective.calibrate(class_pixels) with the pixel counts of the training labels before fit"
        )


def finders(trainer: pl.Trainer) -> list[str]:
    """Return the names of Lightning's callbacks that search a learning rate or a batch size before the training."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [type(callback).__name__ for callback in callbacks if isinstance(callback, LearningRateFinder | BatchSizeFinder)]


def check_finders(trainer: pl.Trainer) -> None:
    """Raise ValueError if the batch size that is searched would have no effect."""
    total = getattr(getattr(trainer, "datamodule", None), "total_batch_size", None)
    if total is not None and "BatchSizeFinder" in finders(trainer):
        raise ValueError(
            f"BatchSizeFinder: found data.total_batch_size {total}, which replaces the batch_size that it searches; set "
            "data.total_batch_size to null"
        )


def use_findings(trainer: pl.Trainer, *, is_new_lr: bool) -> None:
    """Build the optimiser again if a learning rate was found, so that the schedule starts from it; end the search.

    For use in ``on_fit_start`` of the module; the callbacks of the searches come first.
    """
    if is_new_lr:
        trainer.strategy.setup_optimizers(trainer)
    if finders(trainer):
        begin_after_search(trainer)
