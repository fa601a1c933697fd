"""Callbacks: one confusion matrix per split, also of several processes; pixels of pictures and files."""

import gc
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch.utils.data import DataLoader

from mcseg import pictures
from mcseg.callbacks.panels import PredictionPanel, TrainingCurves
from mcseg.callbacks.prediction_writer import PredictionWriter
from mcseg.callbacks.scores import JaccardCallback, score_table
from mcseg.evaluation.metrics import score
from mcseg.palette import distinct_colors


class Answers(pl.LightningModule):
    """Returns the predictions in the batch."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"num_classes": 3})
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def validation_step(self, batch, index):
        return {"preds": batch["preds"], "target": batch["mask"]}

    test_step = validation_step

    def predict_step(self, batch, index):
        return list(batch["preds"])

    def training_step(self, batch, index):
        loss = (self.weight - 1).square().sum()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(count=7, size=2, classes=3):
    """Return targets, predictions and a loader of both with images; the last batch is smaller."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, classes, (count, 6, 8), generator=generator)
    target[:, 0, 0] = 255
    preds = torch.where(torch.rand(target.shape, generator=generator) < 0.7, target, 0).clamp(max=classes - 1)
    image = torch.randint(0, 256, (count, 3, 6, 8), generator=generator, dtype=torch.uint8)
    items = [
        {"image": i, "mask": t, "preds": p.to(torch.uint8), "name": f"n{k}"}
        for k, (i, t, p) in enumerate(zip(image, target, preds, strict=True))
    ]
    return target, preds, DataLoader(items, size)


def trainer(tmp_path, callbacks, **options):
    return pl.Trainer(
        **{
            "default_root_dir": tmp_path,
            "callbacks": callbacks,
            "logger": False,
            "accelerator": "cpu",
            "max_epochs": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            **options,
        }
    )


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_logged_scores_are_those_of_the_whole_split(tmp_path, verb):
    target, preds, loader = batches()
    callback = JaccardCallback(["sky", "road", "pole"])
    run = trainer(tmp_path, [callback])
    logged = getattr(run, verb)(Answers(), loader, verbose=False)[0]
    kept = target != 255
    counts = confusion_matrix(target[kept], preds[kept])
    iou = np.diag(counts) / (counts.sum(0) + counts.sum(1) - np.diag(counts))
    split = {"validate": "val", "test": "test"}[verb]
    assert logged[f"{split}/miou"] == pytest.approx(iou.mean(), rel=1e-6)
    assert [logged[f"{split}/iou/{name}"] for name in ("sky", "road", "pole")] == pytest.approx(iou, rel=1e-6)
    assert logged[f"{split}/pixel_accuracy"] == pytest.approx(np.diag(counts).sum() / counts.sum(), rel=1e-6)
    assert logged[f"{split}/classes_averaged"] == 3
    again = getattr(run, verb)(Answers(), loader, verbose=False)[0]
    assert again == logged  # the counts are reset


def test_absent_classes_are_left_out_and_counted(tmp_path):
    _, _, loader = batches()
    logged = trainer(tmp_path, [JaccardCallback(["a", "b", "c", "never"])]).validate(Answers(), loader, verbose=False)[0]
    assert logged["val/classes_averaged"] == 3
    assert "val/iou/never" not in logged


def test_table_is_printed_with_shares_and_percentages(tmp_path, caplog):
    target, preds, loader = batches()
    with caplog.at_level("INFO", "pytorch_lightning.utilities.rank_zero"):
        trainer(tmp_path, [JaccardCallback(["sky", "road", "pole"])]).validate(Answers(), loader, verbose=False)
    scores = score(preds, target, 3)
    text = "\n".join(caplog.messages)
    for index, name in enumerate(("sky", "road", "pole")):
        row = next(line for line in text.splitlines() if line.startswith(name)).split()
        assert row == [
            name,
            f"{100 * scores.share[index]:.3f}",
            f"{100 * scores.iou[index]:.1f}",
            f"{100 * scores.precision[index]:.1f}",
            f"{100 * scores.recall[index]:.1f}",
        ]
    assert f"val: mIoU {100 * scores.miou:.2f} % over 3 of 3 classes" in text


def test_table_of_absent_classes():
    text = score_table(score(torch.tensor([0, 1]), torch.tensor([0, 1]), 3), ["a", "b", "c"], "test")
    assert text.splitlines()[4].split() == ["c", "0.000", "-", "-", "-"]
    assert "over 2 of 3 classes (1 without a pixel" in text


DDP = """
import sys, json, torch, pytorch_lightning as pl
sys.path.insert(0, {tests!r})
from test_callbacks import Answers, batches, trainer
from mcseg.callbacks.scores import JaccardCallback
callback = JaccardCallback(["a", "b", "c"])
run = trainer({folder!r}, [callback], strategy="ddp", devices=2)
run.validate(Answers(), batches(count=7)[2], verbose=False)
if run.is_global_zero:
    print("RESULT", json.dumps([callback._metric.confmat.tolist(), callback.scores["val"].share.mul(7 * 47).tolist(), callback.scores["val"].miou]))
"""


@pytest.mark.slow
def test_two_processes_count_the_same_as_one(tmp_path):
    """Seven images on two processes in batches of two: the image that the sampler repeats must count once."""
    target, preds, _ = batches()
    script = tmp_path / "run.py"
    script.write_text(DDP.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    assert line, done.stderr[-3000:]
    import json

    _, pixels, miou = json.loads(line.removeprefix("RESULT "))
    kept = target != 255
    counts = confusion_matrix(target[kept], preds[kept])
    assert pixels == pytest.approx(counts.sum(1).tolist(), abs=1e-9)
    assert miou == pytest.approx(score(preds, target, 3).miou, rel=1e-12)


def test_palette_image_keeps_ids_and_shows_colours(tmp_path):
    palette = [(10, 20, 30), (200, 0, 0)]
    mask = torch.tensor([[0, 1], [1, 255]], dtype=torch.uint8)
    pictures.save(pictures.palette_image(mask, palette), tmp_path / "sub" / "m.png")
    with Image.open(tmp_path / "sub" / "m.png") as file:
        assert np.asarray(file).tolist() == [[0, 1], [1, 255]]
        assert np.asarray(file.convert("RGB")).tolist() == [[[10, 20, 30], [200, 0, 0]], [[200, 0, 0], [0, 0, 0]]]
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["m.png"]  # no temporary file remains


def test_overlay_has_more_of_the_image_than_of_the_mask():
    image = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    picture = pictures.overlay(image, torch.tensor([[0, 1], [1, 0]]), [(0, 0, 0), (200, 0, 0)])
    assert pictures.as_array(picture)[0].tolist() == [[65, 65, 65], [135, 65, 65]]


def test_a_failed_picture_leaves_no_file(tmp_path):
    class Broken:
        def save(self, path):
            path.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        pictures.save(Broken(), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_panel_shows_image_target_and_prediction():
    palette = [(255, 0, 0), (0, 255, 0)]
    image = torch.full((3, 9, 12), 77, dtype=torch.uint8)
    target = torch.zeros(18, 24, dtype=torch.long)
    target[:, 12:] = 255
    preds = torch.ones(18, 24, dtype=torch.uint8)
    panel = pictures.as_array(pictures.panel([(image, target, preds)], ["red", "green"], palette))
    row = panel[24 + 135]  # the middle of the first row of pictures: 360 x 270 each, 8 between them
    assert row[8 + 180].tolist() == [77, 77, 77]
    assert row[376 + 90].tolist() == [255, 0, 0]
    assert row[376 + 270].tolist() == [0, 0, 0]  # void in the target
    assert row[744 + 90].tolist() == [0, 255, 0]
    assert row[744 + 270].tolist() == [0, 0, 0]  # void is drawn in the prediction as well


def test_panels_are_written_and_logged_in_the_epochs_of_the_interval(tmp_path):
    _, _, loader = batches()
    logger = pl.loggers.TensorBoardLogger(tmp_path, name="", version="")
    run = trainer(tmp_path, [PredictionPanel(images=3, every_n_epochs=2)], max_epochs=5, logger=logger, log_every_n_steps=1)
    run.fit(Answers(), loader, loader)
    assert sorted(path.name for path in (tmp_path / "panels").iterdir()) == [
        f"val-epoch{epoch:03d}.png" for epoch in (1, 3, 4)
    ]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert len(events.Images("val/panel")) == 3


@pytest.mark.parametrize(("count", "size", "expected"), [(40, 2, [0, 10, 20, 30]), (3, 1, [0, 1, 2]), (8, 4, [0, 1, 4, 5])])
def test_panel_takes_images_from_the_whole_split(tmp_path, monkeypatch, count, size, expected):
    drawn = []
    monkeypatch.setattr(
        pictures,
        "panel",
        lambda rows, names, palette: drawn.extend(int(r[0][0, 0, 0]) for r in rows) or Image.new("RGB", (9, 9)),
    )
    items = [
        {
            "image": torch.full((3, 4, 4), k, dtype=torch.uint8),
            "mask": torch.zeros(4, 4).long(),
            "preds": torch.zeros(4, 4).byte(),
        }
        for k in range(count)
    ]
    trainer(tmp_path, [PredictionPanel(images=4)]).validate(Answers(), DataLoader(items, size), verbose=False)
    assert drawn == expected


def test_prediction_files_have_the_images_names(tmp_path):
    items = [
        {
            "image": torch.zeros(3, 4, 5, dtype=torch.uint8),
            "preds": torch.full((8, 10), k, dtype=torch.uint8),
            "name": name,
        }
        for k, name in enumerate(("first", "sub/second"))
    ]
    trainer(tmp_path, [PredictionWriter(tmp_path / "out")]).predict(Answers(), DataLoader(items, 1))
    for k, name in enumerate(("first", "sub/second")):
        with Image.open(tmp_path / "out" / "masks" / f"{name}.png") as file:
            assert np.asarray(file).tolist() == [[k] * 10] * 8
        with Image.open(tmp_path / "out" / "overlays" / f"{name}.jpg") as file:
            assert file.size == (10, 8)


def test_curves_continue_after_a_checkpoint(tmp_path):
    _, _, loader = batches()
    curves = TrainingCurves()
    trainer(tmp_path, [JaccardCallback(["a", "b", "c"]), curves], max_epochs=2, log_every_n_steps=1).fit(
        Answers(), loader, loader
    )
    assert [row["epoch"] for row in curves.history] == [0, 1]
    assert all({"train/loss", "val/miou", "val/iou/a"} <= row.keys() for row in curves.history)
    again = TrainingCurves()
    again.load_state_dict(curves.state_dict())
    assert again.history == curves.history
    with Image.open(tmp_path / "curves.png") as file:
        assert file.width > 800


def test_archives_hold_the_files_by_their_paths(tmp_path):
    for name in ("b.png", "sub/a.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    zipped = pictures.pack(tmp_path / "in", tmp_path / "out" / "x.zip")
    with zipfile.ZipFile(zipped) as archive:
        assert {name: archive.read(name).decode() for name in archive.namelist()} == {n: n for n in ("b.png", "sub/a.png")}
    with tarfile.open(pictures.pack(tmp_path / "in", tmp_path / "out" / "x.tar.gz")) as archive:
        assert sorted(archive.getnames()) == ["b.png", "sub/a.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x.tar.gz", "x.zip"]


def test_void_is_never_the_colour_of_a_class():
    mask = torch.tensor([[0, 1, 255]], dtype=torch.uint8)
    assert pictures.as_array(pictures.palette_image(mask, [(9, 9, 9), (8, 8, 8)]))[0].tolist() == [[9] * 3, [8] * 3, [0] * 3]
    with_black = pictures.as_array(pictures.palette_image(mask, [(0, 0, 0), (8, 8, 8)]))
    assert with_black[0].tolist() == [[0] * 3, [8] * 3, [224, 224, 192]]


def test_contact_sheet_shows_images_labels_and_shares(tmp_path):
    def samples():
        for value in (0, 1, 1):
            yield f"sample {value}", torch.full((3, 20, 40), 77, dtype=torch.uint8), torch.full((20, 40), value)

    sheet = pictures.as_array(pictures.contact_sheet(samples(), ["a", "b", "absent"], [(200, 0, 0), (0, 200, 0), (0, 0, 9)]))
    image, labels = sheet[24:174, 8:308], sheet[24:174, 316:616]  # the first sample, 300 wide: 150 high
    assert (image == 77).all()
    assert (labels == (200, 0, 0)).all()
    assert (sheet[24:174, 932:1232] == (0, 200, 0)).all()
    # the third sample starts the second line, with white beside it
    assert (sheet[206:356, 316:616] == (0, 200, 0)).all()
    assert (sheet[206:356, 624:] == 255).all()
    # largest share first in the legend
    assert sheet[376, 15].tolist() == [0, 200, 0]


def test_curves_of_many_classes_are_drawn_without_a_legend(tmp_path):
    row = {"epoch": 0, "train/loss": 1.0, "val/miou": 0.5} | {f"val/iou/class {index}": 0.5 for index in range(171)}
    names, palette = [f"class {index}" for index in range(171)], distinct_colors(171)
    # matplotlib warns if a legend leaves no room
    pictures.save_curves([row, {**row, "epoch": 1}], tmp_path / "curves.png", names, palette)
    assert (tmp_path / "curves.png").is_file()


def test_curves_have_the_class_colours_and_percent(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: (drawn.append(figure), path.touch()))
    history = [
        {"epoch": epoch, "train/loss": 1.0, "val/miou": 0.5, "val/iou/sky": 0.7, "val/iou/pole": 0.3} for epoch in (0, 1)
    ]
    pictures.save_curves(history, tmp_path / "curves.png", ["sky", "pole"], [(255, 0, 0), (0, 0, 255)])
    lines = drawn[0].axes[1].lines
    assert [line.get_label() for line in lines] == ["sky", "pole", "mIoU"]
    assert [line.get_ydata()[1] for line in lines] == pytest.approx([70, 30, 50])
    assert [line.get_color() for line in lines] == [(1, 0, 0), (0, 0, 1), "black"]


def test_class_shares_are_written_and_end_at_100_percent(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: (drawn.append(figure), path.touch()))
    share, palette = torch.tensor([0.0, 0.9988, 0.0012]), distinct_colors(3)
    pictures.save_class_shares(["absent", "road", "pole"], share, {}, path=tmp_path / "shares.png", palette=palette)
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.texts] == ["100 %", "0.12 %", "0 %"]
    assert axes.get_xlim() == pytest.approx((0.01, 100))


def test_legends_name_void_only_if_there_is_some():
    image, names, palette = torch.zeros(3, 20, 40, dtype=torch.uint8), ["a"], [(200, 0, 0)]
    void = {}
    for label in (0, 255):
        target = torch.full((20, 40), label)
        sheet = pictures.as_array(pictures.contact_sheet([("x", image, target)], names, palette))
        panel = pictures.as_array(pictures.panel([(image, target, target)], names, palette))
        void[label] = [bool((picture[-24:, 40:] < 50).all(-1).sum() > 100) for picture in (sheet, panel)]
    assert void == {0: [False, False], 255: [True, True]}


def test_small_images_keep_their_pixels():
    image = torch.tensor([[0, 255]], dtype=torch.uint8).repeat(3, 10, 10)
    sheet = pictures.as_array(pictures.contact_sheet([("x", image, torch.zeros(10, 20).long())], ["a"], [(200, 0, 0)]))
    assert set(np.unique(sheet[24:174, 8:308]).tolist()) == {0, 255}


def test_panel_of_many_classes_names_those_in_the_pictures():
    names = [f"class {index}" for index in range(171)]
    palette = [(index, 0, 0) for index in range(171)]
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    few, many = (
        pictures.panel([(image, target, torch.zeros_like(target))], names, palette).height
        for target in (torch.full((20, 40), 7), torch.arange(800).view(20, 40) % 171)
    )
    assert many >= few + 10 * 24  # more than ten further lines in the legend


class Counted(pl.LightningDataModule):
    """Seven images of four classes; in the training labels the third is rare and the second is absent."""

    class_names = ("road", "nowhere", "pole", "car")

    def __init__(self, never=()):
        super().__init__()
        self.never = never

    def class_pixels(self):
        return torch.tensor([900, 0, 20, 80])

    def train_dataloader(self):
        return DataLoader([0, 1])

    def val_dataloader(self):
        loader = batches(classes=4)[2]
        for item in loader.dataset:
            for index in self.never:
                item["preds"][item["preds"] == index] = 0
        return loader


def test_mean_of_the_rarest_third_is_logged_in_training(tmp_path):
    run = trainer(tmp_path, [JaccardCallback()])
    run.fit(Answers(), Counted())
    logged = run.callback_metrics
    # Three classes have training labels, so the rarest third is one class, the pole.
    assert float(logged["val/miou_tail"]) == pytest.approx(float(logged["val/iou/pole"]))
    assert float(logged["val/miou"]) != pytest.approx(float(logged["val/miou_tail"]))


def test_classes_that_are_never_predicted_are_named_once(tmp_path):
    with pytest.warns(UserWarning, match="never predicted although") as caught:
        trainer(tmp_path, [JaccardCallback()], max_epochs=3).fit(Answers(), Counted(never=(2, 3)))
    named = [str(warning.message) for warning in caught if "never predicted although" in str(warning.message)]
    assert len(named) == 1
    assert "targets contain them: car, pole;" in named[0]


def artists():
    """Figures, axes, lines and texts of matplotlib that are alive and not frozen."""
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Artist)]


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_curves_leave_no_garbage(tmp_path, frozen):
    """A figure is thousands of objects in cycles; without a collection a long run keeps many figures in memory."""
    history = [{"epoch": epoch, "train/loss": 1.0, "val/miou": 0.5, "val/iou/road": 0.5} for epoch in range(3)]
    pictures.save_curves(history, tmp_path / "curves.png", ["road"], [(9, 9, 9)])  # fills matplotlib's caches
    was_frozen = gc.get_freeze_count() > 0  # the suite freezes the libraries
    gc.unfreeze()
    gc.collect()
    if frozen:
        gc.freeze()
    gc.disable()
    try:
        before = artists()  # kept alive, so that no new object gets the id of an old one
        pictures.save_curves(history, tmp_path / "curves.png", ["road"], [(9, 9, 9)])
        known = {id(thing) for thing in before}
        assert [type(thing) for thing in artists() if id(thing) not in known] == []
        assert (gc.get_freeze_count() > 0) == frozen  # as before the call
    finally:
        gc.enable()
        gc.unfreeze()
        if was_frozen:
            gc.freeze()
