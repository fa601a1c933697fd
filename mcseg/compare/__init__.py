"""Compare objectives: one data recipe x objectives x seeds, tables with intervals, one report."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mcseg.compare.schedule import Folder, default_jobs, execute, save_text, workers_per_job
from mcseg.compare.study import Study, make_study, parse_grid, parse_overrides, remarks


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"compare: {message}")


def command(recipe: str, words: Sequence[str]) -> None:
    """``mcseg compare``: read its own options, give all others to the runs.

    Raises:
        SystemExit: 1 where a run failed.
    """
    parser = _Parser(prog="mcseg compare", allow_abbrev=False, description=_DESCRIPTION)
    parser.add_argument(
        "--objectives", nargs="+", metavar="NAME[:KEY=VALUE,...]", help="recipes below objectives, or YAML files"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="of the final runs (0 1 2)")
    parser.add_argument("--baseline", help="objective that the others are compared to (the first)")
    parser.add_argument("--folds", nargs="+", metavar="PATTERN", help="names of training images that a fold holds out")
    parser.add_argument(
        "--tune", nargs="+", metavar="KEY=V1,V2", help="settings to choose on the folds, for every objective"
    )
    parser.add_argument("--first", metavar="NAME", help="objective of a first stage; all others start from its weights")
    parser.add_argument("--then", nargs="+", metavar="KEY=VALUE", help="settings of the second stage")
    parser.add_argument("--study", help="YAML file with these settings, and with trials for each objective")
    parser.add_argument("--folder", help="where results go and are looked for (runs/compare/RECIPE)")
    parser.add_argument("--jobs", type=int, help="runs at the same time (one for each GPU, or 1)")
    parser.add_argument("--keep_checkpoints", action="store_true", help="keep the last weights of the final runs")
    found, others = parser.parse_known_args(list(words))
    settings: dict[str, Any] = {}
    if found.study:
        settings = _read_study(Path(found.study))
    own = {key: value for key, value in vars(found).items() if value not in (None, False) and key != "study"}
    own |= {key: read(own[key]) for key, read in (("tune", parse_grid), ("then", parse_overrides)) if key in own}
    settings |= own
    shared = [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.pop("settings", {}).items()
    ]
    if "objectives" not in settings:
        raise ValueError("compare: --objectives: none given; name some, such as --objectives cross_entropy lovasz")
    try:
        failures = _compare(recipe, [*others, *shared], settings)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is missing")
        raise SystemExit(130) from None
    if failures:
        raise SystemExit(1)


_DESCRIPTION = (
    "Trains every objective with every seed on one data recipe; goes on where it stopped. Other options are those of fit."
)
_STUDY_KEYS = (
    "objectives",
    "seeds",
    "baseline",
    "folds",
    "tune",
    "first",
    "then",
    "settings",
    "folder",
    "jobs",
    "keep_checkpoints",
)


def _read_study(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise ValueError(f"--study: no file {path}")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or (unknown := sorted(set(found) - set(_STUDY_KEYS))):
        told = ", ".join(unknown) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path}: found {told}, expected settings among {', '.join(_STUDY_KEYS)}")
    return found


def _compare(recipe: str, words: Sequence[str], settings: Mapping[str, Any]) -> dict[str, str]:
    settings = dict(settings)
    folder = Folder(Path(settings.pop("folder", None) or Path("runs") / "compare" / recipe))
    jobs = int(settings.pop("jobs", None) or default_jobs())
    keep = bool(settings.pop("keep_checkpoints", False))
    if jobs < 1:
        raise ValueError(f"jobs: found {jobs}, expected at least 1")
    study = make_study(recipe, [*words, *_quiet(words), *_workers(words, folder, jobs)], **settings)
    for remark in remarks(study):
        print(f"note: {remark}")
    save_text(folder.root / "study.json", json.dumps(_about(study), indent=1))
    failures = execute(study, folder, jobs, keep_checkpoints=keep)
    for run, reason in failures.items():
        print(f"failed: {run}: {reason} ({folder.path(run)})")
    return {str(run): reason for run, reason in failures.items()}


def _quiet(words: Sequence[str]) -> list[str]:
    """Defaults of all runs that change no result."""
    defaults = {"--trainer.enable_progress_bar": "false", "--trainer.num_sanity_val_steps": "0"}
    return [f"{flag}={value}" for flag, value in defaults.items() if not _has(words, flag)]


def _workers(words: Sequence[str], folder: Folder, jobs: int) -> list[str]:
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
        "words": study.words,
        "objectives": {o.label: {"words": o.words, "trials": o.trials} for o in study.objectives},
        "seeds": study.seeds,
        "baseline": study.baseline,
        "folds": study.folds,
        "first": study.first and {"label": study.first.label, "words": study.first.words},
        "then": study.then,
        "num_workers": int(workers[-1]) if workers else None,
    }
