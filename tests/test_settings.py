"""Wrong settings: an error of one line that names the setting and the expected value, and no run folder."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import write_png
from PIL import Image

from mcseg.run.main import main
from mcseg.run.recipes import RECIPES

TINY = [
    "--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--data.num_workers=0", "--data.crop_size=[32,32]",
    "--model.encoder=tu-test_resnet.r160_in1k", "--model.encoder_weights=null", "--trainer.enable_progress_bar=false",
]  # fmt: skip


def error_line(capsys, words, code):
    """Run, check the exit code, and return the last line of standard error, which must hold the whole error."""
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == code
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "mcseg: error" in line] == lines[-1:]
    return lines[-1]


def keys(content, prefix=()):
    for key, value in content.items():
        if isinstance(value, dict) and "class_path" not in value:
            yield from keys(value, (*prefix, key))
        else:
            yield (*prefix, key)


RECIPE_KEYS = sorted({".".join(key) for path in RECIPES.rglob("*.yaml") for key in keys(yaml.safe_load(path.read_text()))})


@pytest.mark.slow
@pytest.mark.parametrize("key", RECIPE_KEYS)
def test_a_key_of_a_recipe_misspelt(key, capsys, tmp_path, camvid_root):
    """Each key of a recipe with its last letter doubled, on the command line and in a user's file."""
    wrong = key + key[-1]
    code = 1 if ".network_options." in key else 2  # the network checks these later than the parser
    name = wrong.rpartition(".")[2]
    assert name in error_line(capsys, ["fit", "camvid", f"--data.root={camvid_root}", f"--{wrong}=1"], code)
    content = 1
    for part in reversed(wrong.split(".")):
        content = {part: content}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    assert name in error_line(capsys, ["fit", "camvid", f"--data.root={camvid_root}", "--config", "own.yaml"], code)
    assert not Path("runs").exists()


WRONG = {
    # names that do not exist
    "fitt": (1, "found the verb 'fitt', expected one of fit, validate, test, predict, stats, check, show, bound, compare"),
    "--verison": (2, "found the option --verison, expected a verb first: fit, validate,"),
    "--root PHOTOS fit": (2, "found the option --root, expected a verb first"),
    "fit camvidd": (1, "--config camvidd: neither a file nor a recipe of mcseg, such as camvid"),
    "fit lovas": (1, "recipe of mcseg, such as objectives/lovasz; mcseg --help lists all recipes"),
    "fit zzz": (1, "--config zzz: neither a file nor a recipe of mcseg, such as "),
    "check EMPTY": (1, "empty is a folder; use: mcseg check folder --root /"),
    "fit camvid --config objectives/dicee": (1, "neither a file nor a recipe of mcseg, such as objectives/dice"),
    "fit camvid --config --data.root x": (2, "--config: expected one argument"),
    "fit --model.objective --data.root x": (2, "--model.objective: expected one argument"),
    "fit --trainer.max_epoch 3": (2, "--trainer.max_epoch"),  # not taken for an abbreviation
    "fit --model.encodr x": (2, "--model.encodr"),
    "fit --panel.image 3": (2, "--panel.image"),
    "fit --model.arch unett": (1, "network unett with encoder"),
    "fit --model.encoder resnet35": (1, "Wrong encoder name `resnet35`, supported encoders"),
    "fit --model.encoder tu-resnet35": (1, "network unet with encoder tu-resnet35"),
    "fit --model.encoder resnet18 --model.encoder_weights imagenot": (1, "Wrong pretrained weights `imagenot`"),
    "fit --model.encoder resnet18 --model.encoder_weights imagenet": (1, "set encoder_weights to null"),  # offline here
    "fit --model.objective mcseg.losses.Foo": (2, "model.objective: mcseg.losses.Foo: module 'mcseg.losses' has no"),
    "fit --model.objective torch.Tensor": (2, "model.objective: Import path does not correspond to a subclass of Module"),
    "fit --model.objective null": (1, "model.objective: found null"),
    "fit --model.objective MarginCalibrationLoss --model.objective.init_args.tua 3": (2, "MarginCalibrationLoss: Option 'tua' is not accepted"),
    "fit --model.objective MarginCalibrationLoss --model.objective.scheme foo": (2, "scheme: Expected a typing.Literal['ijcv2022', 'miou', 'none']. Got value: foo"),
    "fit --model.optimizer Foo": (2, "model.optimizer: Expected a dot import path string: Foo"),
    "fit --model.optimizer.lrr 3": (2, "model.optimizer: Option 'lrr' is not accepted"),
    "fit --trainer.logger Foo": (2, "trainer.logger: "),
    "fit --trainer.accelerator gpu": (1, "gpu backend"),
    "fit --trainer.precision foo": (2, "trainer.precision: "),
    "fit --checkpoint.monitor val/foo": (1, "checkpoint.mode: found none for val/foo, a score of unknown direction; expected min or max"),
    "fit --checkpoint.monitor val/foo --checkpoint.mode min": (1, "BestCheckpoint: no score val/foo; expected one of val/loss, val/miou"),
    "fit --checkpoint.monitor val/iou/unicorn": (1, "no score val/iou/unicorn; expected one of"),
    "fit --checkpoint.monitor val_loss": (1, "BestCheckpoint: no score val_loss; expected one of val/loss, val/miou"),
    "fit --checkpoint.monitor val/loss --checkpoint.mode max": (1, "mode max for val/loss, but a lower val/loss is better; set mode to min"),
    "fit --checkpoint.mode min": (1, "checkpoint: found mode min for val/miou, but a higher val/miou is better"),
    "fit --checkpoint.save_top_k 3 --checkpoint.filename good": (1, "checkpoint.filename: found good with save_top_k 3"),
    "fit --trainer.callbacks EarlyStopping --trainer.callbacks.monitor val/miou --trainer.callbacks.mode min": (1, "EarlyStopping: found mode min for val/miou, but"),
    "fit --trainer.callbacks EarlyStopping --trainer.callbacks.monitor val_loss": (1, "EarlyStopping: no score val_loss; expected one of"),
    "fit --trainer.callbacks ModelCheckpoint --trainer.callbacks.filename best": (1, "ModelCheckpoint with filename best"),
    "fit --trainer.limit_val_batches 0 --trainer.callbacks EarlyStopping --trainer.callbacks.monitor val/miou": (1, "no score val/miou, because the run has no validation"),
    # values
    "fit folder --data.root PHOTOS --data.bach_size 3": (2, "data: mcseg.data.FolderData: Option 'bach_size' is not accepted"),
    "fit folder --data.root PHOTOS --data.batch_size many": (2, "batch_size: Expected a <class 'int'>. Got value: many"),
    "fit folder --data.root PHOTOS --data.crop_size 64": (2, "crop_size: Expected a <class 'tuple'>. Got value: 64"),
    "fit folder --data.root PHOTOS --data.crop_size [64,64,64]": (2, "crop_size: Expected a tuple with 2 elements"),
    "fit folder --data.root PHOTOS --data.crop_size [0,64]": (1, "data.crop_size: found 0, expected a positive number"),
    "fit folder --data.root PHOTOS --data.total_batch_size 0": (1, "data.total_batch_size: found 0, expected a positive"),
    "fit folder --data.root PHOTOS --data.on_error ignore": (2, "on_error: Expected a typing.Literal['stop', 'skip']"),
    "fit folder --data.root PHOTOS --data.val_fraction 1.5": (1, "data.val_fraction 1.5"),
    "fit folder --data.root PHOTOS --data.held_out ['x*']": (1, "data.held_out: no training image is named x*"),
    "fit folder --data.root PHOTOS --model.num_classes 7": (2, 'Linked "model.num_classes" must be given via'),
    "fit folder --data.root PHOTOS --model.objective LDAMLoss --model.objective.num_classes 7": (1, "found 7, but the data have 3 classes"),
    "fit --trainer.max_epochs many": (2, "trainer.max_epochs: "),
    "fit --trainer.max_steps -5": (1, "max_steps"),
    "fit --seed_everything foo": (2, "seed_everything: "),
    "fit --model.optimizer.lr -1": (1, "Invalid learning rate: -1"),
    "fit --model.scheduler torch.optim.lr_scheduler.ReduceLROnPlateau --model.scheduler.mode min": (1, "mode min for val/miou, but a higher"),
    "fit --model.scheduler pytorch_lightning.cli.ReduceLROnPlateau --model.scheduler.monitor val/x": (1, "no score val/x"),
    "fit --model.aux_weight -1": (1, "aux_weight: found -1.0, expected a weight >= 0"),
    "fit --model.objective MarginCalibrationLoss --model.objective.tau -1": (1, "tau: found -1.0, expected a finite number > 0"),
    "fit --inference.window [0,5]": (1, "window: found (0, 5), expected (height, width), each at least 1"),
    "fit --inference.scales [0]": (1, "scales: found (0.0,), expected"),
    "show --split foo": (1, "found --split foo and --images 12; expected train, val, test"),
    "show --images 0": (1, "and at least 1 image"),
    # files and folders
    "fit camvid": (1, "data.root is not set"),
    "fit folder --data.root nowhere": (1, "data.root: folder nowhere does not exist; expected a folder with images, masks and a class list"),
    "fit folder --data.root EMPTY": (1, "no class list: looked for "),
    "fit --root PHOTOS": (1, "photos, but the drawn scenes have no folder; name a recipe, for example `mcseg check folder --root "),
    "check --root nowhere": (1, "data.root: found nowhere, but the drawn scenes have no folder"),
    "stats synthetic --root nowhere": (1, "data.root: found nowhere, but the drawn scenes have no folder"),
    "check folder --data.root nowhere": (1, "data.root: folder nowhere does not exist"),
    "stats folder --data.root nowhere": (1, "data.root: folder nowhere does not exist"),
    "fit pascal_voc --root nowhere": (1, "below the root; `mcseg download pascal_voc --root DIR` downloads them"),
    "download voc --root x": (1, "found the benchmark voc, expected one of bdd100k, camvid, cityscapes,"),
    "download pascal_voc": (2, "root"),
    "fit --trainer.default_root_dir PHOTOS/classes.txt": (1, "classes.txt: File exists"),
    "fit --resume nowhere": (1, "--resume: no nowhere/config.yaml; expected the folder of a run"),
    "fit --config BROKEN_YAML": (1, "broken.yaml: not a YAML file (while parsing"),
    "fit --config EMPTY_YAML": (1, "empty.yaml: found NoneType, expected keys with values"),
    "fit --config UNSAFE_YAML": (1, "unsafe.yaml: not a YAML file (could not determine a constructor for the tag"),
    "fit --config OTHER_YAML": (2, "does not accept option 'modle.arch'"),
    "fit synthetic --config NULL_YAML": (1, "model.scheduler: found null, expected a class path"),
    # checkpoints
    "test": (1, "mcseg test needs trained weights: give --ckpt_path"),
    "predict": (1, "mcseg predict needs trained weights"),
    "bound": (1, "mcseg bound needs trained weights"),
    "validate --ckpt_path nowhere.ckpt": (1, "--ckpt_path: no checkpoint nowhere.ckpt"),
    "validate --ckpt_path EMPTY": (1, "is a folder; expected a file such as"),
    "validate --ckpt_path TEXT_CKPT": (1, "text.ckpt: not a checkpoint, or an incomplete one"),
    "validate --ckpt_path CUT_CKPT": (1, "cut.ckpt: not a checkpoint, or an incomplete one"),
    "validate --ckpt_path FOREIGN_CKPT": (1, "foreign.ckpt: contains no state_dict"),
    "validate --ckpt_path MALICIOUS_CKPT": (1, "malicious.ckpt: contains objects other than tensors"),
    "validate --ckpt_path CALLING_CKPT": (1, "calling.ckpt has settings that this version refuses"),
    "fit --model.init_from nowhere.ckpt": (1, "model.init_from: no checkpoint nowhere.ckpt"),
    "fit --model.init_from TEXT_CKPT": (1, "text.ckpt: not a checkpoint, or an incomplete one"),
    "fit --model.init_from MALICIOUS_CKPT": (1, "malicious.ckpt: contains objects other than tensors"),
}  # fmt: skip


# A function as class path, which the parser accepts if the argument may be a callable
CALL = {"class_path": "torch.save", "init_args": {"obj": 1, "f": "owned"}}


class Malicious:
    """Runs code when its pickle is read."""

    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.fixture
def places(photo_folder, tmp_path):
    """Wrong files and folders, by their placeholders in the commands."""
    (tmp_path / "empty").mkdir()
    files = {"PHOTOS": photo_folder, "EMPTY": tmp_path / "empty"}
    for name, text in {
        "broken": "model: [\n",
        "empty": "",
        "unsafe": "model: !!python/object/apply:os.system ['touch owned']\n",
        "other": "modle:\n  arch: unet\n",
        "null": "model:\n  scheduler: null\n",
    }.items():
        files[f"{name.upper()}_YAML"] = tmp_path / f"{name}.yaml"
        files[f"{name.upper()}_YAML"].write_text(text)
    for name in ("text", "cut", "foreign", "malicious", "calling"):
        files[f"{name.upper()}_CKPT"] = tmp_path / f"{name}.ckpt"
    files["TEXT_CKPT"].write_text("hello world")
    torch.save({"weights": torch.zeros(3)}, files["FOREIGN_CKPT"])
    files["CUT_CKPT"].write_bytes(files["FOREIGN_CKPT"].read_bytes()[:-60])
    torch.save({"state_dict": {}, "payload": Malicious()}, files["MALICIOUS_CKPT"])
    torch.save({"state_dict": {}, "hyper_parameters": {"num_classes": 3, "objective": CALL}}, files["CALLING_CKPT"])
    return files


@pytest.mark.slow
@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_setting_is_one_line_and_leaves_no_files(words, capsys, places):
    code, expected = WRONG[words]
    verb, *rest = words.split()
    for name in sorted(places, key=len, reverse=True):
        rest = [word.replace(name, str(places[name])) for word in rest]
    # before the arguments of the case, which take precedence
    recipe = [rest.pop(0)] if rest and not rest[0].startswith("-") else []
    tiny = TINY if verb == "fit" and "--resume" not in rest and code == 1 and "foo" not in words else []
    assert expected in error_line(capsys, [verb, *recipe, *tiny, *rest], code)
    assert not Path("runs").exists()
    assert not Path("owned").exists()


@pytest.mark.parametrize("name", ["objective", "optimizer", "scheduler"])
def test_a_function_is_not_called_where_a_class_belongs(name, capsys, tmp_path):
    """Some versions of the parser refuse the function, others accept it; then mcseg's own check refuses it."""
    settings = tmp_path / "calling.yaml"
    settings.write_text(f"model:\n  {name}: {CALL}\n")
    with pytest.raises(SystemExit):
        main(["fit", "synthetic", *TINY, "--config", str(settings)])
    assert f"mcseg: error: model.{name}: " in capsys.readouterr().err.splitlines()[-1]
    assert not Path("runs").exists()
    assert not Path("owned").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*using the validation split")
def test_a_checkpoint_of_other_data(photo_folder, tmp_path, capsys):
    """Another number of classes is an error; other names are a warning, as only the names may differ."""
    settings = [*TINY, "--trainer.default_root_dir", str(tmp_path / "run")]
    main(["fit", "folder", "--data.root", str(photo_folder), *settings])
    weights = ["--ckpt_path", str(tmp_path / "run/checkpoints/last.ckpt")]
    (photo_folder / "classes.txt").write_text("background\nfloor\nthing\n")
    with pytest.warns(UserWarning, match=r"trained on other classes \(ground where the data have floor\)"):
        main(["validate", "folder", "--data.root", str(photo_folder), *settings, *weights])
    (photo_folder / "classes.txt").write_text("background\nground\n")
    for path in (photo_folder / "masks").iterdir():
        values = np.array(Image.open(path))
        write_png(path, np.where(values == 2, 255, values).astype(np.uint8))
    for verb in ("validate", "fit", "predict"):
        line = error_line(capsys, [verb, "folder", "--data.root", str(photo_folder), *settings, *weights], 1)
        assert "network has 3 classes, the data have 2" in line


def test_batch_and_crop_larger_than_data_and_image(photo_folder, capsys):
    """The batch shrinks to the data, and the crop is padded with void."""
    main(["fit", "folder", "--data.root", str(photo_folder), *TINY, "--data.batch_size=64", "--data.crop_size=[128,128]"])
    assert len(list(Path("runs/folder").iterdir())) == 1
