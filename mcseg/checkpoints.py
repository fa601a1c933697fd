"""Checkpoints that a crash cannot damage, and runs that go on from them."""

import argparse
import csv
import errno
import os
import pickle
import re
import signal
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.loggers.logger import rank_zero_experiment
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Callback, WeightAveraging
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor

from mcseg import __version__

VERSION = "mcseg_version"  # key of a checkpoint
LOCK = ".lock"  # file in the folder of a run


class CheckpointFile(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: there is a whole one at every moment. Unpickles nothing."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: it could not be written; what was at its place before is still there.
        """
        if storage_options is not None or "://" in str(path):  # not a file
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        temporary = place.with_name(f".{place.name}.tmp")  # what a killed process has left is written over
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(place)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):  # torch's writer has errors of its own on top
                cause = cause.__context__
            reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
            before = "the checkpoint that was there before is whole" if place.exists() else "there is none"
            raise OSError(f"{place}: the checkpoint cannot be written ({reason}); {before}") from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; one that holds other objects than tensors and plain types is refused, unless told otherwise."""
        plain = True if weights_only is None else weights_only
        with _refusing(path):
            return super().load_checkpoint(path, map_location, plain)


class CheckpointOnSignal(Callback):
    """Writes a checkpoint when a training is told to end by SIGTERM or Ctrl-C; of several processes, when any of them is.

    It ends where no gradient is half collected: behind an optimiser's step, or between two batches of a validation where
    there is one process. Several end together, behind the same step; a validation that is under way is finished before.
    Lightning's own handler talks to the other processes from within, wherever they are: they may be waiting for something
    else, and then all wait for ever. The second Ctrl-C ends at once.

    Args:
        path: where; a run that goes on from it has the next batch that it would have had, and repeats a validation that
            was under way.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._told = 0  # the signal

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew."""
        self._told = 0

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to listen."""
        self._listen(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to listen."""
        self._listen(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End all processes behind this step where one was told to."""
        self._end_if_told(trainer)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """End behind this batch; several processes have different numbers of them, and end later."""
        if trainer.world_size == 1:
            self._end_if_told(trainer)

    def _listen(self, trainer: pl.Trainer) -> None:
        def hear(number: int, _: Any) -> None:
            self._told = number
            if number == signal.SIGINT:
                signal.signal(number, signal.default_int_handler)
                if trainer.is_global_zero:  # not by print, which may be what the signal came into
                    os.write(2, b"\nCtrl-C: ends behind this step, with a checkpoint; once more ends at once, without\n")

        if threading.current_thread() is threading.main_thread():  # no other one may
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, hear)  # until the Trainer puts back what was there before it

    def _end_if_told(self, trainer: pl.Trainer) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate():  # no checkpoint holds a gradient
            return
        told = bool(self._told)
        if trainer.world_size > 1:
            told = trainer.strategy.reduce_boolean_decision(told, all=False)
        if told:
            trainer._signal_connector.received_sigterm = True

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write it, and give the exit code that is usual for the signal."""
        if not isinstance(exception, SIGTERMException) or trainer.state.fn != "fit":
            return
        exception.code = 128 + (self._told or signal.SIGTERM)
        if trainer.validating:
            # what Lightning takes for a validation that has begun, with none of its batches done
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset()
            progress.increment_ready()
            progress.increment_started()
            progress.current.reset()
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):  # has put its average in the module's place until the end
                    callback.on_validation_epoch_end(trainer, pl_module)
        if trainer.training or trainer.validating:
            trainer.save_checkpoint(self.path, weights_only=False)
            rank_zero_info(f"told to end; to go on: mcseg fit --resume {trainer.default_root_dir}")


class ContinuedCSVLogger(CSVLogger):
    """Lightning's CSV logger, which goes on with the file that is there instead of deleting it.

    Args:
        step: training steps that are done: rows of later ones are left out, as they will come again.
        save_dir: folder of ``metrics.csv``.
        **options: of the CSV logger.
    """

    def __init__(self, step: int, save_dir: str | Path, **options: Any) -> None:
        super().__init__(save_dir, **options)
        self._step = step

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, on rank 0; its first use takes the rows over."""
        if self._experiment is None:
            path = Path(self.log_dir) / "metrics.csv"
            kept = path.with_suffix(".kept")
            if path.is_file() and not kept.exists():
                path.replace(kept)  # out of the way of the writer, which would delete it
            writer: Any = super().experiment
            if kept.is_file():
                with kept.open(newline="", encoding="utf-8") as file:
                    reader = csv.DictReader(file)
                    keys = list(reader.fieldnames or [])
                    # the last row may have been cut off
                    rows = [row for row in reader if (row["step"] or "").isdigit() and int(row["step"]) < self._step]
                with path.open("w", newline="", encoding="utf-8") as file:
                    output = csv.DictWriter(file, keys)
                    output.writeheader()
                    output.writerows(rows)
                writer.metrics_keys = keys
                kept.unlink()
        return super().experiment


@contextmanager
def _refusing(path: Any) -> Iterator[None]:
    """Say in one line why a file is no checkpoint."""
    is_file = "://" not in str(path) and Path(path).is_file()
    if is_file and not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not a checkpoint, or one that was cut off; expected a .ckpt file as mcseg fit writes it")
    try:
        yield
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        kind = f" ({found[1]})" if found else ""
        raise ValueError(
            f"{path}: holds other objects than tensors and plain types{kind}, which are not loaded (weights_only), as they "
            "could run any code; expected a .ckpt file as mcseg fit writes it"
        ) from None


def read_checkpoint(path: str | Path, **options: Any) -> dict[str, Any]:
    """Read a checkpoint of this package to the CPU.

    Args:
        path: a file.
        **options: of ``torch.load``.

    Raises:
        ValueError: not a checkpoint, or one with other objects than tensors and plain types.
        FileNotFoundError: no such file.
    """
    with _refusing(path):
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, **options)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path}: holds no state_dict; expected a .ckpt file as mcseg fit writes it")
    return checkpoint


def written_by(checkpoint: dict[str, Any]) -> str:
    """Say which version of the package wrote a checkpoint, and which this is."""
    writer = f"mcseg {checkpoint[VERSION]}" if VERSION in checkpoint else "an earlier mcseg"
    return f"written by {writer}, this is {__version__}"


def differing_tensors(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that only one of two states has, or that have different shapes in them, sorted."""
    return sorted(
        name
        for name in found.keys() | own.keys()
        if name not in found or name not in own or found[name].shape != own[name].shape
    )


def steps_done(path: Path) -> int:
    """Training steps that are behind a checkpoint."""
    return int(read_checkpoint(path, mmap=True)["global_step"])


def resumed(words: list[str]) -> tuple[list[str], Path | None]:
    """Spell out ``fit --resume RUN_FOLDER``: the run's settings, its folder, and its last checkpoint if there is one."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("--resume")
    chosen, rest = options.parse_known_args(words)
    if chosen.resume is None:
        return words, None
    if rest[0] != "fit":
        raise ValueError(f"--resume: found with {rest[0]!r}, expected mcseg fit --resume RUN_FOLDER")
    folder = Path(chosen.resume)
    settings, last = folder / "config.yaml", folder / "checkpoints" / "last.ckpt"
    if not settings.is_file():
        raise FileNotFoundError(f"--resume: no {settings}; expected the folder of a run, such as runs/camvid/<time>")
    words = ["fit", "--config", str(settings), "--trainer.default_root_dir", str(folder), *rest[1:]]
    return words + (["--ckpt_path", str(last)] if last.is_file() else []), folder


@contextmanager
def alone(folder: Path, verb: str) -> Iterator[None]:
    """Keep a second ``mcseg fit`` or ``compare`` out of a folder while one is at work there; made where it is missing.

    The lock belongs to this process and ends with it, however that ends. Where the file system or the system knows no locks
    nothing is kept out.

    Raises:
        RuntimeError: another process is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            pass
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise RuntimeError(f"{folder}: another mcseg {verb} is at work here; wait for it, or end it") from None
        yield
