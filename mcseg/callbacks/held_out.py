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
from mcseg.evaluation.bounds import iou_lower_bounds, miou_lower_bound
from mcseg.evaluation.margin_counts import MARGINS, MarginCounts
from mcseg.evaluation.metrics import image_counts
from mcseg.palette import Palette

_COLUMNS = (0.0, 0.5, 1.0, 2.0, 5.0)  # margins of the table


_FEW_UNITS = 50  # below this the level of the bootstrap has not been checked


class HeldOutBounds(EvaluationCallback):
    """Bounds the mIoU of unseen images of the same source from a validation or test run in one process.

    Writes ``bound.json`` and ``margins.png`` into the run folder and prints a table. The predictions are the module's own.
    Margins are those of the logits for whole images, also where the module averages windows, scales or mirror images.

    Args:
        level: confidence of the bounds, in (0, 1).
        group: regular expression; images whose names have the same first match form one unit, for example ``^[^_]+`` for
            frames of a video ``<sequence>_<frame>``. None takes each image for a unit. Units must be independent.
        selected_from: how many checkpoints this split chose this one from; 1 if it was not used to choose.
    """

    def __init__(self, level: float = 0.95, group: str | None = None, selected_from: int = 1) -> None:
        if not 0 < level < 1:
            raise ValueError(f"level: found {level}, expected a confidence between 0 and 1")
        if selected_from < 1:
            raise ValueError(f"selected_from: found {selected_from}, expected the number of checkpoints, at least 1")
        try:
            self._pattern = None if group is None else re.compile(group)
        except re.error as error:
            raise ValueError(f"group: found {group!r}, expected a regular expression ({error})") from None
        self.level = level
        self.selected_from = selected_from
        self._counts: dict[str, Tensor] = {}
        self._pixels: dict[str, int] = {}
        self._margins: MarginCounts | None = None

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, split: str) -> None:
        """Begin to count."""
        if trainer.world_size > 1:
            raise ValueError(f"bounds need the images in one process, found {trainer.world_size}; set trainer.devices to 1")
        self._counts, self._pixels = {}, {}
        self._margins = MarginCounts(_data(trainer).num_classes, device=module.device)

    def take(self, trainer: pl.Trainer, outputs: Any, batch: Any, batch_idx: int, split: str) -> None:
        """Count a batch, image by image."""
        assert self._margins is not None
        classes = _data(trainer).num_classes
        for name, preds, target in zip(batch["name"], outputs["preds"], outputs["target"], strict=True):
            unit = self._unit(name)
            counts = image_counts(preds, target, classes).cpu()
            self._counts[unit] = self._counts.get(unit, 0) + counts
            self._pixels[unit] = self._pixels.get(unit, 0) + target.numel()
        with trainer.precision_plugin.forward_context():
            logits = trainer.lightning_module(batch["image"])
        for index, target in enumerate(outputs["target"]):
            self._margins.update(logits[index : index + 1], target[None])

    def _unit(self, name: str) -> str:
        if self._pattern is None:
            return name
        found = self._pattern.search(name)
        if found is None:
            raise ValueError(f"group: {self._pattern.pattern!r} is not found in the image name {name!r}")
        return found.group()

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule, split: str) -> None:
        """Write and print what was found."""
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
        """Give everything in plain types; None where there is no value."""
        assert self._margins is not None
        counts = torch.stack(list(self._counts.values()))
        each = 1 - (1 - self.level) / self.selected_from
        image_pixels = max(self._pixels.values())
        hits, target, predicted = counts.sum(0).double()
        iou = hits / (target + predicted - hits)
        columns = {
            "iou": iou,
            "iou_lower_bound": iou_lower_bounds(counts, each, image_pixels),
            "units": ((counts[:, 1] + counts[:, 2]) > 0).sum(0),
            "cleared": self._margins.cleared(),
            "iou_at_margin": self._margins.iou(),
        }
        lists = {key: value.tolist() for key, value in columns.items()}
        return {
            "split": split,
            "units": len(counts),
            "largest_unit_pixels": image_pixels,
            "level": self.level,
            "selected_from": self.selected_from,
            "miou": float(iou.nanmean()),
            "miou_lower_bound": {
                "bootstrap": miou_lower_bound(counts, each),
                "concentration": miou_lower_bound(counts, each, "concentration", image_pixels=image_pixels),
            },
            "margins": list(MARGINS),
            "classes": {name: {key: _plain(lists[key][k]) for key in lists} for k, name in enumerate(names)},
        }


def _data(trainer: pl.Trainer) -> Any:
    """The data module, which knows the classes."""
    return trainer.datamodule  # type: ignore[attr-defined]


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def bound_table(result: dict[str, Any]) -> str:
    """Lay :meth:`HeldOutBounds.result` out as text."""
    classes = result["classes"]
    places = [result["margins"].index(margin) for margin in _COLUMNS]
    width = max(len("class"), *map(len, classes))
    rows = [
        f"{'':<{width}}  {'':>6}  {'':>6}  {'':>6}  share of the pixels that clear a margin, %",
        f"{'class':<{width}}  {'units':>6}  {'IoU %':>6}  {'at least':>8}"
        + "".join(f"  {f'> {margin:g}':>6}" for margin in _COLUMNS),
    ]
    for name, found in classes.items():
        cleared = [found["cleared"][place] for place in places]
        rows.append(
            f"{name:<{width}}  {found['units']:>6}  {_percent(found['iou']):>6}  {_percent(found['iou_lower_bound']):>8}"
            + "".join(f"  {_percent(share):>6}" for share in cleared)
        )
    line = "-" * max(map(len, rows))
    bounds, level, units = result["miou_lower_bound"], 100 * result["level"], result["units"]
    total = [
        f"{result['split']}: mIoU {_percent(result['miou'])} % on {units} units.",
        f"On unseen images of the same source, with {level:g} % confidence, at least",
        f"  {_percent(bounds['bootstrap']):>5} %  by bootstrap over the units (the level is approximate)",
        f"  {_percent(bounds['concentration']):>5} %  by concentration, and each class its value under 'at least'",
        "provided that the units are independent, were not trained on and chose this checkpoint among no more than "
        f"{result['selected_from']} (--selected_from)",
    ]
    if units < _FEW_UNITS:
        total.append(f"fewer than {_FEW_UNITS} units: whether the bootstrap keeps its level there has not been checked")
    return "\n".join([*rows[:2], line, *rows[2:], line, *total])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def save_margins(counts: MarginCounts, names: Sequence[str], palette: Palette, path: Path) -> None:
    """Draw, for each class, IoU and share of cleared pixels against the margin; more than 30 classes go without a legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    iou, cleared = counts.iou().cpu(), counts.cleared().cpu()
    for axes, values in ((left, iou), (right, cleared)):
        for index, name in enumerate(names):
            if not values[index].isnan().all():
                color = tuple(channel / 255 for channel in palette[index])
                style = ("-", "-.", ":")[index % 3]  # palettes have colours that a line does not tell apart
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
