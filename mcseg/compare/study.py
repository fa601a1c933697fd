"""Define a study: objectives, seeds, folds and trials. All settings are checked before the first run starts."""

import fnmatch
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from mcseg.data import SegmentationData
from mcseg.run.cli import SegmentationCLI
from mcseg.run.recipes import RECIPES

Arguments = tuple[str, ...]
ObjectiveSettings = str | Mapping[str, Any]

# Settings that do not change the results of a run.
_IRRELEVANT = ("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.logger")
# Settings in which objectives may differ without a remark.
_MAY_DIFFER = ("model.objective", "model.optimizer", "model.scheduler")


def parse_overrides(texts: Sequence[str]) -> dict[str, str]:
    """Parse ``KEY=VALUE`` texts."""
    return dict(map(_pair, texts))


def parse_grid(texts: Sequence[str]) -> dict[str, list[str]]:
    """Parse ``KEY=V1,V2`` texts; a comma within brackets is part of the value."""
    return {key: re.split(r",(?![^\[{(]*[\]})])", value) for key, value in map(_pair, texts)}


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"found {text}, expected KEY=VALUE")
    return key, value


@dataclass(frozen=True)
class StudySettings:
    """Settings of a study, given in Python, in a study file, or as options of ``mcseg compare``.

    Attributes:
        objectives: objectives to compare. Each is ``NAME`` or ``NAME:key=value,key=value``, where NAME is a recipe in
            ``objectives`` or a YAML file; or a mapping with ``recipe``, ``overrides`` (key -> value) and ``trials`` (list of
            key -> value). A key without a dot is an argument of the objective. If ``objectives`` is a mapping, its keys are
            the labels.
        seeds: seeds of the final runs; runs on folds use the first.
        baseline: label of the objective that all differences refer to; None is the first objective.
        folds: for each fold, one or several glob patterns of names of training images to hold out.
        tune: values to try by key; every objective tries all combinations.
        first: objective of a first training stage; all objectives start from its weights.
        then: settings of the second stage by key, for example fewer epochs.
        settings: settings of all runs by key, for example ``{"data.root": "CamVid", "trainer.max_epochs": 30}``.
        folder: folder of the results; None is ``runs/compare/<recipe>``.
        jobs: number of simultaneous runs; None is one per GPU, or one without a GPU.
        keep_checkpoints: keep the last weights of the final runs.
    """

    # `metadata` holds arguments of argparse's add_argument; `parse` converts the option's texts to the setting. A field
    # without metadata is not an option: on the command line, each of the runs' settings is an option of its own.
    objectives: Sequence[ObjectiveSettings] | Mapping[str, ObjectiveSettings] = field(
        default=(),
        metadata={"nargs": "+", "metavar": "NAME[:KEY=VALUE,...]", "help": "recipes in objectives, or YAML files"},
    )
    seeds: Sequence[int] = field(
        default=(0, 1, 2),
        metadata={"nargs": "+", "type": int, "metavar": "N", "help": "seeds of the final runs (0 1 2)"},
    )
    baseline: str | None = field(
        default=None, metadata={"metavar": "NAME", "help": "objective that all differences refer to (the first)"}
    )
    folds: Sequence[str | Sequence[str]] = field(
        default=(),
        metadata={"nargs": "+", "metavar": "PATTERN", "help": "glob pattern of the training images that a fold holds out"},
    )
    tune: Mapping[str, Sequence[Any]] | None = field(
        default=None,
        metadata={
            "nargs": "+",
            "metavar": "KEY=V1,V2",
            "help": "settings to tune for each objective on the folds",
            "parse": parse_grid,
        },
    )
    first: ObjectiveSettings | None = field(
        default=None,
        metadata={"metavar": "NAME", "help": "objective of a first stage; all objectives start from its weights"},
    )
    then: Mapping[str, Any] | None = field(
        default=None,
        metadata={"nargs": "+", "metavar": "KEY=VALUE", "help": "settings of the second stage", "parse": parse_overrides},
    )
    settings: Mapping[str, Any] | None = None
    folder: str | Path | None = field(
        default=None, metadata={"metavar": "DIR", "help": "folder of the results (runs/compare/RECIPE)"}
    )
    jobs: int | None = field(
        default=None,
        metadata={"type": int, "metavar": "N", "help": "simultaneous runs (one per GPU, or 1)"},
    )
    keep_checkpoints: bool = field(
        default=False, metadata={"action": "store_true", "help": "keep the last weights of the final runs"}
    )


@dataclass(frozen=True)
class Objective:
    """An objective as arguments of ``mcseg fit``, with the trials to choose from; one empty trial means no tuning."""

    label: str
    arguments: Arguments
    trials: tuple[Arguments, ...] = ((),)


@dataclass(frozen=True)
class Study:
    """One data recipe x objectives x seeds.

    Attributes:
        recipe: name of the data recipe.
        arguments: settings of all runs, as arguments of ``mcseg fit``.
        objectives: objectives to compare, with unique labels.
        seeds: seeds of the final runs; runs on folds use the first.
        baseline: label of the objective that all differences refer to.
        folds: glob patterns of the training images that each fold holds out.
        first: objective of the first stage, which trains the weights that all objectives start from; None for one stage.
        then: additional arguments of all runs of the second stage.
        shifts: whether to fit shifts of the logits on the folds.
        remarks: notes for the reader, such as settings other than objective and optimiser in which objectives differ.
    """

    recipe: str
    arguments: Arguments
    objectives: tuple[Objective, ...]
    seeds: tuple[int, ...]
    baseline: str
    folds: tuple[Arguments, ...] = ()
    first: Objective | None = None
    then: Arguments = ()
    shifts: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def tuned(self) -> bool:
        """Whether objectives have several trials to choose from."""
        return any(len(objective.trials) > 1 for objective in self.objectives)


def make_study(recipe: str, arguments: Sequence[str], settings: StudySettings) -> Study:
    """Build a study from its settings and check them.

    Args:
        recipe: name of the data recipe.
        arguments: settings of all runs, as arguments of ``mcseg fit`` with recipes as paths.
        settings: all other settings; ``settings.settings`` is ignored, ``arguments`` must include it.

    Raises:
        ValueError: a setting is invalid.
    """
    if isinstance(settings.objectives, Mapping):
        objectives = [_objective(label, one, settings.tune) for label, one in settings.objectives.items()]
    else:
        objectives = [_objective(None, one, settings.tune) for one in settings.objectives]
    study = Study(
        recipe=recipe,
        arguments=tuple(arguments),
        objectives=tuple(objectives),
        seeds=tuple(settings.seeds),
        baseline=settings.baseline if settings.baseline is not None else next((one.label for one in objectives), ""),
        folds=tuple((fold,) if isinstance(fold, str) else tuple(fold) for fold in settings.folds),
        first=_objective(None, settings.first, None) if settings.first is not None else None,
        then=setting_arguments(settings.then or {}),
    )
    _check(study)
    return _check_runs(study)


def _objective(label: str | None, settings: ObjectiveSettings, tune: Mapping[str, Sequence[Any]] | None) -> Objective:
    if isinstance(settings, str):
        label = label or settings
        name, _, rest = settings.partition(":")
        # Values may be lists: a comma separates settings only if a key follows
        pairs = [_pair(part) for part in re.split(r",(?=[\w.]+=)", rest)] if rest else []
        settings = {"recipe": name, "overrides": dict(pairs)}
    unknown = set(settings) - {"recipe", "overrides", "trials"}
    if unknown or "recipe" not in settings:
        raise ValueError(
            f"objective {label or dict(settings)}: found {', '.join(map(str, settings))}, expected recipe and, if needed, "
            "overrides and trials"
        )
    label = label or str(settings["recipe"])
    trials = settings.get("trials")
    if trials and tune:
        raise ValueError(
            f"objective {label}: found both its own trials and tune, which applies to all; give only one of the two"
        )
    if tune:
        trials = [dict(zip(tune, values, strict=True)) for values in itertools.product(*tune.values())]
    overrides = setting_arguments(settings.get("overrides") or {})
    return Objective(
        label,
        ("--model.objective=null", "--config", str(_path(str(settings["recipe"]))), *overrides),
        tuple(setting_arguments(trial) for trial in trials) if trials else ((),),
    )


def _path(name: str) -> Path:
    packaged = RECIPES / "objectives" / f"{name.removeprefix('objectives/')}.yaml"
    if packaged.is_file():
        return packaged
    if Path(name).is_file():
        return Path(name).resolve()
    known = ", ".join(sorted(path.stem for path in (RECIPES / "objectives").glob("*.yaml")))
    raise ValueError(f"objective {name}: neither a YAML file nor a packaged recipe; expected a file or one of {known}")


def setting_arguments(settings: Mapping[str, Any]) -> Arguments:
    """Convert settings by key to command-line arguments; a key without a dot is an argument of the objective."""
    return tuple(
        f"--{key if '.' in key else f'model.objective.{key}'}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
    )


class _ParseOnly(SegmentationCLI):
    """Parse a command without instantiating its classes."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass


@cache
def _parser() -> ArgumentParser:
    """Return the parser of ``mcseg fit``."""
    return _ParseOnly("compare", ["--config", str(RECIPES / "synthetic.yaml")], run=False).parser


def explicit_settings(arguments: Arguments) -> dict[str, Any]:
    """Parse arguments of ``mcseg fit`` into the effective settings, without defaults.

    Omits settings that do not change results, and keeps only the last folder of the data's root.
    """
    preceding = ("", *arguments)
    files = [argument for argument, flag in zip(arguments, preceding, strict=False) if flag == "--config"]
    files += [argument.removeprefix("--config=") for argument in arguments if argument.startswith("--config=")]
    return _explicit_settings(arguments, tuple(Path(file).stat().st_mtime_ns for file in files))


@cache  # execute() lists the runs again whenever one ends
def _explicit_settings(arguments: Arguments, _modified: tuple[int, ...]) -> dict[str, Any]:
    """Parse the arguments; the modification times of their files make the cache notice edits."""
    try:
        config: Namespace = _parser().parse_args(list(arguments), defaults=False)
    except ArgumentError:  # settings that are valid only on top of a default, such as the name of the default logger
        config = _parser().parse_args(list(arguments))
    for key in ("config", *_IRRELEVANT):
        config.pop(key, None)
    if root := config.get("data.init_args.root"):
        config["data.init_args.root"] = Path(root).name
    settings: dict[str, Any] = config.as_dict()
    return settings


def _check(study: Study) -> None:
    labels = [objective.label for objective in study.objectives]
    if not labels:
        raise ValueError("objectives: found none; name at least one, such as cross_entropy")
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"objectives: found {', '.join(twice)} twice; use a mapping from unique labels in a study file")
    if study.baseline not in labels:
        raise ValueError(f"baseline: found {study.baseline}, expected one of the objectives {', '.join(labels)}")
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise ValueError(f"seeds: found {list(study.seeds)}, expected at least one, each only once")
    counts = {objective.label: len(objective.trials) for objective in study.objectives}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{label} {count}" for label, count in counts.items())
        raise ValueError(f"trials: found {listed}; expected the same number for every objective")
    if study.tuned and not study.folds:
        raise ValueError("folds: found none; tuning needs at least one glob pattern of names of training images to hold out")
    if study.then and study.first is None:
        raise ValueError(
            "then: found settings of a second stage but no first stage; give first, the objective of the first stage"
        )
    for setting in ("seed_everything", "data.held_out", "model.init_from"):
        if any(argument.split("=")[0] == f"--{setting}" for argument in study.arguments):
            raise ValueError(f"{setting}: mcseg compare sets this for each run; use seeds, folds or first instead")


def _check_runs(study: Study) -> Study:
    """Parse the settings of all runs; set ``shifts`` and ``remarks`` from them."""
    parser = _parser()
    shared: Namespace = parser.parse_args(list(study.arguments))
    whole_images = True
    if study.folds:
        _check_folds(study, shared)

    def parsed(label: str, arguments: Arguments) -> Namespace:
        try:
            config: Namespace = parser.parse_args([*study.arguments, *arguments])
        except ArgumentError as error:
            raise ValueError(f"objective {label}: {_short(error)}") from None
        return config

    if study.first is not None:
        parsed(f"{study.first.label} (first stage)", study.first.arguments)
    values_of: dict[str, dict[str, str]] = {}
    for objective in study.objectives:
        for trial in objective.trials:
            config = parsed(objective.label, (*study.then, *objective.arguments, *trial))
            inference = config.inference
            whole_images &= not (inference.window or inference.flip or inference.scales != (1.0,))
            for key, value in _flat(config).items():
                if not key.startswith(_MAY_DIFFER):
                    values_of.setdefault(key, {})[objective.label] = value
    number = len(study.objectives)
    remarks = [
        f"the objectives differ in {key}: " + ", ".join(f"{label} {value}" for label, value in values.items())
        for key, values in values_of.items()
        if len(set(values.values())) > 1 or len(values) < number
    ]
    if study.folds and not whole_images:
        remarks.append("shifts are not fitted: they need logits of whole images, but inference.* averages probabilities")
    return replace(study, shifts=bool(study.folds) and whole_images, remarks=tuple(remarks))


def _check_folds(study: Study, config: Namespace) -> None:
    """Check that each fold holds out some, but not all, training images."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SegmentationData, "data")
    data = parser.instantiate_classes(parser.parse_object({"data": config.data.as_dict()})).data
    names = [sample.name for sample in data.samples("train")]
    for fold in study.folds:
        held_out = [any(fnmatch.fnmatchcase(name, pattern) for pattern in fold) for name in names]
        if not any(held_out) or all(held_out):
            raise ValueError(
                f"folds: {', '.join(fold)} matches {'every' if all(held_out) else 'no'} training image; expected a glob "
                f"pattern of some of their names, such as {names[0] if names else 'those of the training split'}"
            )


def _flat(config: Namespace) -> dict[str, str]:
    return {
        key: str(value) for key, value in config.items() if not isinstance(value, Namespace) and not key.startswith("config")
    }


def _short(error: ArgumentError) -> str:
    """Reduce an error of jsonargparse to one line: the reason, without the other types that the value may have."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    start = next((index for index, line in enumerate(lines) if line.startswith("- Problem with given class_path")), None)
    if start is None:
        return " ".join(lines)
    end = next((index for index in range(start + 1, len(lines)) if lines[index].startswith("- ")), len(lines))
    return " ".join(lines[start:end]).removeprefix("- Problem with given class_path ")
