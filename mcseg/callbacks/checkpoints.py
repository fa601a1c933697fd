"""The two checkpoints of a run: the best by a score, and the last."""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint

from mcseg.atomic import write_atomically
from mcseg.evaluation.directions import Mode, better_mode
from mcseg.monitors import wanted_mode

_BEST = "best"


class BestCheckpoint(ModelCheckpoint):
    """Keep the checkpoints with the best scores; ``best.ckpt`` is always the best of them.

    With ``save_top_k`` 1 there is only ``best.ckpt``. Otherwise each file is named after its epoch and step, and
    ``best.ckpt`` is a hard link to the best one, or a copy on a file system without links. In a run without validation
    ``best.ckpt`` is the checkpoint of the last epoch.

    Args:
        dirpath: Folder of the files; None means Lightning's default, ``checkpoints`` below the logger's folder.
        filename: Name of the files without ``.ckpt``. None means ``best`` for one file, otherwise
            ``epoch{epoch:03d}-step{step}``.
        monitor: Name of the score; None keeps the last epochs.
        mode: ``"min"`` or ``"max"``; None takes it from the score: losses and errors are minimised, IoU and accuracy
            maximised.
        save_top_k: Number of checkpoints to keep; -1 keeps all, 0 saves none.
        auto_insert_metric_name: Whether to put the names of scores into the names of files.
        enable_version_counter: Whether to add a version to the name of an existing file instead of replacing the file.
        **options: Further arguments of Lightning's ``ModelCheckpoint``.

    Raises:
        ValueError: ``mode`` contradicts the score, is missing for a score of unknown direction, or ``filename`` gives
            several checkpoints the same name.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        monitor: str | None = "val/miou",
        *,
        mode: Mode | None = None,
        save_top_k: int = 1,
        auto_insert_metric_name: bool = False,
        enable_version_counter: bool = False,
        **options: Any,
    ) -> None:
        if monitor is not None and mode is None and better_mode(monitor) is None:
            raise ValueError(f"checkpoint.mode: found none for {monitor}, a score of unknown direction; expected min or max")
        if monitor is not None and mode is not None:
            wanted_mode("checkpoint", monitor, mode, default=None)
        several = save_top_k not in (0, 1)
        if filename is None or (several and filename == _BEST):  # the former default
            filename = "epoch{epoch:03d}-step{step}" if several else _BEST
        if filename == "last" or (several and "{" not in filename):
            raise ValueError(
                f"checkpoint.filename: found {filename} with save_top_k {save_top_k}, which names more than one checkpoint; "
                "expected a name such as {epoch}-{step}"
            )
        super().__init__(
            dirpath,
            filename,
            monitor,
            mode=mode or (better_mode(monitor) if monitor else None) or "min",
            save_top_k=save_top_k,
            auto_insert_metric_name=auto_insert_metric_name,
            enable_version_counter=enable_version_counter,
            **options,
        )
        self._linked: tuple[str, int] | None = None  # file that best.ckpt is, and the time when it was written

    @property
    def best_path(self) -> str:
        """Path of ``best.ckpt``, or of the best checkpoint if that is not a local file; "" without one."""
        if not self.best_model_path or "://" in self.best_model_path:
            return self.best_model_path
        return str(Path(self.best_model_path).with_name(_BEST + self.FILE_EXTENSION))

    def describe(self) -> str:
        """Return the path of the best checkpoint with its score and, if it has another name as well, that name."""
        if not self.best_model_path:
            return ""
        remarks = []
        if self.monitor is not None and self.best_model_score is not None:
            remarks.append(f"{self.monitor} {float(self.best_model_score):.4g}")
        if self.best_path != self.best_model_path:
            remarks.append(f"the same as {Path(self.best_model_path).name}")
        return self.best_path + (f" ({', '.join(remarks)})" if remarks else "")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Keep the last epochs if the run has no validation; leave the best of an earlier part of the run alone."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not trainer.enable_validation and self.monitor is not None and self.monitor.startswith("val/"):
            self.monitor = None
            exists = self.file_exists(os.path.join(str(self.dirpath), _BEST + self.FILE_EXTENSION), trainer)
            self.save_top_k = 0 if exists else min(self.save_top_k, 1)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if ``every_n_train_steps`` or ``train_time_interval`` is due."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._link_best(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if the score is among the best."""
        super().on_train_epoch_end(trainer, pl_module)
        self._link_best(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if the score is among the best."""
        super().on_validation_end(trainer, pl_module)
        self._link_best(trainer)

    def _link_best(self, trainer: pl.Trainer) -> None:
        best, target = self.best_model_path, self.best_path
        if best == target or not trainer.is_global_zero or not os.path.exists(best):
            return
        if self._linked != (best, written := os.stat(best).st_mtime_ns):
            _link(best, Path(target))
            self._linked = best, written

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the scores and files from a checkpoint, also if the run folder was moved or ``save_top_k`` has changed."""
        state = dict(state_dict)
        folder, former = str(self.dirpath), str(state.get("dirpath"))
        if former != folder and os.path.exists(os.path.join(folder, os.path.basename(state["best_model_path"]))):
            state["dirpath"] = folder
            for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
                state[key] = _moved(state[key], folder)
            state["best_k_models"] = {_moved(path, folder): score for path, score in state["best_k_models"].items()}
        super().load_state_dict(state)
        if self.best_k_models and self.save_top_k > 0:
            self._keep_top_k()

    def _keep_top_k(self) -> None:
        best = os.path.join(str(self.dirpath), _BEST + self.FILE_EXTENSION)
        if self.save_top_k > 1 and best in self.best_k_models:  # written with save_top_k 1; the name is now that of the link
            self.best_k_models = {_renamed(path) if path == best else path: s for path, s in self.best_k_models.items()}
        ordered = sorted(self.best_k_models.items(), key=lambda item: float(item[1]), reverse=self.mode == "max")
        self.best_k_models = dict(ordered[: self.save_top_k])
        self.best_model_path, self.best_model_score = ordered[0]
        full = len(self.best_k_models) == self.save_top_k
        self.kth_best_model_path, self.kth_value = list(self.best_k_models.items())[-1] if full else ("", self.kth_value)


class LastCheckpoint(ModelCheckpoint):
    """Write ``last.ckpt`` after every epoch; ``ModelCheckpoint(save_last=True)`` writes it only with a new best.

    Args:
        dirpath: Folder of the file; None means Lightning's default.
    """

    def __init__(self, dirpath: str | Path | None = None) -> None:
        super().__init__(dirpath, "last", enable_version_counter=False, save_on_train_epoch_end=True)


def _link(source: str, target: Path) -> None:
    """Replace a file by a hard link to another one in its folder, or by a copy on a file system without links."""
    if os.path.isdir(source):  # a sharded checkpoint
        target.unlink(missing_ok=True)
        target.symlink_to(os.path.basename(source))
        return

    def link(temporary: Path) -> None:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copy2(source, temporary)

    write_atomically(target, link)


def _moved(path: str, folder: str) -> str:
    return os.path.join(folder, os.path.basename(path)) if path else path


def _renamed(best: str) -> str:
    """Give the best checkpoint of the run so far a second name, and return it."""
    path = best.removesuffix(".ckpt") + "-before-resume.ckpt"
    with suppress(OSError):  # several processes make the same link
        _link(best, Path(path))
    return path
