"""Lightning's finders of a learning rate and a batch size: a run's config.yaml has what they found."""

import pkgutil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from jsonargparse import Namespace
from pytorch_lightning.callbacks import BatchSizeFinder, Callback, LearningRateFinder
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from mcseg.atomic import write_atomically
from mcseg.checkpoints.module import finders


def remove_finders(config: Namespace) -> None:
    """Remove the finders from the settings of a resumed run, which has what they found."""
    callbacks = config.get("trainer.callbacks") or []
    kinds = [pkgutil.resolve_name(setting.class_path) for setting in callbacks]
    found = [kind.__name__ for kind in kinds if issubclass(kind, LearningRateFinder | BatchSizeFinder)]
    if found:
        rank_zero_info(f"--resume keeps what {' and '.join(found)} found when the run started")
        config.trainer.callbacks = [c for c, kind in zip(callbacks, kinds, strict=True) if kind.__name__ not in found]


class SaveFound(Callback):
    """Writes the learning rate and the batch size that Lightning's finders found into config.yaml, and reports them."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file; by now the finders have ended."""
        names, batch_size = finders(trainer), getattr(getattr(trainer, "datamodule", None), "batch_size", None)
        if not names or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = Path(trainer.default_root_dir) / "config.yaml"
        rate = pl_module.hparams["lr"]
        content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if "LearningRateFinder" in names and rate is None:
            rank_zero_warn(
                "LearningRateFinder: nothing found, the run keeps its learning rate; it needs more training steps"
            )
        elif "LearningRateFinder" in names:
            rank_zero_info(f"LearningRateFinder: learning rate {rate:.4g}")
            if content:
                content["model"]["optimizer"].setdefault("init_args", {})["lr"] = rate
        if "BatchSizeFinder" in names:
            rank_zero_info(f"BatchSizeFinder: batch size {batch_size}")
            if content:
                content["data"]["init_args"]["batch_size"] = batch_size
        if content:
            text = yaml.safe_dump(content, sort_keys=False)
            write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
