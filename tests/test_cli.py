"""The command in process: every recipe through every verb on small data; errors in one line."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
import yaml
from conftest import break_three, write_png
from PIL import Image

from mcseg.cli import RECIPES, main
from mcseg.module import SegmentationModule

TINY = [
    "--model.encoder",
    "tu-test_resnet.r160_in1k",
    "--model.network_options",
    '{"decoder_channels": [16, 16, 8, 8, 8]}',
    "--trainer.max_epochs",
    "1",
    "--trainer.accelerator",
    "cpu",
    "--trainer.enable_progress_bar",
    "false",
    "--trainer.enable_model_summary",
    "false",
    "--trainer.log_every_n_steps",
    "1",
    "--trainer.check_val_every_n_epoch",
    "1",
    "--data.num_workers",
    "0",
    "--data.batch_size",
    "2",
]


@pytest.fixture
def arguments(camvid_root, photo_folder):
    """What each recipe needs to run on small data."""
    return {
        "synthetic": [
            "--data.train_scenes",
            "4",
            "--data.val_scenes",
            "2",
            "--data.test_scenes",
            "2",
            "--data.size",
            "[32,48]",
            "--data.crop_size",
            "[32,32]",
        ],
        "camvid": ["--data.root", str(camvid_root), "--data.crop_size", "[32,32]"],
        "folder": ["--data.root", str(photo_folder), "--data.crop_size", "[32,32]"],
    }


def fails(capsys, words, code=1):
    """Run, expect the exit code, and return what was said on standard error."""
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == code
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mcseg: error")]
    assert len(said) == 1
    return said[0]


def run_folder(recipe):
    folders = sorted((Path("runs") / recipe).iterdir(), key=lambda path: path.stat().st_mtime)
    return folders[-1]


def logged_rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.filterwarnings("ignore:.*no test split found")
@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_through_every_verb(recipe, arguments, photo_folder, caplog):
    common = ["--config", recipe, *arguments[recipe], *TINY]
    with caplog.at_level("INFO", "pytorch_lightning.utilities.rank_zero"):
        main(["fit", *common])
    folder = run_folder(recipe)
    text = "\n".join(caplog.messages)
    assert f"run folder: {folder}" in text
    assert "val: mIoU" in text
    for name in (
        "metrics.csv",
        "config.yaml",
        "curves.png",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "panels/val-epoch000.png",
    ):
        assert (folder / name).is_file(), name
    rows = logged_rows(folder)
    logged = next(float(row["val/miou"]) for row in rows if row.get("val/miou"))
    assert any(row.get("lr-AdamW") for row in rows)

    checkpoint = str(folder / "checkpoints" / "best.ckpt")
    main(["validate", *common, "--ckpt_path", checkpoint])
    scored = float(logged_rows(run_folder(recipe))[0]["val/miou"])
    assert scored == pytest.approx(logged, abs=1e-6)
    main(["test", *common, "--ckpt_path", checkpoint])
    assert 0 <= float(logged_rows(run_folder(recipe))[0]["test/miou"]) <= 1

    main(["predict", *common, "--ckpt_path", checkpoint, "--data.predict_root", str(photo_folder / "images")])
    out = run_folder(recipe)
    for image in (photo_folder / "images").iterdir():
        with Image.open(out / "masks" / f"{image.stem}.png") as file:
            assert file.size == (32, 24)
            assert file.mode == "P"
    assert len(list((out / "overlays").iterdir())) == 10


def test_checkpoint_from_the_command_line_in_python(arguments):
    main(
        [
            "fit",
            "--config",
            "synthetic",
            *arguments["synthetic"],
            *TINY,
            "--model.objective.tau",
            "3",
            "--model.optimizer.lr",
            "0.005",
        ]
    )
    path = run_folder("synthetic") / "checkpoints" / "best.ckpt"
    hparams = torch.load(path, weights_only=True)["hyper_parameters"]
    assert hparams["objective"]["init_args"]["tau"] == 3.0
    assert hparams["num_classes"] == 8
    module = SegmentationModule.load_from_checkpoint(path, weights_only=True).eval()
    assert module.objective.tau == 3.0
    assert module.objective.is_calibrated
    assert module.optimizer(module.parameters()).defaults["lr"] == 0.005
    assert module(torch.zeros(1, 3, 20, 20)).shape == (1, 8, 20, 20)


@pytest.mark.parametrize(
    "objective",
    [
        ["--model.objective", "torch.nn.CrossEntropyLoss", "--model.objective.ignore_index", "255"],
        [
            "--model.objective",
            "segmentation_models_pytorch.losses.DiceLoss",
            "--model.objective.mode",
            "multiclass",
            "--model.objective.ignore_index",
            "255",
        ],
        [
            "--model.objective",
            "MarginCalibrationLoss",
            "--model.objective.scheme",
            "miou",
            "--model.objective.max_margin",
            "2",
        ],
    ],
    ids=lambda words: words[1],
)
def test_any_objective_by_its_name(arguments, objective):
    main(["fit", "--config", "synthetic", *arguments["synthetic"], *TINY, *objective])
    path = run_folder("synthetic") / "checkpoints" / "best.ckpt"
    assert objective[1].endswith(type(SegmentationModule.load_from_checkpoint(path).objective).__name__)
    main(["validate", "--config", "synthetic", *arguments["synthetic"], *TINY, "--ckpt_path", str(path)])


def test_recipe_of_the_users_own_and_layering(arguments, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("trainer: {max_steps: 2}\nmodel: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.25}}}\n")
    words = [word for word in TINY if word not in ("--trainer.max_epochs",)]
    words.remove("1")
    main(["fit", "--config=synthetic", "--config", str(mine), *arguments["synthetic"], *words])
    saved = yaml.safe_load((run_folder("synthetic") / "config.yaml").read_text())
    assert saved["model"]["optimizer"] == {
        "class_path": "torch.optim.SGD",
        "init_args": saved["model"]["optimizer"]["init_args"],
    }
    assert saved["model"]["optimizer"]["init_args"]["lr"] == 0.25
    assert saved["trainer"]["max_steps"] == 2
    assert saved["data"]["init_args"]["train_scenes"] == 4


def test_saved_config_repeats_the_run_in_a_new_folder(arguments):
    main(["fit", "--config", "synthetic", *arguments["synthetic"], *TINY])
    first = run_folder("synthetic")
    main(["fit", "--config", str(first / "config.yaml")])
    second = run_folder("config")
    assert logged_rows(first) == logged_rows(second)  # to the last digit, though the second found the label counts cached
    assert len(list((first / "checkpoints").iterdir())) == 2


def test_resuming_from_the_command_line(arguments):
    common = ["fit", "--config", "synthetic", *arguments["synthetic"], *TINY]
    main(common)
    last = run_folder("synthetic") / "checkpoints" / "last.ckpt"
    main([*common, "--trainer.max_epochs", "3", "--ckpt_path", str(last)])
    assert torch.load(run_folder("synthetic") / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 2


def test_wandb_offline_twice_into_one_place(arguments, tmp_path):
    words = [
        "fit",
        "--config",
        "synthetic",
        *arguments["synthetic"],
        *TINY,
        "--trainer.logger",
        "WandbLogger",
        "--trainer.default_root_dir",
        str(tmp_path / "same"),
    ]
    for _ in range(2):
        main(words)
        wandb.finish()
    runs = list((tmp_path / "same" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert list(runs[0].rglob("*.png"))  # the panel
    assert (tmp_path / "same" / "config.yaml").is_file()


def test_stats(arguments, camvid_root, capsys):
    write_png(camvid_root / "trainannot" / "0001TP_006690.png", np.full((9, 12), 3, dtype=np.uint8))
    main(
        [
            "stats",
            "--config",
            "camvid",
            *arguments["camvid"],
            "--trainer.default_root_dir",
            "out",
            "--model.objective.tau",
            "2",
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    first = lines[1].split()
    assert first[:2] == ["road", "126"]  # 108 of the changed mask and 9 in each of the two others
    assert float(first[2]) == pytest.approx(100 * 126 / 306, abs=1e-3)
    assert float(first[4]) == pytest.approx(2 * (306 - 126) ** 0.5 / 126, rel=1e-3)
    with Image.open("out/class_shares.png") as file:
        assert file.width > 500


def test_check_of_good_data(arguments, capsys):
    main(["check", "--config", "folder", *arguments["folder"]])
    assert capsys.readouterr().out.splitlines()[-1] == "no problems found"


def test_bad_files_are_listed_by_check_and_stop_fit_at_once(arguments, photo_folder, capsys):
    break_three(photo_folder)
    with pytest.raises(SystemExit) as end:
        main(["check", "--config", "folder", *arguments["folder"]])
    assert end.value.code == 1
    out = capsys.readouterr().out
    for expected in (
        "photo 2.jpg: cannot be read",
        "photo 5.png: 1 pixels of the mask have the unknown values 7",
        "photo 8.png: the mask is 32x12 pixels",
        "3 problems found",
    ):
        assert expected in out
    said = fails(capsys, ["fit", "--config", "folder", *arguments["folder"], *TINY])
    assert "photo 8.png: the mask is 32x12" in said or "photo 2.jpg: cannot be read" in said
    assert not list(Path().rglob("*.ckpt"))


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_bad_file_found_by_a_worker_is_one_line(arguments, photo_folder, capsys, workers):
    """The header is sound, so the file is only found when its pixels are decoded, in another process."""
    for photo in (photo_folder / "images").iterdir():
        photo.write_bytes(photo.read_bytes()[:-200])
    said = fails(capsys, ["fit", "--config", "folder", *arguments["folder"], *TINY, "--data.num_workers", workers])
    assert "cannot be read" in said
    assert "Traceback" not in said
    assert said.startswith("mcseg: error: " + str(photo_folder))


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (
            ["fit", "--config", "cityscape"],
            1,
            "--config cityscape: neither a file nor a recipe of mcseg; the recipes are camvid, folder, synthetic",
        ),
        (["fit", "--config", "camvid"], 1, "data.root is not set"),
        (["fit", "--config", "folder", "--data.root", "nowhere"], 1, "data.root: no folder nowhere"),
        (["test", "--config", "synthetic"], 1, "mcseg test needs trained weights: give --ckpt_path"),
        (["predict"], 1, "mcseg predict needs trained weights"),
        (["validate", "--ckpt_path", "nowhere.ckpt"], 1, "nowhere.ckpt"),
        (["fit", "--model.encodr", "x"], 2, "model.encodr"),
        (["fit", "--trainer.max_epochs", "many"], 2, "trainer.max_epochs"),
        (["fit", "--model.arch", "unett"], 1, "network unett"),
        (["fit", "--model.objective.tau", "-1"], 1, "tau: found -1.0, expected a finite number > 0"),
        (["fit", "--model.objective", "null"], 1, "model.objective: found null"),
        (["frobnicate"], 2, "frobnicate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_are_one_line(capsys, words, code, expected):
    assert expected in fails(capsys, words, code)
    assert not Path("runs").exists()


def test_help_lists_verbs_and_recipes(capsys):
    main(["--help"])
    out = capsys.readouterr().out
    for word in ("fit", "validate", "test", "predict", "stats", "check", "camvid, folder, synthetic"):
        assert word in out


def test_verb_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--help"])
    assert end.value.code == 0
    assert "--model.arch" in capsys.readouterr().out


def test_no_run_folder_name_is_used_twice(arguments, monkeypatch):
    class Clock:
        @staticmethod
        def now():
            from datetime import datetime

            return datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr("mcseg.cli.datetime", Clock)
    for _ in range(2):
        main(["fit", "--config", "synthetic", *arguments["synthetic"], *TINY])
    assert sorted(os.listdir("runs/synthetic")) == ["20260102-030405", "20260102-030405-2"]
