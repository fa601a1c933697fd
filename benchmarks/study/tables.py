"""Print the Markdown tables of the study's README from its pixel counts.

python benchmarks/study/tables.py
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mcseg.compare.comparison import Comparison
from mcseg.compare.counts import class_names, comparison, counts_of, read_counts
from mcseg.compare.statistics import MEASURES, Floats, Interval, measures
from mcseg.evaluation.metrics import rarest_third

if TYPE_CHECKING:
    from pandas import DataFrame

HERE = Path(__file__).parent
OURS = "power dice (ours)"
# Sequence with held-out frames between training frames; all other held-out frames are far from the training images.
NEAR = "0016E5"
# Arguments of power Dice in the ablation
CENTRE = {"aggregation": "dice", "classes": "all", "margin": "soft", "power": 0.5, "scheme": "none", "surrogate": "sigmoid"}
CENTRE |= {"weighting": "foreground"}


@cache
def read(regime: str) -> "DataFrame":
    """Read the pixel counts of a regime: ``scratch``, ``finetune`` or ``ablation``."""
    (path,) = HERE.glob(f"{regime}.csv*")
    return read_counts(path)


@cache
def compared(regime: str) -> Comparison:
    """Compare the final runs of a regime with power Dice."""
    return comparison(read(regime), OURS)


class Trial:
    """Scores of one trial on the folds.

    Attributes:
        label: label of the objective.
        objective: class path and arguments of the objective.
        folds: (F,3,3) scores in %: per fold, for all, near and far images, mIoU, mean IoU of the rarest third and pixel
            accuracy.
    """

    def __init__(self, rows: "DataFrame") -> None:
        self.label = str(rows["objective"].iloc[0])
        self.objective: dict[str, Any] = json.loads(rows["model.objective"].iloc[0])
        scores = []
        for _, fold in rows.groupby("fold"):
            pixels = fold[[f"class_pixels/{name}" for name in class_names(rows)]].iloc[0].astype(int).tolist()
            tail = _tail(pixels)
            near = fold["images"].str.startswith(NEAR).to_numpy()
            scores.append([measures(counts_of(fold[part]).sum(0), tail) for part in (near | True, near, ~near)])
        self.folds: Floats = 100 * np.array(scores)

    @property
    def mean(self) -> Floats:
        """Mean mIoU over the folds (3,), for all, near and far images."""
        mean: Floats = self.folds[:, :, 0].mean(0)
        return mean

    def cells(self) -> list[str]:
        """Format the scores of each fold's all, near and far images, then the mean mIoU."""
        parts = [" / ".join(f"{value:.1f}" for value in part) for fold in self.folds for part in fold]
        return [*parts, f"{self.mean[0]:.2f}"]


def trials(table: "DataFrame") -> list[Trial]:
    """Return the trials that ran on both folds, highest mean mIoU first. Trials are distinguished by their settings."""
    rows = table[table["role"] == "fold"]
    rate = rows.get("model.optimizer.init_args.lr", rows["seed"])
    groups = [Trial(trial) for _, trial in rows.groupby(["objective", "model.objective", rate])]
    return sorted((trial for trial in groups if len(trial.folds) == 2), key=lambda trial: -trial.mean[0])


def best(table: "DataFrame") -> dict[str, Trial]:
    """Return the trial of each objective with the highest mean mIoU."""
    chosen: dict[str, Trial] = {}
    for trial in trials(table):
        chosen.setdefault(trial.label, trial)
    return chosen


def minus(scores: Comparison, label: str, other: str) -> dict[str, Interval]:
    """Return the differences between two objectives by measure, in percentage points."""
    entry, reference = scores.entry(label), scores.entry(other)
    assert entry is not None
    intervals = scores.intervals(entry, reference)
    assert intervals is not None
    return {measure: Interval(*(100 * value for value in interval)) for measure, interval in intervals.items()}


def final_table(regime: str, last: Sequence[str]) -> str:
    """Format the final runs on the validation images, highest mIoU first; ``last`` names the last columns."""
    rows = {(row["objective"], row["shifted"]): row for row in compared(regime).rows}
    chosen = best(read(regime))
    lines = []
    for (label, shifted), row in sorted(rows.items(), key=lambda item: -item[1]["miou_mean"]):
        if shifted:
            continue
        cells = [label, *(f"{100 * row[f'{measure}_mean']:.2f} ± {100 * row[f'{measure}_sd']:.2f}" for measure in MEASURES)]
        difference = None if label == OURS else minus(compared(regime), OURS, label)["miou"]
        cells.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(*difference) if difference else "")
        more = {
            "shifted": f"{100 * rows[label, True]['miou_mean']:.2f}",
            "step": f"{row['step_ms']:.0f}",
            "folds": f"{chosen[label].mean[0]:.2f}",
            "near": f"{chosen[label].mean[1]:.2f}",
        }
        lines.append(cells + [more[name] for name in last])
    return _markdown(["objective", "mIoU", "rarest third", "pixel accuracy", "power Dice's mIoU minus this", *last], lines)


def fold_table(table: "DataFrame") -> str:
    """Format the best trial of each objective on the folds."""
    return _markdown(["objective", *_FOLDS], [[_trial_name(trial), *trial.cells()] for trial in best(table).values()])


def ablation_table(table: "DataFrame") -> str:
    """Format the trials of the ablation by their difference from power Dice."""
    return _markdown(["changed", *_FOLDS], [[changed(trial.objective), *trial.cells()] for trial in trials(table)])


def changed(objective: dict[str, Any]) -> str:
    """Describe the settings in which an objective differs from power Dice."""
    settings = objective["init_args"]
    if "objectives" in settings:
        first, *others = settings["objectives"]
        if settings["warmup_steps"]:
            return f"{settings['warmup_steps']} steps of cross entropy first"
        if others[0]["class_path"].endswith("CrossEntropyLoss"):
            ratio = "" if first["init_args"]["aggregation"] == "dice" else "Jaccard "
            return f"{ratio}+ {others[0]['weight']} cross entropy"
        return "half power 0.5, half power 1"
    differs = [f"{key} {settings[key]}" for key, value in CENTRE.items() if settings[key] != value]
    differs += [f"max_margin {settings['max_margin']}"] if settings["scheme"] == "miou" else []
    differs += [f"tau {settings['tau']:g}"] if settings["scheme"] == "ijcv2022" else []
    return ", ".join(differs) or "nothing"


_FOLDS = ["fold 0: all", "near", "far", "fold 1: all", "near", "far", "mean mIoU"]


def _trial_name(trial: Trial) -> str:
    settings = trial.objective["init_args"]
    return trial.label + (f", tau {settings['tau']:g}" if settings.get("scheme") == "ijcv2022" else "")


def _tail(pixels: Sequence[int]) -> list[int]:
    import torch

    tail: list[int] = rarest_third(torch.tensor(pixels)).tolist()
    return tail


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(head) - 1), *lines[1:]])


def all_tables() -> dict[str, str]:
    """Return the README's tables by their headings."""
    return {
        "From random weights: the validation images": final_table("scratch", ["shifted", "step"]),
        "From random weights: the folds": fold_table(read("scratch")),
        "Cross entropy first, then 8 epochs of each objective": final_table("finetune", ["shifted", "folds", "near"]),
        "The ablation": ablation_table(read("ablation")),
    }


if __name__ == "__main__":
    for heading, lines in all_tables().items():
        print(f"## {heading}\n\n{lines}\n")
