"""The command in process: every recipe through every verb on small data; errors in one line."""

import csv
import os
import pkgutil
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from functools import partial
from pathlib import Path

import fakes
import numpy as np
import pytest
import torch
import wandb
import yaml
from conftest import break_three, write_png
from PIL import Image

from mcseg.data import CamVidData
from mcseg.evaluation.inference import Inference
from mcseg.evaluation.metrics import score
from mcseg.losses import DiceLoss, default_objective
from mcseg.module import SegmentationModule
from mcseg.run.cli import ParseOnlyCLI
from mcseg.run.folder import run_folder as new_run_folder
from mcseg.run.main import main
from mcseg.run.recipes import RECIPES, expand_shorthand, find_recipes

UNET = ["--model.network_options", '{"decoder_channels": [16, 16, 8, 8, 8]}']
DEEPLAB = [
    "--model.network_options",
    '{"encoder_output_stride": 16, "decoder_channels": 16}',
]
TINY = [
    "--model.encoder",
    "tu-test_resnet.r160_in1k",
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


BENCHMARKS = {
    "bdd100k": fakes.bdd100k,
    "cityscapes": fakes.cityscapes,
    "cocostuff10k": fakes.cocostuff10k,
    "endovis2017": partial(fakes.endovis, sequences=(1, 2)),
    "mapillary_vistas": fakes.mapillary_vistas,
    "pascal_voc": partial(fakes.pascal_voc, test=True),
    "sceneparse150": fakes.sceneparse150,
}


@pytest.fixture
def arguments(camvid_root, photo_folder, tmp_path):
    """Return a function from the name of a recipe to its arguments for small data."""
    scenes = ["--data.train_scenes=4", "--data.val_scenes=2", "--data.test_scenes=2", "--data.size=[32,48]"]

    def of(recipe):
        crop = "--data.crop_size=[32,32]"
        if recipe == "synthetic":
            return [*scenes, crop, *UNET]
        if recipe not in BENCHMARKS:
            return [f"--data.root={camvid_root if recipe == 'camvid' else photo_folder}", crop, *UNET]
        arch = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))["model"]["arch"]
        network = DEEPLAB if arch == "deeplabv3plus" else UNET
        root = tmp_path / "benchmark data"
        if not root.exists():
            BENCHMARKS[recipe](root)
        return [f"--data.root={root}", crop, "--data.total_batch_size=2", "--model.encoder_weights=null", *network]

    return of


def fails(capsys, words, code=1):
    """Run, check the exit code, and return the error line."""
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mcseg: error")]
    return line


def run_folder(recipe):
    folders = sorted((Path("runs") / recipe).iterdir(), key=lambda path: path.stat().st_mtime)
    return folders[-1]


def logged_rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*using the validation split")
@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_through_every_verb(recipe, arguments, photo_folder, caplog):
    common = ["--config", recipe, *arguments(recipe), *TINY]
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
        "confusion/val-epoch000.png",
    ):
        assert (folder / name).is_file(), name
    rows = logged_rows(folder)
    logged = next(float(row["val/miou"]) for row in rows if row.get("val/miou"))
    assert any(value for row in rows for key, value in row.items() if key.startswith("lr-"))

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


# Label values that the server accepts, the name of one of its files, and its size
SUBMISSIONS = {
    "bdd100k": (set(range(19)), "ac6d4f42-00000000.png", (32, 18)),
    "cityscapes": (
        {7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33},
        "berlin_000000_000019.png",
        (40, 24),
    ),
    "mapillary_vistas": (set(range(65)), "2nTTdpqRbvXIqeTVEsqPSg.png", (22, 30)),
    "pascal_voc": (set(range(21)), "results/VOC2012/Segmentation/comp6_test_cls/2008_000006.png", (18, 26)),
    "sceneparse150": (set(range(1, 151)), "ADE_test_00000001.png", (18, 26)),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(SUBMISSIONS))
def test_submissions_have_the_servers_format(recipe, arguments, tmp_path):
    values, name, size = SUBMISSIONS[recipe]
    common = [
        "--config",
        recipe,
        *arguments(recipe),
        *TINY,
        "--trainer.limit_train_batches=1",
        "--trainer.limit_val_batches=1",
    ]
    main(["fit", *common])
    checkpoint = str(run_folder(recipe) / "checkpoints" / "last.ckpt")
    plain, submitted = tmp_path / "plain", tmp_path / "submitted"
    main(["predict", *common, "--ckpt_path", checkpoint, f"--writer.output_dir={plain}"])
    main(["predict", *common, "--ckpt_path", checkpoint, f"--writer.output_dir={submitted}", "--format", recipe])
    order = sorted(values)
    with Image.open(submitted / "submission" / name) as file, Image.open(plain / "masks" / Path(name).name) as train_ids:
        assert file.mode == ("P" if recipe == "pascal_voc" else "L")
        assert file.size == size
        assert np.asarray(file).tolist() == [[order[train] for train in row] for row in np.asarray(train_ids)]
        if recipe == "pascal_voc":
            assert file.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
    packed = sorted(p.relative_to(submitted / "submission").as_posix() for p in submitted.glob("submission/**/*.png"))
    assert len(packed) == 2
    if recipe == "pascal_voc":
        with tarfile.open(submitted / "pascal_voc.tar.gz") as archive:
            assert sorted(archive.getnames()) == packed
    else:
        with zipfile.ZipFile(submitted / f"{recipe}.zip") as archive:
            assert sorted(archive.namelist()) == packed
            assert archive.testzip() is None


def test_official_evaluation_of_a_submission_gives_the_logged_miou(arguments, tmp_path, monkeypatch):
    """Predictions of the validation split, scored by cityscapesscripts as on its server, have the scores of `validate`."""
    common = ["--config", "cityscapes", *arguments("cityscapes"), *TINY]
    main(["fit", *common])
    checkpoint = str(run_folder("cityscapes") / "checkpoints" / "best.ckpt")
    main(["validate", *common, "--ckpt_path", checkpoint])
    logged = logged_rows(run_folder("cityscapes"))[0]
    out = tmp_path / "out"
    options = ["--ckpt_path", checkpoint, f"--writer.output_dir={out}", "--data.predict_split", "val"]
    main(["predict", *common, *options, "--format", "cityscapes"])

    official = official_scores(tmp_path / "benchmark data", out / "submission")
    # Both averages leave out classes without target and predicted pixels
    assert float(logged["val/miou"]) == pytest.approx(official["averageScoreClasses"], abs=1e-6)
    for name, value in official["classScores"].items():
        if f"val/iou/{name}" in logged:
            assert float(logged[f"val/iou/{name}"]) == pytest.approx(value, abs=1e-6)


def official_scores(root, predictions):
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as evaluation

    truth = sorted(map(str, root.glob("gtFine/val/*/*_gtFine_labelIds.png")))
    names = [Path(path).name.replace("_gtFine_labelIds", "") for path in truth]
    args = evaluation.args
    args.evalInstLevelScore, args.JSONOutput, args.quiet = False, False, True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # divisions by zero for absent classes
        return evaluation.evaluateImgLists([str(predictions / name) for name in names], truth, args)


def test_two_stages_cross_entropy_then_margins(arguments, caplog):
    common = ["--config", "cityscapes", *arguments("cityscapes"), *TINY, "--trainer.limit_val_batches=1"]
    main(["fit", "--config", "cityscapes", "--config", "objectives/cross_entropy", *common[2:]])
    first = run_folder("cityscapes") / "checkpoints" / "last.ckpt"
    kept = torch.load(first, weights_only=True)["hyper_parameters"]["objective"]
    assert kept["class_path"] == "mcseg.losses.CrossEntropyLoss"
    assert kept["init_args"]["ignore_index"] == 255
    with caplog.at_level("INFO"):
        main(["fit", *common, "--model.init_from", str(first), "--trainer.limit_train_batches=1", "--model.optimizer.lr=0"])
    assert f"network initialised from {first}" in caplog.text
    second = run_folder("cityscapes") / "checkpoints" / "last.ckpt"
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (first, second)]
    weights = [name for name in states[0] if name.endswith("weight")]
    assert weights
    assert all(torch.equal(states[0][name], states[1][name]) for name in weights)  # at learning rate 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "precision"),
    [
        ("cpu", "bf16-mixed"),
        pytest.param("gpu", "16-mixed", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ],
)
@pytest.mark.parametrize("name", sorted(path.stem for path in (RECIPES / "objectives").glob("*.yaml")))
def test_every_objective_on_a_data_recipe(name, device, precision, arguments, capsys):
    few = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", f"--trainer.precision={precision}"]
    few += [f"--trainer.accelerator={device}"]
    words = ["--config", "camvid", "--config", f"objectives/{name}", *arguments("camvid"), *TINY, *few]
    main(["fit", *words])
    folder = run_folder("camvid")
    losses = [float(row["train/loss"]) for row in logged_rows(folder) if row.get("train/loss")]
    assert np.isfinite(losses).all()
    settings = yaml.safe_load((RECIPES / "objectives" / f"{name}.yaml").read_text())["model"]["objective"]
    kept = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["hyper_parameters"]["objective"]
    assert kept["class_path"] == settings["class_path"]
    assert kept["init_args"].items() >= settings["init_args"].items()
    module = SegmentationModule.load_from_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert getattr(module.objective, "is_calibrated", True)
    assert all(bool(weights.isfinite().all()) for weights in module.network.state_dict().values())


@pytest.mark.slow
def test_a_recipe_of_an_objective_keeps_nothing_of_the_former_objective():
    parser = ParseOnlyCLI("camvid", ["--config", str(RECIPES / "camvid.yaml")], run=False).parser
    names = [f"objectives/{path.stem}" for path in (RECIPES / "objectives").glob("*.yaml")]
    below = ["power_dice", "iou_weighted", "logit_adjustment", "ldam", "tversky", "cross_entropy_weighted"]
    below += ["margin_calibration_warmup"]

    def objective(*recipes):
        _, words = find_recipes(["fit", *(f"--config={recipe}" for recipe in recipes)])
        return parser.parse_args(words[1:]).model.objective.as_dict()

    for name in names:
        expected = objective("synthetic", name)
        assert all(expected == objective("synthetic", f"objectives/{other}", name) for other in below), name
    changed = objective("synthetic", names[0], "objectives/margin_calibration")
    assert changed["class_path"].endswith("MarginCalibrationLoss")
    assert changed["init_args"].items() >= {"scheme": "ijcv2022", "tau": 10.0}.items()


def test_a_recipe_without_data_takes_the_drawn_scenes(tmp_path):
    (tmp_path / "own.yaml").write_text("trainer: {max_epochs: 3}\n")
    synthetic = str(RECIPES / "synthetic.yaml")
    for words in (["--config", "objectives/lovasz"], ["--config=own.yaml"], []):
        recipe, found = find_recipes(["fit", *words])
        assert (recipe, found[1:3]) == ("synthetic", ["--config", synthetic])
        assert found.count(synthetic) == 1
    _, found = find_recipes(["fit", "--config", "objectives/lovasz"])
    settings = ParseOnlyCLI("synthetic", found[1:], run=False).config
    assert settings.data.class_path.endswith("SyntheticData")
    assert settings.model.objective.class_path.endswith("LovaszSoftmaxLoss")
    for words in (["--config", "objectives/lovasz", "--config", "camvid"], ["--data=CamVidData"], ["--data", "CamVidData"]):
        assert synthetic not in find_recipes(["fit", *words])[1]


def test_the_default_objective_is_the_same_everywhere():
    recipe = yaml.safe_load((RECIPES / "objectives" / "default.yaml").read_text())["model"]["objective"]
    assert recipe == {"class_path": "mcseg.losses.DiceLoss", "init_args": {"power": 0.5, "classes": "all"}}
    cli = ParseOnlyCLI("camvid", ["--config", str(RECIPES / "camvid.yaml")], run=False)
    objective = cli.config.model.objective
    assert pkgutil.resolve_name(objective.class_path) is DiceLoss
    assert objective.init_args.as_dict().items() >= recipe["init_args"].items()
    module = SegmentationModule("unet", "tu-test_resnet.r160_in1k", num_classes=3)
    assert repr(module.objective) == repr(default_objective()) == repr(DiceLoss(**recipe["init_args"]))
    for path in RECIPES.glob("*.yaml"):
        assert "objective" not in yaml.safe_load(path.read_text())["model"], path


def test_an_objective_by_its_name_keeps_nothing_of_the_default(tmp_path):
    (tmp_path / "own.yaml").write_text("model: {objective: {class_path: mcseg.losses.DiceLoss}}\n")
    parser = ParseOnlyCLI("camvid", ["--config", str(RECIPES / "camvid.yaml")], run=False).parser
    for words in (
        ["--model.objective=mcseg.losses.DiceLoss"],
        ["--model.objective", "mcseg.losses.DiceLoss"],
        ["--model.objective", "DiceLoss"],  # segmentation_models_pytorch has one of that name
        ["--model.objective=DiceLoss"],
        ["--config", str(tmp_path / "own.yaml")],
    ):
        _, found = find_recipes(["fit", "--config", "camvid", *words])
        objective = parser.parse_args(found[1:]).model.objective
        assert objective.class_path.endswith("DiceLoss")
        assert objective.init_args.classes == "present"  # DiceLoss's default; power Dice has "all"


@pytest.mark.parametrize(
    ("words", "arch", "options"),
    [
        (["--config", "camvid"], "unet", {"encoder_depth": 4, "decoder_channels": [64, 48, 32, 16]}),
        (["--config", "camvid", "--model.arch", "deeplabv3plus"], "deeplabv3plus", None),
        (["--model.arch=fpn", "--model.encoder=resnet18"], "fpn", None),  # after the default recipe
        (
            ["--config=camvid", '--model.network_options={"encoder_depth":3}', "--model.arch=fpn"],
            "fpn",
            {"encoder_depth": 3},
        ),
        (["--config", "camvid", "--config", "cityscapes"], "deeplabv3plus", {"encoder_output_stride": 16}),
        (["--config", "camvid", "--config", "own.yaml"], "linknet", None),
        (["--config=synthetic", "--config", "own.yaml", "--config", "options/ema", "--model.arch=pan"], "pan", None),
    ],
    ids=str,
)
def test_another_architecture_keeps_no_options_of_the_former_one(words, arch, options):
    """A DeepLab refuses the decoder's channels of a U-Net."""
    Path("own.yaml").write_text("model: {arch: linknet}\n")
    parser = ParseOnlyCLI("camvid", ["--config", str(RECIPES / "camvid.yaml")], run=False).parser
    _, found = find_recipes(["fit", *words])
    model = parser.parse_args(found[1:]).model
    assert (model.arch, model.network_options) == (arch, options)


def test_inference_from_the_command_line(arguments):
    """Settings of whole-image inference reach validate and give the same score as in Python."""
    common = ["--config", "camvid", *arguments("camvid"), *TINY, "--trainer.precision=32-true"]
    main(["fit", *common])
    path = run_folder("camvid") / "checkpoints" / "last.ckpt"
    options = ["--config", "options/multi_scale", "--inference.window=[4,5]", "--inference.scales=[1.0,2.0]"]
    main(["validate", common[0], common[1], *options, *common[2:], "--ckpt_path", str(path)])
    folder = run_folder("camvid")
    assert yaml.safe_load((folder / "config.yaml").read_text())["inference"] == {
        "window": [4, 5],
        "overlap": 0.5,
        "scales": [1.0, 2.0],
        "flip": True,
        "batch": 1,
    }
    module = SegmentationModule.load_from_checkpoint(path).eval()
    data = CamVidData(next(word.partition("=")[2] for word in common if "data.root" in word), image_scale=0.5, num_workers=0)
    data.setup("validate")
    inference = Inference(window=(4, 5), scales=(1.0, 2.0), flip=True)
    with torch.no_grad():
        batches = [(inference(module, b["image"], b["mask"].shape[-2:]), b["mask"]) for b in data.val_dataloader()]
    expected = score(*(torch.cat(part) for part in zip(*batches, strict=True)), num_classes=11)
    assert float(logged_rows(folder)[0]["val/miou"]) == pytest.approx(expected.miou, abs=1e-6)


def test_wrong_inference_is_one_line(arguments, capsys):
    words = ["validate", "--config", "camvid", *arguments("camvid"), *TINY, "--inference.overlap", "1.5"]
    main(["fit", *words[1:-2]])
    path = run_folder("camvid") / "checkpoints" / "last.ckpt"
    assert "overlap: found 1.5, expected" in fails(capsys, [*words, "--ckpt_path", str(path)])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in (RECIPES / "options").glob("*.yaml")))
def test_every_option_on_a_data_recipe(name, arguments):
    common = ["--config", "camvid", "--config", f"options/{name}", *arguments("camvid"), *TINY, "--inference.batch=1"]
    main(["fit", *common])
    path = run_folder("camvid") / "checkpoints" / "last.ckpt"
    logged = [row["val/miou"] for row in logged_rows(run_folder("camvid")) if row["val/miou"]][-1]
    main(["validate", *common, "--ckpt_path", str(path)])
    assert logged_rows(run_folder("camvid"))[0]["val/miou"] == logged


def test_a_format_needs_its_own_data(arguments, photo_folder, capsys):
    main(["fit", "--config", "synthetic", *arguments("synthetic"), *TINY])
    checkpoint = str(run_folder("synthetic") / "checkpoints" / "best.ckpt")
    words = ["--ckpt_path", checkpoint, "--data.predict_root", str(photo_folder / "images"), "--format", "cityscapes"]
    line = fails(capsys, ["predict", "--config", "synthetic", *arguments("synthetic"), *TINY, *words])
    assert "format cityscapes: the data are SyntheticData, expected those of cityscapes" in line


def test_checkpoint_from_the_command_line_in_python(arguments):
    main(
        [
            "fit",
            "--config",
            "synthetic",
            *arguments("synthetic"),
            *TINY,
            "--model.objective=MarginCalibrationLoss",
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


@pytest.mark.slow
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
    main(["fit", "--config", "synthetic", *arguments("synthetic"), *TINY, *objective])
    path = run_folder("synthetic") / "checkpoints" / "best.ckpt"
    assert objective[1].endswith(type(SegmentationModule.load_from_checkpoint(path).objective).__name__)
    main(["validate", "--config", "synthetic", *arguments("synthetic"), *TINY, "--ckpt_path", str(path)])


MY_LOSS = """
import torch

class MyLoss(torch.nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def forward(self, logits, target):
        return self.factor * torch.nn.functional.cross_entropy(logits, target, ignore_index=255)
"""


@pytest.mark.slow
def test_an_objective_of_the_current_folder_that_is_deleted_after_training(arguments, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    Path("losses_of_mine.py").write_text(MY_LOSS)
    options = [*arguments("synthetic"), *TINY]
    main(["fit", "synthetic", *options, "--model.objective=losses_of_mine.MyLoss", "--model.objective.factor=2"])
    run = run_folder("synthetic")
    best = str(run / "checkpoints" / "best.ckpt")
    trained = [row for row in logged_rows(run) if row["val/miou"]][-1]
    Path("losses_of_mine.py").unlink()
    monkeypatch.delitem(sys.modules, "losses_of_mine")
    with caplog.at_level("INFO"):
        main(["validate", "--config", str(run / "config.yaml"), "--ckpt_path", best])
    assert "losses_of_mine.MyLoss cannot be built (ModuleNotFoundError" in caplog.text
    (row,) = logged_rows(run_folder("config"))
    assert row["val/miou"] == trained["val/miou"]
    assert "val/loss" not in row
    main(["predict", "synthetic", *options, "--ckpt_path", best])
    assert len(list((run_folder("synthetic") / "masks").iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["torch.nn.CrossEntropyLoss"], "CrossEntropyLoss has ignore_index -100; set ignore_index to 255"),
        (["CrossEntropyLoss", "--model.objective.weight=[1,2]"], "weight: found 2 weights, expected 8, one per class"),
        (
            ["torch.nn.CrossEntropyLoss", "--model.objective.weight=[1,2]", "--model.objective.ignore_index=255"],
            "CrossEntropyLoss fails for logits",
        ),
        (["FocalLoss", "--model.objective.weight=[1,2,3,4,5,6,7,-8]"], "weight: found -8.0, expected a finite number >= 0"),
    ],
    ids=str,
)
def test_unfit_objectives_are_one_line_before_training(arguments, capsys, words, expected):
    line = fails(capsys, ["fit", "synthetic", *arguments("synthetic"), *TINY, "--model.objective", *words])
    assert expected in line


@pytest.mark.slow
def test_class_weights_from_the_command_line(arguments):
    weight = "--model.objective.weight=[1,2,3,4,5,6,7,0.5]"
    for objective in (["CrossEntropyLoss"], ["torch.nn.CrossEntropyLoss", "--model.objective.ignore_index=255"]):
        main(["fit", "synthetic", *arguments("synthetic"), *TINY, "--model.objective", *objective, weight])
        folder = run_folder("synthetic")
        saved = yaml.safe_load((folder / "config.yaml").read_text())["model"]["objective"]["init_args"]["weight"]
        loaded = SegmentationModule.load_from_checkpoint(folder / "checkpoints" / "best.ckpt").objective
        assert saved == list(loaded.weight) == [1, 2, 3, 4, 5, 6, 7, 0.5]
    main(["fit", "--resume", str(folder), "--trainer.max_epochs=2"])  # compares the settings, tensors among them


def test_a_users_recipe_over_another_one(arguments, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("trainer: {max_steps: 2}\nmodel: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.25}}}\n")
    words = [word for word in TINY if word not in ("--trainer.max_epochs",)]
    words.remove("1")
    main(["fit", "--config=synthetic", "--config", str(mine), *arguments("synthetic"), *words])
    saved = yaml.safe_load((run_folder("synthetic") / "config.yaml").read_text())
    assert saved["model"]["optimizer"] == {
        "class_path": "torch.optim.SGD",
        "init_args": saved["model"]["optimizer"]["init_args"],
    }
    assert saved["model"]["optimizer"]["init_args"]["lr"] == 0.25
    assert saved["trainer"]["max_steps"] == 2
    assert saved["data"]["init_args"]["train_scenes"] == 4


LAYERS = {
    "stop": "callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/miou, patience: 2}}]",
    "longer": "callbacks: {class_path: EarlyStopping, init_args: {monitor: val/miou, patience: 9}}",
    "two": "callbacks: [{class_path: ModelCheckpoint, init_args: {every_n_train_steps: 5}}, "
    "{class_path: ModelCheckpoint, init_args: {every_n_epochs: 2}}]",
}


@pytest.mark.parametrize(
    ("words", "expected", "line"),
    [
        ("--config stop.yaml --config options/ema", ["EarlyStopping 2", "EMAWeightAveraging None"], ""),
        ("--config options/ema --config two.yaml", ["EMAWeightAveraging None", "ModelCheckpoint None", "ModelCheckpoint None"], ""),
        ("--config stop.yaml --config longer.yaml", ["EarlyStopping 9"], "a later EarlyStopping of val/miou replaces an earlier one: patience 9 instead of 2"),
        ("--config options/ema --trainer.callbacks EarlyStopping --trainer.callbacks.monitor val/loss", ["EMAWeightAveraging None", "EarlyStopping 3"], ""),
        ("--config stop.yaml --trainer.callbacks.patience 7", ["EarlyStopping 7"], ""),
        ("--config stop.yaml --trainer.callbacks null", [], ""),
    ],
)  # fmt: skip
def test_callbacks_of_layered_recipes_add_up(words, expected, line, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in LAYERS.items():
        Path(f"{name}.yaml").write_text("trainer:\n  " + text + "\n")
    with caplog.at_level("INFO"):
        recipe, words = find_recipes(["fit", *words.split()])
        callbacks = ParseOnlyCLI(recipe, words[1:], run=False).config.trainer.callbacks or []
    assert [f"{c.class_path.rpartition('.')[2]} {c.init_args.get('patience')}" for c in callbacks] == expected
    assert caplog.text.count("replaces") == bool(line)
    assert line in caplog.text


def test_saved_config_repeats_the_run_in_a_new_folder(arguments):
    main(["fit", "--config", "synthetic", *arguments("synthetic"), *TINY])
    first = run_folder("synthetic")
    main(["fit", "--config", str(first / "config.yaml")])
    second = run_folder("config")
    assert logged_rows(first) == logged_rows(
        second
    )  # to the last digit, although the second run read the label counts from the cache
    assert len(list((first / "checkpoints").iterdir())) == 2


@pytest.mark.slow
def test_repeating_a_run_of_a_named_folder_overwrites_nothing(arguments, tmp_path):
    named = tmp_path / "named"
    main(["fit", "--config", "synthetic", *arguments("synthetic"), *TINY, "--trainer.default_root_dir", str(named)])
    before = {path: path.read_bytes() for path in named.rglob("*") if path.is_file()}
    main(["fit", "--config", str(named / "config.yaml")])
    main(["fit", "--config", str(named / "config.yaml"), "--trainer.default_root_dir", str(tmp_path / "other")])
    assert before == {path: path.read_bytes() for path in named.rglob("*") if path.is_file()}
    for folder in (run_folder("config"), tmp_path / "other"):
        assert logged_rows(folder) == logged_rows(named)
        assert len(list((folder / "checkpoints").iterdir())) == 2


@pytest.mark.slow
def test_checkpoints_of_an_earlier_version(arguments, tmp_path, capsys):
    """Arguments that the checkpoint does not have get their default, not the recipe's value; refused settings are named."""
    common = ["--config", "synthetic", *arguments("synthetic"), *TINY]
    main(["fit", *common, "--model.objective", "DiceLoss", "--trainer.default_root_dir", str(tmp_path / "run")])
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["objective"]["init_args"]["power"] == 1.0  # not the recipe's
    del checkpoint["mcseg_version"], checkpoint["class_names"]
    for name in ("power", "backend", "classes"):
        del checkpoint["hyper_parameters"]["objective"]["init_args"][name]
    early = tmp_path / "early.ckpt"
    torch.save(checkpoint, early)
    main(["validate", *common, "--ckpt_path", str(early), "--trainer.default_root_dir", str(tmp_path / "scored")])
    found = yaml.safe_load((tmp_path / "scored" / "config.yaml").read_text())["model"]["objective"]["init_args"]
    assert [found[name] for name in ("power", "backend", "classes")] == [1.0, "auto", "present"]

    state = checkpoint["state_dict"]
    name = max(name for name in state if name.startswith("network."))
    torch.save(checkpoint | {"state_dict": {k: v for k, v in state.items() if k != name}}, early)
    with pytest.raises(SystemExit):
        main(["validate", *common, "--ckpt_path", str(early)])
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"1 tensors differ, for example {name}; written by an earlier mcseg, this is 0.1.0)" in message
    checkpoint["hyper_parameters"]["gone"] = 1
    torch.save(checkpoint | {"mcseg_version": "0.0.9"}, early)
    with pytest.raises(SystemExit):
        main(["validate", *common, "--ckpt_path", str(early)])
    message = capsys.readouterr().err.splitlines()[-1]
    assert "settings that this version refuses (written by mcseg 0.0.9, this is 0.1.0)" in message
    assert "'model' does not accept option 'gone'" in message


@pytest.mark.slow
def test_resuming_from_the_command_line(arguments):
    common = ["fit", "--config", "synthetic", *arguments("synthetic"), *TINY]
    main(common)
    last = run_folder("synthetic") / "checkpoints" / "last.ckpt"
    main([*common, "--trainer.max_epochs", "3", "--ckpt_path", str(last)])
    assert torch.load(run_folder("synthetic") / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 2


def test_wandb_offline_twice_into_one_folder(arguments, tmp_path):
    words = [
        "fit",
        "--config",
        "synthetic",
        *arguments("synthetic"),
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
    assert list(runs[0].rglob("*.png"))  # the prediction panel
    assert (tmp_path / "same" / "config.yaml").is_file()


def test_stats(arguments, camvid_root, capsys):
    write_png(camvid_root / "trainannot" / "0001TP_006690.png", np.full((9, 12), 3, dtype=np.uint8))
    main(
        [
            "stats",
            "--config",
            "camvid",
            *arguments("camvid"),
            "--trainer.default_root_dir",
            "out",
            "--model.objective",
            "MarginCalibrationLoss",
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


def test_stats_prints_the_class_constants_of_the_objective(arguments, capsys):
    heads = {}
    for objective in (None, "DiceLoss", "MarginCalibrationLoss", "LogitAdjustmentLoss"):
        words = ["--model.objective", objective] if objective else []
        main(["stats", "--config", "folder", *arguments("folder"), "--trainer.default_root_dir", "out", *words])
        heads[objective] = capsys.readouterr().out.splitlines()[0].split()
    assert heads[None] == heads["DiceLoss"] == ["class", "pixels", "share", "%"]
    assert heads["MarginCalibrationLoss"][4:] == ["foreground", "offset", "background", "offset"]
    assert heads["LogitAdjustmentLoss"][4:] == ["adjustment"]


def test_check_of_good_data(arguments, capsys):
    main(["check", "--config", "folder", *arguments("folder")])
    assert capsys.readouterr().out.splitlines()[-1] == "no problems found"


def test_check_of_one_image_and_one_problem(arguments, photo_folder, capsys):
    (photo_folder / "train.txt").write_text("photo 1\n")
    (photo_folder / "val.txt").write_text("photo 2\nphoto 3\n")
    (photo_folder / "images" / "photo 2.jpg").write_bytes(b"")
    with pytest.raises(SystemExit):
        main(["check", "--config", "folder", *arguments("folder")])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("train: 1 image, ") for line in lines)
    assert lines[-1] == "1 problem found"


def test_bad_files_are_listed_by_check_and_stop_fit_early(arguments, photo_folder, capsys):
    break_three(photo_folder)
    with pytest.raises(SystemExit) as end:
        main(["check", "--config", "folder", *arguments("folder")])
    assert end.value.code == 1
    out = capsys.readouterr().out
    for expected in (
        "photo 2.jpg: cannot be read",
        "photo 5.png: 1 pixels of the mask have the unknown values 7",
        "photo 8.png: the mask is 32x12 pixels",
        "3 problems found",
    ):
        assert expected in out
    line = fails(capsys, ["fit", "--config", "folder", *arguments("folder"), *TINY])
    assert "photo 8.png: the mask is 32x12" in line or "photo 2.jpg: cannot be read" in line
    assert not list(Path().rglob("*.ckpt"))


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_bad_file_found_by_a_worker_is_one_line(arguments, photo_folder, capsys, workers):
    """The header is valid, so the error occurs only when a worker decodes the pixels."""
    for photo in (photo_folder / "images").iterdir():
        photo.write_bytes(photo.read_bytes()[:-200])
    line = fails(capsys, ["fit", "--config", "folder", *arguments("folder"), *TINY, "--data.num_workers", workers])
    assert "cannot be read" in line
    assert "Traceback" not in line
    assert line.startswith("mcseg: error: " + str(photo_folder))


def test_short_forms_of_prediction():
    folder = ["--data.predict_root", "new"]
    for words, expected in (
        (["a.ckpt", "--images", "new"], ["--ckpt_path=a.ckpt", *folder]),
        (["folder", "a.ckpt", "--images=new"], ["--config", "folder", "--ckpt_path=a.ckpt", "--data.predict_root=new"]),
        (["--images", "new", "a.ckpt"], [*folder, "--ckpt_path=a.ckpt"]),
        (
            ["--ckpt_path", "a.ckpt", "--images", "1.png", "2.png"],
            ["--ckpt_path", "a.ckpt", folder[0], '["1.png", "2.png"]'],
        ),
    ):
        assert expand_shorthand(["predict", *words]) == ["predict", *expected]
    assert expand_shorthand(["show", "folder", "--images", "3"]) == ["show", "--config", "folder", "--images", "3"]


@pytest.mark.slow
def test_predict_without_the_training_folder(photo_folder, tmp_path, capsys, monkeypatch):
    """Class names, colours and the images' scale come from the checkpoint; no file overwrites another."""
    (photo_folder / "classes.txt").write_text("background 10 20 30\nground 40 50 60\nthing 70 80 90\n")
    options = ["--data.image_scale=0.5", "--data.max_side=500", "--trainer.default_root_dir", str(tmp_path / "run")]
    main(["fit", "folder", "--root", str(photo_folder), *TINY, *options])
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    stored = torch.load(checkpoint, weights_only=True)
    assert stored["random_split"] == {"draw": "name", "split_seed": 0, "val_fraction": 0.2, "test_fraction": 0.0}
    new = tmp_path / "new"
    for name in ("a.jpg", "a.png", "a_jpg.png", "A.bmp", "v1.0/a.png", "v1.0/deep/a.png", ".hidden/b.png"):
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(photo_folder / "images" / "photo 0.jpg").save(new / name)
    (new / "link").symlink_to(new)
    shutil.rmtree(photo_folder)
    sizes = []
    step = SegmentationModule.predict_step

    def watched(module, batch, index):
        sizes.append(tuple(batch["image"].shape[-2:]))
        return step(module, batch, index)

    monkeypatch.setattr(SegmentationModule, "predict_step", watched)
    out = tmp_path / "out"
    main(["predict", str(checkpoint), "--images", str(new), f"--writer.output_dir={out}", *TINY])
    expected = {"A_bmp", "a_jpg", "a_jpg_", "a_png", "v1.0/a", "v1.0/deep/a"}
    written = {path.relative_to(out / "masks").with_suffix("").as_posix() for path in out.rglob("masks/**/*.png")}
    assert len(written) == 6
    assert written == expected
    with Image.open(out / "masks" / "v1.0" / "a.png") as file:
        assert file.size == (32, 24)
        assert file.getpalette()[:9] == [10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert set(sizes) == {(12, 16)}
    several = [str(new / "a.jpg"), str(new / "v1.0" / "a.png")]  # as a shell expands a pattern
    for values, names in (
        ([str(new / "v1.0" / "**" / "*.png")], {"a", "deep/a"}),
        (several, {"a", "v1.0/a"}),
        ([str(new / "a_jpg.png")], {"a_jpg"}),
    ):
        shutil.rmtree(out)
        main(["predict", str(checkpoint), "--images", *values, f"--writer.output_dir={out}", *TINY])
        assert {path.relative_to(out / "masks").with_suffix("").as_posix() for path in out.rglob("masks/**/*.png")} == names
    line = fails(capsys, ["predict", str(checkpoint), "--images", "nowhere/*.png", *TINY])
    assert "data.predict_root: no readable image in nowhere/*.png" in line


def test_help_lists_verbs_and_recipes(capsys):
    main(["--help"])
    out = capsys.readouterr().out
    for word in ("fit", "validate", "test", "predict", "download", "show", "check", "stats", "folder", "pascal_voc"):
        assert word in out


def test_download_lists_archives_that_need_an_account(capsys, tmp_path):
    main(["download", "cityscapes", "--root", str(tmp_path / "data")])
    out = capsys.readouterr().out
    for text in ("gtFine_trainvaltest.zip", "https://www.cityscapes-dataset.com/", "leftImg8bit/{train,val,test}/<city>/"):
        assert text in out
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("recipe", ["camvid", "cityscapes", "cocostuff10k", "endovis2017", "synthetic"])
def test_show_puts_images_beside_their_labels(recipe, arguments, capsys):
    main(["show", recipe, *arguments(recipe), "--images", "3", "--trainer.default_root_dir=out"])
    assert "images of the train split: out/train.png" in capsys.readouterr().out
    with Image.open("out/train.png") as file:
        sheet = np.asarray(file)
    assert sheet.shape[1] == 1240
    data = {"camvid": (128, 128, 128), "cityscapes": (119, 11, 32), "endovis2017": (128, 128, 0)}
    if recipe in data:
        assert (sheet[:, 316:616] == data[recipe]).all(-1).any(), "labels have the class colours"


def test_show_of_withheld_labels_is_void(arguments):
    main(["show", "bdd100k", *arguments("bdd100k"), "--split", "test", "--trainer.default_root_dir=out"])
    with Image.open("out/test.png") as file:
        assert (np.asarray(file)[30:150, 316:616] == 0).all()


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

    monkeypatch.setattr("mcseg.run.folder.datetime", Clock)
    for _ in range(2):
        main(["fit", "--config", "synthetic", *arguments("synthetic"), *TINY])
    assert sorted(os.listdir("runs/synthetic")) == ["20260102-030405", "20260102-030405-2"]
    # Two runs started together choose their folders before either has written a file
    monkeypatch.setenv("MCSEG_RUN_FOLDER", "")  # restores the variable after the test, as run_folder sets it
    assert [new_run_folder("folder", "fit").name for _ in range(2)] == ["20260102-030405", "20260102-030405-2"]


@pytest.mark.slow
def test_class_names_that_the_terminal_cannot_show(photo_folder):
    (photo_folder / "classes.txt").write_text("ground\nstraße\n猫\n", encoding="utf-8")
    words = [sys.executable, "-m", "mcseg", "stats", "folder", "--data.root", str(photo_folder), "--data.num_workers=0"]
    done = subprocess.run(words, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stra\\xdfe " in done.stdout
    assert "\\u732b " in done.stdout
