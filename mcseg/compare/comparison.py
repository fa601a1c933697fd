"""Compare objectives by the pixel counts of their final runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mcseg.compare.statistics import MEASURES, Counts, Floats, Interval, class_iou, measures, paired_intervals
from mcseg.evaluation.metrics import rarest_third

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Entry:
    """Final runs of one objective, evaluated with or without shifts of the logits.

    Attributes:
        label: name of the objective.
        shifted: whether the predictions use the shifts.
        counts: by seed, (N,3,C) int64 per validation image: pixels predicted correctly, in the target, in the prediction.
        costs: by seed, ``step_ms`` and ``step_with_data_ms`` (milliseconds per optimiser step; NaN if no step was timed) and
            ``memory_mib`` (peak memory).
    """

    label: str
    shifted: bool
    counts: Mapping[int, Counts]
    costs: Mapping[int, Mapping[str, float]]

    @property
    def name(self) -> str:
        """Label, with "+ shifts" if the predictions use them."""
        return f"{self.label} + shifts" if self.shifted else self.label


@dataclass(frozen=True)
class Comparison:
    """Scores of the objectives and their differences to a baseline.

    Attributes:
        entries: all objectives without shifts, then all with shifts.
        class_names: names of the classes by train id.
        class_pixels: (C,) labelled training pixels.
        baseline_label: objective that all differences refer to.
    """

    entries: Sequence[Entry]
    class_names: Sequence[str]
    class_pixels: Sequence[int]
    baseline_label: str

    @property
    def tail(self) -> list[int]:
        """Train ids of the rarest third of the classes by training pixels."""
        tail: list[int] = rarest_third(torch.tensor(self.class_pixels)).tolist()
        return tail

    @property
    def shares(self) -> Floats:
        """(C,) share of each class in the labelled training pixels."""
        pixels = np.array(self.class_pixels, dtype=np.float64)
        shares: Floats = pixels / max(1.0, pixels.sum())
        return shares

    def entry(self, label: str, shifted: bool = False) -> Entry | None:
        """Return an objective's entry; None if none of its final runs is finished."""
        return next((entry for entry in self.entries if (entry.label, entry.shifted) == (label, shifted)), None)

    def baseline(self, shifted: bool = False) -> Entry | None:
        """Entry of the baseline; None if none of its final runs is finished."""
        return self.entry(self.baseline_label, shifted)

    def intervals(self, entry: Entry, other: Entry | None) -> dict[str, Interval] | None:
        """Compute the differences between two entries over their common seeds, by measure; None without a common seed."""
        if other is None or entry is other:
            return None
        seeds = [seed for seed in entry.counts if seed in other.counts]
        if not seeds:
            return None
        ours, theirs = (np.stack([side.counts[seed] for seed in seeds]) for side in (entry, other))
        return dict(zip(MEASURES, paired_intervals(ours, theirs, self.tail), strict=True))

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One row per entry: scores as fractions, times in milliseconds, memory in MiB."""
        return [self._row(entry) for entry in self.entries]

    def table(self) -> "DataFrame":
        """Return the rows as a data frame."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    def __str__(self) -> str:
        """Format the rows as text: percent, mean and standard deviation over seeds, highest mIoU first."""
        if not self.entries:
            return "no final run is finished"
        versus = f"mIoU minus {self.baseline_label}'s"
        head = ["objective", "seeds", "mIoU %", "rare third %", "pixel accuracy %", versus, "step ms", "MiB"]
        body = []
        for row in sorted(self.rows, key=lambda row: -row["miou_mean"]):
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
        for name, *values in [head, *body]:
            cells = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *cells]))
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    def _row(self, entry: Entry) -> dict[str, Any]:
        totals = np.stack([counts.sum(0) for counts in entry.counts.values()])
        row: dict[str, Any] = {"objective": entry.label, "shifted": entry.shifted, "seeds": len(totals)}
        for name, values in zip(MEASURES, measures(totals, self.tail).T, strict=True):
            row |= _spread(name, values)
        for ending, shifted in (("difference", False), ("difference_to_shifted", True)):
            intervals = self.intervals(entry, self.baseline(shifted)) if entry.shifted or not shifted else None
            for name in MEASURES:
                interval = intervals[name] if intervals else Interval(np.nan, np.nan, np.nan)
                row |= {f"{name}_{ending}": interval.difference}
                row |= {f"{name}_{ending}_low": interval.low, f"{name}_{ending}_high": interval.high}
        for name, values in zip(self.class_names, class_iou(totals).T, strict=True):
            row |= _spread(f"iou/{name}", values)
        for key in ("step_ms", "step_with_data_ms"):
            times = [cost[key] for cost in entry.costs.values() if not np.isnan(cost[key])]
            row[key] = float(np.median(times)) if times else np.nan
        row["memory_mib"] = max(cost["memory_mib"] for cost in entry.costs.values())
        return row


def _plus_minus(row: Mapping[str, Any], measure: str) -> str:
    mean, deviation = 100 * row[f"{measure}_mean"], 100 * row[f"{measure}_sd"]
    if np.isnan(mean):
        return "-"
    return f"{mean:.2f}" if np.isnan(deviation) else f"{mean:.2f} ± {deviation:.2f}"


def _spread(name: str, values: Floats) -> dict[str, float]:
    """Mean and sample standard deviation over the seeds with a defined value."""
    defined = values[~np.isnan(values)]
    mean = float(defined.mean()) if len(defined) else np.nan
    return {f"{name}_mean": mean, f"{name}_sd": float(defined.std(ddof=1)) if len(defined) > 1 else np.nan}
