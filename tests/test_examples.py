"""Run each example and check its output and files."""

import math
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mcseg import SegmentationModule, SyntheticData
from mcseg.data import DataError

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run an example in this process; return its variables and its output."""
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as Python does for a script
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def example(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__"), capsys.readouterr().out

    return example


def predicted(module, image):
    """Predict the classes (H,W) of an image (H,W,3) uint8."""
    with torch.no_grad():
        return module(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]).argmax(1)[0].numpy()


def test_each_example_has_a_test_and_is_short():
    tests = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.name}"' in tests
        assert f"({path.name})" in (EXAMPLES / "README.md").read_text()
        assert 20 <= len(path.read_text().splitlines()) <= 60, path.name


@pytest.mark.slow
def test_own_folder(run):
    variables, printed = run("own_folder.py")
    score, checkpoint = re.search(r"mIoU ([\d.]+) %, checkpoint (\S+)", printed).groups()
    module = SegmentationModule.load_from_checkpoint(checkpoint).eval()
    samples = variables["data"].samples("val")
    assert len(samples) == 6
    confusion = np.zeros((3, 3))
    for sample in samples:
        mask = np.array(Image.open(variables["root"] / "masks" / f"{sample.name}.png"))
        preds = predicted(module, Image.open(variables["root"] / "images" / f"{sample.name}.jpg"))
        np.add.at(confusion, (mask[mask != 255], preds[mask != 255]), 1)
    iou = np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion))
    assert float(score) == pytest.approx(100 * iou.mean(), abs=0.051)
    assert iou.min() > 0.3  # each class has been learned


def test_own_folder_with_a_given_folder(run, photo_folder):
    variables, printed = run("own_folder.py", photo_folder)
    assert variables["data"].class_names == ("background", "ground", "thing")
    assert "mIoU" in printed


@pytest.mark.slow
def test_loss_only(run):
    variables, printed = run("loss_only.py")
    masks = variables["masks"][:48].numpy()
    assert variables["class_pixels"].tolist() == [int((masks == index).sum()) for index in range(8)]
    lines = re.findall(r"(?m)^(cross entropy|power Dice|margin calibration) +(.*)$", printed)
    numbers = {name: [float(number) for number in rest.split()] for name, rest in lines}
    assert len(numbers) == 3
    for miou, *iou in numbers.values():
        assert miou == pytest.approx(np.mean(iou), abs=0.11)
        assert iou[0] > 60  # road
    assert numbers["power Dice"][0] > numbers["cross entropy"][0]


@pytest.mark.slow
def test_own_objective(run):
    variables, printed = run("own_objective.py")
    assert "PolyLoss with epsilon 2.0" in printed
    assert variables["again"].objective is not variables["module"].objective
    loss = variables["PolyLoss"](epsilon=3.0)
    logits, target = torch.randn(2, 4, 3, 5, dtype=torch.float64), torch.randint(4, (2, 3, 5))
    target[0, 0, :2] = 255
    total, number = 0.0, 0
    for n, row, column in np.ndindex(target.shape):
        if (label := int(target[n, row, column])) != 255:
            scores = [math.exp(value) for value in logits[n, :, row, column].tolist()]
            p = scores[label] / sum(scores)
            total, number = total - math.log(p) + 3 * (1 - p), number + 1
    assert float(loss(logits, target)) == pytest.approx(total / number)
    assert float(loss(logits, torch.full_like(target, 255))) == 0


@pytest.mark.slow
def test_own_data(run):
    variables, printed = run("own_data.py")
    data, root = variables["data"], variables["root"]
    assert [len(data.samples(split)) for split in ("train", "val", "test")] == [16, 4, 0]
    assert {sample.image.parent.name for sample in data.samples("val")} == {"8", "9"}
    pixels = np.zeros(3, dtype=int)
    for path in root.glob("[0-7]/*_labels.png"):
        pixels += [(np.array(Image.open(path)) == value).sum() for value in (0, 10, 20)]
    for name, count in zip(("background", "tissue", "lesion"), pixels, strict=True):
        assert f"'{name}': {count}" in printed
    Image.fromarray(np.full((64, 64), 30, dtype=np.uint8)).save(root / "0" / "0_labels.png")
    with pytest.raises(DataError, match=r"0_labels\.png.* 30;"):
        data.reader.mask(data.samples("train")[0])


@pytest.mark.slow
def test_predict(run, tmp_path):
    trained = run("predict.py")
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(photo)
    given = run("predict.py", trained[0]["checkpoint"], photo)
    for (variables, printed), size in ((trained, (64, 96)), (given, (50, 70))):
        labels = predicted(variables["module"], Image.open(variables["photo"]).convert("RGB"))
        assert np.array_equal(labels, variables["labels"].numpy())
        shares = dict(re.findall(r"(?m)^(\w+) +([\d.]+) % of the pixels$", printed))
        for index, name in enumerate(SyntheticData().class_names):
            assert float(shares[name]) == pytest.approx(100 * (labels == index).mean(), abs=0.051)
        mask = np.array(Image.open(variables["folder"] / "mask.png"))
        assert mask.shape == labels.shape == size
        changed = float(re.search(r"change ([\d.]+) %", printed)[1])
        assert changed == pytest.approx(100 * (mask != labels).mean(), abs=0.051)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:No complete tensor found")  # torch 2.15 warns about a file that it wrote
@pytest.mark.filterwarnings("ignore:.*buffer is not writable")  # torch 2.7 warns about a buffer that it created
def test_exported_network_needs_only_torch(run, tmp_path):
    variables, _ = run("export.py")
    images = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    torch.save(images, tmp_path / "images.pt")
    code = """
import sys
sys.modules |= dict.fromkeys(("mcseg", "segmentation_models_pytorch", "timm", "pytorch_lightning"))  # importing these fails
import torch
network = torch.export.load(sys.argv[1]).module()
torch.save(network(torch.load("images.pt")), "logits.pt")
"""
    subprocess.run([sys.executable, "-c", code, variables["folder"] / "network.pt2"], check=True, cwd=tmp_path)
    with torch.no_grad():
        expected = variables["network"](images)
    assert F.mse_loss(torch.load(tmp_path / "logits.pt"), expected) < 1e-10


@pytest.mark.slow
def test_two_processes():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLES / "two_processes.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert f"process {rank} of 2: same weights as process 0: True" in done.stdout
    data = SyntheticData(val_scenes=7, size=(64, 96))
    labelled = sum(int((data.reader.mask(sample) != 255).sum()) for sample in data.samples("val"))
    assert f"{labelled} of 43008 validation pixels scored" in done.stdout
