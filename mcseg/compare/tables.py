"""Collect the results of a study and write its tables of objectives, runs and pixel counts as CSV and JSON."""

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mcseg.compare import counts
from mcseg.compare.comparison import Comparison, Entry
from mcseg.compare.plan import Run
from mcseg.compare.schedule import Folder, save_text
from mcseg.compare.statistics import LEVEL, MEASURES, Counts
from mcseg.compare.study import Study

if TYPE_CHECKING:
    from pandas import DataFrame


class Results:
    """Results of the finished runs of a study.

    Args:
        study: the study.
        folder: folder of its runs.

    Attributes:
        runs: each run with its ``result.json`` (None if it is not finished) and its error ("" if it did not fail).
        finals: finished final runs with their ``result.json``, by label and seed.
        comparison: scores of the objectives and their differences to the baseline.

    Raises:
        ValueError: final runs were evaluated on different images.
    """

    def __init__(self, study: Study, folder: Folder) -> None:
        self.study = study
        self.folder = folder
        self.runs: list[tuple[Run, dict[str, Any] | None, str]] = []
        for run, blocked in _without_repeats(folder.runs(study)):
            outcome = folder.outcome(run)
            path = folder.path(run) / "error.txt"
            error = blocked or (path.read_text().strip() if path.is_file() else "")
            self.runs.append((run, outcome, "") if isinstance(outcome, dict) else (run, None, error))
        self.finals = {
            (run.objective, run.seed): (run, result) for run, result, _ in self.runs if result and run.role == "final"
        }
        if self.finals:
            self._check_images()
        classes = self.any_final["classes"] if self.finals else {"names": [], "training_pixels": []}
        self.comparison = Comparison(self._entries(), classes["names"], classes["training_pixels"], study.baseline)

    @property
    def any_final(self) -> dict[str, Any]:
        """``result.json`` of any finished final run, for values that all have in common."""
        return next(iter(self.finals.values()))[1]

    @property
    def failures(self) -> list[tuple[Run, str]]:
        """Failed runs and their errors."""
        return [(run, error) for run, result, error in self.runs if result is None and error]

    @property
    def missing(self) -> list[str]:
        """Objectives and seeds whose final run is not finished."""
        wanted = ((objective.label, seed) for objective in self.study.objectives for seed in self.study.seeds)
        return [f"{label}, seed {seed}" for label, seed in wanted if (label, seed) not in self.finals]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per objective, without and with shifts, with its chosen settings."""
        rows = []
        for entry, row in zip(self.comparison.entries, self.comparison.rows, strict=True):
            run, _ = self.finals[entry.label, next(iter(entry.counts))]
            rows.append(row | {"trial": run.trial, "settings": self.settings(entry.label, run.trial or 0)})
        return rows

    def table(self) -> "DataFrame":
        """Return the rows as a data frame."""
        import pandas as pd

        return pd.DataFrame(self.rows())

    def settings(self, label: str, trial: int) -> str:
        """Return the settings of a trial as text."""
        objective = next(objective for objective in self.study.objectives if objective.label == label)
        return " ".join(argument.removeprefix("--") for argument in objective.trials[trial])

    def fold_scores(self, label: str) -> dict[int, list[float | None]]:
        """Return mIoU on each fold by trial; None if the run is not finished."""
        scores: dict[int, list[float | None]] = {}
        for run, result, _ in self.runs:
            if run.role == "fold" and run.objective == label and run.trial is not None:
                scores.setdefault(run.trial, []).append(result["scores"]["miou"] if result else None)
        return scores

    def condition_mismatches(self) -> list[str]:
        """Report seeds for which initial weights or batches differ between objectives."""
        lines = []
        for seed in self.study.seeds:
            for part, name in (("weights", "initial weights"), ("batches", "batches")):
                labels_by_hash: dict[str, list[str]] = {}
                for (label, run_seed), (_, result) in self.finals.items():
                    if run_seed == seed:
                        labels_by_hash.setdefault(result["fingerprint"][part], []).append(label)
                if len(labels_by_hash) > 1:
                    groups = " | ".join(map(", ".join, labels_by_hash.values()))
                    lines.append(f"seed {seed}: {name} differ between {groups}")
        return lines

    def _entries(self) -> list[Entry]:
        """Return all objectives without shifts, then with shifts, that have finished final runs."""
        entries = []
        for shifted in (False, True):
            for objective in self.study.objectives:
                label = objective.label
                finals = {seed: self.finals[label, seed] for seed in self.study.seeds if (label, seed) in self.finals}
                if not finals or (shifted and any(result["shifts"] is None for _, result in finals.values())):
                    continue
                by_seed = {seed: self._counts(run, shifted) for seed, (run, _) in finals.items()}
                costs = {seed: counts.costs_of(result) for seed, (_, result) in finals.items()}
                entries.append(Entry(label=label, shifted=shifted, counts=by_seed, costs=costs))
        return entries

    def _counts(self, run: Run, shifted: bool) -> Counts:
        with np.load(self.folder.path(run) / "counts.npz") as file:
            pixel_counts: Counts = file["counts_shifted" if shifted else "counts"]
        return pixel_counts

    def _check_images(self) -> None:
        expected: list[str] | None = None
        for run, _ in self.finals.values():
            with np.load(self.folder.path(run) / "counts.npz") as file:
                names = file["names"].tolist()
            if expected is not None and names != expected:
                raise ValueError(
                    f"{self.folder.path(run)}: evaluated on other images than the runs beside it: the data set has changed; "
                    "delete the older runs, or use another folder"
                )
            expected = names


def write(results: Results) -> None:
    """Write ``table.csv``, ``runs.csv``, ``results.json`` and, if any run is finished, ``counts.csv.xz`` to the folder."""
    import pandas as pd

    root = results.folder.root
    save_text(
        root / "runs.csv", pd.DataFrame(run_rows(results)).astype({"fold": "Int64", "trial": "Int64"}).to_csv(index=False)
    )
    save_text(root / "table.csv", results.table().to_csv(index=False))
    finished = [(results.folder.path(run), run.about) for run, result, _ in results.runs if result]
    if finished:
        counts.write_counts(finished, root / counts.FILE)
    content = {
        "format": 1,
        "recipe": results.study.recipe,
        "baseline": results.study.baseline,
        "seeds": results.study.seeds,
        "interval_level": LEVEL,
        "classes": results.any_final["classes"] if results.finals else None,
        "table": results.rows(),
        "shifts": {label: result["shifts"] for (label, _), (_, result) in results.finals.items()},
        "tuning": {objective.label: results.fold_scores(objective.label) for objective in results.study.objectives},
        "remarks": [*results.study.remarks, *results.condition_mismatches()],
        "failures": {str(run): error for run, error in results.failures},
    }
    save_text(root / "results.json", json.dumps(_replace_nan(content), indent=1))


def run_rows(results: Results) -> list[dict[str, Any]]:
    """Return one row per run."""
    rows = []
    for run, result, error in results.runs:
        row = run.about | {"state": "finished" if result else "failed" if error else "missing", "error": error}
        if run.trial is not None:
            row["settings"] = results.settings(run.objective, run.trial)
        if result:
            for key, ending in (("scores", ""), ("scores_shifted", "_shifted")):
                scores = result[key] or {}
                row |= {f"{name}{ending}": scores.get(name) for name in MEASURES}
            row |= {f"{name}_s": value for name, value in result["seconds"].items()}
            row |= {f"memory_{name}_mib": value / 2**20 for name, value in result["memory_bytes"].items()}
            row |= {f"iou/{name}": v for name, v in zip(result["classes"]["names"], result["scores"]["iou"], strict=True)}
        rows.append(row | {"folder": str(results.folder.path(run).relative_to(results.folder.root))})
    return rows


def _without_repeats(runs: Iterable[tuple[Run, str]]) -> list[tuple[Run, str]]:
    """Drop repeated rows. Objectives with the same settings share a run but keep separate rows."""
    rows: dict[tuple[Any, ...], tuple[Run, str]] = {}
    for run, blocked in runs:
        rows.setdefault((run.objective, run.role, run.seed, run.fold, run.trial), (run, blocked))
    return list(rows.values())


def _replace_nan(value: Any) -> Any:
    """Replace NaN by None, since JSON has no NaN."""
    if isinstance(value, Mapping):
        return {str(key): _replace_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nan(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and np.isnan(value) else value
