"""Checkpoints and config files of earlier versions: objectives, schedule and state."""

import inspect
import shutil
from functools import partial

import pytest
import torch
import yaml

from mcseg import SegmentationModule
from mcseg.callbacks import BestCheckpoint, LastCheckpoint
from mcseg.checkpoints.translate import rename_checkpoint_callbacks, translate_config, translate_hyperparameters
from mcseg.losses import CrossEntropyLoss, DiceLoss, IoUWeightedLoss, JaccardLoss, MarginCalibrationLoss, SumLoss
from mcseg.run.main import main

LOSS = "mcseg.losses.MarginCalibrationLoss"
# Former arguments as the command line stored them, most of them without effect
ALL = {
    "num_classes": 3,
    "scheme": "ijcv2022",
    "tau": 10.0,
    "upsilon": 1.0,
    "foreground_weight": None,
    "ignore_index": 255,
    "reduction": "mean",
    "backend": "auto",
    "max_margin": 1.0,
    "margin": "hard",
    "surrogate": "log",
    "aggregation": "sum",
    "weighting": "foreground",
    "false_alarm_weight": 1.0,
    "classes": "present",
    "smooth": 1.0,
    "decay": 0.95,
    "power": 1.0,
}
SOFT = {"scheme": "none", "margin": "soft", "surrogate": "sigmoid"}
SUCCESSORS = {
    "power dice": ({**SOFT, "power": 0.5, "aggregation": "dice", "classes": "all"}, DiceLoss(power=0.5, classes="all")),
    "soft jaccard": ({**SOFT, "aggregation": "jaccard", "smooth": 2.0}, JaccardLoss(smooth=2.0)),
    "iou": ({"scheme": "miou", "max_margin": 2.0, "weighting": "iou", "decay": 0.9}, IoUWeightedLoss(3, 2.0, 0.9)),
    "paper": ({"tau": 3.0, "max_margin": 7.0}, MarginCalibrationLoss(3, tau=3.0)),
    "miou": ({"scheme": "miou", "max_margin": 7.0, "tau": 3.0}, MarginCalibrationLoss(3, "miou", max_margin=7.0)),
    "uniform": ({"weighting": "uniform"}, MarginCalibrationLoss(3, foreground_weight=1.0)),
}
GONE = [
    {"margin": "soft", "surrogate": "sigmoid", "aggregation": "dice", "scheme": "miou"},  # offsets of a region loss
    {"aggregation": "jaccard"},  # a ratio of hard margins
    {"margin": "soft"},  # soft margins with the log
    {"false_alarm_weight": 0.5},
    {"weighting": "iou", "scheme": "none"},
]


def settings_of(objective):
    return repr(objective).replace(", calibrated=True", "").replace(", calibrated=False", "")


def stored(given, every):
    return {"class_path": LOSS, "init_args": {**ALL, **given} if every else {"num_classes": 3, **given}}


@pytest.mark.slow
@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize(("given", "expected"), SUCCESSORS.values(), ids=SUCCESSORS)
def test_objectives_have_their_successors(given, expected, every, tmp_path):
    """A checkpoint with former arguments loads in Python with the successor, reported in one line."""
    module = SegmentationModule("unet", "tu-test_resnet.r160_in1k", num_classes=3, objective=expected)
    hyper_parameters = {**module.hparams, "objective": stored(given, every)}
    state = module.state_dict()
    for side in ("foreground_offsets", "background_offsets"):  # MarginCalibrationLoss always had them
        state.setdefault(f"objective.{side}", torch.zeros(3, dtype=torch.float64))
    torch.save(
        {"state_dict": state, "hyper_parameters": hyper_parameters, "pytorch-lightning_version": "2.5.0"},
        tmp_path / "a.ckpt",
    )
    loaded = SegmentationModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert settings_of(loaded.objective) == settings_of(expected)
    assert loaded.state_dict().keys() == module.state_dict().keys()
    _, remarks = translate_hyperparameters(hyper_parameters)
    if type(expected) is MarginCalibrationLoss and "weighting" not in given:
        assert remarks == []
    else:
        assert len(remarks) == 1
        assert f"mcseg.losses.{type(expected).__name__}" in remarks[0]
        assert "\n" not in remarks[0]


@pytest.mark.parametrize("given", GONE, ids=str)
def test_an_objective_without_successor_is_refused_in_one_line(given, tmp_path):
    hyper_parameters = {"num_classes": 3, "objective": stored(given, every=True)}
    with pytest.raises(ValueError, match="no successor") as caught:
        translate_hyperparameters(hyper_parameters)
    message = str(caught.value)
    assert "\n" not in message
    assert all(f"{name} {value}" in message for name, value in given.items())
    # The weights load with another objective
    module = SegmentationModule("unet", "tu-test_resnet.r160_in1k", num_classes=3, objective=CrossEntropyLoss())
    state = module.state_dict() | {"objective.foreground_offsets": torch.zeros(3, dtype=torch.float64)}
    torch.save(
        {
            "state_dict": state,
            "hyper_parameters": {**module.hparams, **hyper_parameters},
            "pytorch-lightning_version": "2.5.0",
        },
        tmp_path / "a.ckpt",
    )
    labels = SegmentationModule.load_from_checkpoint(tmp_path / "a.ckpt")  # only training needs the objective
    assert all(torch.equal(value, state[f"network.{name}"]) for name, value in labels.network.state_dict().items())
    with pytest.raises(ValueError, match="MarginCalibrationLoss cannot be built.*no successor.*training needs it") as caught:
        labels.setup("fit")
    assert "\n" not in str(caught.value)
    loaded = SegmentationModule.load_from_checkpoint(tmp_path / "a.ckpt", objective=partial(CrossEntropyLoss))
    assert isinstance(loaded.objective, CrossEntropyLoss)


def test_sums_are_translated_part_by_part_and_other_objectives_are_unchanged():
    entries = [{**stored({**SOFT, "aggregation": "dice"}, every=True), "weight": 0.3}, {"class_path": "torch.nn.Identity"}]
    before = {"objective": {"class_path": "mcseg.losses.SumLoss", "init_args": {"num_classes": 3, "objectives": entries}}}
    after, remarks = translate_hyperparameters(before)
    assert len(remarks) == 1
    loss = SumLoss(**after["objective"]["init_args"])
    assert repr(loss.parts[0]) == repr(DiceLoss())
    assert loss.weights == [0.3, 1.0]
    for objective in (
        None,
        {"class_path": "mcseg.losses.DiceLoss", "init_args": {"power": 0.5}},
        {"class_path": "mine.Loss"},
    ):
        assert translate_hyperparameters({"objective": objective, "arch": "fpn"}) == (
            {"objective": objective, "arch": "fpn"},
            [],
        )


NEW = "mcseg.schedules.WarmupPolynomialLR"
STEP = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 3}}


def test_settings_of_the_polynomial_schedule_become_its_arguments():
    old = {"num_classes": 3, "scheduler": None, "lr_power": 0.5, "warmup_steps": 7}
    found, (remark,) = translate_hyperparameters(old)
    assert found == {"num_classes": 3, "scheduler": {"class_path": NEW, "init_args": {"power": 0.5, "warmup_steps": 7}}}
    assert "scheduler: lr_power and warmup_steps are read as" in remark
    assert old == {"num_classes": 3, "scheduler": None, "lr_power": 0.5, "warmup_steps": 7}  # not modified


def test_the_default_is_the_schedule_of_checkpoints_that_name_none():
    assert translate_hyperparameters({"scheduler": None}) == ({}, [])  # leaves the choice to the module's default
    default = inspect.signature(SegmentationModule).parameters["scheduler"].default
    schedule = default(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1))
    assert (type(schedule).__name__, schedule.power, schedule.warmup_steps) == ("WarmupPolynomialLR", 0.9, 0), (
        "write the schedule of earlier versions into checkpoints/translate.py:_schedule before changing the default"
    )


def test_another_schedule_stays_and_settings_without_effect_are_dropped():
    assert translate_hyperparameters({"scheduler": STEP, "lr_power": 0.5, "warmup_steps": 7}) == (
        {"scheduler": STEP, "scheduler_interval": "step"},
        ["scheduler: StepLR of an earlier version counts optimiser steps (scheduler_interval step)"],
    )


def test_arguments_of_this_version_stay_as_they_are():
    plain = dict(SegmentationModule("unet", "tu-test_resnet.r160_in1k", num_classes=3).hparams)
    assert translate_hyperparameters(plain) == (plain, [])
    assert plain["scheduler"] == {"class_path": NEW}


def old_checkpoint(path):
    objective = torch.nn.CrossEntropyLoss(ignore_index=255)
    module = SegmentationModule("unet", "tu-test_resnet.r160_in1k", num_classes=8, objective=objective)
    arguments = {**module.hparams, "scheduler": None, "lr_power": 0.5, "warmup_steps": 7}
    content = {"state_dict": module.state_dict(), "hyper_parameters": arguments, "pytorch-lightning_version": "2.6.6"}
    torch.save(content, path)
    return path


def test_an_old_checkpoint_loads_from_python(tmp_path):
    path = old_checkpoint(tmp_path / "old.ckpt")
    module = SegmentationModule.load_from_checkpoint(path)
    schedule = module.scheduler(torch.optim.SGD(module.parameters(), lr=0.1))
    assert (type(schedule).__name__, schedule.power, schedule.warmup_steps) == ("WarmupPolynomialLR", 0.5, 7)
    assert module.hparams["scheduler"]["init_args"] == {"power": 0.5, "warmup_steps": 7}
    assert not {"lr_power", "warmup_steps"} & set(module.hparams)
    # The caller's argument takes precedence over the stored one
    other = SegmentationModule.load_from_checkpoint(path, scheduler=torch.optim.lr_scheduler.ConstantLR)
    assert other.scheduler is torch.optim.lr_scheduler.ConstantLR


def test_an_old_checkpoint_loads_from_the_command(tmp_path, caplog):
    path = old_checkpoint(tmp_path / "old.ckpt")
    words = ["--data.num_workers=0", "--data.val_scenes=2", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    with caplog.at_level("INFO"):
        main(["validate", "--ckpt_path", str(path), *words, "--trainer.enable_progress_bar=false"])
    assert "old.ckpt: scheduler: lr_power and warmup_steps are read as" in caplog.text
    assert "mIoU" in caplog.text


def former_settings(model):
    """Settings of a module as an earlier version wrote them, for power Dice and the polynomial schedule."""
    objective = stored({**SOFT, "power": 0.5, "aggregation": "dice", "classes": "all"}, every=True)
    del objective["init_args"]["num_classes"]  # config.yaml does not repeat what is linked
    return {**model, "objective": objective, "scheduler": None, "lr_power": 0.9, "warmup_steps": 0}


@pytest.mark.slow
@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_a_run_of_an_earlier_version_is_resumed(with_checkpoint, tmp_path, caplog):
    """Its config.yaml and last.ckpt are translated; the weights are those of a run with today's settings."""
    today, former = tmp_path / "today", tmp_path / "former"
    words = ["--data.num_workers=0", "--data.train_scenes=4", "--data.val_scenes=2", "--data.batch_size=2"]
    words += ["--data.size=[32,48]", "--data.crop_size=[32,32]", "--model.encoder=tu-test_resnet.r160_in1k"]
    words += ["--trainer.accelerator=cpu", "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"]
    main(["fit", *words, "--trainer.limit_train_batches=1", "--trainer.default_root_dir", str(today)])
    shutil.copytree(today, former)
    config = yaml.safe_load((former / "config.yaml").read_text())
    config["model"] = former_settings(config["model"])
    (former / "config.yaml").write_text(yaml.safe_dump(config))
    last = former / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["hyper_parameters"] = former_settings(checkpoint["hyper_parameters"])
    checkpoint["state_dict"]["objective.foreground_offsets"] = torch.zeros(8, dtype=torch.float64)
    checkpoint["state_dict"]["objective.background_offsets"] = torch.zeros(8, dtype=torch.float64)
    del checkpoint["mcseg_version"]
    torch.save(checkpoint, last)
    if not with_checkpoint:
        shutil.rmtree(today / "checkpoints")
        shutil.rmtree(former / "checkpoints")
    for folder in (today, former):
        with caplog.at_level("INFO"):
            caplog.clear()
            main(["fit", "--resume", str(folder), "--trainer.max_epochs=4"])
    for text in ("MarginCalibrationLoss of an earlier version", "lr_power and warmup_steps are read as"):
        assert [line.count(text) for line in caplog.messages if text in line] == [1] * (1 + with_checkpoint)
    assert f"{former / 'config.yaml'}: objective: MarginCalibrationLoss" in caplog.text
    settings = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in (today, former)]
    assert [written["trainer"]["max_epochs"] for written in settings] == [4, 4]
    assert settings[0]["model"]["objective"]["init_args"] == settings[1]["model"]["objective"]["init_args"]
    one, other = (torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (today, former))
    assert one["epoch"] == other["epoch"] == 3
    objectives = [part["hyper_parameters"].pop("objective") for part in (one, other)]
    assert objectives[0]["init_args"] == objectives[1]["init_args"]
    assert [objective["class_path"].rpartition(".")[2] for objective in objectives] == ["DiceLoss"] * 2
    assert one["hyper_parameters"] == other["hyper_parameters"]
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert all(torch.equal(weights, other["state_dict"][name]) for name, weights in one["state_dict"].items())
    assert (today / "metrics.csv").read_text() == (former / "metrics.csv").read_text()


def test_config_files_without_former_settings_stay_as_they_are():
    """Also arguments without effect, which the objective refuses by name."""
    entries = [{"class_path": LOSS, "init_args": {"scheme": "miou"}}, {"class_path": "torch.nn.Identity"}]
    for content in (
        {},
        {"model": None},
        {"model": {"arch": "unet", "scheduler": None}},
        {"model": {"objective": "DiceLoss", "scheduler": STEP}},
        {"model": {"objective": {"class_path": LOSS, "init_args": {"scheme": "miou", "tau": 3.0}}}},
        {"model": {"objective": {"init_args": {"power": 0.5}}}},
        {"model": {"objective": {"class_path": "mcseg.losses.DiceLoss", "init_args": {"power": 0.5}}}},
        {"model": {"objective": {"class_path": "mcseg.losses.SumLoss", "init_args": {"objectives": entries}}}},
    ):
        assert translate_config(content) == (content, [])
    entries.append(stored({**SOFT, "aggregation": "dice"}, every=False))
    content = {"model": {"objective": {"class_path": "mcseg.losses.SumLoss", "init_args": {"objectives": entries}}}}
    after, (remark,) = translate_config({"seed_everything": 3, **content})
    assert after["seed_everything"] == 3
    assert after["model"]["objective"]["init_args"]["objectives"][2]["class_path"] == "mcseg.losses.DiceLoss"
    assert "DiceLoss" in remark


def test_a_config_file_whose_objective_has_no_successor_is_named(tmp_path, capsys):
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump({"model": {"objective": stored(GONE[1], every=True)}}))
    with pytest.raises(SystemExit):
        main(["fit", "synthetic", "--config", str(path)])
    assert f"--config {path}: objective: MarginCalibrationLoss" in capsys.readouterr().err


def test_states_of_the_checkpoint_callbacks_of_an_earlier_version():
    """The keys are those that Lightning 2.6 wrote; the best score of the run so far must survive."""
    best = "ModelCheckpoint{'monitor': 'val/miou', 'mode': 'max', 'every_n_train_steps': 0, 'every_n_epochs': 1, 'train_time_interval': None}"
    last = best.replace("'val/miou'", "None").replace("max", "min")
    wanted = {best.replace("Model", "Best", 1), last.replace("Model", "Last", 1)}
    states = {best: {"best_model_score": 0.5}, last: {"best_model_score": None}, "TrainingCurves": {}}
    rename_checkpoint_callbacks(states, wanted)
    assert states.keys() == wanted | {"TrainingCurves"}
    assert states[best.replace("Model", "Best", 1)]["best_model_score"] == 0.5
    assert {best.replace("Model", "Best", 1), last.replace("Model", "Last", 1)} == {
        BestCheckpoint("folder").state_key,
        LastCheckpoint("folder").state_key,
    }
    own = {best: {"best_model_score": 0.5}}
    rename_checkpoint_callbacks(own, {best, *wanted})  # a ModelCheckpoint of a user's own script
    assert own.keys() == {best}


def test_schedules_of_an_earlier_version_count_steps():
    """In checkpoints and in the config.yaml of a run; a recipe has this version's meaning."""
    step = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 2}}
    arguments, (remark,) = translate_hyperparameters({"scheduler": step})
    assert arguments == {"scheduler": step, "scheduler_interval": "step"}
    assert "StepLR of an earlier version counts optimiser steps" in remark
    for same in (
        {"scheduler": step, "scheduler_interval": None},
        {"scheduler": {"class_path": "mcseg.schedules.WarmupPolynomialLR"}},
    ):
        assert translate_hyperparameters(same) == (same, [])
    saved, (remark,) = translate_config({"ckpt_path": None, "model": {"scheduler": step}})
    assert saved["model"]["scheduler_interval"] == "step"
    recipe = {"model": {"scheduler": step}}
    assert translate_config(recipe) == (recipe, [])


def test_a_run_that_drew_images_by_their_order_keeps_its_split():
    settings = {"root": "photos", "split": "auto", "val_fraction": 0.2, "test_fraction": 0.0, "split_seed": 0}
    settings |= {"images_dir": "images", "masks_dir": "masks", "mask_suffix": ""}
    data = {"class_path": "mcseg.data.FolderData", "init_args": settings}
    after, (remark,) = translate_config({"data": data, "trainer": {}})
    assert after == {"data": {**data, "init_args": {**settings, "draw": "order"}}, "trainer": {}}
    assert remark == "data: a random split is kept as it was (draw order); new runs draw each image by its name"
    for same in ({**settings, "draw": "name"}, {"root": "photos", "val_fraction": 0.3}):  # a new run, a recipe
        content = {"data": {**data, "init_args": same}}
        assert translate_config(content) == (content, [])
