"""Learning-rate schedules: polynomial decay with a warm-up, and the stepping of a schedule by a Lightning Trainer."""

import functools
import inspect
import math
import sys
from collections.abc import Mapping
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from mcseg.checkpoints.module import finders
from mcseg.lightning_internals import batches_done
from mcseg.monitors import plateau_monitor, require_score

Interval = Literal["step", "epoch"]

_SETTINGS = ("total_steps", "power", "warmup_steps")


class WarmupPolynomialLR(LRScheduler):
    """Decays the learning rate to 0 by a polynomial, after a linear warm-up; step it after each optimiser step.

    In step t = 0, 1, ... of ``total_steps`` the rate is::

        lr * min(1, (t + 1) / (warmup_steps + 1)) * (1 - t / total_steps)^power

    Without a warm-up this is the schedule of DeepLab (Chen et al., "DeepLab", TPAMI 2018, "poly") and of
    :class:`torch.optim.lr_scheduler.PolynomialLR`.

    Args:
        optimizer: the optimiser whose rates are scheduled.
        total_steps: optimiser steps of the run (epochs, if it is stepped after each epoch), at least 1. With None,
            :class:`~mcseg.module.SegmentationModule` takes the number from its Trainer; in your own loop, set it here.
        power: exponent, at least 0; 0 keeps the rate constant after the warm-up.
        warmup_steps: optimiser steps of the warm-up, at least 0.

    Raises:
        ValueError: an argument is out of range.
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
        """Compute the rate of each parameter group for the current step."""
        step = self.last_epoch  # torch's name for the number of steps done
        if step and self.total_steps is None:
            raise RuntimeError("WarmupPolynomialLR: total_steps is not set; set it to the optimiser steps of the run")
        done = step / self.total_steps if self.total_steps else 0.0
        rise = (step + 1) / (self.warmup_steps + 1) if step < self.warmup_steps else 1.0
        factor = float(rise * max(0.0, 1 - done) ** self.power)
        return [rate * factor for rate in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the progress without the settings: a resumed run uses its own, and may be longer than the first run."""
        return {name: value for name, value in super().state_dict().items() if name not in _SETTINGS}


# Schedules whose documentation steps them after each batch
_PER_STEP = (WarmupPolynomialLR, OneCycleLR, CyclicLR)


def optimizer_and_schedule(module: Any) -> dict[str, Any]:
    """Build the optimiser and the schedule of a :class:`~mcseg.module.SegmentationModule` with a Trainer.

    Returns:
        The value of ``configure_optimizers``.

    Raises:
        ValueError: see :func:`lightning_schedule`.
    """
    optimizer = module.optimizer(module.network.parameters())
    if module.lr is not None:
        for group in optimizer.param_groups:
            group["lr"] = module.lr
    factory, interval = module.scheduler, module.hparams["scheduler_interval"]
    chosen = factory.keywords if isinstance(factory, functools.partial) and inspect.isclass(factory.func) else {}
    schedule = factory(optimizer)
    if isinstance(schedule, OneCycleLR | CyclicLR) and (
        module.lr is not None or "LearningRateFinder" in finders(module.trainer)
    ):
        raise ValueError(
            f"model.lr: {type(schedule).__name__} takes its learning rates from max_lr, so that model.lr and a "
            "LearningRateFinder have no effect; set model.scheduler.max_lr, or choose another schedule"
        )
    settings = lightning_schedule(schedule, module.trainer, interval=interval, given=chosen)
    return {"optimizer": optimizer, "lr_scheduler": settings}


def counts_steps(schedule: LRScheduler, interval: Interval | None) -> bool:
    """Whether a schedule is stepped after each optimiser step, otherwise after each epoch."""
    return isinstance(schedule, _PER_STEP) if interval is None else interval == "step"


def lightning_schedule(
    schedule: LRScheduler | ReduceLROnPlateau,
    trainer: pl.Trainer,
    *,
    interval: Interval | None = None,
    given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Configure Lightning to step a schedule after each optimiser step or epoch, and a ``ReduceLROnPlateau`` never.

    :func:`step_plateau` steps the latter.

    Args:
        schedule: the schedule; the mode of a ``ReduceLROnPlateau`` is set from its score.
        trainer: Trainer that steps it.
        interval: what the schedule counts. None takes what its documentation shows: optimiser steps for
            :class:`WarmupPolynomialLR` and torch's ``OneCycleLR`` and ``CyclicLR``, epochs for all others.
        given: the arguments of the schedule that the user chose, if they are known.

    Returns:
        The value of ``lr_scheduler`` for ``configure_optimizers``.

    Raises:
        ValueError: a polynomial schedule without ``total_steps`` in a run without limit, or a ``ReduceLROnPlateau`` that
            follows an unknown score, or a score in the wrong direction, or that is to be stepped after each step.
    """
    if isinstance(schedule, ReduceLROnPlateau):
        if interval == "step":
            raise ValueError(
                "model.scheduler_interval: found step for ReduceLROnPlateau, which is stepped after each validation; "
                "remove it"
            )
        monitor = plateau_monitor(schedule, given=(given or {}).get("mode"))
        require_score("model.scheduler: ReduceLROnPlateau", monitor, trainer, trainer.lightning_module)
        # Lightning would step it after writing the epoch's checkpoint, and a run resumed from that would miss the step
        return {"scheduler": schedule, "interval": "epoch", "frequency": sys.maxsize, "monitor": monitor}
    by_step = counts_steps(schedule, interval)
    unknown = isinstance(schedule, WarmupPolynomialLR) and schedule.total_steps is None
    if unknown and trainer.max_epochs == -1 and (trainer.max_steps == -1 or not by_step):
        raise ValueError(
            "model.scheduler: found a WarmupPolynomialLR without total_steps in a run without limit; set "
            f"trainer.max_epochs, {'trainer.max_steps ' if by_step else ''}or model.scheduler.total_steps, or choose "
            "another schedule"
        )
    return {"scheduler": schedule, "interval": "step" if by_step else "epoch"}


def set_length(schedule: Any, trainer: pl.Trainer, interval: Interval | None = None) -> None:
    """Set ``total_steps`` of a :class:`WarmupPolynomialLR` that has none, and the rates; leave other schedules as they are.

    A resumed run may have another number of epochs, or of steps per epoch, than its first part.

    Call it when training starts, not before: to count the batches, the Trainer makes the loader's iterator, which starts at
    the wrong epoch if the checkpoint of a resumed run is not loaded yet.
    """
    if not isinstance(schedule, WarmupPolynomialLR):
        return
    if schedule.total_steps is None:
        schedule.total_steps = max(1, _steps(trainer) if counts_steps(schedule, interval) else trainer.max_epochs or 1)
    for group, rate in zip(schedule.optimizer.param_groups, schedule.get_lr(), strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _steps(trainer: pl.Trainer) -> int | float:
    """Return the optimiser steps of a run; in a resumed run the first ones may have had another batch size."""
    total = trainer.estimated_stepping_batches
    epochs, length = trainer.max_epochs, trainer.num_training_batches
    if not trainer.global_step or not epochs or epochs < 0 or isinstance(length, float):
        return total
    per_epoch = math.ceil(length / trainer.accumulate_grad_batches)
    if total != epochs * per_epoch:  # limited by max_steps
        return total
    in_epoch = math.ceil(batches_done(trainer) / trainer.accumulate_grad_batches)
    return total + trainer.global_step - (trainer.current_epoch * per_epoch + in_epoch)


def step_plateau(schedule: Any, scores: Mapping[str, Any]) -> None:
    """Step a ``ReduceLROnPlateau`` by the score that it monitors; leave any other schedule as it is.

    Args:
        schedule: schedule of the optimiser.
        scores: logged scores by name.

    Raises:
        ValueError: the monitored score is not logged.
    """
    if isinstance(schedule, ReduceLROnPlateau):
        monitor = plateau_monitor(schedule)
        if monitor not in scores:
            raise ValueError(f"model.scheduler: no score {monitor}; expected one of {', '.join(scores)}")
        schedule.step(scores[monitor])
