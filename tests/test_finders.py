"""Lightning's finders of a learning rate and a batch size, in Python and from the command line."""

import csv
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder
from pytorch_lightning.tuner import Tuner

from mcseg.data import SyntheticData
from mcseg.losses import MarginCalibrationLoss
from mcseg.module import SegmentationModule
from mcseg.run.main import main

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def data(**options):
    settings = {
        "train_scenes": 8,
        "val_scenes": 1,
        "size": (32, 48),
        "crop_size": (32, 32),
        "batch_size": 2,
        "num_workers": 0,
    }
    return SyntheticData(**{**settings, **options})


def module(**options):
    """A module whose objective must be calibrated, with ordinary rates that no search would give."""
    objective = partial(MarginCalibrationLoss, num_classes=8)
    options = {"optimizer": partial(torch.optim.SGD, lr=0.123), **options}
    return SegmentationModule("unet", "tu-test_resnet.r160_in1k", num_classes=8, objective=objective, **options)


class First(pl.Callback):
    """Notes weights, rate and offsets before the first step."""

    def on_train_start(self, trainer, pl_module):
        self.weights = {name: tensor.clone() for name, tensor in pl_module.network.state_dict().items()}
        self.rate, self.offsets = trainer.optimizers[0].param_groups[0]["lr"], pl_module.objective.offsets.foreground.clone()


def test_the_rate_that_is_found_is_used_for_the_whole_run(tmp_path):
    """The schedule starts from it; the weights and offsets at the start are those of a run without a search."""
    runs = {}
    for name, callbacks in {"plain": [], "search": [LearningRateFinder(num_training_steps=20, min_lr=1e-4)]}.items():
        pl.seed_everything(3)
        net, first = module(), First()
        trainer = pl.Trainer(**QUIET, default_root_dir=tmp_path, max_epochs=6, max_steps=3, callbacks=[first, *callbacks])
        trainer.fit(net, data())
        runs[name] = net, first, trainer
    (plain, before, _), (net, first, trainer) = runs["plain"], runs["search"]
    assert (plain.lr, before.rate) == (None, 0.123)
    assert net.lr == net.hparams["lr"] == first.rate
    assert 1e-4 <= net.lr <= 1
    assert net.lr != 0.123
    assert torch.equal(first.offsets, before.offsets)
    assert first.offsets.any()
    assert all(torch.equal(tensor, before.weights[name]) for name, tensor in first.weights.items())
    assert trainer.global_step == 3
    rate = net.lr_schedulers().get_last_lr()[0]
    assert rate == pytest.approx(0.0, abs=1e-12)  # after the last step of the polynomial
    assert net.lr_schedulers().base_lrs == [net.lr]


def test_the_tuner_in_python(tmp_path):
    """Both searches, then a training from weights that no search has touched."""
    pl.seed_everything(3)
    net, scenes, first = module(), data(), First()
    weights = {name: tensor.clone() for name, tensor in net.network.state_dict().items()}
    trainer = pl.Trainer(**QUIET, default_root_dir=tmp_path, max_epochs=6, callbacks=[first])
    suggested = Tuner(trainer).lr_find(net, datamodule=scenes, num_training=20, min_lr=1e-4).suggestion()
    assert net.lr == suggested
    found = Tuner(trainer).scale_batch_size(net, datamodule=scenes, max_trials=2, steps_per_trial=1)
    assert found == scenes.batch_size
    assert scenes.batch_size != 2 or found == 2
    trainer.fit_loop.max_epochs = 1
    trainer.fit(net, datamodule=scenes)
    assert first.rate == suggested
    assert all(torch.equal(tensor, weights[name]) for name, tensor in first.weights.items())
    assert trainer.global_step == 8 // found


def test_lr_replaces_the_rate_of_the_optimizer(tmp_path):
    net = module(lr=0.5)
    first = First()
    pl.Trainer(**QUIET, default_root_dir=tmp_path, max_epochs=1, limit_train_batches=1, callbacks=[first]).fit(net, data())
    assert first.rate == 0.5


@pytest.mark.parametrize(
    ("options", "settings", "callback", "message"),
    [
        ({"scheduler": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=9), "lr": 0.1}, {}, None, "OneCycleLR takes its learning rates from max_lr"),
        ({"scheduler": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=9)}, {}, LearningRateFinder(), "a LearningRateFinder have no effect"),
        ({}, {"total_batch_size": 4}, BatchSizeFinder(), "BatchSizeFinder: found data.total_batch_size 4"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_one_line(options, settings, callback, message, tmp_path):
    trainer = pl.Trainer(**QUIET, default_root_dir=tmp_path, max_epochs=1, callbacks=[callback] if callback else [])
    with pytest.raises(ValueError, match=message):
        trainer.fit(module(**options), data(**settings))


WORDS = [
    "fit", "--config", "synthetic", "--data.train_scenes=8", "--data.val_scenes=1", "--data.size=[32,48]", "--data.crop_size=[32,32]",
    "--data.batch_size=2", "--data.num_workers=0", "--model.encoder=tu-test_resnet.r160_in1k", "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1", "--trainer.max_epochs=6", "--trainer.default_root_dir=run",
]  # fmt: skip


def rates():
    with Path("run/metrics.csv").open() as file:
        return [float(row["lr-AdamW"]) for row in csv.DictReader(file) if row.get("lr-AdamW")]


@pytest.mark.slow
def test_finders_of_the_command(tmp_path, monkeypatch, caplog, capsys):
    """config.yaml gets what was found; a resumed run keeps it and goes on, in Python it is refused."""
    monkeypatch.chdir(tmp_path)
    finder = [
        "--trainer.callbacks",
        "LearningRateFinder",
        "--trainer.callbacks.num_training_steps=20",
        "--trainer.callbacks+=BatchSizeFinder",
    ]
    with caplog.at_level("INFO"):
        main([*WORDS, *finder, "--trainer.callbacks.max_trials=2", "--trainer.max_steps=4"])
    content = yaml.safe_load(Path("run/config.yaml").read_text())
    rate, size = content["model"]["optimizer"]["init_args"]["lr"], content["data"]["init_args"]["batch_size"]
    assert rate == rates()[0] != 0.002
    assert f"LearningRateFinder: learning rate {rate:.4g}" in caplog.text
    assert f"BatchSizeFinder: batch size {size}" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        main(["fit", "--resume", "run", "--trainer.max_steps=6"])
    assert "--resume keeps what LearningRateFinder and BatchSizeFinder found" in caplog.text
    assert len(rates()) == 6
    assert rates()[-1] < rate
    trainer = pl.Trainer(**QUIET, max_epochs=2, callbacks=[LearningRateFinder()])
    net = SegmentationModule.load_from_checkpoint("run/checkpoints/last.ckpt")
    with pytest.raises(ValueError, match="LearningRateFinder: found in a resumed run"):
        trainer.fit(net, data(), ckpt_path="run/checkpoints/last.ckpt")


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        (["--model.lr", "0.5"], 0.5),
        (["--config", "rate.yaml"], 0.25),
        (["--config", "rate.yaml", "--model.optimizer.lr=0.1"], 0.1),
        (["--config", "rate.yaml", "--model.lr=0.1"], 0.1),
        (["--model.optimizer", "SGD", "--model.lr=0.1"], 0.1),
    ],
)
def test_model_lr_is_an_alias_on_the_command_line(words, rate, tmp_path, monkeypatch):
    from mcseg.run.cli import ParseOnlyCLI
    from mcseg.run.recipes import expand_shorthand, find_recipes

    monkeypatch.chdir(tmp_path)
    Path("rate.yaml").write_text("model:\n  lr: 0.25\n")
    recipe, words = find_recipes(expand_shorthand(["fit", "synthetic", *words]))
    model = ParseOnlyCLI(recipe, words[1:], run=False).config.model
    assert (model.lr, model.optimizer.init_args.lr) == (None, rate)
