"""Compare objectives: one data recipe x objectives x seeds, a table with intervals, and one report."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcseg.compare import report, tables
from mcseg.compare.schedule import Folder, default_jobs, execute, save_text, workers_per_job
from mcseg.compare.study import ObjectiveSettings, Study, make_study, setting_words
from mcseg.run.recipes import RECIPES, find_recipes

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["compare", "run_study"]

# Defaults of all runs that change no result.
_QUIET = {"--trainer.enable_progress_bar": "false", "--trainer.num_sanity_val_steps": "0"}


def compare(
    config: str | Sequence[str],
    objectives: Sequence[ObjectiveSettings] | Mapping[str, ObjectiveSettings],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    baseline: str | None = None,
    folds: Sequence[str | Sequence[str]] = (),
    tune: Mapping[str, Sequence[Any]] | None = None,
    first: ObjectiveSettings | None = None,
    then: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    jobs: int | None = None,
    keep_checkpoints: bool = False,
) -> "DataFrame":
    """Train every objective with every seed and compare them; what the folder already holds is not run again.

    Every run has the same network, data order, augmentation and budget, in a process of its own, and is scored with its
    last weights on the validation split, once. With ``folds``, the settings of each objective (``tune``, or ``trials`` of
    its own, the same number for each) are chosen by mIoU on images held out of the training split, and so are shifts of the
    logits per class, with which the final runs are scored a second time.

    Args:
        config: data recipe by name or path, or several to be layered.
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

    Returns:
        One row per objective, without and with shifts: mean and standard deviation over seeds of mIoU, mean IoU of the
        rarest third, pixel accuracy and each class's IoU as fractions; differences to the baseline with their intervals;
        step time and memory. A run that failed is warned of and missing.

    Raises:
        ValueError: a setting cannot be used; nothing has run then.
    """
    configs = [config] if isinstance(config, str) else list(config)
    recipe, words = find_recipes(["compare", *(f"--config={name}" for name in configs), *setting_words(settings or {})])
    return run_study(
        recipe,
        words[1:],
        folder=folder,
        jobs=jobs,
        keep_checkpoints=keep_checkpoints,
        objectives=objectives,
        seeds=seeds,
        baseline=baseline,
        folds=folds,
        tune=tune,
        first=first,
        then=then,
    ).table()


def run_study(
    recipe: str,
    words: Sequence[str],
    *,
    folder: str | Path | None = None,
    jobs: int | None = None,
    keep_checkpoints: bool = False,
    only_report: bool = False,
    **settings: Any,
) -> tables.Results:
    """Run what is missing of a study, write tables and report, and print the table.

    Args:
        recipe: name of the data recipe.
        words: what all runs share, as words of ``mcseg fit``.
        folder: see :func:`compare`.
        jobs: see :func:`compare`.
        keep_checkpoints: see :func:`compare`.
        only_report: run nothing.
        **settings: see :func:`~mcseg.compare.study.make_study`.
    """
    jobs = default_jobs() if jobs is None else jobs
    if jobs < 1:
        raise ValueError(f"jobs: found {jobs}, expected at least 1")
    place = Folder(Path(folder or Path("runs") / "compare" / recipe))
    defaults = [f"{flag}={value}" for flag, value in _QUIET.items() if not _has(words, flag)]
    study = make_study(recipe, [*words, *defaults, *_loader_processes(words, place, jobs)], **settings)
    for note in study.remarks:
        print(f"note: {note}")
    if not only_report:
        save_text(place.root / "study.json", json.dumps(_about(study), indent=1))
        execute(study, place, jobs, keep_checkpoints=keep_checkpoints)
    results = tables.Results(study, place)
    tables.write(results)
    report.write(results)
    print(results.comparison)
    for run, reason in results.failures:
        print(f"failed: {run}: {reason} ({place.path(run)})")
    print(f"written to {place.root}: table.csv, runs.csv, counts.csv.xz, results.json, report.html")
    return results


def _loader_processes(words: Sequence[str], folder: Folder, jobs: int) -> list[str]:
    """Loader processes: the random crops depend on their number, so a folder keeps the one that it began with."""
    if _has(words, "--data.num_workers"):
        return []
    known = folder.root / "study.json"
    workers = json.loads(known.read_text()).get("num_workers") if known.is_file() else None
    return [f"--data.num_workers={workers_per_job(jobs) if workers is None else workers}"]


def _has(words: Sequence[str], flag: str) -> bool:
    return any(word.partition("=")[0] == flag for word in words)


def _about(study: Study) -> dict[str, Any]:
    workers = [word.partition("=")[2] for word in study.words if word.startswith("--data.num_workers=")]
    return {
        "recipe": study.recipe,
        "words": _shown(study.words),
        "objectives": {o.label: {"words": _shown(o.words), "trials": o.trials} for o in study.objectives},
        "seeds": study.seeds,
        "baseline": study.baseline,
        "folds": study.folds,
        "first": study.first and {"label": study.first.label, "words": _shown(study.first.words)},
        "then": study.then,
        "num_workers": int(workers[-1]) if workers else None,
    }


def _shown(words: Sequence[str]) -> list[str]:
    """Words with packaged recipes by name again, and of the data's root the last folder: results are there to be shared."""
    shown: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--data.root" and equals:
            word = f"{flag}={Path(value).name}"
        elif shown and shown[-1] == "--data.root":
            word = Path(word).name
        elif str(RECIPES) in word:
            word = word.replace(f"{RECIPES}{os.sep}", "").removesuffix(".yaml")
        shown.append(word)
    return shown
