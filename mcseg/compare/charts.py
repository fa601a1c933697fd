"""Draw the charts of the report with matplotlib, as SVG in data URIs."""

import base64
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from mcseg.compare.comparison import Comparison, Entry
from mcseg.compare.statistics import MEASURES, Floats, Interval, measures
from mcseg.compare.tables import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLES = {"miou": "mIoU", "miou_tail": "rare third", "pixel_accuracy": "pixel accuracy"}
_ABOVE, _BELOW, _NEUTRAL = "#2563eb", "#c2410c", "#77828e"
_MAX_NAMES = 30  # more class names would hide the points


@contextmanager
def _picture(width: float, height: float) -> "Iterator[tuple[Figure, list[str]]]":
    """Open a figure of this size in inches; on exit, append its data URI to the list."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Names may contain "$", which must not start a formula. Text is drawn in the reader's font.
    style: dict[Any, Any] = {"svg.fonttype": "none", "text.parse_math": False, "font.size": 8, "axes.spines.top": False}
    style |= {"axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "mcseg"}
    uri: list[str] = []
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # matplotlib's font only affects the layout
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, uri
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        uri.append(data_uri("svg+xml", buffer.getvalue()))


def data_uri(kind: str, content: bytes) -> str:
    """Encode an image as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def forest(comparison: Comparison, order: Sequence[tuple[Entry, dict[str, Any]]]) -> list[tuple[bool, str]]:
    """Draw the differences to the baseline with their intervals, without and with shifts.

    Args:
        comparison: scores of the objectives.
        order: entries and their rows, in the order of the chart.

    Returns:
        Up to two pairs: whether the entries use shifts, and the picture. Empty if there is nothing to compare.
    """
    pictures = []
    for shifted in (False, True):
        baseline, ending = comparison.baseline(shifted), "_to_shifted" if shifted else ""
        rows = [
            (entry, row)
            for entry, row in order
            if entry.shifted == shifted and baseline is not None and not math.isnan(row[f"miou_difference{ending}"])
        ]
        if not rows or baseline is None:
            continue
        with _picture(11, 0.9 + 0.42 * len(rows)) as (figure, uri):
            panels = figure.subplots(1, 3, sharey=True)
            for index, (measure, axes) in enumerate(zip(MEASURES, panels, strict=True)):
                for height, (entry, row) in enumerate(reversed(rows)):
                    interval = Interval(*(100 * row[f"{measure}_difference{ending}{end}"] for end in ("", "_low", "_high")))
                    seeds = [seed for seed in entry.counts if seed in baseline.counts]
                    scores = [
                        np.stack([measures(side.counts[seed].sum(0), comparison.tail) for seed in seeds])[:, index]
                        for side in (entry, baseline)
                    ]
                    _draw_interval(axes, height, interval=interval, by_seed=100 * (scores[0] - scores[1]))
                axes.axvline(0, color="black", linewidth=0.8)
                axes.set_title(_TITLES[measure])
                axes.grid(axis="y", visible=False)
                axes.set(ylim=(-0.6, len(rows) - 0.2))
            panels[0].set_yticks(range(len(rows)), [entry.name for entry, _ in reversed(rows)])
        pictures.append((shifted, uri[0]))
    return pictures


def _draw_interval(axes: "Axes", height: int, *, interval: Interval, by_seed: Floats) -> None:
    point, low, high = interval
    if math.isnan(point):
        return
    color = _ABOVE if low > 0 else _BELOW if high < 0 else _NEUTRAL
    axes.plot([low, high], [height, height], color=color, linewidth=4, alpha=0.6, solid_capstyle="round")
    axes.plot(by_seed, [height] * len(by_seed), "|", color="black", alpha=0.4)
    axes.plot(point, height, "o", color=color)
    axes.annotate(signed(point, low, high), (point, height + 0.2), ha="center", va="bottom", fontsize=6.5, color=color)


def curves(results: Results) -> list[tuple[str, str]]:
    """Draw validation mIoU and training loss by epoch, one picture per objective, with the baseline's mIoU in grey."""
    curves_by_label = {
        objective.label: [
            results.finals[objective.label, seed][1]["curves"]
            for seed in results.study.seeds
            if (objective.label, seed) in results.finals
        ]
        for objective in results.study.objectives
    }
    top = max(
        (100 * point.get("miou", 0) for lines in curves_by_label.values() for line in lines for point in line), default=0
    )
    pictures = []
    for label, lines in curves_by_label.items():
        if not lines:
            continue
        with _picture(2.7, 3.4) as (figure, uri):
            score, loss = figure.subplots(2, 1, sharex=True)
            if label != results.study.baseline:
                _draw_lines(score, curves_by_label.get(results.study.baseline, []), "miou", factor=100, color=_NEUTRAL)
            _draw_lines(score, lines, "miou", factor=100, color=_ABOVE)
            _draw_lines(loss, lines, "loss", factor=1, color="black")
            score.set(ylabel="mIoU %", ylim=(0, 1.05 * top or 1))
            loss.set(ylabel="training loss", xlabel="epoch")
            loss.xaxis.get_major_locator().set_params(integer=True)
        pictures.append((label, uri[0]))
    return pictures


def _draw_lines(axes: "Axes", lines: Sequence[Sequence[dict[str, float]]], key: str, *, factor: float, color: str) -> None:
    for line in lines:
        points = [(point["epoch"], factor * point[key]) for point in line if math.isfinite(point.get(key, math.nan))]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.2, marker="." if len(points) == 1 else None)


def offsets(results: Results) -> list[tuple[str, str]]:
    """Draw margin offsets against pixel shares on logarithmic scales, one picture per objective with offsets."""
    offsets_by_label = {label: result["offsets"] for (label, _), (_, result) in results.finals.items() if result["offsets"]}
    shares = 100 * results.comparison.shares
    pictures = []
    for label, both in offsets_by_label.items():
        values = np.array([both["foreground"], both["background"]])
        floor = 10 ** math.floor(math.log10(values[values > 0].min())) if (values > 0).any() else 0.1
        with _picture(4.2, 3.2) as (figure, uri):
            axes = figure.subplots()
            axes.set(xscale="log", yscale="log", xlabel="share of the training pixels in %", ylabel="offset in logits")
            for kind, offset, face in zip(("foreground", "background"), values, (_ABOVE, "none"), strict=True):
                color = _ABOVE if kind == "foreground" else _BELOW
                shown = np.maximum(offset, floor)[shares > 0]
                axes.scatter(shares[shares > 0], shown, facecolors=face, edgecolors=color, label=kind, clip_on=False)
            for index, name in enumerate(results.comparison.class_names if len(shares) <= _MAX_NAMES else ()):
                if shares[index] == 0:
                    continue
                point = (shares[index], max(floor, values[:, index].max()))
                axes.annotate(name, point, (0, 5), textcoords="offset points", fontsize=6, ha="center")
            axes.set_ylim(bottom=floor)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter("")
            axes.legend(fontsize=7)
        pictures.append((label, uri[0]))
    return pictures


def signed(point: float, low: float, high: float) -> str:
    """Format a difference with its interval."""
    return minus(f"{point:+.2f} [{low:+.2f}, {high:+.2f}]")


def minus(text: str) -> str:
    """Replace hyphens by minus signs."""
    return text.replace("-", "\N{MINUS SIGN}")


def share(part: float) -> str:
    """Format a share of the pixels as percent."""
    return f"{100 * part:.2f}" if part < 0.01 else f"{100 * part:.1f}"
