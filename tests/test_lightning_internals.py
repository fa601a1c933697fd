"""Private and undocumented parts of Lightning, jsonargparse and torch: each works as in the versions named here.

Seen in Lightning 2.6.6, jsonargparse 4.53.0, torch 2.10 and 2.14.1. After an upgrade, run this file first: a failing test names
the function of `mcseg.lightning_internals` that needs a change.
"""

import ast
import functools
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import nn

import mcseg
from mcseg import lightning_internals as internals
from mcseg.data import SyntheticData
from mcseg.module import SegmentationModule

PACKAGE = Path(mcseg.__file__).parent


class Line(pl.LightningModule):
    """A module with one weight that accepts any batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return self.weight * batch.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(batches=6):
    return torch.utils.data.DataLoader(torch.ones(batches, 1), batch_size=1)


def trainer(*callbacks, **options):
    return pl.Trainer(
        **{
            "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "callbacks": [*callbacks],
            "enable_model_summary": False, "enable_checkpointing": False, **options,
        }
    )  # fmt: skip


def test_class_method_is_refused_on_an_instance():
    class Kind:
        @internals.classmethod_of_the_class
        def name(cls):
            return cls.__name__

    assert Kind.name() == "Kind"
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        Kind().name()


def test_module_arguments_are_read_from_these_keys():
    """Lightning 2.6.6 reads arguments from all of them, later ones override, and accepts only one instantiator."""
    arguments = {}

    class Kind(Line):
        def __init__(self, a=0, b=0, c=0):
            super().__init__()
            arguments.update(a=a, b=b, c=c)

    globals()["Kind"] = Kind
    Kind.__qualname__ = "Kind"
    keys = internals.argument_keys(Kind)
    assert keys == ("hparams", "module_arguments", "hyper_parameters")
    content = {"state_dict": Line().state_dict(), "pytorch-lightning_version": "2.6.6"}
    content |= {
        key: {name: index + 1 for name in names}
        for index, (key, names) in enumerate(zip(keys, ("abc", "bc", "c"), strict=True))
    }
    content["hyper_parameters"][internals.INSTANTIATOR_KEY] = internals.INSTANTIATOR
    torch.save(content, "x.ckpt")
    Kind.load_from_checkpoint("x.ckpt", weights_only=True)
    assert arguments == {"a": 1, "b": 2, "c": 3}
    content["hyper_parameters"][internals.INSTANTIATOR_KEY] = "builtins.dict"
    torch.save(content, "x.ckpt")
    with pytest.raises(ValueError, match="instantiator"):
        Kind.load_from_checkpoint("x.ckpt", weights_only=True)


def test_url_is_loaded_as_plain_types(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "x.ckpt")
    assert internals.load_from_url(f"file://{tmp_path}/x.ckpt")["a"].tolist() == [1, 1]
    torch.save({"a": Path("x")}, tmp_path / "y.ckpt")
    with pytest.raises(Exception, match="weights_only"):
        internals.load_from_url(f"file://{tmp_path}/y.ckpt")


def test_settings_of_a_subclass_contain_its_class_path():
    assert internals.as_settings({"a": 1, "_instantiator": "x"}) == {"a": 1}
    assert internals.as_settings({"a": 1, "_class_path": "p.C"}) == {"class_path": "p.C", "dict_kwargs": {"a": 1}}


def test_settings_of_a_checkpoint_are_merged_before_instantiation(tmp_path):
    """Lightning 2.6.6 calls its method once, between parsing and instantiation."""
    seen = []

    class CLI(internals.CheckpointSettingsCLI):
        def take_checkpoint_settings(self, verb, path):
            seen.append((verb, path, hasattr(self, "model")))

        def validate(self, *args, **options):
            seen.append("ran")

    path = tmp_path / "x.ckpt"
    options = ["--trainer.accelerator=cpu", "--trainer.logger=false"]
    globals()["Line"] = Line
    CLI(Line, args=["validate", *options], save_config_callback=None, seed_everything_default=0)
    torch.save({}, path)
    CLI(Line, args=["validate", f"--ckpt_path={path}", *options], save_config_callback=None, seed_everything_default=0)
    assert seen == ["ran", ("validate", path, False), "ran"]
    # the method replaces one of Lightning, which would have read the file
    assert "_parse_ckpt_path" in vars(pl.cli.LightningCLI)


def test_accumulated_gradient_is_reported():
    class Watch(pl.Callback):
        seen = []

        def on_train_batch_end(self, trainer, *args):
            self.seen.append(internals.accumulates_gradient(trainer))

    trainer(Watch(), accumulate_grad_batches=4).fit(Line(), loader())
    assert Watch.seen == [True, True, True, False, True, False]  # the last batch of an epoch always steps


@pytest.mark.parametrize("logger", [False, True])
def test_steps_that_go_to_the_loggers(logger, tmp_path):
    class Watch(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_before_optimizer_step(self, trainer, *args):
            self.seen.append(internals.logs_step(trainer))

    watch = Watch()
    log = CSVLogger(tmp_path, "", "") if logger else False
    trainer(watch, log_every_n_steps=4, logger=log, max_epochs=2).fit(Line(), loader())
    # every fourth step, and the last one of each epoch
    assert watch.seen == [False, False, False, True, False, True, False, True, False, False, False, True]


def test_a_requested_stop_happens_after_the_batch():
    class Stop(pl.Callback):
        validations = 0

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 2:
                internals.request_stop(trainer)

        def on_validation_start(self, trainer, module):
            self.validations += 1

    stop = Stop()
    run = trainer(stop, num_sanity_val_steps=0)
    with pytest.raises(SIGTERMException):
        run.fit(Line(), loader(), loader())
    assert run.global_step == 3
    assert stop.validations == 0


def test_an_interrupted_validation_is_repeated_from_its_start(tmp_path):
    class Interrupt(pl.Callback):
        def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, *_):
            if batch_idx == 3:
                internals.restart_validation(trainer)
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    class Count(pl.Callback):
        steps, batches = 0, 0

        def on_train_batch_start(self, *args):
            self.steps += 1

        def on_validation_batch_start(self, *args):
            self.batches += 1

    trainer(Interrupt(), num_sanity_val_steps=0).fit(Line(), loader(), loader())
    trainer(count := Count(), num_sanity_val_steps=0).fit(Line(), loader(), loader(), ckpt_path=tmp_path / "x.ckpt")
    assert (count.steps, count.batches) == (0, 6)


@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable")
@pytest.mark.parametrize(("step", "expected"), [(3, (0, 3)), (6, (1, 0)), (8, (1, 2))])
def test_position_of_a_resumed_training(tmp_path, step, expected):
    class Order(torch.utils.data.Sampler):
        """Records the position when the loader's iterator is made."""

        run, seen = None, []

        def __len__(self):
            return 6

        def __iter__(self):
            self.seen.append(internals.training_position(self.run))
            return iter([[index] for index in range(self.seen[-1][1], 6)])

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    trainer(Save(), max_epochs=2).fit(Line(), loader())
    Order.run = trainer(max_epochs=3)
    batches = torch.utils.data.DataLoader(torch.ones(6, 1), batch_sampler=Order())
    Order.run.fit(Line(), batches, ckpt_path=tmp_path / "x.ckpt")
    assert Order.seen[0] == expected
    assert Order.run.global_step == 18


class Noted(pl.Callback):
    """Notes batches, ends of epochs and validations."""

    def __init__(self):
        self.events = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.events.append(f"{trainer.current_epoch}.{batch_idx}")

    def on_train_epoch_end(self, trainer, pl_module):
        self.events.append("end")
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "epoch.ckpt")


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*")
@pytest.mark.parametrize(
    ("first", "second"), [(2, ["1.0", "1.1", "end", "2.0", "end"]), (4, ["2.0", "end"]), (3, ["1.1", "end", "2.0", "end"])]
)
def test_a_run_with_max_steps_is_resumed_where_it_ended(tmp_path, first, second):
    """Two batches an epoch: at the end of an epoch the next one begins, within an epoch it continues; no epoch ends twice."""
    module = SegmentationModule("unet", "tu-test_resnet.r160_in1k", num_classes=8)
    data = SyntheticData(train_scenes=4, val_scenes=1, size=(32, 48), crop_size=(32, 32), batch_size=2, num_workers=0)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    runs = []
    for steps, path in ((first, None), (5, tmp_path / "epoch.ckpt"), (7, tmp_path / "epoch.ckpt")):
        noted = Noted()
        limits = {"max_epochs": -1, "max_steps": steps, "limit_val_batches": 0, "enable_checkpointing": False}
        trainer = pl.Trainer(**quiet, **limits, default_root_dir=tmp_path, callbacks=[noted])
        trainer.fit(module, data, ckpt_path=path)
        runs.append(noted.events)
    assert runs[1:] == [second, ["2.1", "end", "3.0", "end"]]


def test_rows_are_appended_to_a_csv_file(tmp_path):
    path = tmp_path / "metrics.csv"
    logger = CSVLogger(tmp_path, "", "")
    writer = logger.experiment
    path.write_text("a,step\n1,0\n")
    internals.set_csv_columns(writer, ["a", "step"])
    logger.log_metrics({"b": 2.0}, step=1)
    logger.save()
    assert path.read_text().split() == ["a,b,step", "1,,0", ",2.0,1"]


def test_bfloat16_of_the_cpu():
    """torch 2.14.1 has both functions; their results depend on the machine."""
    assert callable(torch.cpu._is_avx512_bf16_supported)
    assert callable(torch.cpu._is_amx_tile_supported)
    assert internals.cpu_computes_bfloat16() == (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def test_hooks_of_modules_that_losses_override():
    """torch 2.14.1 casts by `_apply`, keeps buffers in `_buffers`, and loads by `_load_from_state_dict`."""
    called = []

    class Part(nn.Module):
        def _apply(self, fn, recurse=True):
            called.append("apply")
            return super()._apply(fn, recurse)

        def _load_from_state_dict(self, *args, **kwargs):
            called.append("load")
            super()._load_from_state_dict(*args, **kwargs)

    part = nn.Sequential(Part())
    part[0].register_buffer("x", torch.ones(()))
    assert part[0]._buffers["x"] is part[0].x
    part.half()
    part.load_state_dict(part.state_dict())
    assert called == ["apply", "load"]


# Documented by Python, although they begin with an underscore
PUBLIC = {"os._exit", "_fields", "_replace", "_asdict"}
# Parts of nn.Module that losses override or use; tested above
LOSSES = {"_apply", "_buffers", "_load_from_state_dict"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def names_of(tree):
    """Yield the names that a file defines: functions, classes, variables and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


@functools.cache
def names_of_package():
    return {name for path in PACKAGE.rglob("*.py") for name in names_of(ast.parse(path.read_text()))}


def private_parts(path):
    """Yield the private names of libraries that a file uses: imported, of an object, of a base class, or by a string."""
    tree = ast.parse(path.read_text())
    defined_here, defined_in_package = set(names_of(tree)), names_of_package()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and not node.module.startswith("mcseg"):
            yield from (part for alias in node.names for part in (*node.module.split("."), alias.name) if is_private(part))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node) not in PUBLIC:
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            of_super = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super"
            if node.attr not in defined_here | (defined_in_package if of_self or of_super else set()) | PUBLIC:
                yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            yield from (a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and is_private(str(a.value)))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_private_parts_of_libraries_are_used_in_one_file(path):
    allowed = LOSSES if path.parent.name == "losses" else set()
    if path.name != "lightning_internals.py":
        assert set(private_parts(path)) <= allowed


def test_search_finds_the_private_parts_of_lightning_internals():
    assert set(private_parts(PACKAGE / "lightning_internals.py")) >= {
        "_load",
        "_restricted_classmethod",
        "_should_accumulate",
        "_signal_connector",
    }


def test_no_class_overrides_a_private_method_of_a_library():
    overridden = set()
    for info in pkgutil.walk_packages(mcseg.__path__, "mcseg."):
        if info.name.rpartition(".")[2].startswith(("gpu", "__main__")):
            continue
        for _, kind in inspect.getmembers(importlib.import_module(info.name), inspect.isclass):
            bases = [base for base in kind.__mro__ if not base.__module__.startswith(("mcseg", "builtins", "typing", "abc"))]
            methods = {name for name, value in vars(kind).items() if is_private(name) and inspect.isfunction(value)}
            if kind.__module__ == info.name:
                overridden |= {(info.name, name) for name in methods if any(hasattr(base, name) for base in bases)}
    elsewhere = {entry for entry in overridden if not (entry[0].startswith("mcseg.losses") and entry[1] in LOSSES)}
    assert elsewhere == {("mcseg.lightning_internals", "_parse_ckpt_path")}
