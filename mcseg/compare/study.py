"""What is compared: objectives, seeds, folds and trials, checked before anything runs."""

import fnmatch
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from mcseg.data import SegmentationData
from mcseg.run.cli import SegmentationCLI
from mcseg.run.recipes import RECIPES

Words = tuple[str, ...]
ObjectiveSettings = str | Mapping[str, Any]

# Settings in which the objectives of a comparison may differ without a remark.
_OBJECTIVES_OWN = ("model.objective", "model.optimizer", "model.scheduler")


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


def make_study(
    recipe: str,
    words: Sequence[str],
    objectives: Sequence[ObjectiveSettings] | Mapping[str, ObjectiveSettings],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    baseline: str | None = None,
    folds: Sequence[str | Sequence[str]] = (),
    tune: Mapping[str, Sequence[Any]] | None = None,
    first: ObjectiveSettings | None = None,
    then: Mapping[str, Any] | None = None,
) -> Study:
    """Make a study of settings as a person writes them, and check them.

    Args:
        recipe: name of the data recipe, for messages.
        words: what all runs share, as words of ``mcseg fit``, recipes as paths.
        objectives: each is ``NAME`` or ``NAME:key=value,key=value``, NAME being a recipe below ``objectives`` or a YAML
            file; or a mapping with ``recipe``, ``overrides`` (key -> value) and ``trials`` (list of key -> value). A key
            without a dot is one of the objective's arguments. In a mapping the keys are the labels.
        seeds: of the final runs.
        baseline: label; None is the first objective.
        folds: a glob pattern of names of training images, or several, for each fold.
        tune: values by key; every objective tries all combinations.
        first: objective of a first stage.
        then: settings of the second stage by key.

    Raises:
        ValueError: a setting cannot be used.
    """
    if isinstance(objectives, Mapping):
        found = [_objective(label, settings, tune) for label, settings in objectives.items()]
    else:
        found = [_objective(None, settings, tune) for settings in objectives]
    labels = [objective.label for objective in found]
    study = Study(
        recipe=recipe,
        words=tuple(words),
        objectives=tuple(found),
        seeds=tuple(seeds),
        baseline=baseline if baseline is not None else next(iter(labels), ""),
        folds=tuple((fold,) if isinstance(fold, str) else tuple(fold) for fold in folds),
        first=_objective(None, first, None) if first is not None else None,
        then=setting_words(then or {}),
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


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"found {text}, expected KEY=VALUE")
    return key, value


def setting_words(settings: Mapping[str, Any]) -> Words:
    """Turn settings by key into words; a key without a dot is an argument of the objective."""
    return tuple(
        f"--{key if '.' in key else f'model.objective.{key}'}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
    )


def parse_overrides(texts: Sequence[str]) -> dict[str, str]:
    """Read ``KEY=VALUE``."""
    return dict(map(_pair, texts))


def parse_grid(texts: Sequence[str]) -> dict[str, list[str]]:
    """Read ``KEY=V1,V2``; a comma within brackets belongs to the value."""
    return {key: re.split(r",(?![^\[{(]*[\]})])", value) for key, value in map(_pair, texts)}


class _ParseOnly(SegmentationCLI):
    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass


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
    cli = _ParseOnly(study.recipe, study.words, run=False)
    plain = True
    if study.folds:
        _check_folds(study, cli.config)

    def parsed(label: str, words: Words) -> Namespace:
        try:
            config: Namespace = cli.parser.parse_args([*study.words, *words])
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
