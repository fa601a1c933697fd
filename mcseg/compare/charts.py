"""Charts of the report as positions: in percent of a track, or in the units of an SVG picture."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mcseg.compare.statistics import MEASURES, measures
from mcseg.compare.tables import Entry, Results

_TITLES = {"miou": "mIoU", "miou_tail": "rare third", "pixel_accuracy": "pixels right"}
_CURVE = (220, 120)  # width and height of the area in which a curve is drawn
_SCATTER = (220, 160)


def forest(results: Results, order: Sequence[tuple[Entry, dict[str, Any]]]) -> dict[str, Any]:
    """Differences to the baseline as positions on a track per measure, in percent of its width."""
    groups: list[tuple[bool, list[tuple[str, dict[str, list[float]]]]]] = []
    for shifted in (False, True):
        baseline, ending = results.baseline(shifted), "_to_shifted" if shifted else ""
        rows = []
        for entry, row in order:
            if entry.shifted != shifted or baseline is None or math.isnan(row[f"miou_difference{ending}"]):
                continue
            seeds = [seed for seed in entry.counts if seed in baseline.counts]
            single = [
                measures(entry.counts[seed].sum(0), results.tail) - measures(baseline.counts[seed].sum(0), results.tail)
                for seed in seeds
            ]
            values = {
                measure: [
                    *(100 * row[f"{measure}_difference{ending}{end}"] for end in ("", "_low", "_high")),
                    *(100 * float(found[index]) for found in single),
                ]
                for index, measure in enumerate(MEASURES)
            }
            rows.append((entry.name, values))
        if rows:
            groups.append((shifted, rows))
    columns: list[dict[str, Any]] = []
    for measure in MEASURES:
        every = [v for _, rows in groups for _, found in rows for v in found[measure] if not math.isnan(v)]
        ticks = _ticks(min([0.0, *every]), max([0.0, *every]), 4)
        columns.append({"measure": measure, "title": _TITLES[measure], "low": ticks[0], "high": ticks[-1], "ticks": ticks})
    drawn = []
    for shifted, rows in groups:
        lines = []
        for name, values in rows:
            cells = [_interval(values[column["measure"]], column["low"], column["high"]) for column in columns]
            lines.append({"name": name, "cells": cells})
        drawn.append({"shifted": shifted, "rows": lines})
    for column in columns:
        low, high = column["low"], column["high"]
        column["ticks"] = [(_place(tick, low, high), minus(f"{tick:+g}") if tick else "0") for tick in column["ticks"]]
        column["zero"] = _place(0, low, high)
    return {"columns": columns, "groups": drawn}


def _interval(values: list[float], low: float, high: float) -> dict[str, Any] | None:
    point, begin, end, *single = values
    if math.isnan(point):
        return None
    left, right = _place(begin, low, high), _place(end, low, high)
    return {
        "left": left,
        "width": round(right - left, 2),
        "point": _place(point, low, high),
        "single": [_place(value, low, high) for value in single if not math.isnan(value)],
        "text": signed(point, begin, end),
        "sign": "above" if begin > 0 else "below" if end < 0 else "",
    }


def curves(results: Results) -> list[dict[str, Any]]:
    """Validation mIoU and training loss over the epochs: one picture per objective, with the baseline in grey."""
    found = {
        objective.label: [
            results.finals[objective.label, seed][1]["curves"]
            for seed in results.study.seeds
            if (objective.label, seed) in results.finals
        ]
        for objective in results.study.objectives
    }
    every = [point for curves in found.values() for curve in curves for point in curve]
    epochs = max(point["epoch"] for point in every)
    top = _ticks(0, max([0.01, *(100 * point["miou"] for point in every if "miou" in point)]), 4)
    baseline = [_line(curve, "miou", epochs, 0, top[-1], 100) for curve in found.get(results.study.baseline, [])]
    pictures = []
    for label, curves in found.items():
        if not curves:
            continue
        losses = [point["loss"] for curve in curves for point in curve if math.isfinite(point["loss"])]
        loss_ticks = _ticks(min([0.0, *losses]), max(losses, default=1.0), 3)
        pictures.append(
            {
                "label": label,
                "baseline": [] if label == results.study.baseline else baseline,
                "miou": [_line(curve, "miou", epochs, 0, top[-1], 100) for curve in curves],
                "miou_ticks": [(_height(tick, 0, top[-1], _CURVE), f"{tick:g}") for tick in top],
                "loss": [_line(curve, "loss", epochs, loss_ticks[0], loss_ticks[-1], 1) for curve in curves],
                "loss_ticks": [(_height(t, loss_ticks[0], loss_ticks[-1], _CURVE), f"{t:g}") for t in loss_ticks],
                "epochs": epochs,
                "size": _CURVE,
            }
        )
    return pictures


def _line(curve: Sequence[dict[str, float]], key: str, epochs: float, low: float, high: float, factor: float) -> str:
    """Points of an SVG polyline."""
    width = _CURVE[0]
    points = [
        (width * (point["epoch"] - 1) / max(1, epochs - 1), _height(factor * point[key], low, high, _CURVE))
        for point in curve
        if math.isfinite(point.get(key, math.nan))
    ]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points * (2 if len(points) == 1 else 1))


def offsets(results: Results) -> list[dict[str, Any]]:
    """Margin offsets against pixel shares, both on logarithmic scales."""
    found = {label: result["offsets"] for (label, _), (_, result) in results.finals.items() if result["offsets"]}
    shares = 100 * results.shares
    decades = _decades(shares)
    pictures = []
    for label, offsets in found.items():
        values = np.array([offsets["foreground"], offsets["background"]])
        span = _decades(values)
        points = []
        for index in np.nonzero(shares > 0)[0]:
            x = _SCATTER[0] * (math.log10(shares[index]) - decades[0]) / (decades[-1] - decades[0])
            for kind, value in zip(("foreground", "background"), values[:, index], strict=True):
                y = _height(math.log10(value), span[0], span[-1], _SCATTER) if value > 0 else _SCATTER[1]
                title = f"{results.class_names[index]}: {share(results.shares[index])} % of the pixels, {kind} {value:.3g}"
                points.append({"x": round(x, 1), "y": round(y, 1), "kind": kind, "title": title})
        pictures.append(
            {
                "label": label,
                "points": points,
                "x_ticks": [(_SCATTER[0] * i / (len(decades) - 1), _power(d)) for i, d in enumerate(decades)],
                "y_ticks": [(_height(d, span[0], span[-1], _SCATTER), _power(d)) for d in span],
                "size": _SCATTER,
            }
        )
    return pictures


def _decades(values: np.ndarray[Any, Any]) -> list[int]:
    """Exponents of the powers of ten around the positive values, at most six of them by leaving some out."""
    positive = values[values > 0]
    low, high = (math.floor(math.log10(positive.min())), math.ceil(math.log10(positive.max()))) if len(positive) else (-1, 0)
    high = max(high, low + 1)
    step = math.ceil((high - low) / 5)
    return list(range(low, high + step, step))


def signed(point: float, low: float, high: float) -> str:
    """A difference with its interval."""
    return minus(f"{point:+.2f} [{low:+.2f}, {high:+.2f}]")


def minus(text: str) -> str:
    """Set minus signs for hyphens."""
    return text.replace("-", "\N{MINUS SIGN}")


def share(part: float) -> str:
    """A share of the pixels in percent."""
    return f"{100 * part:.2f}" if part < 0.01 else f"{100 * part:.1f}"


def _power(exponent: int) -> str:
    """A power of ten for an axis."""
    digits = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return f"{10.0**exponent:g}" if -4 < exponent < 5 else "10" + str(exponent).translate(digits)


def _place(value: float, low: float, high: float) -> float:
    """Position on a track in percent."""
    return round(100 * (value - low) / (high - low), 2)


def _height(value: float, low: float, high: float, size: tuple[int, int]) -> float:
    """Position in a picture from its top."""
    return round(size[1] * (1 - (value - low) / (high - low)), 1)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers that enclose the range, about ``count`` steps apart."""
    span = max(high - low, 1e-9)
    step = next(
        base * 10.0**power
        for power in range(math.floor(math.log10(span / count)), 20)
        for base in (1, 2, 5)
        if base * 10.0**power >= span / count
    )
    begin, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(begin, max(end, begin + 1) + 1)]
