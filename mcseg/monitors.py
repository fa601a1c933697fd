"""Check the callbacks and schedules that monitor a score: the score must exist, and their mode must fit it."""

import inspect
from collections.abc import Sequence
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_info
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mcseg.evaluation.directions import Mode, better_mode

_MODES = ("min", "max")
_OF_LIGHTNING = ("epoch", "step")  # a ModelCheckpoint may monitor these as well


def follow_scores(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Prepare the callbacks that have a ``monitor``, before training starts.

    A callback whose class has a default mode cannot tell whether the user chose it. A mode that differs from the default is
    the user's; the default is replaced where it is wrong, with a line that reports it.

    Args:
        trainer: Trainer whose callbacks are checked; their modes may be changed.
        module: Module that is trained.

    Raises:
        ValueError: A callback monitors a score that nothing logs, or in the wrong mode.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str):
            continue
        name = type(callback).__name__
        require_score(name, monitor, trainer, module)
        mode = getattr(callback, "mode", None)
        if mode in _MODES and (better := wanted_mode(name, monitor, mode, _default_mode(type(callback)))) != mode:
            _set_mode(callback, better)
            rank_zero_info(f"{name}: mode {better} instead of the default {mode}, as {_reason(monitor, better)}")


def require_score(name: str, monitor: str, trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Raise ValueError if no part of the run can log a score.

    A module or a callback from outside mcseg and Lightning may log any name, so that this is known only after the first
    validation; then Lightning's callbacks raise an error that lists the logged names.

    Args:
        name: Class that monitors the score, for the message.
        monitor: Name of the score.
        trainer: Trainer of the run.
        module: Module that is trained.
    """
    known = known_scores(trainer, module)
    if known is None or monitor in (*known, *_OF_LIGHTNING) or monitor.startswith(("train/loss/", "lr-")):
        return
    if monitor.startswith("val") and not trainer.enable_validation:
        raise ValueError(
            f"{name}: no score {monitor}, because the run has no validation; expected validation data and "
            f"trainer.limit_val_batches above 0, or one of {', '.join(known)}"
        )
    advice = "" if any(score.endswith("/miou") for score in known) else "; mcseg.callbacks.JaccardCallback logs val/miou"
    raise ValueError(f"{name}: no score {monitor}; expected one of {', '.join(known)}{advice * trainer.enable_validation}")


def known_scores(trainer: pl.Trainer, module: pl.LightningModule) -> list[str] | None:
    """List the scores that a training logs; None if a module or a callback of a user may log others."""
    callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
    of_callbacks = [getattr(callback, "score_names", None) for callback in callbacks]
    for part, names in zip((module, *callbacks), (None, *of_callbacks), strict=True):
        if names is None and not type(part).__module__.startswith(("mcseg.", "pytorch_lightning.", "lightning.")):
            return None
    validation = ["val/loss", *(score for names in of_callbacks if names is not None for score in names(trainer, "val"))]
    return [*(validation if trainer.enable_validation else []), "train/loss", "train/grad_norm"]


def wanted_mode(name: str, monitor: str, mode: str, default: str | None) -> Mode:
    """Return the mode in which a score is to be followed.

    Args:
        name: Class that monitors the score, for the message.
        monitor: Name of the score.
        mode: ``"min"`` or ``"max"``, as it is set.
        default: The mode that the class has if the user gives none; None if ``mode`` is the user's.

    Raises:
        ValueError: The user's mode contradicts the score.
    """
    better = better_mode(monitor)
    if better is not None and mode not in (better, default):
        raise ValueError(
            f"{name}: found mode {mode} for {monitor}, but {_reason(monitor, better)}; set mode to {better}, or leave it out"
        )
    return better or cast(Mode, mode)


def plateau_monitor(schedule: ReduceLROnPlateau, *, given: str | None = None) -> str:
    """Return the score that a schedule follows, its attribute ``monitor`` or ``val/miou``, and set the mode from the score.

    Args:
        schedule: The schedule; its mode may be changed.
        given: The mode that the user chose, if it is known.

    Raises:
        ValueError: The mode contradicts the score.
    """
    monitor = str(getattr(schedule, "monitor", "val/miou"))
    default = None if given else _default_mode(type(schedule))
    if (better := wanted_mode("model.scheduler: ReduceLROnPlateau", monitor, schedule.mode, default)) != schedule.mode:
        schedule.mode = better
        schedule.best = schedule.mode_worse = _worst(better)
    return monitor


def _reason(monitor: str, better: Mode) -> str:
    return f"a {'lower' if better == 'min' else 'higher'} {monitor} is better"


def _worst(mode: Mode) -> float:
    return float("inf") if mode == "min" else -float("inf")


def _default_mode(kind: type) -> str | None:
    """Return the default of a class's argument ``mode``, also of the base class to which it passes its keywords on."""
    for base in kind.__mro__:
        parameter = inspect.signature(base).parameters.get("mode") if "__init__" in vars(base) else None
        if parameter is not None:
            return parameter.default if parameter.default in _MODES else None
    return None


def _set_mode(callback: Any, mode: Mode) -> None:
    """Replace the mode of a callback that has not seen a score yet, and what its constructor derived from the mode."""
    if isinstance(callback, ModelCheckpoint):
        callback.kth_value = torch.tensor(_worst(mode))
    elif isinstance(callback, EarlyStopping):
        callback.min_delta = -callback.min_delta
        callback.best_score = torch.tensor(_worst(mode))
    else:  # its constructor may have derived anything
        raise ValueError(
            f"{type(callback).__name__}: found mode {callback.mode} for {callback.monitor}, but "
            f"{_reason(callback.monitor, mode)}; set mode to {mode}"
        )
    callback.mode = mode
