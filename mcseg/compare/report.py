"""Write the report of a study: one self-contained HTML file from the Jinja template ``report.html``."""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mcseg.compare.charts import curves, data_uri, forest, minus, offsets, share, signed
from mcseg.compare.comparison import Entry
from mcseg.compare.schedule import save_text
from mcseg.compare.statistics import LEVEL, MEASURES, class_iou, mean_of_defined
from mcseg.compare.tables import Results

_FULL_TINT = 0.15  # difference in IoU at which a cell has its full tint


def write(results: Results) -> Path:
    """Write ``report.html`` to the folder of the study and return its path."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names of classes, objectives and files are untrusted
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path = results.folder.root / "report.html"
    save_text(path, environment.get_template("report.html").render(_content(results)))
    return path


def _content(results: Results) -> dict[str, Any]:
    study = results.study
    content: dict[str, Any] = {
        "recipe": study.recipe,
        "baseline": study.baseline,
        "level": round(100 * LEVEL),
        "problems": [*(f"{run}: {error}" for run, error in results.failures), *results.condition_mismatches()],
        "missing": results.missing,
        "remarks": study.remarks,
        "finished": bool(results.finals),
    }
    if not results.finals:
        return content
    compared = results.comparison
    order = sorted(zip(compared.entries, results.rows(), strict=True), key=lambda pair: -pair[1]["miou_mean"])
    return content | {
        "lead": _lead(results, order),
        "rows": [_table_row(entry, row) for entry, row in order],
        "tuned": study.tuned,
        "forest": forest(compared, order),
        "classes": [table for shifted in (False, True) if (table := _class_table(results, [e for e, _ in order], shifted))],
        "curves": curves(results),
        "scenes": _scenes(results),
        "legend": [
            (name, _css(color))
            for name, color in zip(compared.class_names, results.any_final["classes"]["palette"], strict=True)
        ],
        "offsets": offsets(results),
        "shifts": _shifts(results),
        "trials": _trials(results),
        "facts": _facts(results),
    }


def _lead(results: Results, order: Sequence[tuple[Entry, dict[str, Any]]]) -> dict[str, Any]:
    entry, row = order[0]
    baseline = next((r for e, r in order if (e.label, e.shifted) == (results.study.baseline, False)), None)
    final = results.any_final
    return {
        "objectives": len({e.label for e, _ in order}),
        "seeds": len(results.study.seeds),
        "epochs": len(final["curves"]),
        "steps": final["steps"],
        "images": final["images"],
        "classes": len(results.comparison.class_names),
        "best": entry.name,
        "best_miou": _percent(row["miou_mean"], row["miou_sd"]),
        "baseline_miou": baseline and _percent(baseline["miou_mean"], baseline["miou_sd"]),
        "stages": results.study.first and results.study.first.label,
    }


def _table_row(entry: Entry, row: dict[str, Any]) -> dict[str, Any]:
    interval = [100 * row[f"miou_difference{end}"] for end in ("", "_low", "_high")]
    return {
        "label": entry.label,
        "shifted": entry.shifted,
        "seeds": row["seeds"],
        "measures": [(row[f"{m}_mean"], _percent(row[f"{m}_mean"], row[f"{m}_sd"])) for m in MEASURES],
        "difference": None if math.isnan(interval[0]) else (interval[0], signed(*interval)),
        "step": (row["step_ms"], f"{row['step_ms']:.0f}"),
        "step_with_data": (row["step_with_data_ms"], f"{row['step_with_data_ms']:.0f}"),
        "memory": (row["memory_mib"], f"{row['memory_mib']:,.0f}"),
        "settings": _last_parts(row["settings"]),
    }


def _class_table(results: Results, entries: Sequence[Entry], shifted: bool) -> dict[str, Any] | None:
    """IoU by class and objective, tinted by the difference to the baseline."""
    columns = [entry for entry in entries if entry.shifted == shifted]
    if not columns:
        return None
    iou = {e.name: np.stack([class_iou(counts.sum(0)) for counts in e.counts.values()]) for e in columns}
    means = {name: mean_of_defined(values.T) for name, values in iou.items()}
    baseline = results.comparison.baseline(shifted)
    reference = np.full(len(results.comparison.class_names), np.nan) if baseline is None else means[baseline.name]
    rows = []
    for index in np.argsort(-results.comparison.shares, kind="stable"):
        best = np.nanmax([*(mean[index] for mean in means.values()), -1])
        cells = []
        for entry in columns:
            mean, values = means[entry.name][index], iou[entry.name][:, index]
            cells.append(
                {
                    "value": None if np.isnan(mean) else float(mean),
                    "text": "-" if np.isnan(mean) else f"{100 * mean:.1f}",
                    "spread": f"{100 * values.std(ddof=1):.1f}" if len(values) > 1 and not np.isnan(values).any() else "",
                    "best": bool(mean == best > 0),
                    "tint": _tint(float(mean - reference[index]) / _FULL_TINT),
                }
            )
        rows.append(
            {
                "name": results.comparison.class_names[index],
                "color": _css(results.any_final["classes"]["palette"][index]),
                "share": float(results.comparison.shares[index]),
                "share_text": share(float(results.comparison.shares[index])),
                "tail": int(index) in results.comparison.tail,
                "cells": cells,
            }
        )
    return {"shifted": shifted, "columns": [entry.label for entry in columns], "rows": rows}


def _scenes(results: Results) -> list[dict[str, Any]]:
    """Pictures of the same images for every objective, from its first finished seed."""
    folders = {}
    for objective in results.study.objectives:
        runs = [results.finals.get((objective.label, seed)) for seed in results.study.seeds]
        if final := next((run for run in runs if run), None):
            folders[objective.label] = results.folder.path(final[0]) / "pictures"
    scenes = []
    first = next(iter(folders.values()))
    for index in range(len(list(first.glob("*-image.jpg")))):
        target = np.asarray(Image.open(first / f"{index}-target.png"))
        pictures = [("image", _read_uri(first / f"{index}-image.jpg")), ("target", _read_uri(first / f"{index}-target.png"))]
        for label, folder in folders.items():
            with Image.open(folder / f"{index}-prediction.png") as picture:
                pixels = np.where(target == 255, 255, np.asarray(picture)).astype(np.uint8)  # void is not scored
                drawn = Image.fromarray(pixels).convert("P")
                drawn.putpalette(picture.getpalette() or [])
            buffer = io.BytesIO()
            drawn.save(buffer, "PNG", optimize=True)
            pictures.append((label, data_uri("png", buffer.getvalue())))
        scenes.append({"pictures": pictures, "height": target.shape[0], "width": target.shape[1]})
    return scenes


def _shifts(results: Results) -> dict[str, Any] | None:
    """Shifts of the logits by class and objective."""
    by_label = {label: result["shifts"] for (label, _), (_, result) in results.finals.items() if result["shifts"]}
    if not by_label:
        return None
    rows = []
    compared = results.comparison
    for index in np.argsort(-compared.shares, kind="stable"):
        cells = [(minus(f"{shifts[index]:+.2f}"), _tint(shifts[index] / 2), shifts[index]) for shifts in by_label.values()]
        rows.append({"name": compared.class_names[index], "share": float(compared.shares[index]), "cells": cells})
        rows[-1]["share_text"] = share(float(compared.shares[index]))
        rows[-1]["color"] = _css(results.any_final["classes"]["palette"][index])
    return {"columns": list(by_label), "rows": rows}


def _trials(results: Results) -> list[dict[str, Any]]:
    """Trials of every objective with their scores on the folds."""
    rows = []
    for objective in results.study.objectives:
        chosen = {run.trial for (label, _), (run, _) in results.finals.items() if label == objective.label}
        for trial, scores in results.fold_scores(objective.label).items():
            complete = [score for score in scores if score is not None]
            mean = float(np.mean(complete)) if len(complete) == len(scores) else None
            rows.append(
                {
                    "label": objective.label,
                    "settings": _last_parts(results.settings(objective.label, trial)) or "as in its recipe",
                    "scores": ["-" if score is None else f"{100 * score:.1f}" for score in scores],
                    "mean": mean,
                    "mean_text": "not finished" if mean is None else f"{100 * mean:.2f}",
                    "chosen": trial in chosen,
                }
            )
    return rows


def _facts(results: Results) -> list[tuple[str, str]]:
    """Facts about the study, as pairs of a heading and a text."""
    study = results.study
    finals = [result for _, result in results.finals.values()]

    def kinds(part: str) -> str:
        texts = {
            ", ".join(f"{key} {value}" for key, value in result[part].items() if value is not None) for result in finals
        }
        return " | ".join(sorted(texts))

    facts = [
        ("Settings of all runs", " ".join(Path(w).name if w.endswith((".yaml", ".yml")) else w for w in study.arguments)),
        ("Objectives", "; ".join(f"{o.label}: {' '.join(map(_short, o.arguments))}" for o in study.objectives)),
        ("Seeds", ", ".join(map(str, study.seeds))),
        ("Budget", f"{finals[0]['steps']} optimiser steps, {len(finals[0]['curves'])} epochs"),
        ("Machine", kinds("machine")),
        ("Versions", kinds("versions")),
    ]
    if study.first is not None:
        then = " ".join(study.then) or "the settings of the first stage"
        facts.insert(2, ("Two stages", f"first {study.first.label}; then every objective from its weights with {then}"))
    if study.folds:
        facts.insert(2, ("Folds of the training images", "; ".join(", ".join(fold) for fold in study.folds)))
    return facts


def _short(argument: str) -> str:
    """Name a recipe without its path, and drop the option --config in front of it."""
    return Path(argument).stem if argument.endswith((".yaml", ".yml")) else "" if argument == "--config" else argument


def _percent(mean: float, deviation: float) -> str:
    if math.isnan(mean):
        return "-"
    return f"{100 * mean:.2f}" + ("" if math.isnan(deviation) else f" ± {100 * deviation:.2f}")


def _last_parts(settings: str) -> str:
    """Shorten each key to its last part."""
    return re.sub(r"(?<!\S)[\w.]+\.(?=\w+=)", "", settings)


def _tint(strength: float) -> str:
    """CSS colour of a cell for a strength from -1 (worse, orange) to 1 (better, blue), readable in light and dark mode."""
    if math.isnan(strength) or strength == 0:
        return "transparent"
    color = "37, 99, 235" if strength > 0 else "234, 88, 12"
    return f"rgba({color}, {0.5 * min(1.0, abs(strength)):.2f})"


def _css(color: Sequence[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _read_uri(path: Path) -> str:
    return data_uri("jpeg" if path.suffix == ".jpg" else "png", path.read_bytes())
