"""Learning-rate schedules: the polynomial in each step, its length from the Trainer, the state of a resumed run."""

from functools import partial
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import ReduceLROnPlateau as PlateauOfLightning
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from mcseg.callbacks import JaccardCallback
from mcseg.data import SyntheticData
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
        set_length(
            schedule, SimpleNamespace(estimated_stepping_batches=12, global_step=0, max_epochs=4, num_training_batches=3)
        )
    assert (unknown.total_steps, given.total_steps, hasattr(other, "total_steps")) == (12, 7, False)


def test_total_epochs_come_from_the_trainer_if_the_schedule_counts_epochs():
    schedule = WarmupPolynomialLR(sgd(0.1), power=1.0)
    assert lightning_schedule(schedule, trainer_of(), interval="epoch")["interval"] == "epoch"
    set_length(schedule, SimpleNamespace(max_epochs=4), "epoch")
    assert rates(schedule, 4) == [pytest.approx([rate]) for rate in (0.1, 0.075, 0.05, 0.025)]
    endless = SimpleNamespace(max_epochs=-1, max_steps=7)
    with pytest.raises(ValueError, match="set trainer.max_epochs, or model.scheduler.total_steps"):
        lightning_schedule(WarmupPolynomialLR(sgd(0.1)), endless, interval="epoch")


@pytest.mark.parametrize(
    ("schedule", "interval"),
    [
        (partial(StepLR, step_size=2), "epoch"),
        (partial(MultiStepLR, milestones=[2]), "epoch"),
        (partial(ExponentialLR, gamma=0.9), "epoch"),
        (partial(CosineAnnealingLR, T_max=3), "epoch"),
        (partial(CosineAnnealingWarmRestarts, T_0=3), "epoch"),
        (partial(LinearLR, total_iters=3), "epoch"),
        (partial(ConstantLR, total_iters=3), "epoch"),
        (partial(PolynomialLR, total_iters=3), "epoch"),
        (partial(LambdaLR, lr_lambda=float), "epoch"),
        (lambda optimizer: SequentialLR(optimizer, [ConstantLR(optimizer), StepLR(optimizer, 2)], [2]), "epoch"),
        (lambda optimizer: ChainedScheduler([ConstantLR(optimizer), StepLR(optimizer, 2)]), "epoch"),
        (partial(OneCycleLR, max_lr=1.0, total_steps=9), "step"),
        (partial(CyclicLR, base_lr=0.1, max_lr=1.0, cycle_momentum=False), "step"),
        (partial(WarmupPolynomialLR, total_steps=9), "step"),
    ],
)
def test_what_a_schedule_counts(schedule, interval):
    """By default what its documentation shows; the user may choose either."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    assert lightning_schedule(schedule(optimizer), trainer_of())["interval"] == interval
    for chosen in ("step", "epoch"):
        assert lightning_schedule(schedule(optimizer), trainer_of(), interval=chosen)["interval"] == chosen


def test_a_plateau_is_not_stepped_after_each_step():
    assert lightning_schedule(ReduceLROnPlateau(sgd(0.1)), trainer_of(), interval="epoch")["interval"] == "epoch"
    with pytest.raises(ValueError, match="scheduler_interval: found step for ReduceLROnPlateau"):
        lightning_schedule(ReduceLROnPlateau(sgd(0.1)), trainer_of(), interval="step")


class Rates(pl.Callback):
    """Notes the learning rate of each optimiser step."""

    def __init__(self):
        self.rates = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.rates.append(round(optimizer.param_groups[0]["lr"], 6))


def fit(tmp_path, scheduler, *, batch_size=2, ckpt_path=None, interval=None, **limits):
    """Train on six images with one batch of two images each; return the rates of the steps and the module."""
    module = SegmentationModule(
        "unet", "tu-test_resnet.r160_in1k", num_classes=8, scheduler=scheduler, scheduler_interval=interval,
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )  # fmt: skip
    data = SyntheticData(
        train_scenes=6, val_scenes=1, size=(32, 48), crop_size=(32, 32), batch_size=batch_size, num_workers=0
    )
    noted = Rates()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(accelerator="cpu", callbacks=[noted], num_sanity_val_steps=0, **quiet, **limits)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return noted.rates


def test_a_schedule_of_epochs_in_a_run(tmp_path):
    """Three steps an epoch, two with accumulation: the rate changes between epochs, also in a resumed run."""
    halved = partial(StepLR, step_size=1, gamma=0.5)
    assert fit(tmp_path, halved, max_epochs=2) == [0.1] * 3 + [0.05] * 3
    assert fit(tmp_path, halved, max_epochs=3, ckpt_path=tmp_path / "last.ckpt") == [0.025] * 3
    assert fit(tmp_path, halved, max_epochs=2, accumulate_grad_batches=2) == [0.1] * 2 + [0.05] * 2
    assert fit(tmp_path, halved, max_epochs=1, interval="step") == [0.1, 0.05, 0.025]


def test_a_checkpoint_of_an_earlier_version_goes_on_counting_steps(tmp_path):
    halved = partial(StepLR, step_size=1, gamma=0.5)
    fit(tmp_path, halved, max_epochs=1, interval="step")
    old = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del old["hyper_parameters"]["scheduler_interval"]
    torch.save(old, tmp_path / "old.ckpt")
    assert fit(tmp_path, halved, max_epochs=2, ckpt_path=tmp_path / "old.ckpt") == [0.0125, 0.00625, 0.003125]


def test_the_polynomial_of_a_resumed_run_has_the_new_length(tmp_path):
    """With a larger number of epochs, and with another batch size: the rate ends at 0 after the last epoch."""
    linear = partial(WarmupPolynomialLR, power=1.0)
    fit(tmp_path, linear, max_epochs=1)
    longer = fit(tmp_path, linear, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert longer == [0.05, 0.033333, 0.016667]
    fit(tmp_path, linear, max_epochs=1)
    larger = fit(tmp_path, linear, max_epochs=4, batch_size=6, ckpt_path=tmp_path / "last.ckpt")
    assert larger == [0.05, 0.033333, 0.016667]  # three of six steps are left


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
