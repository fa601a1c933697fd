"""Lightning's command line with mcseg's callbacks and run folder: fit, validate, test and predict."""

import inspect
import json
import logging
import pkgutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning_fabric.plugins import CheckpointIO
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, SaveConfigCallback
from pytorch_lightning.utilities import rank_zero_info

from mcseg.atomic import write_atomically
from mcseg.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from mcseg.callbacks.last_validation import LastValidation
from mcseg.callbacks.objective_monitor import ObjectiveMonitor
from mcseg.callbacks.panels import ConfusionPicture, PredictionPanel, TrainingCurves
from mcseg.callbacks.prediction_writer import PredictionWriter
from mcseg.callbacks.scores import JaccardCallback
from mcseg.callbacks.trackers import log_configuration
from mcseg.checkpoints.files import CheckpointFile, read_checkpoint, steps_done, written_by
from mcseg.checkpoints.hyperparameters import refuse_calls
from mcseg.checkpoints.translate import translate_hyperparameters
from mcseg.checkpoints.unavailable import labelling_hyperparameters
from mcseg.data import SegmentationData
from mcseg.evaluation.inference import Inference
from mcseg.lightning_internals import CheckpointSettingsCLI, as_settings, cpu_computes_bfloat16
from mcseg.messages import one_line
from mcseg.module import SegmentationModule
from mcseg.monitors import wanted_mode
from mcseg.run.finders import SaveFound, remove_finders
from mcseg.run.folder import exclusive_lock, run_folder
from mcseg.run.recipes import default_objective
from mcseg.run.resume import changed_settings, describe_changes, refuse_model_settings, refuse_other_batches, resume_logger
from mcseg.run.signals import CheckpointOnSignal

# Arguments that tell callbacks of one class apart, as in Lightning's `ModelCheckpoint.state_key`
_KEY_OF_CALLBACK = ("monitor", "every_n_train_steps", "every_n_epochs", "train_time_interval")


class SaveConfig(SaveConfigCallback):
    """Saves config.yaml without the run folder, so that a run repeated from it gets a new folder."""

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
        """Log the same settings to the trackers, on rank 0."""
        log_configuration(trainer, json.loads(self.parser.dump(self.config, format="json", skip_none=False)))


def _loggers(config: Namespace) -> list[Namespace]:
    loggers = config.trainer.logger
    return [logger for logger in (loggers if isinstance(loggers, list) else [loggers]) if isinstance(logger, Namespace)]


class SegmentationCLI(CheckpointSettingsCLI):
    """LightningCLI for one module class and any data module, with mcseg's callbacks and run folder.

    Args:
        recipe: Name of the recipe, a part of the run folder's path.
        args: Verb and arguments, as returned by `~mcseg.run.recipes.find_recipes`.
        run: Whether to run the verb; False only parses, and ``args`` then contain no verb.
        resume: Folder of the run to resume.

    Raises:
        ValueError, OSError, jsonargparse.ArgumentError: The settings are wrong; the message names the setting.
    """

    def __init__(self, recipe: str, args: Sequence[str], run: bool = True, resume: Path | None = None) -> None:
        self.recipe = recipe
        self.resume = resume
        self._palette: list[list[int]] | None = None  # colours of the checkpoint's classes, for prediction
        self._updated_config: tuple[str, str] | None = None  # content of a resumed run's config.yaml, and its changes
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
        """Link the numbers of classes and bands, and add mcseg's callbacks, each under its own key."""
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.bands", "model.in_channels", apply_on="instantiate")
        parser.link_arguments("data.num_classes", "model.objective.init_args.num_classes", apply_on="instantiate")
        for callback, key in (
            (JaccardCallback, "jaccard"),
            (PredictionPanel, "panel"),
            (ConfusionPicture, "confusion"),
            (ObjectiveMonitor, "monitor"),
            (TrainingCurves, "curves"),
            (PredictionWriter, "writer"),
        ):
            parser.add_lightning_class_args(callback, key)
        parser.add_class_arguments(BestCheckpoint, "checkpoint")  # no callback of a run with enable_checkpointing false
        parser.add_class_arguments(Inference, "inference")
        parser.set_defaults(
            {
                "model.objective": default_objective(),
                "trainer.logger": {
                    "class_path": "CSVLogger",
                    "init_args": {"save_dir": ".", "name": "", "version": ""},
                },
            }
        )

    @property
    def verb(self) -> str:
        """The verb on the command line, which names the run folder.

        Equals Lightning's ``subcommand``, except for ``mcseg bound``, which runs ``validate`` or ``test``.
        """
        return str(self.config.get("subcommand") or "")

    @property
    def verb_config(self) -> Namespace:
        """The settings of the subcommand."""
        config: Namespace = self.config[self.subcommand] if self.subcommand else self.config
        return config

    @property
    def _objects(self) -> Namespace:
        """The settings of the subcommand, with objects in place of class paths."""
        objects: Namespace = self.config_init[self.subcommand] if self.subcommand else self.config_init
        return objects

    @property
    def _parsed(self) -> Namespace:
        """The settings of the subcommand, already while they are parsed."""
        config: Namespace = self.config[self.config.subcommand] if self.config.get("subcommand") else self.config
        return config

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, then check ``--ckpt_path``, which validate, test and predict need, and the changes of a resumed run."""
        super().parse_arguments(parser, args)
        self._set_modes(parser, args)
        _replace_callbacks(self._parsed)
        if self.resume:
            self._compare_with_run(parser, args)
        subcommand = self.config.get("subcommand")  # self.subcommand is set after parsing
        if subcommand and self.config[subcommand].ckpt_path:
            _check_checkpoint(Path(self.config[subcommand].ckpt_path))
        elif subcommand in ("validate", "test", "predict"):
            raise ValueError(f"mcseg {self.verb} needs trained weights: give --ckpt_path RUN_FOLDER/checkpoints/best.ckpt")

    def _set_modes(self, parser: LightningArgumentParser, args: Sequence[str]) -> None:
        """Set the mode of what follows a score; raise ValueError if the user's mode contradicts the score."""
        settings = _that_follow_scores(self._parsed)
        if not settings:
            return
        given = parser.parse_args(args, defaults=False)
        given = given[given.subcommand] if given.get("subcommand") else given
        for setting, chosen in zip(settings, _that_follow_scores(given), strict=True):
            monitor, mode = setting.init_args.get("monitor", "val/miou"), setting.init_args.mode
            if monitor is not None:
                default = None if chosen.get("init_args.mode") else mode
                name = setting.class_path.rpartition(".")[2]
                setting.init_args.mode = wanted_mode(name, monitor, mode, default)

    def _compare_with_run(self, parser: LightningArgumentParser, args: Sequence[str]) -> None:
        """Refuse changes of the module's settings; note the other changes for the run's config.yaml."""
        run = parser.parse_args(args[: args.index("--config") + 2]).fit  # config.yaml alone
        given = self.config.fit.clone()
        given.ckpt_path, given.trainer.default_root_dir = run.ckpt_path, run.trainer.default_root_dir
        given.config = run.config
        if any(word.startswith("--model.arch") for word in args):  # find_recipes removes the options
            given.model.network_options = self.config.fit.model.network_options = run.model.network_options
        changed = changed_settings(run, given)
        refuse_model_settings(changed)
        if self.config.fit.ckpt_path:
            refuse_other_batches(changed, Path(self.config.fit.ckpt_path))
        given.model = run.model
        if changed:
            settings = Namespace(subcommand="fit", fit=given)  # type: ignore[no-untyped-call]
            content = json.loads(parser.dump(settings, format="json", skip_none=False))["fit"]
            self._updated_config = yaml.safe_dump(content, sort_keys=False), describe_changes(changed)

    def take_checkpoint_settings(self, verb: str, path: Path) -> None:
        """Override the settings of recipe and command line with the checkpoint's.

        Arguments of the objective that the checkpoint does not name get the class's defaults, not the recipe's values.
        """
        checkpoint = read_checkpoint(path)
        try:
            # Only training needs objective, optimiser and scheduler, so their classes need not exist to label images.
            translate = translate_hyperparameters if verb == "fit" else labelling_hyperparameters
            stored, remarks = translate(checkpoint.get("hyper_parameters", {}))
            refuse_calls(SegmentationModule, stored, {})
            if stored:
                self.config = self.parser.parse_object({verb: {"model": as_settings(stored)}}, self.config)
        except (ArgumentError, ValueError) as error:
            raise ValueError(
                f"--ckpt_path: {path} has settings that this version refuses ({written_by(checkpoint)}): {one_line(error)}"
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
        """Check class paths; set run folder, loggers, precision and what Lightning prints."""
        self._check_class_paths()
        self._take_checkpoint_classes()
        self._set_run_folder()
        self._set_loggers()
        config = self.verb_config
        if self.resume and config.ckpt_path:
            remove_finders(config)
        if config.trainer.precision is None:
            config.trainer.precision = _default_precision(config.trainer.accelerator)
        if self.subcommand in ("validate", "test"):
            config.verbose = False  # JaccardCallback prints a table
        if self.subcommand == "predict":
            config.return_predictions = False  # they would fill the memory; PredictionWriter writes them

    def _take_checkpoint_classes(self) -> None:
        """Predict images without the folder of the training: take classes and settings of the data from the checkpoint."""
        config = self.verb_config
        data = config.get("data")
        if self.subcommand != "predict" or not data.class_path.endswith(".FolderData") or not data.init_args.predict_root:
            return
        path, given = Path(config.ckpt_path), data.init_args
        checkpoint = read_checkpoint(path) if path.is_file() else {}
        if "palette" not in checkpoint and given.root is not None and Path(given.root).expanduser().is_dir():
            return  # a checkpoint of an earlier version
        names = checkpoint.get("class_names")
        count = len(names or ()) or checkpoint.get("hyper_parameters", {}).get("num_classes", 0)
        if not count:
            return
        given.classes, given.root = list(names or (f"class {index}" for index in range(count))), None
        given.pairs = None
        self._palette = checkpoint.get("palette")
        defaults = inspect.signature(SegmentationData).parameters
        bands = checkpoint.get("hyper_parameters", {}).get("in_channels", 3)
        stored = {"bands": bands, **checkpoint.get("prediction_settings", {})}
        if given.bands not in (3, bands):  # refused later, with the number of bands that the network takes
            stored.pop("show_bands", None)
        for name, value in stored.items():
            if name in given and name in defaults and given[name] == defaults[name].default:
                given[name] = value

    def _check_class_paths(self) -> None:
        config = self.verb_config
        examples = {
            "objective": "mcseg.losses.MarginCalibrationLoss",
            "optimizer": "torch.optim.AdamW",
            "scheduler": "mcseg.schedules.WarmupPolynomialLR",
        }
        for name, example in examples.items():
            if config.model[name] is None:
                raise ValueError(f"model.{name}: found null, expected a class path such as {example}")
            path = config.get(f"model.{name}.class_path")
            if path and not inspect.isclass(pkgutil.resolve_name(path)):  # the parser would call any function
                raise ValueError(f"model.{name}: found {path}, expected a class such as {example}")

    def _set_run_folder(self) -> None:
        """Set the folder of checkpoints and other results; create it unless the user chose one."""
        config = self.verb_config
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = str(run_folder(self.recipe, self.verb))
        self.save_config_kwargs["run_folder"] = config.trainer.default_root_dir
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(Path(config.trainer.default_root_dir) / "checkpoints")

    def _set_loggers(self) -> None:
        """Make the loggers write into the run folder and, in a resumed run, append."""
        config = self.verb_config
        step = steps_done(Path(config.ckpt_path)) if self.resume and config.ckpt_path else 0
        for logger in _loggers(config):
            if logger.get("init_args.save_dir", "") in (None, "."):
                logger.init_args.save_dir = config.trainer.default_root_dir
            if self.resume:
                resume_logger(logger, step)

    def instantiate_classes(self) -> None:
        """Create all objects, and set how the module labels whole images."""
        objective = self.verb_config.model.objective
        super().instantiate_classes()
        self.model.inference = self._objects.inference
        if self._palette:
            self.datamodule.set_palette(self._palette)
        classes = objective.get("init_args.num_classes") if isinstance(objective, Namespace) else None
        # A checkpoint's number of classes is checked when it is loaded.
        if classes not in (None, self.datamodule.num_classes) and not self.verb_config.ckpt_path:
            raise ValueError(
                f"model.objective.init_args.num_classes: found {classes}, but the data have {self.datamodule.num_classes} "
                "classes; remove the setting; it is taken from the data"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create the Trainer with the run's checkpoints, and with the learning rate if there is a logger."""
        settings = self._objects.trainer
        plugins = settings.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, CheckpointFile()]
        callbacks = settings.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        saves = settings.get("enable_checkpointing") is not False
        kwargs["callbacks"] = [*callbacks, *(self._checkpoints(callbacks) if saves else [])]
        trainer = super().instantiate_trainer(**kwargs)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = Path(self.verb_config.checkpoint.dirpath) / "last.ckpt" if saves else None
            trainer.callbacks += [SaveFound(), LastValidation(), CheckpointOnSignal(path)]  # type: ignore[attr-defined]
            if trainer.loggers:
                trainer.callbacks.insert(0, LearningRateMonitor("step"))  # type: ignore[attr-defined]
        return trainer

    def _checkpoints(self, callbacks: Sequence[Callback]) -> list[Callback]:
        """Return the callbacks that write ``best.ckpt`` and ``last.ckpt``; raise ValueError if another one would as well."""
        best = self._objects.checkpoint
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.filename in ("best", "last", best.filename):
                raise ValueError(
                    f"trainer.callbacks: found {type(callback).__name__} with filename {callback.filename}, which the "
                    "command's own checkpoints have; choose another filename, or set checkpoint.monitor and the other keys "
                    "of checkpoint"
                )
        return [best, LastCheckpoint(self.verb_config.checkpoint.dirpath)]

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Train while holding the lock of the run folder."""
        folder = self.trainer.default_root_dir
        needs_lock = self.trainer.is_global_zero and "://" not in folder
        with exclusive_lock(Path(folder), "fit") if needs_lock else nullcontext():
            if self._updated_config and self.resume and self.trainer.is_global_zero:
                content, changes = self._updated_config
                path = self.resume / "config.yaml"
                write_atomically(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))
                rank_zero_info(f"{path}: updated, the resumed run has {changes}")
            checkpoint = self.verb_config.ckpt_path if self.resume else None
            former_steps = steps_done(Path(checkpoint)) if checkpoint else -1  # before the checkpoint is replaced
            self.trainer.fit(*args, **kwargs)
        if self.trainer.global_step == former_steps:
            rank_zero_info(
                f"{folder}: the run is complete after {former_steps} steps, nothing was trained; to train longer, resume it "
                f"with a larger --trainer.{'max_steps' if former_steps == self.trainer.max_steps else 'max_epochs'}"
            )

    def after_fit(self) -> None:
        """Print the run folder and the best checkpoint."""
        best = self._objects.checkpoint.describe()
        rank_zero_info(f"run folder: {self.trainer.default_root_dir}" + (f"\nbest checkpoint: {best}" if best else ""))


class ParseOnlyCLI(SegmentationCLI):
    """Parse the settings, but create no objects and no run folder; use with ``run=False``."""

    def before_instantiate_classes(self) -> None:
        """Do nothing."""

    def instantiate_classes(self) -> None:
        """Do nothing."""


def _replace_callbacks(config: Namespace) -> None:
    """Keep the last of several callbacks of Lightning that are saved under one key, and report which one it replaces."""
    kept: dict[Any, Namespace] = {}
    for index, setting in enumerate(config.get("trainer.callbacks") or []):
        kind = pkgutil.resolve_name(setting.class_path)
        key = index if not kind.__module__.startswith("pytorch_lightning.") else (kind, *map(_of(setting), _KEY_OF_CALLBACK))
        former = kept.pop(key, None)
        if former is not None and former != setting:
            changed = {key.removeprefix("init_args."): values for key, values in changed_settings(former, setting).items()}
            name = " of ".join([kind.__name__, *filter(None, [_of(setting)("monitor")])])
            rank_zero_info(f"trainer.callbacks: a later {name} replaces an earlier one: {describe_changes(changed)}")
        kept[key] = setting
    if kept:
        config.trainer.callbacks = list(kept.values())


def _of(setting: Namespace) -> Callable[[str], Any]:
    return lambda name: setting.get(f"init_args.{name}")


def _that_follow_scores(config: Namespace) -> list[Namespace]:
    """Return the settings of the callbacks, and of the schedule, that have a mode which depends on a score."""
    callbacks = config.get("trainer.callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    scheduler = config.get("model.scheduler")
    follows = [setting for setting in callbacks if {"monitor", "mode"} <= _parameters(setting.class_path)]
    if isinstance(scheduler, Namespace) and scheduler.class_path.endswith(".ReduceLROnPlateau"):
        follows.append(scheduler)
    return follows


def _parameters(class_path: str) -> set[str]:
    return set(inspect.signature(pkgutil.resolve_name(class_path)).parameters)


def _check_checkpoint(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"--ckpt_path: no checkpoint {path}; expected the path of a .ckpt file")
    if path.is_file():
        read_checkpoint(path)
    elif not (path / ".metadata").is_file():  # a sharded checkpoint is a folder with this file
        raise ValueError(f"--ckpt_path: {path} is a folder; expected a file such as {path}/checkpoints/best.ckpt")


def _default_precision(accelerator: str) -> str:
    """Return mixed bfloat16 if the machine has instructions for it, mixed float16 on other GPUs, otherwise float32."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    if accelerator in ("auto", "cpu") and not torch.backends.mps.is_available() and cpu_computes_bfloat16():
        return "bf16-mixed"
    return "32-true"


def silence_warnings() -> None:
    """Silence Lightning's advertisements and its warnings about deliberate choices of mcseg."""
    prefixes = ("💡", "GPU available", "TPU available", "HPU available", "Seed set to", "Loading `train_dataloader`")
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(lambda r: not r.getMessage().startswith(prefixes))
    logging.getLogger("lightning_fabric.utilities.seed").setLevel(logging.WARNING)
    for message in (
        ".*`training_step` returned `None`.*",  # on_nonfinite="skip"; the module reports the number at the end
        ".*does not have many workers.*",  # data.num_workers follows from the machine's cores
        ".*intended to run from within Python.*",
        ".*exists and is not empty.*",  # a resumed run
        ".*your dataloader is not resumable.*",  # TrainingOrder skips the batches that are done
        ".*smaller than the logging interval.*",
        ".*is not supported by the model summary.*",
        ".*recommended to use `self.log.*sync_dist=True.*",  # the scores are reduced before they are logged
        ".*loading a checkpoint outside the 'fit' stage.*",  # averaged weights are stored as the weights
        ".*The dirpath has changed from.*",  # evaluation of a checkpoint in another run folder
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",  # Lightning on a newer torch
    ):
        warnings.filterwarnings("ignore", message=message)
