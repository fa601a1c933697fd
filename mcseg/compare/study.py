"""What is compared: objectives, seeds, folds and trials, checked before anything runs."""

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

Words = tuple[str, ...]
ObjectiveSettings = str | Mapping[str, Any]

# Settings that change no number that a run finds.
_IRRELEVANT = ("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.logger")
# Settings in which the objectives of a comparison may differ without a remark.
_OBJECTIVES_OWN = ("model.objective", "model.optimizer", "model.scheduler")


def parse_overrides(texts: Sequence[str]) -> dict[str, str]:
    """Read ``KEY=VALUE``."""
    return dict(map(_pair, texts))


def parse_grid(texts: Sequence[str]) -> dict[str, list[str]]:
    """Read ``KEY=V1,V2``; a comma within brackets belongs to the value."""
    return {key: re.split(r",(?![^\[{(]*[\]})])", value) for key, value in map(_pair, texts)}


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"found {text}, expected KEY=VALUE")
    return key, value


@dataclass(frozen=True)
class StudySettings:
    """Settings of a study as a person writes them: in Python, in a study file, or as options of ``mcseg compare``.

    Attributes:
        objectives: each is ``NAME`` or ``NAME:key=value,key=value``, NAME being a recipe below ``objectives`` or a YAML
            file; or a mapping with ``recipe``, ``overrides`` (key -> value) and ``trials`` (list of key -> value). A key
            without a dot is one of the objective's arguments. In a mapping the keys are the labels.
        seeds: of the final runs; runs on folds take the first.
        baseline: label of the objective that the others are compared to; None is the first.
        folds: for each fold a glob pattern of names of training images, or several.
        tune: values by key; every objective tries all combinations.
        first: objective of a first stage, from whose weights all others start.
        then: settings of the second stage by key, for example fewer epochs.
        settings: of all runs by key, for example ``{"data.root": "CamVid", "trainer.max_epochs": 30}``.
        folder: where results go and are looked for; None is ``runs/compare/<recipe>``.
        jobs: runs at the same time; None is one for each GPU, or one.
        keep_checkpoints: keep the last weights of the final runs.
    """

    # The metadata are arguments of argparse's add_argument; `read` turns the words of an option into the setting. Without
    # metadata there is no such option: on the command line, settings of all runs are options of their own.
    objectives: Sequence[ObjectiveSettings] | Mapping[str, ObjectiveSettings] = field(
        default=(),
        metadata={"nargs": "+", "metavar": "NAME[:KEY=VALUE,...]", "help": "recipes below objectives, or YAML files"},
    )
    seeds: Sequence[int] = field(
        default=(0, 1, 2),
        metadata={"nargs": "+", "type": int, "metavar": "N", "help": "seeds of the final runs (0 1 2)"},
    )
    baseline: str | None = field(
        default=None, metadata={"metavar": "NAME", "help": "objective that the others are compared to (the first)"}
    )
    folds: Sequence[str | Sequence[str]] = field(
        default=(),
        metadata={"nargs": "+", "metavar": "PATTERN", "help": "names of the training images that each fold holds out"},
    )
    tune: Mapping[str, Sequence[Any]] | None = field(
        default=None,
        metadata={
            "nargs": "+",
            "metavar": "KEY=V1,V2",
            "help": "settings to tune for each objective on the folds",
            "read": parse_grid,
        },
    )
    first: ObjectiveSettings | None = field(
        default=None,
        metadata={"metavar": "NAME", "help": "objective of a first stage; all others start from its weights"},
    )
    then: Mapping[str, Any] | None = field(
        default=None,
        metadata={"nargs": "+", "metavar": "KEY=VALUE", "help": "settings of the second stage", "read": parse_overrides},
    )
    settings: Mapping[str, Any] | None = None
    folder: str | Path | None = field(
        default=None, metadata={"metavar": "DIR", "help": "where results go and are looked for (runs/compare/RECIPE)"}
    )
    jobs: int | None = field(
        default=None,
        metadata={"type": int, "metavar": "N", "help": "runs at the same time (one for each GPU, or 1)"},
    )
    keep_checkpoints: bool = field(
        default=False, metadata={"action": "store_true", "help": "keep the last weights of the final runs"}
    )


@dataclass(frozen=True)
class Objective:
    """An objective as words of the command, and the trials from which its settings are chosen (one empty: no choice)."""

    label: str
    words: Words
    trials: tuple[Words, ...] = ((),)


@dataclass(frozen=True)
class Study:
    """One data recipe x objectives x seeds.

    Attributes:
        recipe: name of the data recipe.
        words: what all runs share, as words of ``mcseg fit``.
        objectives: what is compared; labels differ.
        seeds: seeds of the final runs; tuning runs take the first.
        baseline: label of the objective that the others are compared to.
        folds: glob patterns of the training images that each fold holds out.
        first: objective with which a first stage trains the weights that all others start from; None: one stage.
        then: words that all runs of the second stage get.
        shifts: whether shifts of the logits are chosen on the folds.
        remarks: what a reader should know, as where the objectives differ in more than objective and optimiser.
    """

    recipe: str
    words: Words
    objectives: tuple[Objective, ...]
    seeds: tuple[int, ...]
    baseline: str
    folds: tuple[Words, ...] = ()
    first: Objective | None = None
    then: Words = ()
    shifts: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def tuned(self) -> bool:
        """Whether settings are chosen on the folds."""
        return any(len(objective.trials) > 1 for objective in self.objectives)


def make_study(recipe: str, words: Sequence[str], settings: StudySettings) -> Study:
    """Make a study of its settings, and check them.

    Args:
        recipe: name of the data recipe, for messages.
        words: what all runs share, as words of ``mcseg fit``, recipes as paths.
        settings: the others; those of all runs, ``settings.settings``, are in ``words``.

    Raises:
        ValueError: a setting cannot be used.
    """
    if isinstance(settings.objectives, Mapping):
        found = [_objective(label, one, settings.tune) for label, one in settings.objectives.items()]
    else:
        found = [_objective(None, one, settings.tune) for one in settings.objectives]
    study = Study(
        recipe=recipe,
        words=tuple(words),
        objectives=tuple(found),
        seeds=tuple(settings.seeds),
        baseline=settings.baseline if settings.baseline is not None else next((one.label for one in found), ""),
        folds=tuple((fold,) if isinstance(fold, str) else tuple(fold) for fold in settings.folds),
        first=_objective(None, settings.first, None) if settings.first is not None else None,
        then=setting_words(settings.then or {}),
    )
    _check(study)
    return _checked(study)


def _objective(label: str | None, settings: ObjectiveSettings, tune: Mapping[str, Sequence[Any]] | None) -> Objective:
    if isinstance(settings, str):
        label = label or settings
        name, _, rest = settings.partition(":")
        # a comma separates settings only where a key follows: values may be lists
        pairs = [_pair(part) for part in re.split(r",(?=[\w.]+=)", rest)] if rest else []
        settings = {"recipe": name, "overrides": dict(pairs)}
    unknown = set(settings) - {"recipe", "overrides", "trials"}
    if unknown or "recipe" not in settings:
        raise ValueError(
            f"objective {label or dict(settings)}: found {', '.join(map(str, settings))}, expected recipe, overrides, trials"
        )
    label = label or str(settings["recipe"])
    trials = settings.get("trials")
    if trials and tune:
        raise ValueError(f"objective {label}: has trials of its own, and tune gives values for all; give one of the two")
    if tune:
        trials = [dict(zip(tune, values, strict=True)) for values in itertools.product(*tune.values())]
    overrides = setting_words(settings.get("overrides") or {})
    return Objective(
        label,
        ("--model.objective=null", "--config", str(_path(str(settings["recipe"]))), *overrides),
        tuple(setting_words(trial) for trial in trials) if trials else ((),),
    )


def _path(name: str) -> Path:
    packaged = RECIPES / "objectives" / f"{name.removeprefix('objectives/')}.yaml"
    if packaged.is_file():
        return packaged
    if Path(name).is_file():
        return Path(name).resolve()
    known = ", ".join(sorted(path.stem for path in (RECIPES / "objectives").glob("*.yaml")))
    raise ValueError(f"objective {name}: neither a YAML file nor a recipe of mcseg; the recipes are {known}")


def setting_words(settings: Mapping[str, Any]) -> Words:
    """Turn settings by key into words; a key without a dot is an argument of the objective."""
    return tuple(
        f"--{key if '.' in key else f'model.objective.{key}'}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
    )


class _ParseOnly(SegmentationCLI):
    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass


@cache
def _parser() -> ArgumentParser:
    """Parser of ``mcseg fit``."""
    return _ParseOnly("compare", ["--config", str(RECIPES / "synthetic.yaml")], run=False).parser


def explicit_settings(words: Words) -> dict[str, Any]:
    """Parse words of ``mcseg fit`` into the settings that hold in the end, without defaults.

    Settings that change no number are left out, and of the data's root all but the last folder.
    """
    before = ("", *words)
    files = [word for word, flag in zip(words, before, strict=False) if flag == "--config"]
    files += [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    return _explicit_settings(words, tuple(Path(file).stat().st_mtime_ns for file in files))


@cache  # runs are listed often
def _explicit_settings(words: Words, _: tuple[int, ...]) -> dict[str, Any]:
    """Settings of these words with their files as they are at this time."""
    try:
        found: Namespace = _parser().parse_args(list(words), defaults=False)
    except ArgumentError:  # settings that hold only on top of a default, such as the name of the default logger
        found = _parser().parse_args(list(words))
    for key in ("config", *_IRRELEVANT):
        found.pop(key, None)
    if root := found.get("data.init_args.root"):
        found["data.init_args.root"] = Path(root).name
    settings: dict[str, Any] = found.as_dict()
    return settings


def _check(study: Study) -> None:
    labels = [objective.label for objective in study.objectives]
    if not labels:
        raise ValueError("objectives: none given; name at least one, such as cross_entropy")
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"objectives: {', '.join(twice)} given twice; a study file can give labels of their own")
    if study.baseline not in labels:
        raise ValueError(f"baseline: found {study.baseline}, expected one of the objectives {', '.join(labels)}")
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise ValueError(f"seeds: found {list(study.seeds)}, expected at least one and each once")
    counts = {objective.label: len(objective.trials) for objective in study.objectives}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{label} {count}" for label, count in counts.items())
        raise ValueError(f"trials: every objective needs the same number, found {told}")
    if study.tuned and not study.folds:
        raise ValueError("tuning takes place on folds of the training images: give folds, glob patterns of their names")
    if study.then and study.first is None:
        raise ValueError("then: settings of a second stage, but no first stage is given (first)")
    for setting in ("seed_everything", "data.held_out", "model.init_from"):
        if any(word.split("=")[0] == f"--{setting}" for word in study.words):
            raise ValueError(f"{setting}: mcseg compare sets it itself; use seeds, folds or first")


def _checked(study: Study) -> Study:
    """Parse the settings of all runs; fill in what they say about the study."""
    parser = _parser()
    shared: Namespace = parser.parse_args(list(study.words))
    plain = True
    if study.folds:
        _check_folds(study, shared)

    def parsed(label: str, words: Words) -> Namespace:
        try:
            config: Namespace = parser.parse_args([*study.words, *words])
        except ArgumentError as error:
            raise ValueError(f"objective {label}: {_short(error)}") from None
        return config

    if study.first is not None:
        parsed(f"{study.first.label} (first stage)", study.first.words)
    found: dict[str, dict[str, str]] = {}
    for objective in study.objectives:
        for trial in objective.trials:
            config = parsed(objective.label, (*study.then, *objective.words, *trial))
            plain = plain and not (config.inference.window or config.inference.flip or config.inference.scales != (1.0,))
            for key, value in _flat(config).items():
                if not key.startswith(_OBJECTIVES_OWN):
                    found.setdefault(key, {})[objective.label] = value
    every = len(study.objectives)
    told = [
        f"the objectives differ in {key}: " + ", ".join(f"{label} {value}" for label, value in values.items())
        for key, values in found.items()
        if len(set(values.values())) > 1 or len(values) < every
    ]
    if study.folds and not plain:
        told.append("no shifts are chosen: they need the logits of whole images, and inference.* averages probabilities")
    return replace(study, shifts=bool(study.folds) and plain, remarks=tuple(told))


def _check_folds(study: Study, config: Namespace) -> None:
    """Look for the images that are held out, before the first run does."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SegmentationData, "data")
    data = parser.instantiate_classes(parser.parse_object({"data": config.data.as_dict()})).data
    names = [sample.name for sample in data.samples("train")]
    for fold in study.folds:
        out = [any(fnmatch.fnmatchcase(name, pattern) for pattern in fold) for name in names]
        if not any(out) or all(out):
            raise ValueError(
                f"folds: {', '.join(fold)} is the name of {'every' if all(out) else 'no'} training image; expected a glob "
                f"pattern of some of them, such as {names[0] if names else 'those of the training split'}"
            )


def _flat(config: Namespace) -> dict[str, str]:
    return {
        key: str(value) for key, value in config.items() if not isinstance(value, Namespace) and not key.startswith("config")
    }


def _short(error: ArgumentError) -> str:
    """One line of jsonargparse's many: the reason, without what else the value could have been."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    start = next((index for index, line in enumerate(lines) if line.startswith("- Problem with given class_path")), None)
    if start is None:
        return " ".join(lines)
    end = next((index for index in range(start + 1, len(lines)) if lines[index].startswith("- ")), len(lines))
    return " ".join(lines[start:end]).removeprefix("- Problem with given class_path ")
