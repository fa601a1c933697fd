"""Held-out bounds: counts of images and margins against plain loops, files, table and command."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binom
from test_cli import TINY, UNET, fails

from mcseg.callbacks.held_out import HeldOutBounds, bound_table, save_margins
from mcseg.evaluation.bounds import miou_lower_bound
from mcseg.evaluation.margin_counts import MARGINS, MarginCounts
from mcseg.evaluation.metrics import score
from mcseg.run.main import main

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import coverage


def plain_margins(logits, target, margins, classes):
    """Cleared pixels and false alarms (C,margins), pixel by pixel; logits (C,P), target (P,)."""
    cleared, alarms = np.zeros((classes, len(margins))), np.zeros((classes, len(margins)))
    for pixel, label in enumerate(target):
        if label == 255:
            continue
        for k in range(classes):
            margin = logits[k, pixel] - max(logits[j, pixel] for j in range(classes) if j != k)
            for column, required in enumerate(margins):
                if k == label:
                    cleared[k, column] += margin > required
                else:
                    alarms[k, column] += margin > -required
    return cleared, alarms


@pytest.mark.parametrize("classes", [2, 5])
def test_margins_pixel_by_pixel(classes):
    logits = torch.randint(-4, 5, (3, classes, 6, 7)).float()  # with ties and margins of exactly the required size
    target = torch.randint(0, classes, (3, 6, 7))
    target[target == classes - 1] = 255 if classes == 5 else classes - 1  # a class without pixels
    target[0, 0] = 255
    margins = (0.0, 1.0, 2.0, 5.0)
    counts = MarginCounts(classes, margins)
    counts.update(logits[:1], target[:1])
    counts.update(logits[1:], target[1:])
    pixels = torch.bincount(target.flatten(), minlength=256)[:classes].double()[:, None]
    flat = logits.movedim(1, 0).flatten(1).double().numpy()
    cleared, alarms = plain_margins(flat, target.flatten().tolist(), margins, classes)
    torch.testing.assert_close(counts.cleared(), torch.from_numpy(cleared) / pixels, equal_nan=True)
    torch.testing.assert_close(counts.iou(), torch.from_numpy(cleared) / (pixels + torch.from_numpy(alarms)), equal_nan=True)


def test_margins_are_taken_at_the_size_of_the_mask(monkeypatch):
    logits, target = torch.randn(2, 4, 5, 6), torch.randint(0, 4, (2, 12, 13))
    preds = torch.nn.functional.interpolate(logits, (12, 13), mode="bilinear", align_corners=False).argmax(1)
    whole, banded = MarginCounts(4), MarginCounts(4)
    whole.update(logits, target)
    monkeypatch.setattr("mcseg.evaluation.inference._BAND", 2 * 4 * 13 * 5)  # bands of five rows, counted in chunks of two
    monkeypatch.setattr("mcseg.evaluation.margin_counts._CHUNK", 2 * 4 * 13 * 2)
    banded.update(logits, target)
    torch.testing.assert_close(whole.iou()[:, 0], score(preds, target, 4).iou)
    torch.testing.assert_close(banded.cleared(), whole.cleared(), rtol=0, atol=0.01)
    torch.testing.assert_close(banded.iou()[:, 0], whole.iou()[:, 0])


class Data:
    class_names = ("left", "right")
    palette = ((250, 10, 10), (10, 10, 250))
    num_classes = 2


class FakeTrainer:
    world_size = 1
    sanity_checking = False
    datamodule = Data()

    def __init__(self, root, logits):
        self.default_root_dir = str(root)
        self.lightning_module = lambda image: logits[image[:, 0, 0, 0].long()]
        self.lightning_module.device = "cpu"

    @property
    def precision_plugin(self):
        return self

    def forward_context(self):
        return torch.no_grad()


def run(tmp_path, names, **settings):
    """Evaluate images of 2x4 whose left half is class 0; the k-th prediction is wrong in k mod 4 pixels of class 1."""
    target = torch.tensor([[0, 0, 1, 1]] * 2).repeat(len(names), 1, 1)
    preds = target.clone()
    for k in range(len(names)):
        preds[k].view(-1)[[2, 3, 6, 7][: k % 4]] = 0
    logits = 3.0 * torch.nn.functional.one_hot(preds, 2).movedim(-1, 1)
    trainer, callback = FakeTrainer(tmp_path, logits), HeldOutBounds(**settings)
    callback.start(trainer, trainer.lightning_module, "val")
    for first in range(0, len(names), 3):
        part = slice(first, first + 3)
        image = torch.arange(len(names), dtype=torch.float32)[part, None, None, None].expand(-1, 3, 2, 4)
        outputs = {"preds": preds[part].to(torch.uint8), "target": target[part]}
        callback.take(trainer, outputs, {"name": names[part], "image": image}, first, "val")
    callback.finish(trainer, trainer.lightning_module, "val")
    return json.loads((tmp_path / "bound.json").read_text()), preds, target


def image_counts(preds, target):
    return np.array(
        [
            [[int(((p == k) & (t == k)).sum()), int((t == k).sum()), int((p == k).sum())] for k in range(2)]
            for p, t in zip(preds, target, strict=True)
        ]
    ).transpose(0, 2, 1)


def test_result_of_images_as_units(tmp_path):
    names = [f"a{k}" for k in range(8)]
    result, preds, target = run(tmp_path, names, level=0.9, largest_pixels=8)
    counts = image_counts(preds, target)
    assert result["units"] == 8
    assert result["miou"] == pytest.approx(score(preds, target, 2).miou)
    expected = {
        "bootstrap": miou_lower_bound(counts, 0.9),
        "concentration": miou_lower_bound(counts, 0.9, "concentration", largest_pixels=8),
    }
    assert result["miou_lower_bound"] == pytest.approx(expected)
    assert 0 < expected["concentration"] < expected["bootstrap"] < result["miou"]
    assert result["unit_weighted"] == {"miou": pytest.approx(result["miou"]), "miou_lower_bound": pytest.approx(expected)}
    at = {margin: column for column, margin in enumerate(result["margins"])}
    right = result["classes"]["right"]
    assert right["cleared"][at[2.5]] == pytest.approx(20 / 32)  # every margin is 3 or -3
    assert right["cleared"][at[3.0]] == 0
    assert right["iou_at_margin"][at[2.5]] == pytest.approx(20 / 32)
    assert right["iou_at_margin"][at[4.0]] == 0
    assert result["classes"]["left"]["iou_at_margin"][0] == pytest.approx(32 / 44)
    with Image.open(tmp_path / "margins.png") as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 24)}
    assert {(250, 10, 10), (10, 10, 250)} <= colors


def evaluate(tmp_path, images, **settings):
    """Return the result for (preds, target) pairs of any size with two classes."""
    trainer = FakeTrainer(tmp_path, None)
    trainer.lightning_module = lambda image: torch.nn.functional.one_hot(image[:, 0].long(), 2).movedim(-1, 1).float()
    callback = HeldOutBounds(**settings)
    trainer.lightning_module.device = "cpu"
    callback.start(trainer, trainer.lightning_module, "val")
    for index, (preds, target) in enumerate(images):
        batch = {"name": [f"image {index}"], "image": preds[None, None].expand(-1, 3, -1, -1)}
        callback.take(trainer, {"preds": preds[None], "target": target[None]}, batch, index, "val")
    return callback.result(Data.class_names, "val")


def test_bounds_hold_for_images_of_different_sizes(tmp_path):
    """Most of the sets have no large image, so the size limit cannot be estimated from them."""
    source, sets, rng = coverage.TwoSizes(small=10), 100, np.random.default_rng(0)
    bounded, held = 0, {"pixel": 0, "image": 0}
    for _ in range(sets):
        images = []
        for hits, target, _ in source.images(20, rng):
            labels = torch.arange(2).repeat_interleave(int(target[0]))
            wrong = torch.cat([torch.arange(int(t)) >= int(h) for h, t in zip(hits, target, strict=True)])
            images.append((torch.where(wrong, 1 - labels, labels)[None], labels[None]))
        result = evaluate(tmp_path, images)
        bound = result["miou_lower_bound"]["concentration"]
        bounded += bound is not None
        held["pixel"] += bound is None or bound <= source.miou("pixel")
        held["image"] += result["unit_weighted"]["miou_lower_bound"]["concentration"] <= source.miou("image")
    at_least = binom.ppf(0.001, sets, 0.95)
    assert held["pixel"] >= at_least
    assert held["image"] >= at_least
    assert bounded == 0, "no size limit was given"
    assert evaluate(tmp_path, images, largest_pixels=800)["miou_lower_bound"]["concentration"] <= source.miou("pixel")


def test_an_image_beyond_the_size_limit_is_named(tmp_path):
    images = [(torch.zeros(1, pixels, dtype=torch.int64),) * 2 for pixels in (10, 11)]
    with pytest.raises(ValueError, match="found 10, but 'image 1' has 11 labelled pixels"):
        evaluate(tmp_path, images, largest_pixels=10)


def test_few_images_with_a_class_are_named(tmp_path):
    left = torch.zeros(1, 8, dtype=torch.int64)
    right = left.clone()
    right[0, :2] = 1
    images = [(left, right if index < 4 else left) for index in range(60)]
    result = evaluate(tmp_path, images)
    assert result["classes_in_few_units"] == {"right": 4}
    assert "right (4)" in bound_table(result)
    enough = evaluate(tmp_path, [(left, right if index < 15 else left) for index in range(60)])
    assert enough["classes_in_few_units"] == {}
    assert "right (" not in bound_table(enough)


def test_groups_are_units(tmp_path):
    names = [f"seq{k // 2}_{k}" for k in range(8)]
    result, preds, target = run(tmp_path, names, group="^[^_]+")
    counts = image_counts(preds, target).reshape(4, 2, 3, 2).sum(1)
    assert result["units"] == 4
    assert result["largest_unit_pixels"] == 16
    assert result["miou_lower_bound"]["bootstrap"] == pytest.approx(miou_lower_bound(counts))
    assert "fewer than 50 groups" in bound_table(result)


def test_selection_of_the_checkpoint_lowers_the_bound(tmp_path):
    names = [f"a{k}" for k in range(8)]
    result, preds, target = run(tmp_path, names, selected_from=5, largest_pixels=8)
    counts = image_counts(preds, target)
    assert result["miou_lower_bound"]["concentration"] == pytest.approx(
        miou_lower_bound(counts, 0.99, "concentration", largest_pixels=8)
    )
    assert "among no more than 5" in bound_table(result)
    assert "best.ckpt" not in bound_table(result)
    assert "best.ckpt" in bound_table(run(tmp_path, names)[0]), "the val split selects best.ckpt"


def test_bad_settings_are_named(tmp_path):
    for settings, message in (
        ({"level": 1.0}, "level"),
        ({"selected_from": 0}, "selected_from"),
        ({"group": "("}, "regular expression"),
        ({"largest_pixels": 0}, "largest_pixels: found 0"),
    ):
        with pytest.raises(ValueError, match=message):
            HeldOutBounds(**settings)
    with pytest.raises(ValueError, match="found the image name 'b0'"):
        run(tmp_path, ["b0"], group="^a")
    assert not (tmp_path / "bound.json").exists()
    trainer = FakeTrainer(tmp_path, torch.zeros(1))
    trainer.world_size = 2
    with pytest.raises(ValueError, match=r"trainer\.devices"):
        HeldOutBounds().start(trainer, trainer.lightning_module, "val")


def test_more_classes_than_a_legend_takes(tmp_path):
    counts = MarginCounts(40)
    counts.update(torch.randn(1, 40, 8, 8), torch.randint(0, 40, (1, 8, 8)))
    save_margins(counts, [str(k) for k in range(40)], [(k, 0, 0) for k in range(40)], tmp_path / "margins.png")
    with Image.open(tmp_path / "margins.png") as picture:
        assert picture.width > 1000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*using the validation split")
def test_command(photo_folder, capsys, caplog):
    (photo_folder / "val.txt").write_text("\n".join(f"photo {k}" for k in range(6)))
    (photo_folder / "train.txt").write_text("\n".join(f"photo {k}" for k in range(6, 10)))
    common = ["--config", "folder", f"--data.root={photo_folder}", "--data.crop_size=[32,32]", *UNET, *TINY]
    main(["fit", *common, "--trainer.default_root_dir=fit"])
    half = ["--ckpt_path", "fit/checkpoints/best.ckpt", "--data.image_scale=0.5", "--trainer.precision=32-true"]
    with caplog.at_level("INFO", "pytorch_lightning.utilities.rank_zero"):
        main(["bound", *common, *half, "--level", "0.9", "--group", r"\d$", "--trainer.default_root_dir=out"])
    output = "\n".join(caplog.messages)
    result = json.loads(Path("out/bound.json").read_text())
    assert (result["split"], result["units"], result["level"]) == ("val", 6, 0.9)
    assert list(result["classes"]) == ["background", "ground", "thing"]
    assert f"val: mIoU {100 * result['miou']:.2f} %" in output, "the mIoU of validation"
    for name, values in result["classes"].items():
        # IoU at margin 0 is that of the predictions
        assert values["iou_at_margin"][0] == pytest.approx(values["iou"], abs=1e-9), name
        assert len(values["cleared"]) == len(MARGINS)
        assert values["iou_lower_bound"] is None, "no size limit was given"
        assert values["unit_weighted_iou_lower_bound"] <= values["unit_weighted_iou"]
    assert result["miou_lower_bound"]["concentration"] is None
    assert 0 <= result["miou_lower_bound"]["bootstrap"] < result["miou"]
    assert all(
        0 <= bound < result["unit_weighted"]["miou"] for bound in result["unit_weighted"]["miou_lower_bound"].values()
    )
    assert "by bootstrap" in output
    assert "--bound.largest_pixels" in output
    with Image.open("out/margins.png") as picture:
        assert picture.width > 1000

    limit = ["--bound.largest_pixels", "5000"]
    main(
        ["bound", *common, *half, "--split=test", *limit, "--trainer.default_root_dir=test"]
    )  # FolderData tests on its val split
    result = json.loads(Path("test/bound.json").read_text())
    assert (result["split"], result["largest_pixels"]) == ("test", 5000)
    assert all(0 <= bound < result["miou"] for bound in result["miou_lower_bound"].values())
    for values in result["classes"].values():
        assert values["iou_lower_bound"] <= values["iou"]
    assert "mcseg bound needs trained weights" in fails(capsys, ["bound", *common])
    assert "largest_pixels: found 9, but 'photo 0' has" in fails(
        capsys, ["bound", *common, *half, "--bound.largest_pixels=9"]
    )
    assert "level: found 2" in fails(capsys, ["bound", *common, *half, "--level", "2"])
    assert "train" in fails(capsys, ["bound", *common, *half, "--split", "train"], code=2)
