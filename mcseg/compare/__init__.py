"""Compare objectives on one data recipe: train each with several seeds, then write tables with intervals and a report."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcseg.compare import report, tables
from mcseg.compare.schedule import Folder, default_jobs, execute, save_text, workers_per_job
from mcseg.compare.study import ObjectiveSettings, Study, StudySettings, make_study, setting_arguments
from mcseg.run.recipes import RECIPES, find_recipes

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["StudySettings", "compare", "run_study"]

# Defaults of all runs; they do not change the results.
_RUN_DEFAULTS = {"--trainer.enable_progress_bar": "false", "--trainer.num_sanity_val_steps": "0"}


def compare(
    config: str | Sequence[str],
    objectives: Sequence[ObjectiveSettings] | Mapping[str, ObjectiveSettings],
    **options: Any,
) -> "DataFrame":
    """Train every objective with every seed and compare them. Runs that are finished in the folder are not repeated.

    All runs share the network, data order, augmentation and training length. Each run is a separate process, and its last
    weights are evaluated once on the validation split. With ``folds``, each objective's settings are chosen by mIoU on
    images held out of the training split. They come from ``tune``, or from the objective's own ``trials``, of equal number
    for all. Shifts of the logits, one per class, are fitted on the same images; the final runs are then evaluated with and
    without them.

    Args:
        config: data recipe by name or path, or several, merged in order.
        objectives: objectives to compare; see :class:`~mcseg.compare.study.StudySettings`.
        **options: other fields of :class:`~mcseg.compare.study.StudySettings`, such as ``seeds``, ``folds``,
            ``settings`` and ``folder``.

    Returns:
        One row per objective, without and with shifts: mean and standard deviation over seeds of mIoU, mean IoU of the
        rarest third, pixel accuracy and each class's IoU, all as fractions; differences to the baseline with their
        intervals; step time and memory. Failed runs are printed and left out.

    Raises:
        ValueError: a setting is invalid; no run has started.
    """
    settings = StudySettings(objectives, **options)
    configs = [config] if isinstance(config, str) else list(config)
    shared = setting_arguments(settings.settings or {})
    recipe, arguments = find_recipes(["compare", *(f"--config={name}" for name in configs), *shared])
    return run_study(recipe, arguments[1:], settings).table()


def run_study(
    recipe: str, arguments: Sequence[str], settings: StudySettings, *, only_report: bool = False
) -> tables.Results:
    """Run the missing runs of a study, write its tables and report, and print the comparison.

    Args:
        recipe: name of the data recipe.
        arguments: settings of all runs, as arguments of ``mcseg fit``.
        settings: all other settings.
        only_report: start no run.

    Raises:
        ValueError: a setting is invalid; no run has started.
    """
    jobs = default_jobs() if settings.jobs is None else settings.jobs
    if jobs < 1:
        raise ValueError(f"jobs: found {jobs}, expected at least 1")
    folder = Folder(Path(settings.folder or Path("runs") / "compare" / recipe))
    defaults = [f"{flag}={value}" for flag, value in _RUN_DEFAULTS.items() if not _has(arguments, flag)]
    study = make_study(recipe, [*arguments, *defaults, *_loader_workers(arguments, folder, jobs)], settings)
    for note in study.remarks:
        print(f"note: {note}")
    if not only_report:
        save_text(folder.root / "study.json", json.dumps(_describe(study), indent=1))
        execute(study, folder, jobs, keep_checkpoints=settings.keep_checkpoints)
    results = tables.Results(study, folder)
    tables.write(results)
    report.write(results)
    print(results.comparison)
    for run, reason in results.failures:
        print(f"failed: {run}: {reason} ({folder.path(run)})")
    print(f"written to {folder.root}: table.csv, runs.csv, counts.csv.xz, results.json, report.html")
    return results


def _loader_workers(arguments: Sequence[str], folder: Folder, jobs: int) -> list[str]:
    """Set the number of loader workers. Random crops depend on it, so every call on a folder uses the first call's."""
    if _has(arguments, "--data.num_workers"):
        return []
    earlier = folder.root / "study.json"
    workers = json.loads(earlier.read_text()).get("num_workers") if earlier.is_file() else None
    return [f"--data.num_workers={workers_per_job(jobs) if workers is None else workers}"]


def _has(arguments: Sequence[str], flag: str) -> bool:
    return any(argument.partition("=")[0] == flag for argument in arguments)


def _describe(study: Study) -> dict[str, Any]:
    flag = "--data.num_workers="
    workers = [argument.removeprefix(flag) for argument in study.arguments if argument.startswith(flag)]
    return {
        "recipe": study.recipe,
        "words": _without_local_paths(study.arguments),
        "objectives": {o.label: {"words": _without_local_paths(o.arguments), "trials": o.trials} for o in study.objectives},
        "seeds": study.seeds,
        "baseline": study.baseline,
        "folds": study.folds,
        "first": study.first and {"label": study.first.label, "words": _without_local_paths(study.first.arguments)},
        "then": study.then,
        "num_workers": int(workers[-1]) if workers else None,
    }


def _without_local_paths(arguments: Sequence[str]) -> list[str]:
    """Replace paths of packaged recipes by names and the data's root by its last folder, so that results can be shared."""
    shown: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag == "--data.root" and equals:
            argument = f"{flag}={Path(value).name}"
        elif shown and shown[-1] == "--data.root":
            argument = Path(argument).name
        elif str(RECIPES) in argument:
            argument = argument.replace(f"{RECIPES}{os.sep}", "").removesuffix(".yaml")
        shown.append(argument)
    return shown
