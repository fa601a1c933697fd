"""What a study found: one table of objectives, one of runs, and one of pixel counts, as CSV and JSON."""

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
    """Finished runs of a study, and what is computed from them.

    Args:
        study: what is compared.
        folder: where its runs are.
    """

    def __init__(self, study: Study, folder: Folder) -> None:
        self.study = study
        self.folder = folder
        self.runs: list[tuple[Run, dict[str, Any] | None, str]] = []
        for run, blocked in _each_once(folder.runs(study)):
            outcome = folder.outcome(run)
            path = folder.path(run) / "error.txt"
            error = blocked or (path.read_text().strip() if path.is_file() else "")
            self.runs.append((run, outcome, "") if isinstance(outcome, dict) else (run, None, error))
        self.finals = {
            (run.objective, run.seed): (run, found) for run, found, _ in self.runs if found and run.role == "final"
        }
        if self.finals:
            self._check_images()
        classes = self.any["classes"] if self.finals else {"names": [], "training_pixels": []}
        self.comparison = Comparison(self._entries(), classes["names"], classes["training_pixels"], study.baseline)

    @property
    def any(self) -> dict[str, Any]:
        """A finished final run, for what all have in common."""
        return next(iter(self.finals.values()))[1]

    @property
    def failures(self) -> list[tuple[Run, str]]:
        """Runs that failed, and why."""
        return [(run, error) for run, found, error in self.runs if found is None and error]

    @property
    def missing(self) -> list[str]:
        """Objectives and seeds of which the final run is not finished."""
        wanted = ((objective.label, seed) for objective in self.study.objectives for seed in self.study.seeds)
        return [f"{label}, seed {seed}" for label, seed in wanted if (label, seed) not in self.finals]

    def rows(self) -> list[dict[str, Any]]:
        """One row per objective, without and with shifts, with the settings that were chosen."""
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
        """Settings of a trial in words."""
        objective = next(objective for objective in self.study.objectives if objective.label == label)
        return " ".join(word.removeprefix("--") for word in objective.trials[trial])

    def fold_scores(self, label: str) -> dict[int, list[float | None]]:
        """MIoU on each fold by trial; None where the run is not finished."""
        scores: dict[int, list[float | None]] = {}
        for run, found, _ in self.runs:
            if run.role == "fold" and run.objective == label and run.trial is not None:
                scores.setdefault(run.trial, []).append(found["scores"]["miou"] if found else None)
        return scores

    def uneven(self) -> list[str]:
        """Seeds for which the objectives did not see the same: initial weights or batches differ."""
        lines = []
        for seed in self.study.seeds:
            for part, told in (("weights", "initial weights"), ("batches", "batches")):
                kinds: dict[str, list[str]] = {}
                for (label, other), (_, result) in self.finals.items():
                    if other == seed:
                        kinds.setdefault(result["fingerprint"][part], []).append(label)
                if len(kinds) > 1:
                    lines.append(f"seed {seed}: {told} differ between " + " | ".join(map(", ".join, kinds.values())))
        return lines

    def _entries(self) -> list[Entry]:
        """Objectives without shifts, then with shifts, with their finished runs."""
        entries = []
        for shifted in (False, True):
            for objective in self.study.objectives:
                found = {s: self.finals[objective.label, s] for s in self.study.seeds if (objective.label, s) in self.finals}
                if not found or (shifted and any(result["shifts"] is None for _, result in found.values())):
                    continue
                by_seed = {seed: self._counts(run, shifted) for seed, (run, _) in found.items()}
                costs = {seed: counts.costs_of(result) for seed, (_, result) in found.items()}
                entries.append(Entry(objective.label, shifted, by_seed, costs))
        return entries

    def _counts(self, run: Run, shifted: bool) -> Counts:
        with np.load(self.folder.path(run) / "counts.npz") as file:
            found: Counts = file["counts_shifted" if shifted else "counts"]
        return found

    def _check_images(self) -> None:
        names: list[str] | None = None
        for run, _ in self.finals.values():
            with np.load(self.folder.path(run) / "counts.npz") as file:
                found = file["names"].tolist()
            if names is not None and found != names:
                raise ValueError(
                    f"{self.folder.path(run)}: evaluated other images than the runs beside it; the data have changed. "
                    "Remove the runs made before, or use another folder"
                )
            names = found


def write(results: Results) -> None:
    """Write ``table.csv``, ``runs.csv``, ``results.json`` and, once runs are finished, ``counts.csv.xz`` into the folder."""
    import pandas as pd

    root = results.folder.root
    save_text(
        root / "runs.csv", pd.DataFrame(run_rows(results)).astype({"fold": "Int64", "trial": "Int64"}).to_csv(index=False)
    )
    save_text(root / "table.csv", results.table().to_csv(index=False))
    finished = [(results.folder.path(run), run.about) for run, found, _ in results.runs if found]
    if finished:
        counts.write_counts(finished, root / counts.FILE)
    found = {
        "format": 1,
        "recipe": results.study.recipe,
        "baseline": results.study.baseline,
        "seeds": results.study.seeds,
        "interval_level": LEVEL,
        "classes": results.any["classes"] if results.finals else None,
        "table": results.rows(),
        "shifts": {label: result["shifts"] for (label, _), (_, result) in results.finals.items()},
        "tuning": {objective.label: results.fold_scores(objective.label) for objective in results.study.objectives},
        "remarks": [*results.study.remarks, *results.uneven()],
        "failures": {str(run): error for run, error in results.failures},
    }
    save_text(root / "results.json", json.dumps(_plain(found), indent=1))


def run_rows(results: Results) -> list[dict[str, Any]]:
    """One row per run."""
    rows = []
    for run, found, error in results.runs:
        row = run.about | {"state": "finished" if found else "failed" if error else "missing", "error": error}
        if run.trial is not None:
            row["settings"] = results.settings(run.objective, run.trial)
        if found:
            for key, ending in (("scores", ""), ("scores_shifted", "_shifted")):
                scores = found[key] or {}
                row |= {f"{name}{ending}": scores.get(name) for name in MEASURES}
            row |= {f"{name}_s": value for name, value in found["seconds"].items()}
            row |= {f"memory_{name}_mib": value / 2**20 for name, value in found["memory_bytes"].items()}
            row |= {f"iou/{name}": v for name, v in zip(found["classes"]["names"], found["scores"]["iou"], strict=True)}
        rows.append(row | {"folder": str(results.folder.path(run).relative_to(results.folder.root))})
    return rows


def _each_once(runs: Iterable[tuple[Run, str]]) -> list[tuple[Run, str]]:
    """Objectives may share a run: each objective keeps its own row, and a row is not repeated."""
    found: dict[tuple[Any, ...], tuple[Run, str]] = {}
    for run, blocked in runs:
        found.setdefault((run.objective, run.role, run.seed, run.fold, run.trial), (run, blocked))
    return list(found.values())


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and np.isnan(value) else value
