"""Bounds for unseen images from a held-out split."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from mcseg import pictures
from mcseg.atomic import write_atomically
from mcseg.callbacks.base import EvaluationCallback
from mcseg.evaluation.bounds import Weight, held_out_iou, iou_lower_bounds, miou_lower_bound
from mcseg.evaluation.margin_counts import MARGINS, MarginCounts
from mcseg.evaluation.metrics import image_counts
from mcseg.palette import Palette

_COLUMNS = (0.0, 0.5, 1.0, 2.0, 5.0)  # margins of the table
_FEW_UNITS = 50  # below this the level of the bootstrap has not been checked
_FEW_WITH_CLASS = 15  # a class in fewer units pulls the bootstrap's bound down, often to 0 (docs/theory/bounds.md)


class HeldOutBounds(EvaluationCallback):
    """Bounds the mIoU of unseen images of the same source from a validation or test run in one process.

    Writes ``bound.json`` and ``margins.png`` into the run folder and prints a table. The bounds are those of
    :func:`~mcseg.evaluation.bounds.miou_lower_bound` with both weights: every pixel weighs the same, as in the mIoU of a
    data set, or every unit weighs the same. With equal pixels, the concentration bound needs ``largest_pixels``. Predictions
    are those of the module. Margins are taken from the logits of whole images, even if the module averages windows, scales
    or mirror images.

    Args:
        level: confidence of the bounds, in (0, 1).
        group: regular expression; images whose names have the same first match form one unit, for example ``^[^_]+`` for
            frames of a video ``<sequence>_<frame>``. None: each image is a unit. Units must be independent.
        selected_from: number of checkpoints among which this split selected this one; 1 if it did not select.
        largest_pixels: upper limit of the labelled pixels of a unit, for all images of the source and not only for this
            split: for example width x height of the camera, or the size to which images are scaled down; with groups, times
            the length of the longest sequence. None if no limit is known.

    Raises:
        ValueError: a setting is out of range, a name does not match ``group``, or a unit has more labelled pixels than
            ``largest_pixels``.
    """

    def __init__(
        self,
        level: float = 0.95,
        group: str | None = None,
        selected_from: int = 1,
        largest_pixels: int | None = None,
    ) -> None:
        if not 0 < level < 1:
            raise ValueError(f"level: found {level}, expected a confidence between 0 and 1")
        if selected_from < 1:
            raise ValueError(f"selected_from: found {selected_from}, expected the number of checkpoints, at least 1")
        if largest_pixels is not None and largest_pixels < 1:
            raise ValueError(f"largest_pixels: found {largest_pixels}, expected a number of pixels, at least 1")
        try:
            self._pattern = None if group is None else re.compile(group)
        except re.error as error:
            raise ValueError(f"group: found {group!r}, expected a regular expression ({error})") from None
        self.level = level
        self.selected_from = selected_from
        self.largest_pixels = largest_pixels
        self._counts: dict[str, Tensor] = {}
        self._margins: MarginCounts | None = None

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, split: str) -> None:
        """Reset the counts."""
        if trainer.world_size > 1:
            raise ValueError(f"bounds need the images in one process, found {trainer.world_size}; set trainer.devices to 1")
        self._counts = {}
        self._margins = MarginCounts(_data(trainer).num_classes, device=module.device)

    def take(self, trainer: pl.Trainer, outputs: Any, batch: Any, batch_idx: int, split: str) -> None:
        """Count a batch, image by image."""
        assert self._margins is not None
        classes = _data(trainer).num_classes
        for name, preds, target in zip(batch["name"], outputs["preds"], outputs["target"], strict=True):
            unit = self._unit(name)
            counts = image_counts(preds, target, classes).cpu()
            self._counts[unit] = self._counts.get(unit, 0) + counts
            pixels = int(self._counts[unit][1].sum())
            if self.largest_pixels is not None and pixels > self.largest_pixels:
                raise ValueError(
                    f"largest_pixels: found {self.largest_pixels:,}, but {unit!r} has {pixels:,} labelled pixels; set it to "
                    "the most that any image of the source can have (any group, with --bound.group), or leave it out"
                )
        with trainer.precision_plugin.forward_context():
            logits = trainer.lightning_module(batch["image"])
        for index, target in enumerate(outputs["target"]):
            self._margins.update(logits[index : index + 1], target[None])

    def _unit(self, name: str) -> str:
        if self._pattern is None:
            return name
        match = self._pattern.search(name)
        if match is None:
            raise ValueError(
                f"group: found the image name {name!r}, expected a match of {self._pattern.pattern!r}; change the pattern"
            )
        return match.group()

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule, split: str) -> None:
        """Write the files and print the table."""
        if trainer.sanity_checking:
            return
        assert self._margins is not None
        data = _data(trainer)
        result = self.result(data.class_names, split)
        folder = Path(trainer.default_root_dir)
        text = json.dumps(result, indent=2, allow_nan=False) + "\n"
        write_atomically(folder / "bound.json", lambda temporary: temporary.write_text(text))
        save_margins(self._margins, data.class_names, data.palette, folder / "margins.png")
        rank_zero_info("\n" + bound_table(result) + f"\nwritten: {folder / 'bound.json'}, {folder / 'margins.png'}")

    def result(self, names: Sequence[str], split: str) -> dict[str, Any]:
        """Return all counts and bounds in plain types, None for missing values, as ``bound.json`` holds them."""
        assert self._margins is not None
        counts = torch.stack(list(self._counts.values()))
        with_class = (counts[:, 1] > 0).sum(0)
        of_pixels, pixel_columns = self._bounds(counts, "pixel")
        of_units, unit_columns = self._bounds(counts, "image")
        columns = {
            "units": with_class,
            **pixel_columns,
            **{f"unit_weighted_{key}": column for key, column in unit_columns.items()},
            "cleared": self._margins.cleared(),
            "iou_at_margin": self._margins.iou(),
        }
        lists = {key: column.tolist() for key, column in columns.items()}
        enough = min(_FEW_WITH_CLASS, len(counts))
        few = {name: count for name, count in zip(names, lists["units"], strict=True) if 0 < count < enough}
        return {
            "split": split,
            "group": None if self._pattern is None else self._pattern.pattern,
            "units": len(counts),
            "largest_unit_pixels": int(counts[:, 1].sum(1).max()),
            "largest_pixels": self.largest_pixels,
            "level": self.level,
            "selected_from": self.selected_from,
            **of_pixels,
            "unit_weighted": of_units,
            "classes_in_few_units": few,
            "margins": list(MARGINS),
            "classes": {name: {key: _plain(lists[key][k]) for key in lists} for k, name in enumerate(names)},
        }

    def _bounds(self, counts: Tensor, weight: Weight) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Compute mIoU with its bounds, and IoU with its bound per class."""
        level = 1 - (1 - self.level) / self.selected_from
        iou = held_out_iou(counts, weight)
        columns = {"iou": iou, "iou_lower_bound": torch.full_like(iou, math.nan)}
        bounds = {"bootstrap": miou_lower_bound(counts, level, weight=weight), "concentration": None}
        if weight == "image" or self.largest_pixels is not None:
            limit = self.largest_pixels if weight == "pixel" else None
            columns["iou_lower_bound"] = iou_lower_bounds(counts, level, weight, limit)
            bounds["concentration"] = float(columns["iou_lower_bound"].nanmean())
        return {"miou": float(iou.nanmean()), "miou_lower_bound": bounds}, columns


def _data(trainer: pl.Trainer) -> Any:
    """Return the data module, which has the classes."""
    return trainer.datamodule  # type: ignore[attr-defined]


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def bound_table(result: dict[str, Any]) -> str:
    """Format the output of :meth:`HeldOutBounds.result` as text."""
    classes, unit = result["classes"], "image" if result["group"] is None else "group"
    weights = {"": "equal pixels", "unit_weighted_": f"equal {unit}s"}
    columns = [result["margins"].index(margin) for margin in _COLUMNS]
    width = max(len("class"), *map(len, classes))
    rows = [
        f"{'':<{width}}  {'':>6}"
        + "".join(f"  {title:>16}" for title in weights.values())
        + "  % of its pixels with a margin",
        f"{'class':<{width}}  {unit + 's':>6}"
        + f"  {'IoU %':>6}  {'at least':>8}" * 2
        + "".join(f"  {f'> {margin:g}':>6}" for margin in _COLUMNS),
    ]
    for name, values in classes.items():
        pairs = [(values[f"{key}iou"], values[f"{key}iou_lower_bound"]) for key in weights]
        rows.append(
            f"{name:<{width}}  {values['units']:>6}"
            + "".join(f"  {_percent(iou):>6}  {_percent(bound):>8}" for iou, bound in pairs)
            + "".join(f"  {_percent(values['cleared'][column]):>6}" for column in columns)
        )
    line = "-" * max(map(len, rows))
    return "\n".join([*rows[:2], line, *rows[2:], line, *_summary(result, unit)])


def _summary(result: dict[str, Any], unit: str) -> list[str]:
    """Format the mIoUs, their bounds, and the conditions of the bounds."""
    units, few = result["units"], result["classes_in_few_units"]
    both = result, result["unit_weighted"]
    bounds = [part["miou_lower_bound"] for part in both]

    def row(title: str, values: Sequence[float | None], remark: str = "") -> str:
        return f"  {title:<26}" + "".join(f"  {_percent(value):>12}" for value in values) + f"  {remark}".rstrip()

    lines = [
        f"{result['split']}: mIoU (%) of {units} {unit}s, and lower bounds for unseen {unit}s of the same source, each with "
        f"{100 * result['level']:g} % confidence",
        f"  {'':<26}  {'equal pixels':>12}  {f'equal {unit}s':>12}",
        row(f"these {units} {unit}s", [part["miou"] for part in both]),
        row("at least, by bootstrap", [bound["bootstrap"] for bound in bounds], "approximate level"),
        row("at least, by concentration", [bound["concentration"] for bound in bounds], "guaranteed level"),
        "equal pixels: the usual mIoU, in which a large image counts more than a small one",
        f"equal {unit}s: the same after division of each {unit}'s pixel counts by its number of labelled pixels",
    ]
    if result["largest_pixels"] is None:
        lines.append(
            f"'-' under equal pixels: this bound needs the most labelled pixels that any unseen {unit} can have; set "
            f"--bound.largest_pixels (the largest {unit} here has {result['largest_unit_pixels']:,})"
        )
    lines.append(
        f"Conditions: the {unit}s are independent, none was trained on, and the {result['split']} split selected this "
        f"checkpoint among no more than {result['selected_from']} (--bound.selected_from)"
    )
    if result["split"] == "val" and result["selected_from"] == 1:
        lines.append(
            "If this is the best.ckpt of a run, the val split selected it: set --bound.selected_from to the number of epochs"
            " or use --split test"
        )
    if few:
        named = ", ".join(f"{name} ({count})" for name, count in few.items())
        lines.append(
            f"Classes in fewer than {_FEW_WITH_CLASS} {unit}s: {named}. Their bootstrap bounds may be far too low, down to 0"
        )
    if units < _FEW_UNITS:
        lines.append(f"The level of the bootstrap bounds has not been checked with fewer than {_FEW_UNITS} {unit}s")
    return lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def save_margins(counts: MarginCounts, names: Sequence[str], palette: Palette, path: Path) -> None:
    """Plot IoU and share of cleared pixels of each class against the margin; without a legend if there are many classes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    iou, cleared = counts.iou().cpu(), counts.cleared().cpu()
    for axes, values in ((left, iou), (right, cleared)):
        for index, name in enumerate(names):
            if not values[index].isnan().all():
                color = tuple(channel / 255 for channel in palette[index])
                style = ("-", "-.", ":")[index % 3]  # some colours of a palette are too similar for lines
                axes.plot(MARGINS, values[index].tolist(), style, label=name, color=color, linewidth=1.5)
        axes.plot(MARGINS, values.nanmean(0).tolist(), label="mean", color="black", linewidth=2.5, linestyle="--")
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set(xlabel="margin in logits", xlim=(0, MARGINS[-1]), ylim=(0, 1), xticks=[0, 0.1, 1, 10])
        axes.set_xticklabels(["0", "0.1", "1", "10"])
        axes.grid(alpha=0.3)
    left.set(ylabel="IoU", title="IoU if every pixel had to clear the margin")
    right.set(ylabel="share", title="pixels of the class that clear the margin")
    if len(names) <= pictures.LEGEND_CLASSES:
        right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
