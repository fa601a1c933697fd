"""Before the first step of a fit: weights to start from, and the calibration of the objective."""

from typing import Any

import torch
from pytorch_lightning.strategies import FSDPStrategy

from mcseg.checkpoints.compatibility import load_initial_weights
from mcseg.checkpoints.module import finders
from mcseg.lightning_internals import begin_after_search
from mcseg.losses import calibrate_from_data
from mcseg.losses.probe import check_objective
from mcseg.monitors import follow_scores


def prepare(module: Any) -> None:
    """Load the weights that a `SegmentationModule` starts from, unless it has weights, and calibrate its objective.

    Without weights, the network for other than 3 bands gets mean and deviation of the training images. A new run from loaded
    weights is calibrated again, as its training labels may differ.

    Args:
        module: The module, with a Trainer.

    Raises:
        RuntimeError: The objective needs a calibration, and the data module does not count pixels.
    """
    if not module.has_weights:
        load_initial_weights(module.network, module.hparams["init_from"], module.hparams["encoder_weights"])
    data = module.attached_data
    band_statistics = getattr(data, "band_statistics", None)
    has_statistics = module.has_weights or module.hparams["init_from"] or module.hparams["in_channels"] == 3
    if band_statistics is not None and not has_statistics:
        module.network.set_normalization(*band_statistics())
    calibrate_from_data(module.objective, data)


def set_up(module: Any, stage: str) -> None:
    """Check the callbacks of a fit before anything is done; prepare the network for compilation and for FSDP.

    Raises:
        ValueError: The data have another number of bands than the network; a callback follows no score or in the wrong
            direction, or searches a batch size that has no effect.
    """
    trainer = module.trainer
    own = module.hparams["in_channels"]
    bands = getattr(module.attached_data, "bands", own)
    if bands != own:
        raise ValueError(
            f"the data have images of {bands} bands (data.bands), the network takes {own}; give SegmentationModule "
            f"in_channels={bands}, or the data module bands={own}"
        )
    if stage == "fit":
        module._prepared = False
        follow_scores(trainer, module)
        total = getattr(module.attached_data, "total_batch_size", None)
        if total is not None and "BatchSizeFinder" in finders(trainer):
            raise ValueError(
                f"BatchSizeFinder: found data.total_batch_size {total}, which replaces the batch_size that it searches; set "
                "data.total_batch_size to null"
            )
        if module.hparams["compile"]:
            module.network.compile()
    if isinstance(trainer.strategy, FSDPStrategy):  # it shards only contiguous weights
        module.network.to(memory_format=torch.contiguous_format)


def begin(module: Any) -> None:
    """Prepare a module in ``on_fit_start``, after the searches of Lightning's finders, and try its objective.

    A resumed run has weights and calibration from its checkpoint. If a learning rate was found, the optimiser is built
    again, so that the schedule starts from it.
    """
    resumed, module._resumed, module._prepared = module._resumed, False, True
    if not resumed:
        prepare(module)
        if module.lr != module.configured_lr:
            module.trainer.strategy.setup_optimizers(module.trainer)
        if finders(module.attached_trainer):
            begin_after_search(module.trainer)
    check_objective(module.objective, module.hparams["num_classes"], module.device)
