"""Before the first step of a fit: weights to start from, and the calibration of the objective."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder
from pytorch_lightning.strategies import FSDPStrategy

from mcseg.checkpoints.compatibility import initialize_network
from mcseg.lightning_internals import begin_after_search
from mcseg.losses import calibrate_from_data
from mcseg.monitors import follow_scores


def prepare(module: Any) -> None:
    """Load the weights that a `SegmentationModule` starts from, unless it has weights, and calibrate its objective.

    A new run from loaded weights is calibrated again, as its training labels may differ.

    Args:
        module: The module, with a Trainer.

    Raises:
        RuntimeError: The objective needs a calibration, and the data module does not count pixels.
    """
    if module.hparams["init_from"] and not module.has_weights:
        initialize_network(module.network, module.hparams["init_from"])
    elif module.hparams["encoder_weights"] and not module.has_weights:
        module.network.load_pretrained_encoder(module.hparams["encoder_weights"])
    calibrate_from_data(module.objective, getattr(module.trainer, "datamodule", None))


def finders(trainer: pl.Trainer) -> list[str]:
    """Return the names of Lightning's callbacks that search a learning rate or a batch size before the training."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [type(callback).__name__ for callback in callbacks if isinstance(callback, LearningRateFinder | BatchSizeFinder)]


def set_up(module: Any, stage: str) -> None:
    """Check the callbacks of a fit before anything is done; prepare the network for compilation and for FSDP.

    Raises:
        ValueError: A callback follows no score or in the wrong direction, or searches a batch size that has no effect.
    """
    trainer = module.trainer
    if stage == "fit":
        module._prepared = False
        follow_scores(trainer, module)
        total = getattr(getattr(trainer, "datamodule", None), "total_batch_size", None)
        if total is not None and "BatchSizeFinder" in finders(trainer):
            raise ValueError(
                f"BatchSizeFinder: found data.total_batch_size {total}, which replaces the batch_size that it searches; set "
                "data.total_batch_size to null"
            )
        if module.hparams["compile"]:
            module.network.compile()
    if isinstance(trainer.strategy, FSDPStrategy):  # it shards only contiguous weights
        module.network.to(memory_format=torch.contiguous_format)


def use_findings(trainer: pl.Trainer, *, is_new_lr: bool) -> None:
    """Build the optimiser again if a learning rate was found, so that the schedule starts from it; end the search.

    For use in ``on_fit_start`` of the module; the callbacks of the searches come first.
    """
    if is_new_lr:
        trainer.strategy.setup_optimizers(trainer)
    if finders(trainer):
        begin_after_search(trainer)
