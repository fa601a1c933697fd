"""What a comparison found: one table of objectives, one of runs, as CSV, JSON and text."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mcseg.compare.plan import Run
from mcseg.compare.schedule import Folder, save_text
from mcseg.compare.statistics import LEVEL, MEASURES, Counts, Floats, Interval, class_iou, measures, paired_intervals
from mcseg.compare.study import Study

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Entry:
    """An objective as it is compared: with its settings chosen, and with or without shifts of the logits.

    Attributes:
        label: of the objective.
        shifted: whether predictions are those with shifts.
        results: result.json of the finished final runs, by seed.
        counts: (N,3,C) of the validation images, by seed.
    """

    label: str
    shifted: bool
    results: dict[int, dict[str, Any]]
    counts: dict[int, Counts]

    @property
    def name(self) -> str:
        """Label, with the shifts."""
        return f"{self.label} + shifts" if self.shifted else self.label


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

    @property
    def any(self) -> dict[str, Any]:
        """A finished final run, for what all have in common."""
        return next(iter(self.finals.values()))[1]

    @property
    def class_names(self) -> list[str]:
        """Names of the classes."""
        names: list[str] = self.any["classes"]["names"]
        return names

    @property
    def tail(self) -> list[int]:
        """Train ids of the rarest third of the classes by training pixels."""
        tail: list[int] = self.any["classes"]["tail"]
        return tail

    @property
    def shares(self) -> Floats:
        """(C,) shares of the labelled training pixels."""
        pixels = np.array(self.any["classes"]["training_pixels"], dtype=np.float64)
        shares: Floats = pixels / max(1.0, pixels.sum())
        return shares

    @property
    def failures(self) -> list[tuple[Run, str]]:
        """Runs that failed, and why."""
        return [(run, error) for run, found, error in self.runs if found is None and error]

    @property
    def missing(self) -> list[str]:
        """Objectives and seeds of which the final run is not finished."""
        wanted = ((objective.label, seed) for objective in self.study.objectives for seed in self.study.seeds)
        return [f"{label}, seed {seed}" for label, seed in wanted if (label, seed) not in self.finals]

    @cached_property
    def entries(self) -> list[Entry]:
        """Objectives without shifts, then with them, as far as runs are finished."""
        entries = []
        for shifted in (False, True):
            for objective in self.study.objectives:
                found = {s: self.finals[objective.label, s] for s in self.study.seeds if (objective.label, s) in self.finals}
                if shifted and any(result["shifts"] is None for _, result in found.values()):
                    continue
                if found:
                    results = {seed: result for seed, (_, result) in found.items()}
                    counts = {seed: self._counts(run, shifted) for seed, (run, _) in found.items()}
                    entries.append(Entry(objective.label, shifted, results, counts))
        return entries

    def baseline(self, shifted: bool = False) -> Entry | None:
        """The baseline's entry, None where none of its runs is finished."""
        wanted = (self.study.baseline, shifted)
        return next((entry for entry in self.entries if (entry.label, entry.shifted) == wanted), None)

    def intervals(self, entry: Entry, baseline: Entry | None) -> dict[str, Interval] | None:
        """Differences of an entry to another over the seeds that both have, by measure; None where there are none."""
        if baseline is None or (entry.label, entry.shifted) == (baseline.label, baseline.shifted):
            return None
        seeds = [seed for seed in entry.counts if seed in baseline.counts]
        if not seeds:
            return None
        ours, theirs = (np.stack([found.counts[seed] for seed in seeds]) for found in (entry, baseline))
        return dict(zip(MEASURES, paired_intervals(ours, theirs, self.tail), strict=True))

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One row per entry: shares as fractions, times in milliseconds, memory in MiB."""
        return [self._row(entry) for entry in self.entries]

    def table(self) -> "DataFrame":
        """The rows as a data frame."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    def _row(self, entry: Entry) -> dict[str, Any]:
        totals = np.stack([counts.sum(0) for counts in entry.counts.values()])
        row: dict[str, Any] = {"objective": entry.label, "shifted": entry.shifted, "seeds": len(totals)}
        for name, values in zip(MEASURES, measures(totals, self.tail).T, strict=True):
            row |= _spread(name, values)
        for ending, shifted in (("difference", False), ("difference_to_shifted", True)):
            found = self.intervals(entry, self.baseline(shifted)) if entry.shifted or not shifted else None
            for name in MEASURES:
                interval = found[name] if found else Interval(np.nan, np.nan, np.nan)
                row |= {f"{name}_{ending}": interval.difference}
                row |= {f"{name}_{ending}_low": interval.low, f"{name}_{ending}_high": interval.high}
        for name, values in zip(self.class_names, class_iou(totals).T, strict=True):
            row |= _spread(f"iou/{name}", values)
        results = list(entry.results.values())
        for key in ("step", "step_with_data"):
            times = [1000 * result["seconds"][key] for result in results if result["seconds"][key] is not None]
            row[f"{key}_ms"] = float(np.median(times)) if times else np.nan
        memory = [result["memory_bytes"].get("gpu", result["memory_bytes"]["process"]) for result in results]
        row["memory_mib"] = float(np.max(memory)) / 2**20
        row["trial"] = results[0]["trial"]
        row["settings"] = self.settings(entry.label, results[0]["trial"])
        return row

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

    def _counts(self, run: Run, shifted: bool) -> Counts:
        with np.load(self.folder.path(run) / "counts.npz") as file:
            counts: Counts = file["counts_shifted" if shifted else "counts"]
        return counts

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
    """Write ``table.csv``, ``runs.csv`` and ``results.json`` into the folder."""
    import pandas as pd

    root = results.folder.root
    save_text(
        root / "runs.csv", pd.DataFrame(run_rows(results)).astype({"fold": "Int64", "trial": "Int64"}).to_csv(index=False)
    )
    save_text(root / "table.csv", results.table().to_csv(index=False))
    found = {
        "format": 1,
        "recipe": results.study.recipe,
        "baseline": results.study.baseline,
        "seeds": results.study.seeds,
        "interval_level": LEVEL,
        "classes": results.any["classes"] if results.finals else None,
        "table": results.rows,
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
        row: dict[str, Any] = {"objective": run.objective, "role": run.role, "seed": run.seed, "fold": run.fold}
        row |= {"trial": run.trial, "state": "finished" if found else "failed" if error else "missing", "error": error}
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


def as_text(results: Results) -> str:
    """Lay the table out as text: percent, mean and standard deviation over seeds, best mIoU first."""
    if not results.finals:
        return "no final run is finished"
    name = results.study.baseline
    head = ["objective", "seeds", "mIoU %", "rare third %", "pixels right %", f"mIoU minus {name}'s", "step ms", "MiB"]
    body = []
    for row in sorted(results.rows, key=lambda row: -row["miou_mean"]):
        interval = tuple(100 * row[f"miou_difference{end}"] for end in ("", "_low", "_high"))
        body.append(
            [
                row["objective"] + (" + shifts" if row["shifted"] else ""),
                str(row["seeds"]),
                *(_plus_minus(row, measure) for measure in MEASURES),
                "-" if np.isnan(interval[0]) else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*interval),
                f"{row['step_ms']:.0f}",
                f"{row['memory_mib']:.0f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = []
    for first, *others in [head, *body]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _plus_minus(row: Mapping[str, Any], measure: str) -> str:
    mean, deviation = 100 * row[f"{measure}_mean"], 100 * row[f"{measure}_sd"]
    if np.isnan(mean):
        return "-"
    return f"{mean:.2f}" if np.isnan(deviation) else f"{mean:.2f} ± {deviation:.2f}"


def _spread(name: str, values: Floats) -> dict[str, float]:
    """Mean and sample standard deviation over the seeds for which a value is defined."""
    defined = values[~np.isnan(values)]
    mean = float(defined.mean()) if len(defined) else np.nan
    return {f"{name}_mean": mean, f"{name}_sd": float(defined.std(ddof=1)) if len(defined) > 1 else np.nan}


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
