"""Scores have a direction: what follows one gets its mode from the score, or is refused before training."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from mcseg.callbacks import BestCheckpoint, ConfusionPicture, JaccardCallback, LastValidation
from mcseg.data import SyntheticData
from mcseg.evaluation.directions import better_mode
from mcseg.module import SegmentationModule


@pytest.mark.parametrize(
    ("mode", "names"),
    {
        "max": "val/miou val/miou_tail val/iou/road val/iou/loss val/iou/error_band val/pixel_accuracy miou mIoU val_mIoU "
        "val/aAcc val/mDice val/dice val/f1 val/recall val/precision val/jaccard test/miou val/boundary_iou val/fwiou val-acc",
        "min": "val/loss train/loss train/loss/dice train/loss/iou train/grad_norm val_loss valLoss val/ece val/brier_score "
        "val/nll val/error_rate val/iou_loss val/dice_loss val/hd95 val/rmse val/1-miou_error loss",
        None: "val/classes_averaged lr-AdamW epoch step val/my_number",
    }.items(),
)
def test_direction_follows_from_the_name(mode, names):
    assert {name: better_mode(name) for name in names.split()} == dict.fromkeys(names.split(), mode)


def trainer(tmp_path, *callbacks, epochs=1, **options):
    limits = {"max_epochs": epochs, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    folder = {"default_root_dir": tmp_path, "enable_model_summary": False}
    return pl.Trainer(callbacks=list(callbacks), **{**limits, **folder, **options})


def module(**options):
    return SegmentationModule("unet", "tu-test_resnet.r160_in1k", num_classes=8, **options)


def data(scenes=4):
    return SyntheticData(
        train_scenes=scenes, val_scenes=2, size=(32, 48), crop_size=(32, 32), batch_size=2, eval_batch_size=2, num_workers=0
    )


class Fixed(pl.Callback):
    """Logs scores of each epoch from a list."""

    def __init__(self, **scores):
        self.scores = {name.replace("_", "/", 1): values for name, values in scores.items()}

    def score_names(self, trainer, split):
        return list(self.scores)

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            for name, values in self.scores.items():
                pl_module.log(name, values[trainer.current_epoch])


def test_callbacks_of_a_plain_trainer_get_the_mode_from_the_score(tmp_path, caplog):
    """Both follow the IoU upwards although Lightning's default is min."""
    scores = Fixed(val_miou=[0.2, 0.5, 0.4, 0.3, 0.9])
    stop = EarlyStopping("val/miou", patience=2, min_delta=0.01)
    best = ModelCheckpoint(tmp_path, "best", "val/miou")
    of_loss = ModelCheckpoint(tmp_path, "loss", "val/loss")
    with caplog.at_level("INFO"):
        run = trainer(tmp_path, scores, stop, best, of_loss, epochs=5)
        run.fit(module(), data(2))
    assert run.current_epoch == 4  # stopped after two epochs below 0.5
    assert (stop.mode, stop.min_delta, float(stop.best_score)) == ("max", 0.01, 0.5)
    assert (best.mode, float(best.best_model_score), of_loss.mode) == ("max", 0.5, "min")
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == 1
    assert "EarlyStopping: mode max instead of the default min, as a higher val/miou is better" in caplog.text


class OwnFollower(pl.Callback):
    """A callback of a user whose constructor uses the mode."""

    def __init__(self, monitor="val/miou", mode="min"):
        self.monitor, self.mode = monitor, mode


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            lambda: EarlyStopping("val/loss", mode="max"),
            "EarlyStopping: found mode max for val/loss, but a lower val/loss is",
        ),
        (lambda: ModelCheckpoint(monitor="val/loss", mode="max"), "ModelCheckpoint: found mode max for val/loss"),
        (lambda: OwnFollower(), "OwnFollower: found mode min for val/miou, but a higher"),
        (lambda: EarlyStopping("val_loss"), "EarlyStopping: no score val_loss; expected one of val/loss, val/miou"),
        (lambda: ModelCheckpoint(monitor="val/iou/unicorn"), "no score val/iou/unicorn; expected one of val/loss"),
    ],
)
def test_wrong_modes_and_names_are_refused_before_training(callback, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, JaccardCallback(), callback()).fit(module(), data())


def test_a_score_without_the_callback_that_logs_it(tmp_path):
    with pytest.raises(ValueError, match=r"no score val/miou; expected one of val/loss, .*JaccardCallback logs val/miou"):
        trainer(tmp_path, EarlyStopping("val/miou")).fit(module(), data())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"monitor": "val/loss", "mode": "max"}, "mode max for val/loss"),
        ({"mode": "min"}, "mode min for val/miou"),
        ({"monitor": "val/number"}, "checkpoint.mode: found none for val/number"),
        ({"save_top_k": 2, "filename": "good"}, "checkpoint.filename: found good with save_top_k 2"),
        ({"filename": "last"}, "checkpoint.filename: found last"),
    ],
)
def test_contradictions_of_the_best_checkpoint(settings, message):
    with pytest.raises(ValueError, match=message):
        BestCheckpoint(**settings)


def epoch_of(path):
    return torch.load(path, weights_only=True)["epoch"]


def test_the_best_checkpoint_is_the_best_of_several(tmp_path):
    """Three of five are kept; the name best.ckpt is that of the highest score at every moment."""
    best = BestCheckpoint(tmp_path, save_top_k=3)
    run = trainer(tmp_path, Fixed(val_miou=[0.2, 0.6, 0.1, 0.5, 0.4]), best, epochs=5)
    run.fit(module(), data(2))
    files = {path.name: epoch_of(path) for path in tmp_path.glob("*.ckpt")}
    assert files == {"best.ckpt": 1, "epoch001-step2.ckpt": 1, "epoch003-step4.ckpt": 3, "epoch004-step5.ckpt": 4}
    assert best.describe() == f"{tmp_path}/best.ckpt (val/miou 0.6, the same as epoch001-step2.ckpt)"


@pytest.mark.parametrize(("before", "after", "kept"), [(1, 2, {0, 2}), (3, 1, {0, 1}), (2, 2, {0, 2})])
def test_a_resumed_run_keeps_its_best_also_in_another_folder(before, after, kept, tmp_path):
    """The number of kept files may change, and the folder may have moved; what is better replaces what is worse."""
    first, moved = tmp_path / "first", tmp_path / "moved"
    scores = [0.5, 0.2, 0.4, 0.6]
    best = BestCheckpoint(first, save_top_k=before)
    run = trainer(first, Fixed(val_miou=scores), best, epochs=2)
    run.fit(module(), data(2))
    run.save_checkpoint(first / "last.ckpt")
    first.rename(moved)
    again = BestCheckpoint(moved, save_top_k=after)
    trainer(moved, Fixed(val_miou=scores), again, epochs=3).fit(module(), data(2), ckpt_path=moved / "last.ckpt")
    assert epoch_of(moved / "best.ckpt") == 0
    assert {epoch_of(path) for path in moved.glob("*.ckpt") if path.name != "last.ckpt"} == kept
    trainer(moved, Fixed(val_miou=scores), again, epochs=4).fit(module(), data(2), ckpt_path=moved / "last.ckpt")
    assert epoch_of(moved / "best.ckpt") == 3


class Steps(pl.Callback):
    """Notes the steps at which the run validates."""

    def __init__(self, stop_at=None):
        self.steps, self.stop_at = [], stop_at

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.steps.append(trainer.global_step)

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.should_stop or trainer.current_epoch + 1 == self.stop_at


# three batches an epoch -> steps at which the run validates, and a part of the line before the run begins
LAST = {
    "ordinary": ({"max_epochs": 2}, [3, 6], ""),
    "epochs below the interval": ({"max_epochs": 2, "check_val_every_n_epoch": 10}, [6], "every_n_epoch 10 is above trainer.max_epochs 2"),
    "odd epochs": ({"max_epochs": 3, "check_val_every_n_epoch": 2}, [6, 9], "in epoch 3, which is no multiple of trainer.check_val_every"),
    "even epochs": ({"max_epochs": 2, "check_val_every_n_epoch": 2}, [6], ""),
    "part of an epoch": ({"max_epochs": 2, "val_check_interval": 2}, [2, 5, 6], "the last validation would be 1 batches before"),
    "half an epoch": ({"max_epochs": 1, "val_check_interval": 0.5}, [1, 2, 3], ""),
    "steps within an epoch": ({"max_steps": 5}, [3, 5], "the run ends after 5 batches, and the last validation would be 2"),
    "steps, no limit of epochs": ({"max_epochs": -1, "max_steps": 6}, [3, 6], ""),
    "steps and accumulation": ({"max_steps": 3, "accumulate_grad_batches": 2}, [2, 3], "after 5 batches"),
    "iterations": ({"max_epochs": -1, "max_steps": 7, "check_val_every_n_epoch": None, "val_check_interval": 4}, [4, 7], "no multiple of trainer.val_check_interval 4"),
    "iterations that divide": ({"max_epochs": -1, "max_steps": 8, "check_val_every_n_epoch": None, "val_check_interval": 4}, [4, 8], ""),
    "time": ({"max_epochs": 2, "val_check_interval": "00:01:00:00"}, [6], ""),
    "stopped by a callback": ({"max_epochs": 9, "check_val_every_n_epoch": 5, "stop_at": 2}, [6], "in epoch 9, which is no multiple"),
}  # fmt: skip


@pytest.mark.parametrize("case", LAST)
def test_a_run_validates_after_its_last_step(case, tmp_path, caplog):
    settings, expected, note = LAST[case]
    options = {"max_epochs": None, "num_sanity_val_steps": 0, **settings}
    steps = Steps(options.pop("stop_at", None))
    best = BestCheckpoint(tmp_path, monitor="val/loss")
    with caplog.at_level("INFO"):
        run = trainer(tmp_path, steps, JaccardCallback(), ConfusionPicture(), best, LastValidation(), **options)
        run.fit(module(), data(6))
    assert steps.steps == expected
    assert (tmp_path / "best.ckpt").exists()
    assert len(list((tmp_path / "confusion").iterdir())) == 1
    assert "val: mIoU" in caplog.text
    notes = [record.message for record in caplog.records if "a validation after the last step is added" in record.message]
    assert len(notes) == bool(note)
    assert all(note in line for line in notes)
    assert run.check_val_every_n_epoch == options.get("check_val_every_n_epoch", 1)


def test_a_run_without_validation_says_so_and_keeps_the_last_epoch(tmp_path):
    best = BestCheckpoint(tmp_path)
    run = trainer(tmp_path, JaccardCallback(), best, LastValidation(), epochs=2, limit_val_batches=0)
    with pytest.warns(UserWarning, match="the run has no validation, as trainer.limit_val_batches is 0"):
        run.fit(module(), data(2))
    assert epoch_of(tmp_path / "best.ckpt") == 1
