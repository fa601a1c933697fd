"""Learning-rate schedules: the polynomial in each step, its length from the Trainer, the state of a resumed run."""

from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.cli import ReduceLROnPlateau as PlateauOfLightning
from torch.optim.lr_scheduler import LambdaLR, PolynomialLR, ReduceLROnPlateau

from mcseg.callbacks import JaccardCallback
from mcseg.module import SegmentationModule
from mcseg.schedules import WarmupPolynomialLR, lightning_schedule, set_length, step_plateau


def trainer_of(enable_validation=True):
    """Stand in for a Trainer of mcseg's module and scores."""
    module = SegmentationModule.__new__(SegmentationModule)
    data = SimpleNamespace(class_names=("a", "b"))
    limits = {"max_epochs": 1, "max_steps": -1}
    return SimpleNamespace(
        callbacks=[JaccardCallback()],
        lightning_module=module,
        enable_validation=enable_validation,
        datamodule=data,
        **limits,
    )


def sgd(*rates):
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates])


def rates(schedule, steps):
    result = []
    for _ in range(steps):
        result.append(schedule.get_last_lr())
        schedule.optimizer.step()
        schedule.step()
    return result


def test_rates_are_those_of_the_formula():
    actual = rates(WarmupPolynomialLR(sgd(0.1, 2.0), total_steps=8, power=0.7, warmup_steps=3), 10)
    for step, both in enumerate(actual):
        factor = min(1, (step + 1) / 4) * max(0.0, 1 - step / 8) ** 0.7
        assert both == pytest.approx([0.1 * factor, 2.0 * factor], rel=1e-12)


def test_without_warmup_the_rates_are_those_of_torch():
    ours = rates(WarmupPolynomialLR(sgd(0.1), total_steps=20, power=0.9), 20)
    expected = rates(PolynomialLR(sgd(0.1), total_iters=20, power=0.9), 20)
    assert [rate for (rate,) in ours] == pytest.approx([rate for (rate,) in expected], rel=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 0}, "total_steps 0"),
        ({"power": -0.5}, "power -0.5"),
        ({"power": float("nan")}, "power nan"),
        ({"warmup_steps": -1}, "warmup_steps -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        WarmupPolynomialLR(sgd(0.1), **settings)


def test_total_steps_is_needed_from_the_second_step_on():
    schedule = WarmupPolynomialLR(sgd(0.1))
    assert schedule.get_last_lr() == [0.1]
    schedule.optimizer.step()
    with pytest.raises(RuntimeError, match="total_steps is not set"):
        schedule.step()


def test_total_steps_comes_from_the_trainer_unless_it_is_given():
    unknown, given, other = (
        WarmupPolynomialLR(sgd(0.1)),
        WarmupPolynomialLR(sgd(0.1), total_steps=7),
        LambdaLR(sgd(0.1), float),
    )
    for schedule in (unknown, given, other):
        set_length(schedule, SimpleNamespace(estimated_stepping_batches=12))
    assert (unknown.total_steps, given.total_steps, hasattr(other, "total_steps")) == (12, 7, False)


def test_a_run_without_limit_needs_total_steps():
    endless = SimpleNamespace(max_epochs=-1, max_steps=-1)
    with pytest.raises(ValueError, match="trainer.max_epochs, trainer.max_steps or model.scheduler.total_steps"):
        lightning_schedule(WarmupPolynomialLR(sgd(0.1)), endless)
    assert lightning_schedule(WarmupPolynomialLR(sgd(0.1), total_steps=5), endless)["interval"] == "step"


def test_a_resumed_run_keeps_its_own_settings():
    """Only the progress comes from the checkpoint, which may be of an earlier version, with a LambdaLR as schedule."""
    before = WarmupPolynomialLR(sgd(0.1), total_steps=10, power=2.0)
    old = LambdaLR(sgd(0.1), lambda step: (1 - step / 10) ** 2)
    for first in (before, old):
        rates(first, 4)
        resumed = WarmupPolynomialLR(sgd(0.1), total_steps=20, power=1.0)
        resumed.load_state_dict(first.state_dict())
        resumed.optimizer.step()
        resumed.step()
        assert resumed.get_last_lr() == pytest.approx([0.1 * (1 - 5 / 20)], rel=1e-12)
    assert not {"power", "total_steps", "warmup_steps"} & before.state_dict().keys()


def test_a_plateau_follows_its_score():
    """The mode comes from the score; the best score so far is the worst of that mode."""
    plateau = ReduceLROnPlateau(sgd(0.1), patience=0, factor=0.5)
    assert lightning_schedule(plateau, trainer_of())["monitor"] == "val/miou"
    assert (plateau.mode, plateau.best) == ("max", float("-inf"))
    for score in (0.3, 0.2):
        step_plateau(plateau, {"val/miou": score})
    assert plateau.get_last_lr() == [0.05]
    with pytest.raises(ValueError, match="no score val/miou; expected one of val/loss"):
        step_plateau(plateau, {"val/loss": 1.0})


@pytest.mark.parametrize(
    ("monitor", "mode", "expected"), [("val/loss", "min", "min"), ("val/loss", "max", None), ("val/miou", "max", "max")]
)
def test_the_mode_of_a_plateau(monitor, mode, expected):
    plateau = PlateauOfLightning(sgd(0.1), monitor=monitor, mode=mode)
    if expected:
        assert lightning_schedule(plateau, trainer_of())["monitor"] == monitor
        assert plateau.mode == expected
    else:
        with pytest.raises(ValueError, match=r"mode max for val/loss, but a lower val/loss is better; set mode to min"):
            lightning_schedule(plateau, trainer_of())


def test_a_mode_that_the_user_chose_is_not_replaced():
    with pytest.raises(ValueError, match="mode min for val/miou, but a higher val/miou is better"):
        lightning_schedule(ReduceLROnPlateau(sgd(0.1)), trainer_of(), given={"mode": "min"})


def test_a_plateau_needs_a_score_that_is_logged():
    with pytest.raises(ValueError, match="ReduceLROnPlateau: no score val/x; expected one of val/loss, val/miou"):
        lightning_schedule(PlateauOfLightning(sgd(0.1), monitor="val/x"), trainer_of())
    with pytest.raises(ValueError, match="no score val/miou, because the run has no validation"):
        lightning_schedule(ReduceLROnPlateau(sgd(0.1)), trainer_of(enable_validation=False))
