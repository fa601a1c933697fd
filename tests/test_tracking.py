"""Records of the trackers, read from their own files; class constants and statistics; the sweep."""

import csv
import io
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import wandb
import yaml
from PIL import Image
from pytorch_lightning.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_callbacks import Answers, batches, trainer
from test_cli import TINY, UNET
from torch.utils.data import DataLoader
from wandb.proto import wandb_internal_pb2
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
from wandb.sdk.lib.exit_hooks import ExitHooks

import mcseg
from mcseg import pictures
from mcseg.callbacks.objective_monitor import ObjectiveMonitor
from mcseg.callbacks.panels import ConfusionPicture
from mcseg.callbacks.scores import JaccardCallback
from mcseg.data import SyntheticData
from mcseg.losses import IoUWeightedLoss, JaccardLoss, MarginCalibrationLoss, SumLoss
from mcseg.margins import margin_offsets
from mcseg.run.main import main
from mcseg.run.recipes import RECIPES, recipe_names

SCENES = {"train_scenes": 4, "val_scenes": 2, "test_scenes": 2, "size": [32, 48], "crop_size": [32, 32]}
SYNTHETIC = ["--config", "synthetic", *(f"--data.{key}={value}" for key, value in SCENES.items()), *UNET, *TINY]


KEY = "0123456789abcdef" * 2 + "76543210"  # has the form of W&B's keys


def finish_wandb():
    """End the run and wait until the service has written the file."""
    wandb.finish()
    wandb.teardown()


def wandb_records(folder):
    """Yield the records of the only run in the folder; the format is LevelDB's log after a header of 7 bytes."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # too short for the header of a record
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += 7 + length
        parts += data[position - length : position]
        if kind in (1, 4):  # a record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_run(folder):
    """Return the configuration and the rows of the history, nested keys joined by ``/``."""
    config, history = {}, []
    for record in wandb_records(folder):
        updates = record.run.config if record.HasField("run") else record.config
        config |= {item.key: json.loads(item.value_json) for item in updates.update}
        if record.HasField("history"):
            history.append(
                {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            )
    return config, history


def csv_series(folder):
    """Return ``{key: [(step, value), ...]}`` of metrics.csv."""
    series = {}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value and key not in ("step", "epoch"):
                    series.setdefault(key, []).append((int(row["step"]), float(value)))
    return series


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """Return the folder of a run of two epochs with all three loggers, W&B's configuration and history, TensorBoard's events."""
    folder = tmp_path_factory.mktemp("tracked")
    loggers = ["--trainer.logger+=WandbLogger", "--trainer.logger+=TensorBoardLogger", "--trainer.logger.save_dir=."]
    objective = ["--model.objective=IoUWeightedLoss", "--model.objective.max_margin=3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_API_KEY", KEY)
        patch.chdir(folder)
        words = ["fit", *SYNTHETIC, *loggers, "--trainer.max_epochs=2", f"--trainer.default_root_dir={folder / 'run'}"]
        main([*words, *objective])
        finish_wandb()
    (events,) = (folder / "run").rglob("events.out.*")
    return folder / "run", *wandb_run(folder / "run"), EventAccumulator(str(events), {"images": 0, "tensors": 0}).Reload()


def test_the_key_of_wandb_is_in_no_file(tracked):
    folder = tracked[0].parent
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {".ckpt", ".yaml", ".csv", ".wandb", ".log"} <= {path.suffix for path in files}
    assert [str(path.relative_to(folder)) for path in files if KEY.encode() in path.read_bytes()] == []


def test_trackers_hold_the_numbers_of_metrics_csv(tracked):
    folder, _, history, events = tracked
    series = csv_series(folder)
    names = SyntheticData(**SCENES).class_names
    every = {"train/loss", "lr-AdamW", "val/loss", "val/miou", "val/pixel_accuracy", "val/classes_averaged"}
    every |= {f"train/{key}/{name}" for key in ("miss_weight", "false_alarm_weight") for name in names}
    every |= {f"objective/{side}_offset/{name}" for side in ("foreground", "background") for name in names}
    assert every <= series.keys()
    assert {key for key in series if key.startswith("val/iou/")} <= {f"val/iou/{name}" for name in names}
    assert [step for step, _ in series["train/loss"]] == [0, 1, 2, 3]
    assert [step for step, _ in series["val/miou"]] == [step for step, _ in series["train/running_iou/road"]] == [1, 3]
    for key, expected in series.items():
        assert [(row["trainer/global_step"], row[key]) for row in history if key in row] == expected, key
        logged = [(event.step, event.value) for event in events.Scalars(key)]
        assert logged == [(step, float(np.float32(value))) for step, value in expected], key


def test_trackers_of_a_resumed_run(tmp_path, monkeypatch):
    """Killed after its fourth step with a checkpoint of two; the W&B folder has the name that it has online."""
    folder, last = tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt"
    loggers = ["--trainer.logger+=WandbLogger", "--trainer.logger+=TensorBoardLogger", "--trainer.logger.save_dir=."]
    init, calls = wandb.init, []
    monkeypatch.setattr(wandb, "init", lambda **options: calls.append(options) or init(**options))
    main(["fit", *SYNTHETIC, *loggers, "--trainer.max_epochs=1", f"--trainer.default_root_dir={folder}"])
    finish_wandb()
    (first,) = folder.glob("wandb/offline-run-*")
    first.rename(first.with_name(first.name.removeprefix("offline-")))
    early = last.read_bytes()
    for _ in range(2):
        last.write_bytes(early)
        main(["fit", "--resume", str(folder), "--trainer.max_epochs=2"])
        finish_wandb()
    identity = first.name.rpartition("-")[2]
    assert {path.name.rpartition("-")[2] for path in folder.glob("wandb/offline-run-*")} == {identity}
    assert [options["id"] for options in calls] == [None, identity, identity]
    assert [options["resume"] for options in calls[1:]] == ["allow", "allow"]
    assert [path.name for path in (folder / "lightning_logs").iterdir()] == ["version_0"]
    events = EventAccumulator(str(folder / "lightning_logs" / "version_0")).Reload()
    for key, expected in csv_series(folder).items():
        logged = [(event.step, event.value) for event in events.Scalars(key)]
        assert logged == [(step, pytest.approx(value)) for step, value in expected], key
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3]


def test_offsets_are_those_of_the_counted_labels(tracked):
    data = SyntheticData(**SCENES)
    data.prepare_data()
    offsets = margin_offsets(data.class_pixels(), "miou", max_margin=3.0)
    series = csv_series(tracked[0])
    for side, expected in zip(("foreground", "background"), offsets, strict=True):
        logged = [series[f"objective/{side}_offset/{name}"] for name in data.class_names]
        assert logged == [[(0, value)] for value in expected.tolist()]


@pytest.mark.parametrize(
    ("key", "file", "step"),
    [
        ("val/confusion", "confusion/val-epoch001.png", 3),
        ("val/panel", "panels/val-epoch001.png", 3),
        ("objective/constants", "objective.png", 0),
    ],
)
def test_pictures_are_in_the_run_folder_and_in_the_trackers(tracked, key, file, step):
    folder, _, history, events = tracked
    with Image.open(folder / file) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    ((logged,), media) = next((row[f"{key}/filenames"], row) for row in history if f"{key}/filenames" in row)
    assert media["trainer/global_step"] == step
    with Image.open(next(folder.glob("wandb/offline-run-*/files")) / logged) as picture:
        assert np.array_equal(np.asarray(picture.convert("RGB")), pixels)
    (event,) = events.Images(key)
    assert event.step == step
    with Image.open(io.BytesIO(event.encoded_image_string)) as picture:
        assert np.array_equal(np.asarray(picture.convert("RGB")), pixels)


def test_trackers_hold_the_configuration(tracked):
    folder, config, _, events = tracked
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["data"]["class_path"] == "mcseg.data.SyntheticData"
    assert config["model"]["objective"]["init_args"]["max_margin"] == 3.0
    assert {key: config[key] for key in saved} == saved
    assert config["arch"] == "unet"  # Lightning's hyperparameters
    (text,) = events.Tensors("config/text_summary")
    assert json.loads(text.tensor_proto.string_val[0]) == saved


class Reports(Answers):
    """Its objective has the given statistics, one step after another."""

    def __init__(self, statistics=(), constants=None):
        super().__init__()
        self.statistics = iter(statistics)
        self.objective = torch.nn.Identity()
        if constants:
            self.objective.class_constants = constants

    def training_step(self, batch, index):
        self.objective.class_statistics = {"rate": torch.tensor(next(self.statistics))}
        return super().training_step(batch, index)

    def on_validation_start(self):
        self.objective.class_statistics = {"rate": torch.full((3,), 99.0)}  # must not be logged as training's


def test_statistics_are_averaged_over_the_steps_that_define_them(tmp_path):
    nan = math.nan
    steps = [[0.25, nan, nan], [0.75, 1.0, nan], [nan, 4.0, nan], [nan, 8.0, nan]]
    logger = CSVLogger(tmp_path, name="", version="")
    monitor = ObjectiveMonitor(["a", "b", "c"])
    run = trainer(tmp_path, [monitor], logger=logger, max_epochs=2, log_every_n_steps=1, limit_train_batches=2)
    run.fit(Reports(steps), batches()[2], batches()[2])
    series = {key: values for key, values in csv_series(tmp_path).items() if key != "train/loss"}
    assert series == {"train/rate/a": [(1, 0.5)], "train/rate/b": [(1, 1.0), (3, 6.0)]}
    assert not (tmp_path / "objective.png").exists()


def test_names_that_do_not_fit_the_objective(tmp_path):
    run = trainer(tmp_path, [ObjectiveMonitor(["a", "b"])])
    with pytest.raises(ValueError, match=r"class_names: found 2 names, expected 3, .* \(weight\)"):
        run.fit(Reports([[0.0] * 3] * 9, {"weight": torch.ones(3)}), batches()[2])


class Trains(pl.LightningModule):
    """Computes the objective of the batch's logits times a weight that stays 1."""

    def __init__(self, objective):
        super().__init__()
        self.save_hyperparameters({"num_classes": 3})
        self.objective = objective
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, index):
        return self.objective(self.weight * batch["logits"], batch["mask"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def summed():
    """Return a sum of two objectives with statistics, one with a constant, and one without either."""
    entries = [
        {"class_path": "mcseg.losses.JaccardLoss", "init_args": {"smooth": 0.0}},
        {"class_path": "mcseg.losses.IoUWeightedLoss", "init_args": {"max_margin": 2.0}},
        {"class_path": "mcseg.losses.CrossEntropyLoss", "init_args": {"weighting": "median_frequency"}},
        {"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"ignore_index": 255}},
    ]
    return SumLoss(3, entries).calibrate([60, 30, 10])


def samples(count=4):
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "logits": 2 * torch.randn(3, 4, 5, generator=generator),
            "mask": torch.randint(0, 3, (4, 5), generator=generator).masked_fill(torch.arange(5) == 0, 255),
        }
        for _ in range(count)
    ]


def expected_ratios(items):
    """Compute soft Jaccard and mean soft errors per class of all items as one batch, with NumPy."""
    z = np.concatenate([np.moveaxis(item["logits"].double().numpy(), 0, -1).reshape(-1, 3) for item in items])
    y = np.concatenate([item["mask"].numpy().ravel() for item in items])
    z, y = z[y != 255], y[y != 255]
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    mine = y[:, None] == np.arange(3)
    hits, alarms = (p * mine).sum(0), (p * ~mine).sum(0)
    return {
        "ratio": hits / (mine.sum(0) + alarms),
        "miss_rate": 1 - hits / mine.sum(0),
        "false_alarm_rate": alarms / (~mine).sum(0),
    }, (z, y)


def test_a_sum_logs_its_parts(tmp_path):
    items = samples()
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(tmp_path, [ObjectiveMonitor(["a", "b", "c"])], logger=logger, log_every_n_steps=9).fit(
        Trains(summed()), DataLoader(items, 4)
    )
    remaining = {key: values[0][1] for key, values in csv_series(tmp_path).items()}
    ratios, (z, y) = expected_ratios(items)
    for key, values in ratios.items():
        logged = [remaining.pop(f"train/JaccardLoss/{key}/{name}") for name in "abc"]
        assert logged == pytest.approx(values.tolist(), rel=1e-5)
    preds = z.argmax(1)
    iou = [((preds == k) & (y == k)).sum() / ((preds == k) | (y == k)).sum() for k in range(3)]
    assert [remaining.pop(f"train/IoUWeightedLoss/running_iou/{name}") for name in "abc"] == pytest.approx(iou)
    weights = {
        key: [remaining.pop(f"train/IoUWeightedLoss/{key}/{name}") for name in "abc"]
        for key in ("miss_weight", "false_alarm_weight")
    }
    union = np.array([((preds == k) | (y == k)).sum() for k in range(3)])
    share = np.bincount(y) / len(y)
    assert weights["miss_weight"] == pytest.approx((1 / union / (share / union).sum()).tolist())
    assert weights["false_alarm_weight"] == pytest.approx([w * i for w, i in zip(weights["miss_weight"], iou, strict=True)])
    constants = {
        "IoUWeightedLoss/background_offset": [
            2 * (m / 90) ** 0.25 * (10 / n) ** 0.5 for n, m in ((60, 40), (30, 70), (10, 90))
        ],
        "CrossEntropyLoss1/weight": [0.5, 1.0, 3.0],
    }
    for key, values in constants.items():
        assert [remaining.pop(f"objective/{key}/{name}") for name in "abc"] == pytest.approx(values)
    assert remaining.keys() == {f"objective/IoUWeightedLoss/foreground_offset/{name}" for name in "abc"}
    assert (tmp_path / "objective.png").is_file()


def test_statistics_of_classes_absent_from_the_batch():
    logits, target = torch.zeros(1, 3, 2, 2), torch.tensor([[[0, 0], [1, 255]]])
    for classes, ratio in (("present", math.nan), ("all", 0.0)):
        loss = JaccardLoss(smooth=0.0, classes=classes)
        assert loss.class_statistics == {}
        loss(logits, target)
        statistics = {key: values.tolist() for key, values in loss.class_statistics.items()}
        assert statistics["ratio"] == pytest.approx([2 / 3 / (2 + 1 / 3), 1 / 3 / (1 + 2 / 3), ratio], nan_ok=True)
        assert statistics["miss_rate"] == pytest.approx([2 / 3, 2 / 3, math.nan], nan_ok=True)
        assert statistics["false_alarm_rate"] == pytest.approx([1 / 3] * 3)
        loss(logits, torch.zeros(1, 2, 2).long())
        assert loss.class_statistics["false_alarm_rate"].isnan().tolist() == [True, False, False]
    loss = IoUWeightedLoss(3).calibrate([2, 1, 1])
    loss(logits, target)  # equal logits predict class 0
    assert loss.class_statistics["running_iou"].tolist() == pytest.approx([2 / 3, 0, math.nan], nan_ok=True)


def test_constants_exist_only_after_calibration():
    for loss in (MarginCalibrationLoss(3), SumLoss(3, summed().objectives)):
        assert loss.class_constants == {}
    names = {
        "LDAMLoss": "margin",
        "LogitAdjustmentLoss": "adjustment",
        "BalancedSoftmaxLoss": "adjustment",
        "CrossEntropyLoss": None,
    }
    for kind, name in names.items():
        loss = SumLoss(3, [{"class_path": f"mcseg.losses.{kind}"}]).calibrate([60, 30, 10])
        assert list(loss.class_constants) == ([f"{kind}/{name}"] if name else [])
        if name:
            assert torch.equal(loss.class_constants[f"{kind}/{name}"], loss.parts[0].class_terms)


DDP = """
import sys
sys.path.insert(0, {tests!r})
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch.utils.data import DataLoader
from test_tracking import ObjectiveMonitor, Trains, finish_wandb, samples, trainer
from mcseg.losses import JaccardLoss
loggers = [kind(save_dir={folder!r}, name="", version="") for kind in (CSVLogger, TensorBoardLogger, WandbLogger)]
objective = JaccardLoss(smooth=0.0)
run = trainer({folder!r}, [ObjectiveMonitor(["a", "b", "c"])], logger=loggers, strategy="ddp", devices=2, log_every_n_steps=9)
run.fit(Trains(objective), DataLoader(samples(), 2))
finish_wandb()
"""


@pytest.mark.slow
def test_two_processes_log_the_same_as_one(tmp_path):
    script = tmp_path / "run.py"
    folder = tmp_path / "out"
    script.write_text(DDP.format(tests=str(Path(__file__).parent), folder=str(folder)))
    here = {**os.environ, "PYTHONPATH": str(Path(mcseg.__file__).parents[1])}
    here.pop("WANDB_SERVICE", None)  # from an earlier test
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, check=False, env=here)
    assert done.returncode == 0, done.stderr[-3000:]
    series = csv_series(folder)
    for key, values in expected_ratios(samples())[0].items():
        logged = [series[f"train/{key}/{name}"] for name in "abc"]
        assert [len(rows) for rows in logged] == [1, 1, 1]
        assert [rows[0][1] for rows in logged] == pytest.approx(values.tolist(), rel=1e-5)
    _, history = wandb_run(folder)
    (events,) = folder.rglob("events.out.*")  # one file, as for one process
    scalars = EventAccumulator(str(events)).Reload()
    for key, ((step, value),) in series.items():
        assert [row[key] for row in history if key in row] == [value]
        assert [(event.step, event.value) for event in scalars.Scalars(key)] == [(step, float(np.float32(value)))]


@pytest.mark.parametrize("order", [1, -1], ids=["scorer first", "scorer last"])
@pytest.mark.parametrize("verb", ["validate", "test"])
def test_confusions_are_drawn_from_the_counts_of_jaccard_callback(tmp_path, monkeypatch, verb, order):
    drawn = []
    draw = pictures.confusion_picture
    monkeypatch.setattr(pictures, "confusion_picture", lambda *args: drawn.append(args) or draw(*args))
    target, preds, loader = batches()
    callbacks = [JaccardCallback(["sky", "road", "pole"]), ConfusionPicture()][::order]
    getattr(trainer(tmp_path, callbacks), verb)(Answers(), loader, verbose=False)
    ((counts, names),) = drawn
    kept = target != 255
    assert counts.tolist() == [[int((preds[kept & (target == i)] == j).sum()) for j in range(3)] for i in range(3)]
    assert names == ("sky", "road", "pole")
    assert [path.name for path in (tmp_path / "confusion").iterdir()] == [{"validate": "val", "test": "test"}[verb] + ".png"]


def test_confusions_in_training_and_without_jaccard_callback(tmp_path):
    loader = batches()[2]
    run = trainer(tmp_path, [JaccardCallback(["a", "b", "c"]), ConfusionPicture(every_n_epochs=2)], max_epochs=5)
    run.fit(Answers(), loader, loader)
    assert sorted(path.name for path in (tmp_path / "confusion").iterdir()) == [
        f"val-epoch{epoch:03d}.png" for epoch in (1, 3, 4)
    ]
    with pytest.raises(ValueError, match="found ConfusionPicture without a JaccardCallback"):
        trainer(tmp_path, [ConfusionPicture()]).validate(Answers(), loader)


@pytest.mark.parametrize(("classes", "cell"), [(2, 38), (65, 16), (150, 12)])
def test_confusion_cells_are_shades_of_the_recall(classes, cell):
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    counts[0, 0], counts[0, 1] = 3_000_000_000, 1_000_000_000  # 75 and 25 %; the row of class 1 has no pixels
    counts[2:, 0] = 7
    names = [f"c{index}" for index in range(classes)]
    picture = pictures.as_array(pictures.confusion_picture(counts, names)).astype(int)
    grey = (picture == 225).all(-1)  # the row of class 1, and perhaps pixels of letters
    row_of_class_1 = (grey.sum(1) >= classes * (cell - 1)).argmax()
    left, top = grey[row_of_class_1].argmax(), row_of_class_1 - cell
    corner = 3  # outside lines and numbers

    def at(row, column):
        return picture[top + row * cell + corner, left + column * cell + corner].tolist()

    def shade(share):
        return [round(255 + (dark - 255) * math.sqrt(share)) for dark in (8, 48, 107)]

    assert at(0, 0) == shade(0.75)
    assert at(0, 1) == shade(0.25)
    assert [at(1, column) for column in range(classes)] == [[225] * 3] * classes
    if classes > 2:
        assert at(2, 0) == at(classes - 1, 0) == shade(1)
        assert at(0, 2) == at(classes - 1, classes - 1) == [255] * 3
    first_cell = picture[top + corner : top + cell - corner, left + corner : left + cell - corner]
    assert (first_cell != shade(0.75)).any() == (classes == 2)  # numbers only if they fit


def test_bars_are_to_scale():
    palette = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (9, 9, 9)]
    values = {"x": torch.tensor([2.0, -1.0, 1.0, math.nan]), "y": torch.tensor([0.0, 1e-6, 0.0, 0.0])}
    picture = pictures.as_array(pictures.class_values_picture(values, ["a", "b", "c", "d"], palette))
    widths = [int((picture == color).all(-1).sum(1).max()) for color in palette]
    # 240 pixels from -1 to 2, and 240 for 1e-6 in the second column; a bar's outline takes one pixel
    assert widths == [2 * 80 - 1, 80 - 1 + 240 - 1, 80 - 1, 0]
    lefts = [int((picture == color).all(-1).any(0).argmax()) for color in palette[:3]]
    assert lefts[0] == lefts[2]


def test_the_sweep_file_is_valid_for_wandb_and_the_command(tmp_path):
    sweep = yaml.safe_load((RECIPES.parent / "sweeps" / "margin_calibration.yaml").read_text())
    # Top-level keys and keys of parameters as documented by W&B; its server warns of other keys
    assert set(sweep) <= {
        *("name", "description", "program", "command", "method", "metric", "parameters", "early_terminate", "run_cap"),
        *("entity", "project"),
    }
    assert sweep["method"] == "bayes"
    assert sweep["metric"] == {"name": "val/miou", "goal": "maximize"}
    assert sweep["early_terminate"].keys() == {"type", "min_iter"}
    assert {key.rpartition(".")[2] for key in sweep["parameters"]} == {"tau", "upsilon"}
    for parameter in sweep["parameters"].values():
        assert parameter.keys() == {"values"} or (
            parameter.keys() == {"distribution", "min", "max"}
            and parameter["distribution"] == "log_uniform_values"
            and 0 < parameter["min"] < parameter["max"]
        )

    # As wandb's agent builds the command
    first = {key: {"value": value.get("values", [value.get("min")])[0]} for key, value in sweep["parameters"].items()}
    macros = create_sweep_command_args({"args": first}) | {"env": ["/usr/bin/env"], "program": [sweep["program"]]}
    words = []
    for word in create_sweep_command(list(sweep["command"])):
        words += macros[word[2:-1]] if word.startswith("${") else [word]
    assert words[:3] == ["/usr/bin/env", "mcseg", "fit"]
    # An absolute path, as W&B's service resolves a relative one in the working directory of the process's first run
    main([*words[2:], *SYNTHETIC[2:], f"--trainer.default_root_dir={tmp_path}"])
    finish_wandb()
    kept = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["hyper_parameters"]["objective"][
        "init_args"
    ]
    for key, value in first.items():
        assert kept[key.rpartition(".")[2]] == value["value"]
    # The parameters have an effect: the checkpoint has the offsets of the first trial, and other values give other offsets
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    pixels = SyntheticData(**SCENES).class_pixels()
    tau, upsilon = (first[f"model.objective.{key}"]["value"] for key in ("tau", "upsilon"))
    expected = margin_offsets(pixels, "ijcv2022", tau, upsilon)
    assert torch.equal(state["objective.foreground_offsets"], expected.foreground)
    assert torch.equal(state["objective.background_offsets"], expected.background)
    assert not torch.equal(margin_offsets(pixels, "ijcv2022", 2 * tau, upsilon).foreground, expected.foreground)
    _, history = wandb_run(tmp_path)
    assert sum("val/miou" in row for row in history) == 1
    assert "sweeps" not in " ".join(recipe_names())


def test_wandb_records_a_failure(monkeypatch, capsys):
    """Otherwise a sweep counts a failed run as finished."""
    monkeypatch.setattr(sys, "exit", sys.exit)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    hooks = ExitHooks()
    hooks.hook()
    with pytest.raises(SystemExit):
        main(["fit", "--model.arch", "unett"])
    assert hooks.exit_code == 1
