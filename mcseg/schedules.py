"""Learning-rate schedules: polynomial decay with a warm-up, and how a Lightning Trainer is to step a schedule."""

import math
import sys
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

_SETTINGS = ("total_steps", "power", "warmup_steps")


class WarmupPolynomialLR(LRScheduler):
    """Decays the learning rate to 0 by a polynomial, after a linear warm-up; to be stepped after each optimiser step.

    In step t = 0, 1, ... of ``total_steps`` the rate is::

        lr * min(1, (t + 1) / (warmup_steps + 1)) * (1 - t / total_steps)^power

    Without a warm-up this is the schedule of DeepLab (Chen et al., "DeepLab", TPAMI 2018, "poly") and of
    :class:`torch.optim.lr_scheduler.PolynomialLR`.

    Args:
        optimizer: the optimiser whose rates are scheduled.
        total_steps: optimiser steps of the run. None: :class:`~mcseg.module.SegmentationModule` takes them from its Trainer;
            in a loop of your own set them here.
        power: exponent, at least 0; 0 keeps the rate after the warm-up.
        warmup_steps: optimiser steps with a lower rate at the beginning.

    Raises:
        ValueError: a setting out of range.
        RuntimeError: in the second step, if ``total_steps`` is still None.

    Example:
        >>> import torch
        >>> from mcseg.schedules import WarmupPolynomialLR
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> schedule = WarmupPolynomialLR(optimizer, total_steps=4, power=1.0, warmup_steps=1)
        >>> rates = []
        >>> for _ in range(4):
        ...     rates += schedule.get_last_lr()
        ...     optimizer.step()
        ...     schedule.step()
        >>> [round(rate, 4) for rate in rates]
        [0.05, 0.075, 0.05, 0.025]
    """

    def __init__(
        self, optimizer: Optimizer, *, total_steps: int | None = None, power: float = 0.9, warmup_steps: int = 0
    ) -> None:
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"WarmupPolynomialLR: found total_steps {total_steps}, expected at least 1")
        if not (math.isfinite(power) and power >= 0):
            raise ValueError(f"WarmupPolynomialLR: found power {power}, expected a finite number >= 0")
        if warmup_steps < 0:
            raise ValueError(f"WarmupPolynomialLR: found warmup_steps {warmup_steps}, expected at least 0")
        self.total_steps: float | None = total_steps
        self.power = power
        self.warmup_steps = warmup_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        """Compute the rate of each parameter group for the step ``last_epoch``, as torch calls the steps done."""
        step = self.last_epoch
        if step and self.total_steps is None:
            raise RuntimeError("WarmupPolynomialLR: total_steps is not set; give the optimiser steps of the run")
        done = step / self.total_steps if self.total_steps else 0.0
        rise = (step + 1) / (self.warmup_steps + 1) if step < self.warmup_steps else 1.0
        factor = float(rise * max(0.0, 1 - done) ** self.power)
        return [rate * factor for rate in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the progress alone: a resumed run has its own settings, and may be longer than the one that it resumes."""
        return {name: value for name, value in super().state_dict().items() if name not in _SETTINGS}


def lightning_schedule(schedule: LRScheduler | ReduceLROnPlateau, trainer: pl.Trainer) -> dict[str, Any]:
    """Describe to Lightning how it steps a schedule: after each optimiser step; a plateau it leaves to `step_plateau`.

    Raises:
        ValueError: a polynomial schedule without a length in a run without an end, or a plateau that would lower the rate
            when its score gets better.
    """
    settings: dict[str, Any] = {"scheduler": schedule, "interval": "step"}
    if isinstance(schedule, ReduceLROnPlateau):
        # Never by Lightning: it would step after the epoch's checkpoint, and not at all in a run resumed from that
        settings |= {"interval": "epoch", "frequency": sys.maxsize, "monitor": _monitor(schedule)}
    unknown = isinstance(schedule, WarmupPolynomialLR) and schedule.total_steps is None
    if unknown and trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise ValueError(
            "model.scheduler: a polynomial needs the length of the run; set trainer.max_epochs, trainer.max_steps "
            "or model.scheduler.total_steps, or choose another schedule"
        )
    return settings


def set_length(schedule: Any, trainer: pl.Trainer) -> None:
    """Tell a polynomial schedule without a length the optimiser steps of the run; leave others as they are.

    To be called when training starts, not before: the Trainer counts the batches of a loader whose iterator it makes for
    that, and before a checkpoint is loaded it would begin with the wrong epoch.
    """
    if isinstance(schedule, WarmupPolynomialLR) and schedule.total_steps is None:
        schedule.total_steps = max(1, trainer.estimated_stepping_batches)


def step_plateau(schedule: Any, scores: Mapping[str, Any]) -> None:
    """Step a ``ReduceLROnPlateau`` by the score that it follows; leave other schedules as they are.

    Raises:
        ValueError: no such score.
    """
    if isinstance(schedule, ReduceLROnPlateau):
        monitor = _monitor(schedule)
        if monitor not in scores:
            raise ValueError(f"model.scheduler: no score {monitor}; expected one of {', '.join(scores)}")
        schedule.step(scores[monitor])


def _monitor(plateau: ReduceLROnPlateau) -> str:
    """Name the score that a schedule follows: its own choice, or ``val/miou``."""
    monitor = str(getattr(plateau, "monitor", "val/miou"))
    mode = "min" if monitor == "val/loss" else "max"
    if monitor.startswith("val/") and plateau.mode != mode:
        raise ValueError(
            f"model.scheduler: found ReduceLROnPlateau in mode {plateau.mode} for {monitor}, expected mode {mode}; set "
            f"model.scheduler.init_args.mode to {mode}"
        )
    return monitor
