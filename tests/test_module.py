"""SegmentationModule: it learns, ignores void, rebuilds from checkpoints, and handles losses that are NaN or infinite."""

import csv
import importlib
import json
import logging
import math
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import segmentation_models_pytorch as smp
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import nn

from mcseg.callbacks.scores import JaccardCallback
from mcseg.checkpoints.compatibility import initialize_network
from mcseg.data import SyntheticData
from mcseg.evaluation.inference import Inference, labels_at
from mcseg.losses import CrossEntropyLoss, MarginCalibrationLoss
from mcseg.margins import margin_offsets
from mcseg.module import SegmentationModule
from mcseg.networks import SegmentationNetwork
from mcseg.nonfinite import LossGuard
from mcseg.schedules import WarmupPolynomialLR
from mcseg.seeds import seed_of, seeded

TINY = {
    "arch": "unet",
    "encoder": "tu-test_resnet.r160_in1k",
    "network_options": {"decoder_channels": [16, 16, 8, 8, 8]},
}
MARGINS = partial(MarginCalibrationLoss, num_classes=8)  # an objective that needs pixel counts


class KeepsItsArguments(nn.Module):
    """A user's objective with its argument as an attribute."""

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = weight

    def forward(self, logits, target):
        return self.weight * nn.functional.cross_entropy(logits, target, ignore_index=255)


class ForgetsItsArguments(nn.Module):
    """A user's objective without its argument as an attribute."""

    def __init__(self, weight: float = 1.0):
        super().__init__()


def data(**options):
    return SyntheticData(
        **{
            "train_scenes": 4,
            "val_scenes": 3,
            "test_scenes": 2,
            "size": (32, 48),
            "crop_size": (32, 48),
            "batch_size": 2,
            "eval_batch_size": 2,
            "num_workers": 0,
            "color_jitter": 0.0,
            **options,
        }
    )


def trainer(tmp_path, **options):
    return pl.Trainer(
        **{
            "default_root_dir": tmp_path,
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [JaccardCallback()],
            **options,
        }
    )


def same_weights(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_it_learns_one_batch():
    torch.manual_seed(0)
    module = SegmentationModule(**TINY, num_classes=8, objective=MARGINS())
    source = data(train_scenes=2)
    source.setup("fit")
    module.objective.calibrate(source.class_pixels())
    batch = next(iter(source.train_dataloader()))
    optimizer = torch.optim.AdamW(module.network.parameters(), lr=0.01)
    losses = []
    for _ in range(120):
        loss = module._loss(module.objective, module(batch["image"]), batch["mask"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
    preds = module.eval()(batch["image"]).argmax(1)
    labelled = batch["mask"] != 255
    assert (preds == batch["mask"])[labelled].float().mean() > 0.9


def test_calibration_happens_at_fit_start_from_the_training_labels(tmp_path):
    module = SegmentationModule(**TINY, num_classes=8, objective=MarginCalibrationLoss(8, tau=3.0))
    source = data()
    trainer(tmp_path).fit(module, source)
    expected = margin_offsets(source.class_pixels(), tau=3.0)
    torch.testing.assert_close(module.objective.offsets.background, expected.background, rtol=1e-12, atol=0)


def test_without_counts_an_uncalibrated_objective_is_refused(tmp_path):
    source = data()
    source.setup("fit")
    loader = source.train_dataloader()
    with pytest.raises(RuntimeError, match=r"not calibrated and the data module has no class_pixels.*objective\.calibrate"):
        trainer(tmp_path, callbacks=[]).fit(SegmentationModule(**TINY, num_classes=8, objective=MARGINS()), loader)
    trainer(tmp_path, callbacks=[]).fit(SegmentationModule(**TINY, num_classes=8), loader)  # the default needs no counts


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [
        None,
        MarginCalibrationLoss(8, scheme="miou", max_margin=2.0),
        nn.CrossEntropyLoss(ignore_index=255),
        nn.CrossEntropyLoss(torch.arange(1.0, 9.0), ignore_index=255),
        CrossEntropyLoss(weight=range(1, 9)),
        partial(smp.losses.LovaszLoss, mode="multiclass", ignore_index=255),
        KeepsItsArguments(0.5),
    ],
    ids=["default", "miou", "cross entropy", "weight", "list of weights", "lovasz", "user"],
)
def test_checkpoint_round_trip_from_python(tmp_path, objective):
    module = SegmentationModule(
        **TINY, num_classes=8, objective=objective, optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    )
    run = trainer(tmp_path)
    run.fit(module, data())
    path = tmp_path / "x.ckpt"
    run.save_checkpoint(path)
    content = torch.load(path, weights_only=True)  # refuses anything but tensors and plain types
    assert content["hyper_parameters"]["optimizer"] == {
        "class_path": "torch.optim.sgd.SGD",
        "init_args": {"lr": 0.01, "momentum": 0.9},
    }
    loaded = SegmentationModule.load_from_checkpoint(path, weights_only=True)
    assert same_weights(module, loaded)
    assert type(loaded.objective) is type(module.objective)
    for name in ("tau", "scheme", "max_margin", "weight", "ignore_index"):
        here, there = (getattr(objective, name, None) for objective in (module.objective, loaded.objective))
        assert torch.equal(here, there) if isinstance(here, torch.Tensor) else here == there
    image = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(image), module.eval()(image))
    optimizer = loaded.optimizer(loaded.parameters())
    assert optimizer.defaults["momentum"] == 0.9
    # The loaded module can be trained and saved again.
    second = trainer(tmp_path)
    second.fit(loaded.train(), data())
    second.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["hyper_parameters"] == content["hyper_parameters"]


def test_a_loaded_margin_loss_needs_no_labels(tmp_path):
    run = trainer(tmp_path)
    module = SegmentationModule(**TINY, num_classes=8, objective=MARGINS())
    run.fit(module, data())
    run.save_checkpoint(tmp_path / "x.ckpt")
    loaded = SegmentationModule.load_from_checkpoint(tmp_path / "x.ckpt")
    assert loaded.objective.is_calibrated
    for actual, expected in zip(loaded.objective.offsets, module.objective.offsets, strict=True):
        assert torch.equal(actual, expected)
        assert actual.dtype == torch.float64


# No function that jsonargparse denies by itself from 4.53 on, as it does os.system
TOUCH = {"class_path": "torch.save", "init_args": {"obj": 1, "f": "owned"}}
# Refused by this package, by Lightning, or by the parser, whose messages and order of checks differ between versions
REFUSED = (
    "expected a class of networks|without dots|not in the allowlist|does not correspond to a subclass|Expected 'torch.save' to be"
    "|Option 'obj' is not accepted|does not accept option"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"objective": TOUCH},
        {"objective": json.dumps(TOUCH)},
        {"objective.class_path": "torch.save", "objective.init_args.obj": 1, "objective.init_args.f": "owned"},
        {"objective": {"class_path": "numpy.memmap", "init_args": {"filename": "owned", "shape": [1], "mode": "w+"}}},
        {"objective": {"class_path": "mcseg.losses.SumLoss", "init_args": {"num_classes": 3, "objectives": [TOUCH]}}},
        {"objective": {"class_path": "torch.nn.TripletMarginWithDistanceLoss", "init_args": {"distance_function": TOUCH}}},
        {
            "objective": {
                "class_path": "torch.nn.TripletMarginWithDistanceLoss",
                "init_args": {"distance_function": "torch.save"},
            }
        },
        {"optimizer": TOUCH},
        {"scheduler": TOUCH},
        {"network_options": {"decoder": TOUCH}},
        {"_instantiator": "torch.save"},
        {"_class_path": "mcseg.SegmentationModule", "objective": TOUCH},
        {"class_path": "mcseg.module.SegmentationModule", "init_args": {"num_classes": 3, "objective": TOUCH}},
        {"_class_path": "numpy.memmap", "filename": "owned", "shape": [1], "mode": "w+"},
    ],
    ids=str,
)
def test_a_checkpoint_cannot_call_functions(tmp_path, monkeypatch, arguments):
    """Plain text is not unpickled, but the parser that instantiates classes would call any function that the text names."""
    monkeypatch.chdir(tmp_path)
    module = SegmentationModule(**TINY, num_classes=3, objective=nn.CrossEntropyLoss())
    content = {
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "pytorch-lightning_version": "2.6.6",
    }
    torch.save(content, "good.ckpt")
    torch.save(content | {"hyper_parameters": content["hyper_parameters"] | arguments}, "bad.ckpt")
    with open("good.ckpt", "rb") as file:
        assert same_weights(SegmentationModule.load_from_checkpoint(file), module)
    for options in ({}, {"aux_weight": 0.0}):
        with pytest.raises(ValueError, match=REFUSED) as refusal:
            SegmentationModule.load_from_checkpoint("bad.ckpt", **options)
        assert "\n" not in str(refusal.value)
    assert not Path("owned").exists()
    if "objective" in arguments:  # the caller's objective replaces it
        loaded = SegmentationModule.load_from_checkpoint("bad.ckpt", objective=partial(nn.CrossEntropyLoss, reduction="sum"))
        assert loaded.objective.reduction == "sum"


@pytest.mark.parametrize("key", ["hparams", "module_arguments"])
def test_a_checkpoint_cannot_call_functions_by_older_keys(tmp_path, monkeypatch, key):
    """Lightning still reads arguments from the keys of its first versions."""
    monkeypatch.chdir(tmp_path)
    module = SegmentationModule(**TINY, num_classes=3, objective=nn.CrossEntropyLoss())
    arguments = dict(module.hparams)
    del arguments["objective"]
    content = {"state_dict": module.state_dict(), "hyper_parameters": arguments, "pytorch-lightning_version": "2.6.6"}
    torch.save(content | {key: {"objective": TOUCH}}, "bad.ckpt")
    with pytest.raises(ValueError, match=REFUSED):
        SegmentationModule.load_from_checkpoint("bad.ckpt")
    assert not Path("owned").exists()


def test_a_plateau_schedule_is_stepped_in_training_only(tmp_path):
    """It steps once for each validation of a training, not for the sanity check or a later `validate`."""
    schedule = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode="max", patience=0, threshold=10.0)
    module = SegmentationModule(**TINY, num_classes=8, optimizer=partial(torch.optim.SGD, lr=0.1), scheduler=schedule)
    run = trainer(tmp_path, max_epochs=3, val_check_interval=0.5)
    run.fit(module, data())
    plateau = module.lr_schedulers()
    assert plateau.last_epoch == 6
    # the first score is the best, and no later one is ten times higher
    assert plateau.get_last_lr() == [pytest.approx(0.1 * 0.1**5)]
    run.validate(module, data(), verbose=False)
    assert plateau.last_epoch == 6


def test_reload_and_resume_fetch_no_encoder_weights(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(
        "mcseg.networks.network.SegmentationNetwork.load_pretrained_encoder", lambda *args: fetched.append(args[1])
    )
    module = SegmentationModule(**TINY, encoder_weights="imagenet", num_classes=8)
    assert fetched == []
    run = trainer(tmp_path)
    run.fit(module, data())
    assert fetched == ["imagenet"]
    run.save_checkpoint(tmp_path / "x.ckpt")
    loaded = SegmentationModule.load_from_checkpoint(tmp_path / "x.ckpt")
    trainer(tmp_path).test(loaded, data(), verbose=False)
    trainer(tmp_path, max_epochs=2).fit(
        SegmentationModule(**TINY, encoder_weights="imagenet", num_classes=8), data(), ckpt_path=tmp_path / "x.ckpt"
    )
    assert fetched == ["imagenet"]


def test_resuming_keeps_the_offsets_and_the_schedule(tmp_path):
    whole = SegmentationModule(**TINY, num_classes=8, objective=MARGINS())
    torch.manual_seed(1)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(whole, data())
    run.save_checkpoint(tmp_path / "x.ckpt")
    more = SegmentationModule(**TINY, num_classes=8, objective=MARGINS())
    changed = data(seed=9)  # other labels must not change the offsets of a resumed run
    trainer(tmp_path, max_epochs=3).fit(more, changed, ckpt_path=tmp_path / "x.ckpt")
    assert torch.equal(more.objective.offsets.background, whole.objective.offsets.background)
    # A new run from loaded weights is calibrated again.
    fresh = SegmentationModule.load_from_checkpoint(tmp_path / "x.ckpt").train()
    trainer(tmp_path).fit(fresh, changed)
    torch.testing.assert_close(fresh.objective.offsets.background, margin_offsets(changed.class_pixels()).background)
    assert not torch.equal(fresh.objective.offsets.background, whole.objective.offsets.background)


def defined_in(module, base=nn.CrossEntropyLoss):
    return type("Foreign", (base,), {"__module__": module})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"objective": ForgetsItsArguments()},
            r"ForgetsItsArguments has no attribute for its argument weight.*functools\.partial\(ForgetsItsArguments",
        ),
        (
            {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1)},
            "optimizer: found <function .*lambda.*cannot be recreated from a checkpoint",
        ),
        ({"scheduler": partial(lambda o: o)}, "cannot be imported by name"),
        ({"objective": defined_in("__main__")}, r"__main__\.Foreign, which cannot be imported.*move it to a file"),
        ({"objective": partial(defined_in("__main__"))}, r"__main__\.Foreign, which cannot be imported"),
        ({"objective": defined_in("no_such_module")}, r"no_such_module\.Foreign, which cannot be imported"),
        ({"optimizer": defined_in("__main__", torch.optim.SGD)}, r"optimizer: found __main__\.Foreign"),
        ({"objective": KeepsItsArguments(torch.ones(2))}, r"objective\.weight: found a tensor"),
    ],
)
def test_arguments_that_a_checkpoint_cannot_rebuild_are_refused_before_training(tmp_path, arguments, message):
    module = SegmentationModule(**TINY, num_classes=8, **arguments)
    with pytest.raises(ValueError, match=message) as error:
        trainer(tmp_path).fit(module, data())
    assert "\n" not in str(error.value)


def test_a_tensor_in_a_partial_is_stored_as_a_list():
    objective = partial(nn.CrossEntropyLoss, weight=torch.tensor([1.0, 0.5, 2.0]), ignore_index=255)
    stored = SegmentationModule(**TINY, num_classes=3, objective=objective).hparams["objective"]
    assert stored["init_args"] == {"weight": [1.0, 0.5, 2.0], "ignore_index": 255}


FOREIGN = """
import torch

class Loss(torch.nn.Module):
    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = weight
        self.register_buffer("scale", torch.ones(8))

    def forward(self, logits, target):
        return self.weight * torch.nn.functional.cross_entropy(logits, target, self.scale, ignore_index=255)

class Optimizer(torch.optim.SGD):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
"""


@pytest.fixture
def checkpoint_of_foreign_classes(tmp_path, monkeypatch):
    """Write a checkpoint whose objective and optimiser are classes of a file; return its path, the file and the module."""
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "foreign_classes.py"
    file.write_text(FOREIGN)
    foreign = importlib.import_module("foreign_classes")
    module = SegmentationModule(**TINY, num_classes=8, objective=foreign.Loss(2.0), optimizer=foreign.Optimizer)
    path = tmp_path / "foreign.ckpt"
    content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    torch.save(content | {"pytorch-lightning_version": "2.6.6"}, path)
    monkeypatch.delitem(sys.modules, "foreign_classes")
    return path, file, module


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda file: file.unlink(), "ModuleNotFoundError: No module named 'foreign_classes'"),
        (lambda file: file.write_text("class Other: pass"), "AttributeError"),
        (lambda file: file.write_text("class Loss(:"), "SyntaxError"),
        (lambda file: file.write_text(FOREIGN.replace("weight=1.0", "alpha")), "missing a required argument: 'alpha'"),
    ],
    ids=["no file", "no class", "not Python", "other arguments"],
)
def test_labelling_needs_no_class_of_the_objective(checkpoint_of_foreign_classes, tmp_path, caplog, change, reason):
    path, file, module = checkpoint_of_foreign_classes
    change(file)
    importlib.invalidate_caches()
    with caplog.at_level(logging.INFO):
        loaded = SegmentationModule.load_from_checkpoint(path)
    sys.modules.pop("foreign_classes", None)
    [note] = [line for line in caplog.messages if "objective foreign_classes.Loss cannot be built" in line]
    assert reason in note
    assert "only training needs it; val/loss and test/loss are not computed" in note
    for name, value in loaded.network.state_dict().items():
        assert torch.equal(value, module.network.state_dict()[name])
    scores = trainer(tmp_path).validate(loaded, data(), verbose=False)[0]
    assert "val/miou" in scores
    assert "val/loss" not in scores
    with pytest.raises(ValueError, match="objective: the checkpoint's foreign_classes.Loss cannot be built") as caught:
        trainer(tmp_path).fit(loaded, data())
    assert "\n" not in str(caught.value)


def test_training_needs_the_class_of_the_optimizer(checkpoint_of_foreign_classes, tmp_path):
    path, file, _ = checkpoint_of_foreign_classes
    file.write_text(FOREIGN.replace("class Optimizer", "class Former"))
    importlib.invalidate_caches()
    loaded = SegmentationModule.load_from_checkpoint(path)
    assert type(loaded.objective).__name__ == "Loss"
    with pytest.raises(RuntimeError, match="optimizer: the checkpoint's foreign_classes.Optimizer cannot be built"):
        trainer(tmp_path).fit(loaded, data())
    sys.modules.pop("foreign_classes", None)


def test_test_and_predict_refuse_random_weights(tmp_path):
    module = SegmentationModule(**TINY, num_classes=8)
    with pytest.raises(RuntimeError, match="test: the weights are random; give a checkpoint"):
        trainer(tmp_path).test(module, data(), verbose=False)
    with pytest.raises(RuntimeError, match="predict: the weights are random"):
        trainer(tmp_path).predict(module, data())
    module.has_weights = True
    trainer(tmp_path).test(module, data(), verbose=False)


def test_polynomial_schedule_per_step(tmp_path):
    class Rates(pl.Callback):
        seen = []

        def on_train_batch_start(self, trainer, module, batch, index):
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = SegmentationModule(
        **TINY,
        num_classes=8,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        scheduler=partial(WarmupPolynomialLR, power=0.5, warmup_steps=2),
    )
    trainer(tmp_path, max_epochs=3, callbacks=[Rates()]).fit(module, data())
    steps = range(6)  # 4 scenes, batch 2, 3 epochs
    expected = [0.1 * (min(1, (step + 1) / 3)) * (1 - step / 6) ** 0.5 for step in steps]
    assert Rates.seen == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("interval", "factor"), [(None, 0.5), ("epoch", 0.5), ("step", 0.25)])  # one epoch, two steps
def test_another_schedule_by_class(interval, factor, tmp_path):
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    run = trainer(tmp_path)
    run.fit(SegmentationModule(**TINY, num_classes=8, scheduler=schedule, scheduler_interval=interval), data())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * factor)


def test_prediction_has_the_size_of_the_file():
    module = SegmentationModule(**TINY, num_classes=8).eval()
    with torch.no_grad():
        preds = module.predict_step(
            {"image": torch.randint(0, 256, (1, 3, 20, 30), dtype=torch.uint8), "size": [(41, 59)]}, 0
        )
    assert [(p.shape, p.dtype) for p in preds] == [((41, 59), torch.uint8)]


def test_evaluation_has_the_size_of_the_mask():
    """Logits of a half-size image give predictions in the size of the mask."""
    module = SegmentationModule(
        **TINY, num_classes=2, objective=partial(MarginCalibrationLoss, num_classes=2)
    )  # not calibrated: no loss
    half = torch.zeros(1, 2, 4, 6)
    half[:, 1, :, 3:] = 5.0
    half[:, 0, :, :3] = 5.0
    module.network.forward = lambda image: half
    target = torch.zeros(1, 8, 12, dtype=torch.long)
    target[..., 6:] = 1
    module._trainer = SimpleNamespace(world_size=1, val_dataloaders=None)
    outputs = module.validation_step({"image": torch.zeros(1, 3, 4, 6), "mask": target}, 0)
    assert torch.equal(outputs["preds"].long(), target)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_objectives_compute_in_float32(tmp_path, precision):
    class Records(KeepsItsArguments):
        dtypes = set()

        def forward(self, logits, target):
            loss = super().forward(logits, target)
            self.dtypes.add((logits.dtype, loss.dtype))
            return loss

    globals()["Records"] = Records
    Records.__qualname__ = "Records"
    trainer(tmp_path, precision=precision).fit(SegmentationModule(**TINY, num_classes=8, objective=Records()), data())
    assert Records.dtypes == {(torch.float32, torch.float32)}


@pytest.mark.parametrize(
    ("shape", "size"), [((2, 5, 13, 17), (50, 71)), ((1, 3, 40, 60), (20, 31)), ((2, 4, 7, 9), (7, 30))]
)
def test_labels_computed_in_bands_are_those_of_the_resized_logits(shape, size, monkeypatch):
    logits = torch.randn(shape)
    expected = nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(labels_at(logits, size).long(), expected)
    monkeypatch.setattr("mcseg.evaluation.inference._BAND", 3 * shape[0] * shape[1] * size[1])  # bands of three rows
    assert torch.equal(labels_at(logits, size).long(), expected)


def test_labels_of_a_large_image_take_little_memory():
    logits = torch.randn(1, 65, 96, 128)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        labels = labels_at(logits, (1500, 2000))
    assert labels.shape == (1, 1500, 2000)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 2 * 64 * 2**20  # the resized logits are 780 MB


def test_validation_loss_is_computed_at_the_networks_resolution():
    module = SegmentationModule(**TINY, num_classes=2, objective=KeepsItsArguments())
    logits = torch.randn(1, 2, 5, 6)
    module.network.forward = lambda image: logits
    module._trainer = SimpleNamespace(world_size=1, val_dataloaders=None)
    target = torch.randint(0, 2, (1, 11, 17))
    with torch.no_grad():
        module.validation_step({"image": torch.zeros(1, 3, 5, 6), "mask": target}, 0)
    nearest = nn.functional.interpolate(target[None].float(), (5, 6), mode="nearest")[0].long()
    assert module._evaluated.tolist() == [float(nn.functional.cross_entropy(logits, nearest)), 1]


def test_init_from_loads_only_the_network(tmp_path):
    first = SegmentationModule(**TINY, num_classes=8, objective=KeepsItsArguments())
    one = trainer(tmp_path)
    one.fit(first, data())
    one.save_checkpoint(tmp_path / "first.ckpt")
    second = SegmentationModule(**TINY, num_classes=8, init_from=str(tmp_path / "first.ckpt"), objective=MARGINS())
    assert not same_weights(first.network, second.network)
    second.trainer = trainer(tmp_path / "second")
    second.trainer.datamodule = data()
    second.on_fit_start()
    assert same_weights(first.network, second.network)
    assert second.objective.is_calibrated


def test_a_resumed_run_does_not_need_the_file_of_init_from(tmp_path):
    """The first stage's folder may be deleted when the second stage is resumed."""
    path = tmp_path / "first.ckpt"
    one = trainer(tmp_path)
    one.fit(SegmentationModule(**TINY, num_classes=8), data())
    one.save_checkpoint(path)
    options = TINY | {"num_classes": 8, "init_from": str(path)}
    second = trainer(tmp_path / "second")
    second.fit(SegmentationModule(**options), data())
    second.save_checkpoint(tmp_path / "second.ckpt")
    path.unlink()
    resumed = trainer(tmp_path / "resumed", max_epochs=2)
    resumed.fit(SegmentationModule(**options), data(), ckpt_path=tmp_path / "second.ckpt")
    assert resumed.global_step == 2 * second.global_step > 0
    with pytest.raises(FileNotFoundError, match=r"init_from: no checkpoint .*first.ckpt"):
        trainer(tmp_path / "new").fit(SegmentationModule(**options), data())


def test_init_from_leaves_out_a_head_for_another_number_of_classes(tmp_path, caplog):
    first = SegmentationModule(**TINY, num_classes=5, objective=KeepsItsArguments())
    torch.save({"state_dict": first.state_dict()}, tmp_path / "first.ckpt")
    second = SegmentationModule(**TINY, num_classes=8, init_from=str(tmp_path / "first.ckpt"), objective=KeepsItsArguments())
    head = second.network.model.segmentation_head[0].weight.clone()
    with caplog.at_level("INFO"):
        second.on_fit_start()
    assert "its last layer is skipped" in caplog.text
    assert torch.equal(second.network.model.segmentation_head[0].weight, head)
    assert same_weights(first.network.model.encoder, second.network.model.encoder)
    assert same_weights(first.network.model.decoder, second.network.model.decoder)


def test_init_from_another_network_is_refused(tmp_path):
    first = SegmentationModule(**{**TINY, "arch": "fpn", "network_options": {}}, num_classes=8)
    torch.save({"state_dict": first.state_dict()}, tmp_path / "first.ckpt")
    second = SegmentationModule(**TINY, num_classes=8, init_from=str(tmp_path / "first.ckpt"))
    before = {name: value.clone() for name, value in second.network.state_dict().items()}
    with pytest.raises(ValueError, match=r"first\.ckpt contains another network \(\d+ tensors differ, for example model\."):
        second.on_fit_start()
    assert all(torch.equal(value, before[name]) for name, value in second.network.state_dict().items())


def test_whole_images_are_labelled_by_the_inference(tmp_path):
    """Validation and prediction return the labels of Inference; without averaging, these are the argmax of the logits."""
    module = SegmentationModule(**TINY, num_classes=8, objective=MARGINS())
    module.objective.calibrate(torch.arange(1, 9) * 1000)
    module.has_weights = True
    batch = next(iter(evaluation_loader(data())))
    module.eval()
    with torch.no_grad():
        plain = module(batch["image"]).argmax(1)
        settings = Inference(window=(24, 32), scales=(0.75, 1.0), flip=True)
        averaged = settings(module, batch["image"], batch["mask"].shape[-2:])
    assert not torch.equal(plain.to(torch.uint8), averaged)
    for inference, expected in ((Inference(), plain), (Inference(window=(100, 100)), plain), (settings, averaged)):
        module.inference = inference
        seen = Seen()
        run = trainer(tmp_path, callbacks=[JaccardCallback(), seen])
        run.validate(module, data(), verbose=False)
        assert torch.equal(seen.preds[0].long(), expected.long())
        assert ("val/loss" in run.callback_metrics) == (inference is not settings)
        source = data(predict_split="val")
        predicted = trainer(tmp_path).predict(module, source)
        assert torch.equal(predicted[0][0].long(), expected[0].long())


def evaluation_loader(source):
    source.setup("validate")
    return source.val_dataloader()


class Seen(pl.Callback):
    """Keeps the predictions of validation."""

    def __init__(self):
        self.preds = []

    def on_validation_batch_end(self, trainer, module, outputs, *args):
        self.preds.append(outputs["preds"])


def test_auxiliary_head_is_trained_and_not_used_for_predictions(tmp_path):
    torch.manual_seed(0)
    module = SegmentationModule(**TINY, num_classes=8, objective=MARGINS(), aux_weight=0.4, aux_channels=16)
    source = data(train_scenes=2)
    source.setup("fit")
    batch = next(iter(source.train_dataloader()))
    module.objective.calibrate(source.class_pixels())
    logged = {}
    module._log_losses = lambda losses, _: logged.update({name: float(value.detach()) for name, value in losses.items()})
    torch.manual_seed(3)
    loss = module.training_step(batch, 0)
    module.train()
    with torch.no_grad(), seeded(seed_of(3, 0, 0, 0)):  # the head has dropout
        logits, aux = module.network.forward_with_aux(batch["image"])
    main = module.objective(logits, batch["mask"])
    expected = nn.functional.cross_entropy(aux, batch["mask"], ignore_index=255)
    assert float(loss.detach()) == pytest.approx(float(main + 0.4 * expected), rel=1e-5)
    assert logged["train/loss"] == pytest.approx(float(loss.detach()))
    assert logged["train/loss/aux"] == pytest.approx(float(expected), rel=1e-5)

    trainer(tmp_path, callbacks=[JaccardCallback()]).fit(
        module := SegmentationModule(**TINY, num_classes=8, aux_weight=0.4), source
    )
    path = tmp_path / "aux.ckpt"
    module.trainer.save_checkpoint(path)
    loaded = SegmentationModule.load_from_checkpoint(path, weights_only=True)
    assert same_weights(loaded, module)
    # init_from works from a network with the head to one without it, and in reverse.
    for weight in (0.0, 0.4):
        other = SegmentationModule(**TINY, num_classes=8, aux_weight=weight, init_from=str(path))
        initialize_network(other.network, str(path))
        assert torch.equal(other.eval()(batch["image"]), loaded.eval()(batch["image"]))
    with pytest.raises(ValueError, match="aux_weight: found -1"):
        SegmentationModule(**TINY, num_classes=8, aux_weight=-1)


def test_moving_average_of_the_weights_is_validated_and_saved(tmp_path):
    """With Lightning's callback, the checkpoint holds the moving average of the weights, computed here by a loop."""

    class Steps(pl.Callback):
        weights = []

        def on_train_batch_end(self, trainer, module, *args):
            self.weights.append({name: value.detach().clone() for name, value in module.network.named_parameters()})

    module = SegmentationModule(**TINY, num_classes=8, objective=MARGINS())
    ema = EMAWeightAveraging(decay=0.7)
    run = trainer(tmp_path, max_epochs=2, num_sanity_val_steps=1, callbacks=[JaccardCallback(), Steps(), ema])
    run.fit(module, data())
    assert len(Steps.weights) == 4
    path = tmp_path / "ema.ckpt"
    run.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    assert not torch.isnan(content["state_dict"]["objective.background_offsets"]).any()
    for name in Steps.weights[0]:
        average = Steps.weights[0][name]
        for step in Steps.weights[1:]:
            average = 0.7 * average + 0.3 * step[name]
        assert torch.allclose(content["state_dict"][f"network.{name}"], average, rtol=1e-4, atol=1e-6), name
    loaded = SegmentationModule.load_from_checkpoint(path, weights_only=True)
    score = trainer(tmp_path).validate(loaded, data(), verbose=False)[0]["val/miou"]
    assert score == pytest.approx(float(run.callback_metrics["val/miou"]), abs=1e-6)


class Poisoned(KeepsItsArguments):
    """Cross entropy that is NaN in its call number `weight`."""

    calls = 0

    def forward(self, logits, target):
        self.calls += self.training
        value = super().forward(logits, target) / self.weight
        return value * math.nan if self.calls == self.weight else value


def fit_poisoned(tmp_path, call, **options):
    torch.manual_seed(0)
    module = SegmentationModule(**TINY, num_classes=8, objective=Poisoned(call), **options)
    # four steps an epoch
    run = trainer(tmp_path, max_epochs=2, enable_checkpointing=True, logger=pl.loggers.CSVLogger(tmp_path, "", ""))
    run.fit(module, data(train_scenes=8))
    return module, run


@pytest.mark.parametrize("call", [2, 4, 7])  # also the last step of an epoch
def test_a_loss_that_is_not_finite_stops_with_the_images(tmp_path, call):
    with pytest.raises(RuntimeError, match=rf"train/loss is nan in step {call - 1}, images train-\d+, train-\d+; "):
        fit_poisoned(tmp_path, call)
    for path in tmp_path.rglob("*.ckpt"):
        weights = torch.load(path, weights_only=True)["state_dict"].values()
        assert all(value.isfinite().all() for value in weights)
    assert len(list(tmp_path.rglob("*.ckpt"))) == (call > 4)


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`")
def test_a_loss_that_is_not_finite_can_be_skipped(tmp_path):
    with pytest.warns(UserWarning, match=r"1 steps were skipped because the loss was not finite.*: train-\d+, train"):
        fit_poisoned(tmp_path, 3, on_nonfinite="skip")
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert [math.isnan(loss) for loss in losses] == [False, False, True, *[False] * 5]
    norms = [float(row["train/grad_norm"]) for row in rows if row["train/grad_norm"]]
    assert norms[2] == 0  # the step has no gradient
    assert min(norms[:2] + norms[3:]) > 0


def test_norm_of_the_gradient_is_logged_before_it_is_clipped(tmp_path):
    torch.manual_seed(0)
    module = SegmentationModule(**TINY, num_classes=8, objective=KeepsItsArguments())
    seen = []

    class Watch(pl.Callback):
        def on_after_backward(self, trainer, module):
            seen.append(math.sqrt(sum(float(p.grad.double().square().sum()) for p in module.parameters())))

    log = pl.loggers.CSVLogger(tmp_path, "", "")
    trainer(tmp_path, logger=log, callbacks=[Watch()], gradient_clip_val=1e-3, enable_checkpointing=False).fit(
        module, data()
    )
    rows = csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines())
    logged = [float(row["train/grad_norm"]) for row in rows if row["train/grad_norm"]]
    assert logged == pytest.approx(seen, rel=1e-4)
    assert min(seen) > 1e-2


def test_values_are_reduced_and_norms_computed_only_in_steps_that_are_logged(tmp_path, monkeypatch):
    norm, norms, reduced = torch.nn.utils.get_total_norm, [], []
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda *a: norms.append(norm(*a)) or norms[-1])
    log = pl.loggers.CSVLogger(tmp_path, "", "")
    run = trainer(tmp_path, logger=log, enable_checkpointing=False, log_every_n_steps=3, limit_val_batches=0)
    reduce = run.strategy.reduce
    monkeypatch.setattr(run.strategy, "reduce", lambda value, **options: reduced.append(value) or reduce(value, **options))
    run.fit(SegmentationModule(**TINY, num_classes=8), data(train_scenes=10))  # five steps
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["2"]
    assert len(norms) == 2  # the step that is logged, and the last of the epoch
    assert float(rows[0]["train/grad_norm"]) == pytest.approx(float(norms[0]), rel=1e-6)
    losses = [value for value in reduced if value.is_floating_point()]  # Lightning reduces the number of batches
    assert len(losses) == 2
    assert float(rows[0]["train/loss"]) == pytest.approx(float(losses[0]), rel=1e-6)


def test_a_compiled_network_trains_the_same_weights(tmp_path, monkeypatch):
    compiled = []

    def compile_quickly(network):
        compiled.append(network)
        compile_network(network, backend="eager")

    compile_network = SegmentationNetwork.compile
    monkeypatch.setattr(SegmentationNetwork, "compile", compile_quickly)
    modules = []
    for option in (False, True):
        torch.manual_seed(0)
        modules.append(SegmentationModule(**TINY, num_classes=8, compile=option))
        trainer(tmp_path, callbacks=[JaccardCallback()]).fit(modules[-1], data(train_scenes=4))
    plain, module = modules
    assert compiled == [module.network]
    assert same_weights(module, plain)
    module.trainer.save_checkpoint(tmp_path / "compiled.ckpt")
    assert same_weights(SegmentationModule.load_from_checkpoint(tmp_path / "compiled.ckpt"), plain)
    assert len(compiled) == 1  # loading compiles nothing


GOOD, NAN, INFINITE = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("inf"))


def test_it_stops_one_step_later_with_the_names():
    guard = LossGuard("stop")
    assert guard.accepts(GOOD, ["a"], 4)
    guard.check()
    assert guard.accepts(INFINITE, ["b", "c"], 5)  # not checked yet
    with pytest.raises(RuntimeError, match=r"train/loss is inf in step 5, images b, c; .*set model\.on_nonfinite"):
        guard.check()
    guard.check()  # raised only once


def test_it_skips_steps_and_names_the_first_ten():
    guard = LossGuard("skip")
    for step in range(24):
        assert guard.accepts(NAN if step % 2 else GOOD, [f"image {step}"] if step > 2 else [], step) == (step % 2 == 0)
        guard.check()
    with pytest.warns(UserWarning, match=r"12 steps were skipped.*: \(without names\); image 3; .*image 19; \.\.\.$"):
        guard.summarize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard.summarize()  # warned only once


def test_an_unknown_policy():
    with pytest.raises(ValueError, match="on_nonfinite: found 'ignore', expected 'stop' or 'skip'"):
        LossGuard("ignore")


def guard_as_rank(rank, world, folder):
    store = torch.distributed.FileStore(f"{folder}/store", world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    guard = LossGuard("skip")
    accepted = [guard.accepts(NAN if (step, rank) == (1, 1) else GOOD, [], step) for step in range(3)]
    Path(folder, f"{rank}.json").write_text(json.dumps(accepted))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_processes_skip_the_same_steps(tmp_path):
    torch.multiprocessing.spawn(guard_as_rank, (2, str(tmp_path)), nprocs=2)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [[True, False, True]] * 2
