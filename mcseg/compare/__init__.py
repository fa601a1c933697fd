"""Compare objectives: one data recipe x objectives x seeds, a table with intervals, and one report."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcseg.compare import report, tables
from mcseg.compare.schedule import Folder, default_jobs, execute, save_text, workers_per_job
from mcseg.compare.study import ObjectiveSettings, Study, StudySettings, make_study, setting_words
from mcseg.run.recipes import RECIPES, find_recipes

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["StudySettings", "compare", "run_study"]

# Defaults of all runs that change no result.
_QUIET = {"--trainer.enable_progress_bar": "false", "--trainer.num_sanity_val_steps": "0"}


def compare(
    config: str | Sequence[str],
    objectives: Sequence[ObjectiveSettings] | Mapping[str, ObjectiveSettings],
    **options: Any,
) -> "DataFrame":
    """Train every objective with every seed and compare them; what the folder already holds is not run again.

    Every run has the same network, data order, augmentation and budget, in a process of its own, and is scored with its
    last weights on the validation split, once. With ``folds``, the settings of each objective (``tune``, or ``trials`` of
    its own, the same number for each) are chosen by mIoU on images held out of the training split, and so are shifts of the
    logits per class, with which the final runs are scored a second time.

    Args:
        config: data recipe by name or path, or several to be layered.
        objectives: what is compared; see `StudySettings`.
        **options: the other fields of `StudySettings`, such as ``seeds``, ``folds``,
            ``settings`` and ``folder``.

    Returns:
        One row per objective, without and with shifts: mean and standard deviation over seeds of mIoU, mean IoU of the
        rarest third, pixel accuracy and each class's IoU as fractions; differences to the baseline with their intervals;
        step time and memory. A run that failed is warned of and missing.

    Raises:
        ValueError: a setting cannot be used; nothing has run then.
    """
    settings = StudySettings(objectives, **options)
    configs = [config] if isinstance(config, str) else list(config)
    shared = setting_words(settings.settings or {})
    recipe, words = find_recipes(["compare", *(f"--config={name}" for name in configs), *shared])
    return run_study(recipe, words[1:], settings).table()


def run_study(recipe: str, words: Sequence[str], settings: StudySettings, *, only_report: bool = False) -> tables.Results:
    """Run what is missing of a study, write tables and report, and print the table.

    Args:
        recipe: name of the data recipe.
        words: what all runs share, as words of ``mcseg fit``.
        settings: the others.
        only_report: run nothing.
    """
    jobs = default_jobs() if settings.jobs is None else settings.jobs
    if jobs < 1:
        raise ValueError(f"jobs: found {jobs}, expected at least 1")
    place = Folder(Path(settings.folder or Path("runs") / "compare" / recipe))
    defaults = [f"{flag}={value}" for flag, value in _QUIET.items() if not _has(words, flag)]
    study = make_study(recipe, [*words, *defaults, *_loader_processes(words, place, jobs)], settings)
    for note in study.remarks:
        print(f"note: {note}")
    if not only_report:
        save_text(place.root / "study.json", json.dumps(_about(study), indent=1))
        execute(study, place, jobs, keep_checkpoints=settings.keep_checkpoints)
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
