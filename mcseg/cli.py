"""The command ``mcseg``: Lightning's fit, validate, test and predict, and mcseg's own verbs for data sets."""

import argparse
import inspect
import json
import logging
import os
import pkgutil
import shutil
import signal
import sys
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning_fabric.plugins import CheckpointIO
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import SIGTERMException

from mcseg.callbacks import (
    ConfusionPicture,
    JaccardCallback,
    PredictionPanel,
    PredictionWriter,
    TrainingCurves,
    score_names,
)
from mcseg.checkpoints import (
    CheckpointFile,
    CheckpointOnSignal,
    ContinuedCSVLogger,
    read_checkpoint,
    resumed,
    steps_done,
    written_by,
)
from mcseg.data import IGNORE_INDEX, DataError, SegmentationData
from mcseg.data.benchmark import benchmark_facts, benchmark_names
from mcseg.data.datamodule import SPLITS
from mcseg.data.files import Sample
from mcseg.heldout import HeldOutBounds
from mcseg.inference import Inference
from mcseg.losses import POWER_DICE, MarginCalibrationLoss
from mcseg.margins import MarginOffsets, margin_offsets
from mcseg.messages import one_line
from mcseg.module import SegmentationModule
from mcseg.recipes import find_recipes, in_full, recipe_names
from mcseg.tracking import ObjectiveMonitor, log_configuration

# Lightning starts further DDP processes with this environment variable, and LOCAL_RANK, in place.
_RUN_FOLDER = "MCSEG_RUN_FOLDER"

_HELP = """usage: mcseg VERB [RECIPE] [--config NAME_OR_PATH ...] [--KEY VALUE ...]

  fit       train; writes checkpoints, metrics.csv, curves and panels into runs/<recipe>/<time>
            (--resume RUN_FOLDER goes on with a run that was stopped)
  validate  score a checkpoint on the validation split       (--ckpt_path)
  test      score a checkpoint on the test split             (--ckpt_path)
  bound     what a held-out split promises for unseen images (--ckpt_path, --split val --level 0.95)
  predict   masks and overlays for a folder of images        (--ckpt_path, --data.predict_root)
            or what a benchmark's server takes               (--ckpt_path, --format BENCHMARK)
  download  fetch a benchmark, or say how to get it          (mcseg download BENCHMARK --root DIR)
  compare   train objectives with several seeds and compare them: tables, intervals, a report
            (--objectives NAME ... --seeds 0 1 2; `mcseg compare --help` lists its options)
  show      contact sheet of images and labels               (--images 12 --split train)
  check     open every file of the data set and list what is wrong with it
  stats     pixel shares and margin offsets of the classes, as table and picture

recipes that come with mcseg: {recipes}
benchmarks: {benchmarks}
Any key of a recipe can be set behind it: mcseg fit --config camvid --data.root DIR --trainer.max_epochs 10
--root is short for --data.root, --format for --writer.format, and a name behind the verb for --config.
`mcseg VERB --help` lists the keys; MCSEG_TRACEBACK=1 shows where an error came from.
"""


class SaveConfig(SaveConfigCallback):
    """Saves config.yaml without the run folder, so that using it again makes a new one and overwrites nothing."""

    def __init__(self, *args: Any, run_folder: str | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.config = self.config.clone()
        self.config.trainer.default_root_dir = None
        if self.config.checkpoint.dirpath == str(Path(run_folder or "") / "checkpoints"):
            self.config.checkpoint.dirpath = None
        for logger in _loggers(self.config):
            if logger.get("init_args.save_dir") == run_folder:
                logger.init_args.save_dir = "."

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the same to the trackers, on rank 0."""
        log_configuration(trainer, json.loads(self.parser.dump(self.config, format="json", skip_none=False)))


def _loggers(config: Namespace) -> list[Namespace]:
    found = config.trainer.logger
    return [logger for logger in (found if isinstance(found, list) else [found]) if isinstance(logger, Namespace)]


class SegmentationCLI(LightningCLI):
    """LightningCLI for one module class and any data module, with mcseg's callbacks and run folder."""

    def __init__(self, recipe: str, args: Sequence[str], run: bool = True, resume: Path | None = None) -> None:
        self.recipe = recipe
        self.resume = resume
        strict: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            SegmentationModule,
            SegmentationData,
            args=list(args),
            run=run,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=None if resume else SaveConfig,
            save_config_kwargs={"overwrite": True},
            parser_kwargs=strict | {verb: strict for verb in self.subcommands()},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the number of classes, and add mcseg's callbacks under keys of their own."""
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.num_classes", "model.objective.init_args.num_classes", apply_on="instantiate")
        for callback, key in (
            (JaccardCallback, "jaccard"),
            (PredictionPanel, "panel"),
            (ConfusionPicture, "confusion"),
            (ObjectiveMonitor, "monitor"),
            (TrainingCurves, "curves"),
            (PredictionWriter, "writer"),
            (ModelCheckpoint, "checkpoint"),
        ):
            parser.add_lightning_class_args(callback, key)
        parser.add_class_arguments(Inference, "inference")
        parser.set_defaults(
            {
                "model.objective": {"class_path": "mcseg.losses.MarginCalibrationLoss", "init_args": dict(POWER_DICE)},
                "trainer.logger": {
                    "class_path": "CSVLogger",
                    "init_args": {"save_dir": ".", "name": "", "version": ""},
                },
                "checkpoint.monitor": "val/miou",
                "checkpoint.mode": "max",
                "checkpoint.filename": "best",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.enable_version_counter": False,
            }
        )

    @property
    def verb(self) -> str:
        """The word behind ``mcseg``."""
        return str(self.config.get("subcommand") or "")

    @property
    def verb_config(self) -> Namespace:
        """Settings of the verb that runs."""
        config: Namespace = self.config[self.subcommand] if self.subcommand else self.config
        return config

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuse to score without weights, and what is no checkpoint before Lightning takes settings from it."""
        super().parse_arguments(parser, args)
        verb = self.config.get("subcommand")
        if verb and self.config[verb].ckpt_path:
            _check_checkpoint(Path(self.config[verb].ckpt_path))
        elif verb in ("validate", "test", "predict"):
            raise ValueError(f"mcseg {self.verb} needs trained weights: give --ckpt_path RUN_FOLDER/checkpoints/best.ckpt")

    def _parse_ckpt_path(self) -> None:
        """Take a checkpoint's objective whole: what an earlier version did not know has its default, not the recipe's."""
        verb = self.config.get("subcommand")
        path = self.config[verb].get("ckpt_path") if verb else None
        checkpoint = read_checkpoint(path, mmap=True) if path and Path(path).is_file() else {}
        try:
            super()._parse_ckpt_path()
        except ArgumentError as error:
            raise ValueError(
                f"--ckpt_path: {path} has settings that do not hold here ({written_by(checkpoint)}): {one_line(error)}"
            ) from None
        if stored := checkpoint.get("hyper_parameters", {}).get("objective"):
            objective = self.config[verb].model.objective
            for name, parameter in inspect.signature(pkgutil.resolve_name(objective.class_path)).parameters.items():
                known = name == "num_classes" or name in stored.get("init_args", {})
                if not known and name in objective.init_args and parameter.default is not parameter.empty:
                    objective.init_args[name] = parameter.default

    def before_instantiate_classes(self) -> None:
        """Choose the run folder and the precision."""
        config = self.verb_config
        if config.model.objective is None:
            raise ValueError("model.objective: found null, expected a class path such as mcseg.losses.MarginCalibrationLoss")
        if self.subcommand in ("validate", "test"):
            config.verbose = False  # the table of JaccardCallback says it all
        if self.subcommand == "predict":
            config.return_predictions = False  # they are written; keeping them would fill the memory
        trainer = config.trainer
        if trainer.default_root_dir is None:
            trainer.default_root_dir = str(_run_folder(self.recipe, self.verb))
        self.save_config_kwargs["run_folder"] = trainer.default_root_dir
        for logger in _loggers(config):
            if logger.get("init_args.save_dir", "") in (None, "."):
                logger.init_args.save_dir = trainer.default_root_dir
            if self.resume and logger.class_path.endswith(".CSVLogger"):
                kind = f"{ContinuedCSVLogger.__module__}.{ContinuedCSVLogger.__qualname__}"
                done = steps_done(Path(config.ckpt_path)) if config.ckpt_path else 0
                logger.class_path, logger.init_args.step = kind, done
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        if trainer.precision is None:
            trainer.precision = _default_precision(trainer.accelerator)

    def instantiate_classes(self) -> None:
        """Make everything, and give the module the way in which it labels whole images."""
        objective = self.verb_config.model.objective
        super().instantiate_classes()
        self.model.inference = self._get(self.config_init, "inference")
        classes = objective.get("init_args.num_classes") if isinstance(objective, Namespace) else None
        if classes not in (None, self.datamodule.num_classes) and not self.verb_config.ckpt_path:  # which has its own
            raise ValueError(
                f"model.objective.init_args.num_classes: found {classes}, but the data have {self.datamodule.num_classes} "
                "classes; leave it out, it is taken from them"
            )
        if self.subcommand == "fit":
            self._check_monitors()

    def _check_monitors(self) -> None:
        """Refuse to wait for a score that nobody logs; Lightning would find out behind the first epoch."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if any(not type(callback).__module__.startswith(("mcseg.", "pytorch_lightning.")) for callback in callbacks):
            return  # one of the user's own, which may log anything
        known = ["val/loss", *score_names("val", self.datamodule.class_names)]
        for callback in callbacks:
            monitor = getattr(callback, "monitor", None)
            if monitor and monitor.startswith("val/") and monitor not in known:
                raise ValueError(f"{type(callback).__name__}: no score {monitor}; expected one of {', '.join(known)}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add ``last.ckpt`` of every epoch, and the learning rate where there is something to log it to."""
        plugins = self._get(self.config_init, "trainer.plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, CheckpointFile()]
        trainer = super().instantiate_trainer(**kwargs)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            # Not by ModelCheckpoint's save_last, which writes only when there is a new best.
            folder = self.verb_config.checkpoint.dirpath
            trainer.callbacks.append(  # type: ignore[attr-defined]
                ModelCheckpoint(folder, "last", enable_version_counter=False, save_on_train_epoch_end=True)
            )
            trainer.callbacks.append(CheckpointOnSignal(Path(folder) / "last.ckpt"))  # type: ignore[attr-defined]
            if trainer.loggers:
                trainer.callbacks.insert(0, LearningRateMonitor("step"))  # type: ignore[attr-defined]
        return trainer

    def after_fit(self) -> None:
        """Say where everything is."""
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        rank_zero_info(f"run folder: {self.trainer.default_root_dir}" + (f"\nbest checkpoint: {best}" if best else ""))


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; ``args`` are those behind ``mcseg``, by default the process's own.

    Raises:
        SystemExit: 1 after an error, told in one line; 2 where the arguments cannot be read; 143 after SIGTERM.
    """
    words = list(sys.argv[1:] if args is None else args)
    if "LOCAL_RANK" not in os.environ:
        os.environ.pop(_RUN_FOLDER, None)
    if not words or words[0] in ("-h", "--help"):
        print(_HELP.format(recipes=", ".join(recipe_names()), benchmarks=", ".join(benchmark_names())))
        return
    if words[0] == "--version":
        from mcseg import __version__

        print(__version__)
        return
    try:
        if words[0] == "download":
            download(words[1:])
            return
        words, resume = resumed(words)
        recipe, words = find_recipes(in_full(words))
        own = {"stats": stats, "check": check, "show": show, "bound": bound, "compare": compare}
        if words[0] not in (verbs := [*SegmentationCLI.subcommands(), *own, "download"]):
            raise ValueError(f"found the verb {words[0]!r}, expected one of {', '.join(verbs)}; see mcseg --help")
        with warnings.catch_warnings():
            quieten()
            if words[0] in own:
                own[words[0]](recipe, words[1:])
            else:
                SegmentationCLI(recipe, words, resume=resume)
    except SIGTERMException:  # an exit without a code, as if all had been done
        sys.exit(128 + signal.SIGTERM)
    except ArgumentError as error:
        _fail(one_line(error), 2)
    except (ValueError, OSError, RuntimeError, MisconfigurationException) as error:
        _remove_if_empty(os.environ.get(_RUN_FOLDER))
        if os.environ.get("MCSEG_TRACEBACK"):
            raise
        _fail(one_line(error), 1)


def download(args: Sequence[str]) -> None:
    """``mcseg download``: fetch a benchmark's archives, or say which to get and where."""
    from mcseg.download import download as fetch

    parser = ArgumentParser(prog="mcseg download", exit_on_error=False)
    parser.add_argument("name", help=f"one of {', '.join(benchmark_names())}")
    parser.add_argument("--root", required=True, help="folder that is to hold the data")
    parser.add_argument("--keep_archives", type=bool, default=False, help="keep the archives once they are unpacked")
    settings = parser.parse_args(list(args))
    fetch(
        settings.name,
        benchmark_facts(settings.name),
        Path(settings.root).expanduser(),
        keep_archives=settings.keep_archives,
    )


def show(recipe: str, args: Sequence[str]) -> None:
    """``mcseg show``: a contact sheet of images and labels spread evenly over a split."""
    from mcseg import pictures

    config, data = _data(recipe, args, images=12, split="train")
    if config.split not in SPLITS or config.images < 1:
        raise ValueError(
            f"found --split {config.split} and --images {config.images}; expected {', '.join(SPLITS)}, and at least 1 image"
        )
    for remark in data.remarks(config.split):
        print(remark)
    samples = data.samples(config.split)
    if not samples:
        raise DataError(f"the {config.split} split of {data.root} is empty; choose another --split")
    count = min(config.images, len(samples))
    chosen = [samples[index * len(samples) // count] for index in range(count)]
    sheet = pictures.contact_sheet(
        ((sample.name, *_shown(data, sample, config.split)) for sample in chosen), data.class_names, data.palette
    )
    path = Path(config.trainer.default_root_dir or Path("runs") / recipe) / f"{config.split}.png"
    pictures.save(sheet, path)
    print(f"{count} of {len(samples)} images of the {config.split} split: {path}")


def _shown(data: SegmentationData, sample: Sample, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and labels; all void where the labels are not public."""
    if split in data.withheld:
        image = data.reader.image(sample)
        return image, torch.full(image.shape[1:], IGNORE_INDEX, dtype=torch.uint8)
    return data.reader.pair(sample)


class BoundCLI(SegmentationCLI):
    """Validation or test with the bounds that it gives for unseen images; in one process, as they need every image."""

    verb = "bound"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the bounds' own settings."""
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(HeldOutBounds, "bound")

    def before_instantiate_classes(self) -> None:
        """Take one device, unless the user chose."""
        super().before_instantiate_classes()
        if self.verb_config.trainer.devices in ("auto", -1):
            self.verb_config.trainer.devices = 1


def bound(recipe: str, args: Sequence[str]) -> None:
    """``mcseg bound``: mIoU of a held-out split, what it promises for unseen images, and how far the margins reach."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("--split", choices=("val", "test"), default="val")
    chosen, rest = options.parse_known_args(args)
    BoundCLI(recipe, ["validate" if chosen.split == "val" else "test", *rest])


def stats(recipe: str, args: Sequence[str]) -> None:
    """``mcseg stats``: count the training labels; print and draw shares and offsets of the classes."""
    config, data = _data(recipe, args)
    pixels = data.class_pixels()
    offsets = _offsets(config, pixels)
    share = pixels.double() / pixels.sum()
    width = max(len("class"), *map(len, data.class_names))
    print(f"{'class':<{width}}  {'pixels':>14}  {'share %':>8}  {'foreground offset':>17}  {'background offset':>17}")
    for index in share.argsort(descending=True).tolist():
        print(
            f"{data.class_names[index]:<{width}}  {int(pixels[index]):>14,}  {100 * float(share[index]):>8.3f}  "
            f"{float(offsets.foreground[index]):>17.4g}  {float(offsets.background[index]):>17.4g}"
        )
    from mcseg.pictures import save_class_shares

    path = Path(config.trainer.default_root_dir or Path("runs") / recipe) / "class_shares.png"
    save_class_shares(data.class_names, share, offsets.foreground, offsets.background, path, data.palette)
    print(f"picture: {path}")


def check(recipe: str, args: Sequence[str]) -> None:
    """``mcseg check``: open every file; exit with 1 where anything is wrong."""
    from mcseg.data.check import check as check_data

    _, data = _data(recipe, args)
    report = check_data(data)
    for split, images in report.images.items():
        print(f"{split}: {images} images, {int(report.pixels[split].sum()):,} labelled pixels")
    for problem in report.problems:
        print(f"problem: {problem}")
    if report.problems:
        print(f"{len(report.problems)} problems found")
        raise SystemExit(1)
    print("no problems found")


def compare(recipe: str, args: Sequence[str]) -> None:
    """``mcseg compare``: objectives x seeds on one data recipe, with tables and a report."""
    from mcseg.compare.command import command

    command(recipe, args)


def _data(recipe: str, args: Sequence[str], **options: Any) -> tuple[Namespace, SegmentationData]:
    """Parse as for a run, with the verb's own options and their defaults, then make the data module alone."""

    class DataOnly(SegmentationCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            super().add_arguments_to_parser(parser)
            for name, default in options.items():
                parser.add_argument(f"--{name}", type=type(default), default=default)

        def before_instantiate_classes(self) -> None:
            pass

        def instantiate_classes(self) -> None:
            pass

    config = DataOnly(recipe, args, run=False).config
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SegmentationData, "data")
    return config, parser.instantiate_classes(parser.parse_object({"data": config.data.as_dict()})).data


def _offsets(config: Namespace, pixels: torch.Tensor) -> MarginOffsets:
    """Offsets of the configured objective, where it has such; the paper's otherwise."""
    objective = config.model.objective
    own = pkgutil.resolve_name(objective.class_path) is MarginCalibrationLoss  # the parser may have changed the path
    settings = objective.init_args.as_dict() if own else {}
    keys = [key for key in ("scheme", "tau", "upsilon", "max_margin") if settings.get(key) != "none"]
    return margin_offsets(pixels, **{key: settings[key] for key in keys if key in settings})


def _check_checkpoint(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"--ckpt_path: no checkpoint {path}; expected the path of a .ckpt file")
    if path.is_file():
        read_checkpoint(path, mmap=True)
    elif not (path / ".metadata").is_file():  # which a checkpoint in several files has
        raise ValueError(f"--ckpt_path: {path} is a folder; expected a file such as {path}/checkpoints/best.ckpt")


def _run_folder(recipe: str, verb: str) -> Path:
    """runs/<recipe>/<time>, the same on all processes of a run and new for each run."""
    if "LOCAL_RANK" in os.environ and _RUN_FOLDER in os.environ:
        return Path(os.environ[_RUN_FOLDER])
    stem = Path("runs") / recipe / (datetime.now().strftime("%Y%m%d-%H%M%S") + ("" if verb == "fit" else f"-{verb}"))
    folder, copy = stem, 2
    while folder.exists():
        folder, copy = stem.with_name(f"{stem.name}-{copy}"), copy + 1
    os.environ[_RUN_FOLDER] = str(folder)
    return folder


def _remove_if_empty(folder: str | None) -> None:
    """Take back the run folder of a run that failed before it had a result; loggers and settings are written at once."""
    settings = ("config.yaml", "hparams.yaml")
    if folder and Path(folder).is_dir() and all(path.is_dir() or path.name in settings for path in Path(folder).rglob("*")):
        shutil.rmtree(folder)
        for parent in list(Path(folder).parents)[:2]:
            if not any(parent.iterdir()):
                parent.rmdir()


def _default_precision(accelerator: str) -> str:
    """bfloat16 where the machine computes in it, float32 elsewhere."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    if accelerator in ("auto", "cpu") and not torch.backends.mps.is_available():
        # Asked of torch.cpu under names that torch does not promise to keep.
        features = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        if any(getattr(torch.cpu, feature, lambda: False)() for feature in features):
            return "bf16-mixed"
    return "32-true"


def quieten() -> None:
    """Leave out advertisements, and what Lightning says about choices that mcseg made on purpose."""
    chatter = ("💡", "GPU available", "TPU available", "HPU available", "Seed set to", "Loading `train_dataloader`")
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(lambda r: not r.getMessage().startswith(chatter))
    logging.getLogger("lightning_fabric.utilities.seed").setLevel(logging.WARNING)
    for message in (
        ".*`training_step` returned `None`.*",  # model.on_nonfinite skip; the module tells of it at the end
        ".*does not have many workers.*",  # data.num_workers is set from the machine's cores
        ".*intended to run from within Python.*",
        ".*exists and is not empty.*",  # the checkpoint folder of a run folder that is used again
        ".*smaller than the logging interval.*",
        ".*is not supported by the model summary.*",
        ".*recommended to use `self.log.*sync_dist=True.*",  # the scores are reduced before they are logged
        ".*loading a checkpoint outside the 'fit' stage.*",  # averaged weights are in the checkpoint's usual place
        ".*The dirpath has changed from.*",  # scoring a checkpoint of another run folder
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",  # Lightning on a newer torch
    ):
        warnings.filterwarnings("ignore", message=message)


def _fail(message: str, code: int) -> None:
    print(f"mcseg: error: {message}", file=sys.stderr)
    sys.exit(code)  # not raised by hand: W&B notes the code of a failed run in this function
