"""A training, validation, test or prediction by Lightning: its settings, its folder, and the callbacks that mcseg adds."""

import inspect
import json
import logging
import os
import pkgutil
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, Namespace
from lightning_fabric.plugins import CheckpointIO
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, SaveConfigCallback
from pytorch_lightning.utilities import rank_zero_info

from mcseg.callbacks.objective_monitor import ObjectiveMonitor
from mcseg.callbacks.panels import ConfusionPicture, PredictionPanel, TrainingCurves
from mcseg.callbacks.prediction_writer import PredictionWriter
from mcseg.callbacks.scores import JaccardCallback, score_names
from mcseg.callbacks.trackers import log_configuration
from mcseg.checkpoints.files import CheckpointFile, read_checkpoint, steps_done, written_by
from mcseg.checkpoints.hyperparameters import refuse_calls
from mcseg.checkpoints.translate import translate_hyperparameters
from mcseg.data import SegmentationData
from mcseg.evaluation.inference import Inference
from mcseg.lightning_internals import CheckpointSettingsCLI, as_settings, cpu_computes_bfloat16
from mcseg.messages import one_line
from mcseg.module import SegmentationModule
from mcseg.run.folder import exclusive_lock, run_folder
from mcseg.run.recipes import default_objective
from mcseg.run.resume import ContinuedCSVLogger
from mcseg.run.signals import CheckpointOnSignal


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


class SegmentationCLI(CheckpointSettingsCLI):
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
                "model.objective": default_objective(),
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

    @property
    def _made(self) -> Namespace:
        """The verb's settings, with objects in place of class paths."""
        made: Namespace = self.config_init[self.subcommand] if self.subcommand else self.config_init
        return made

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuse to score without weights, and what is no checkpoint before Lightning takes settings from it."""
        super().parse_arguments(parser, args)
        verb = self.config.get("subcommand")
        if verb and self.config[verb].ckpt_path:
            _check_checkpoint(Path(self.config[verb].ckpt_path))
        elif verb in ("validate", "test", "predict"):
            raise ValueError(f"mcseg {self.verb} needs trained weights: give --ckpt_path RUN_FOLDER/checkpoints/best.ckpt")

    def take_checkpoint_settings(self, verb: str, path: Path) -> None:
        """Take a checkpoint's objective whole: what the checkpoint does not name has its default, not the recipe's."""
        checkpoint = read_checkpoint(path)
        try:
            stored, remarks = translate_hyperparameters(checkpoint.get("hyper_parameters", {}))
            refuse_calls(SegmentationModule, stored, {})
            if stored:
                self.config = self.parser.parse_object({verb: {"model": as_settings(stored)}}, self.config)
        except (ArgumentError, ValueError) as error:
            raise ValueError(
                f"--ckpt_path: {path} has settings that do not hold here ({written_by(checkpoint)}): {one_line(error)}"
            ) from None
        for remark in remarks:
            rank_zero_info(f"{path}: {remark}")
        if named := stored.get("objective"):
            objective = self.config[verb].model.objective
            for name, parameter in inspect.signature(pkgutil.resolve_name(objective.class_path)).parameters.items():
                known = name == "num_classes" or name in named.get("init_args", {})
                if not known and name in objective.init_args and parameter.default is not parameter.empty:
                    objective.init_args[name] = parameter.default

    def before_instantiate_classes(self) -> None:
        """Choose the run folder and the precision."""
        config = self.verb_config
        if config.model.objective is None:
            raise ValueError("model.objective: found null, expected a class path such as mcseg.losses.MarginCalibrationLoss")
        for name in ("objective", "optimizer", "scheduler"):
            path = config.get(f"model.{name}.class_path")
            if path and not inspect.isclass(pkgutil.resolve_name(path)):  # the parser would call any function
                raise ValueError(f"model.{name}: found {path}, expected a class")
        if self.subcommand in ("validate", "test"):
            config.verbose = False  # the table of JaccardCallback says it all
        if self.subcommand == "predict":
            config.return_predictions = False  # they are written; keeping them would fill the memory
        trainer = config.trainer
        if trainer.default_root_dir is None:
            trainer.default_root_dir = str(run_folder(self.recipe, self.verb))
        self.save_config_kwargs["run_folder"] = trainer.default_root_dir
        done = steps_done(Path(config.ckpt_path)) if self.resume and config.ckpt_path else 0
        for logger in _loggers(config):
            if logger.get("init_args.save_dir", "") in (None, "."):
                logger.init_args.save_dir = trainer.default_root_dir
            if self.resume:
                _go_on(logger, done)
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        if trainer.precision is None:
            trainer.precision = _default_precision(trainer.accelerator)

    def instantiate_classes(self) -> None:
        """Make everything, and give the module the way in which it labels whole images."""
        objective = self.verb_config.model.objective
        super().instantiate_classes()
        self.model.inference = self._made.inference
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
        monitors = [(type(callback).__name__, getattr(callback, "monitor", None)) for callback in callbacks]
        scheduler = self.verb_config.model.scheduler
        if scheduler is not None:
            monitors.append((scheduler.class_path.rpartition(".")[2], scheduler.get("init_args.monitor")))
        for name, monitor in monitors:
            if monitor and monitor.startswith("val/") and monitor not in known:
                raise ValueError(f"{name}: no score {monitor}; expected one of {', '.join(known)}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add ``last.ckpt`` of every epoch, and the learning rate where there is something to log it to."""
        plugins = self._made.get("trainer.plugins") or []
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

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Train, in a folder where no other training is at work."""
        folder, first = self.trainer.default_root_dir, self.trainer.is_global_zero
        with exclusive_lock(Path(folder), "fit") if first and "://" not in folder else nullcontext():
            self.trainer.fit(*args, **kwargs)

    def after_fit(self) -> None:
        """Say where everything is."""
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        rank_zero_info(f"run folder: {self.trainer.default_root_dir}" + (f"\nbest checkpoint: {best}" if best else ""))


def _go_on(logger: Namespace, done: int) -> None:
    """Let a logger add to what it has of the run, of which the rows of the steps that are done hold."""
    kind, settings = logger.class_path.rpartition(".")[2], logger.init_args
    folder = Path(settings.get("save_dir") or ".")
    if kind == "CSVLogger":
        logger.class_path = f"{ContinuedCSVLogger.__module__}.{ContinuedCSVLogger.__qualname__}"
        settings.step = done
    elif kind == "TensorBoardLogger":
        versions = [path.name.removeprefix("version_") for path in (folder / settings.name).glob("version_*")]
        if settings.version is None:
            settings.version = max((int(version) for version in versions if version.isdigit()), default=0)
        settings.purge_step = done
    elif kind == "WandbLogger":
        # run-<time>-<id>; offline-run-... is not on the server yet, where the next part would take its place
        ids = [path.name.split("-", 2)[2] for path in sorted(folder.glob("wandb/run-*-*"))]
        if ids and settings.id is None and "WANDB_RUN_ID" not in os.environ:
            settings.id = ids[-1]
            if "resume" in settings:  # where the parser knows it, it gives null in place of Lightning's own default
                settings.resume = "allow"


def _check_checkpoint(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"--ckpt_path: no checkpoint {path}; expected the path of a .ckpt file")
    if path.is_file():
        read_checkpoint(path)
    elif not (path / ".metadata").is_file():  # which a checkpoint in several files has
        raise ValueError(f"--ckpt_path: {path} is a folder; expected a file such as {path}/checkpoints/best.ckpt")


def _default_precision(accelerator: str) -> str:
    """bfloat16 where the machine computes in it, float32 elsewhere."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    if accelerator in ("auto", "cpu") and not torch.backends.mps.is_available() and cpu_computes_bfloat16():
        return "bf16-mixed"
    return "32-true"


def silence_warnings() -> None:
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
