"""Write and read a study as one table of pixel counts. Every score can be computed from it, and it is small enough to keep.

The table is a CSV file. Its suffix (``.csv``, ``.csv.gz``, ``.csv.xz``) gives the compression. It has one row per run,
decision (without or with shifts) and unit of images; the rows of a run are consecutive:

=============================== =====================================================================================
``run``                         key of the run, the last part of its folder's name
``objective``, ``role``,        label of the objective; ``final``, ``fold`` or ``first`` (stage); random seed; index of the
``seed``, ``fold``, ``trial``   held-out fold and of the trial, empty where there is none
``model.objective``             class path and arguments of the objective as JSON
``model...``, ``trainer...``    other settings in which the runs differ, one column each
``epochs``, ``steps``           length of the training
``step_ms``,                    median milliseconds of an optimiser step without and with the wait for its batch; peak
``step_with_data_ms``,          memory in MiB, of the GPU if there is one, else of the process
``memory_mib``
``weights``, ``batches``        fingerprints of the initial weights and of the batches
``commit``                      commit of mcseg's sources
``class_pixels/<class>``        labelled pixels of the training images
``shifted``, ``shift/<class>``  whether shifts were added to the logits before the decision; the shifts
``images``                      the unit: one validation image by name or, for a run on a fold, one glob pattern; the
                                counts of the held-out images that it matches are summed
``correct/<class>``,            pixels predicted correctly, in the target, in the prediction; void is left out
``target/<class>``,
``predicted/<class>``
=============================== =====================================================================================

The IoU of a class is correct / (target + predicted - correct), from counts summed over the images.
"""

import fnmatch
import gzip
import json
import lzma
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from mcseg.atomic import write_atomically
from mcseg.compare.comparison import Comparison, Entry
from mcseg.compare.statistics import Counts

if TYPE_CHECKING:
    from pandas import DataFrame

FILE = "counts.csv.xz"
_PARTS = ("correct", "target", "predicted")
_COSTS = ("step_ms", "step_with_data_ms", "memory_mib")
_HAS_A_COLUMN = ("seed_everything", "data.init_args.held_out")  # settings with the columns `seed` and `fold`


def write_counts(runs: Iterable[tuple[Path, Mapping[str, Any]]], path: Path) -> None:
    """Write the table of finished runs.

    Args:
        runs: for each run, its folder with ``result.json`` and ``counts.npz``, and its ``objective``, ``role``, ``seed``,
            ``fold`` and ``trial`` in this study. They replace those in ``result.json``: studies may share runs.
        path: the file; its suffix gives the compression.
    """
    results = [(folder, json.loads((folder / "result.json").read_text()) | dict(about)) for folder, about in runs]
    differing = _differing_settings([result["settings"] for _, result in results])

    def write(temporary: Path) -> None:
        with _open(temporary) as file:
            for index, (folder, result) in enumerate(results):
                frame = _frame(folder, result, differing)
                file.write(frame.to_csv(index=False, header=index == 0, lineterminator="\n").encode())

    write_atomically(path, write)


def read_counts(path: str | Path) -> "DataFrame":
    """Read a table written by :func:`write_counts`: one row per run, decision and unit of images.

    Raises:
        ValueError: the file is not a table of pixel counts.
    """
    import pandas as pd

    text: dict[Any, Any] = dict.fromkeys(("run", "objective", "images", "weights", "batches", "commit"), str)
    try:
        # A label or a class may have the name "NA"
        table = pd.read_csv(path, dtype={**text, "fold": "Int64", "trial": "Int64"}, keep_default_na=False, na_values=[""])
    except (UnicodeDecodeError, pd.errors.ParserError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a table of pixel counts ({error}); give the {FILE} of a study") from None
    missing = [name for name in ("objective", "role", "seed", "shifted", "images") if name not in table]
    if missing or not class_names(table):
        missing = missing or [f"{part}/<class>" for part in _PARTS]
        raise ValueError(f"{path}: no column {', '.join(missing)}; give the {FILE} of a study")
    return table


def class_names(table: "DataFrame") -> list[str]:
    """Return the names of a table's classes by train id."""
    return [name.partition("/")[2] for name in map(str, table.columns) if name.startswith("correct/")]


def counts_of(rows: "DataFrame") -> Counts:
    """Return the pixel counts (N,3,C) int64 of N rows: predicted correctly, in the target, in the prediction."""
    names = class_names(rows)
    return np.stack([rows[[f"{part}/{name}" for name in names]].to_numpy(np.int64) for part in _PARTS], axis=1)


def comparison(table: "DataFrame", baseline: str | None = None) -> Comparison:
    """Compare the final runs of a table.

    Args:
        table: table from :func:`read_counts`.
        baseline: label of the objective that all differences refer to; None is the first in the table.

    Raises:
        ValueError: there is no final run, or no objective with that label.
    """
    finals = table[table["role"] == "final"]
    labels = list(dict.fromkeys(finals["objective"]))
    if not labels:
        raise ValueError("the table has no final runs (role 'final') to compare")
    if baseline is not None and baseline not in labels:
        raise ValueError(f"baseline: found {baseline}, expected one of the objectives {', '.join(labels)}")
    entries = []
    for shifted in (False, True):
        for label in labels:
            rows = finals[(finals["objective"] == label) & (finals["shifted"] == shifted)]
            by_seed = {int(seed): group for seed, group in rows.groupby("seed")}
            counts = {seed: counts_of(group) for seed, group in by_seed.items()}
            costs = {seed: {cost: float(group[cost].iloc[0]) for cost in _COSTS} for seed, group in by_seed.items()}
            if counts:
                entries.append(Entry(label=label, shifted=shifted, counts=counts, costs=costs))
    names = class_names(table)
    pixels = finals[[f"class_pixels/{name}" for name in names]].iloc[0].astype(np.int64).tolist()
    return Comparison(entries, names, pixels, labels[0] if baseline is None else baseline)


def costs_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Return step times and memory from a result.json; see ``costs`` of :class:`~mcseg.compare.comparison.Entry`."""
    times = {f"{key}_ms": result["seconds"][key] for key in ("step", "step_with_data")}
    memory = result["memory_bytes"].get("gpu", result["memory_bytes"]["process"])
    return {key: np.nan if value is None else 1000 * value for key, value in times.items()} | {"memory_mib": memory / 2**20}


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".xz":
        return lzma.open(path, "wb")
    if path.suffix == ".gz":
        return gzip.GzipFile(path, "wb", mtime=0)  # type: ignore[return-value]
    return path.open("wb")


def _frame(folder: Path, result: Mapping[str, Any], differing: Sequence[str]) -> "DataFrame":
    """Rows of one run."""
    import pandas as pd

    names = result["classes"]["names"]
    settings = dict(_flat(result["settings"]))
    facts: dict[str, Any] = {"run": result["key"]}
    facts |= {key: result[key] for key in ("objective", "role", "seed", "fold", "trial")}
    facts["model.objective"] = json.dumps(result["settings"]["model"]["objective"])
    facts |= {key: settings.get(key) for key in differing}
    facts |= {"epochs": len(result["curves"]), "steps": result["steps"]}
    facts |= {key: round(value, 3) for key, value in costs_of(result).items()}
    facts |= result["fingerprint"] | {"commit": result["versions"].get("commit")}
    facts |= {f"class_pixels/{name}": n for name, n in zip(names, result["classes"]["training_pixels"], strict=True)}
    patterns = result["settings"]["data"]["init_args"].get("held_out") if result["role"] != "final" else None
    frames = []
    with np.load(folder / "counts.npz") as file:
        for shifted in (False, True):
            if shifted and "counts_shifted" not in file:
                continue
            units, counts = _units(file["names"].tolist(), file["counts_shifted" if shifted else "counts"], patterns)
            shifts = result["shifts"] if shifted else [None] * len(names)
            shared = facts | {"shifted": shifted} | {f"shift/{n}": s for n, s in zip(names, shifts, strict=True)}
            columns: dict[str, Any] = {key: [value] * len(units) for key, value in shared.items()} | {"images": units}
            for index, part in enumerate(_PARTS):
                columns |= {f"{part}/{name}": counts[:, index, c] for c, name in enumerate(names)}
            frames.append(pd.DataFrame(columns).astype({"fold": "Int64", "trial": "Int64"}))
    return pd.concat(frames)


def _units(names: Sequence[str], counts: Counts, patterns: Sequence[str] | None) -> tuple[list[str], Counts]:
    """Sum the counts of held-out images by the first pattern that matches; without patterns each image is a unit."""
    if not patterns:
        return list(names), counts
    first = np.array([next(i for i, p in enumerate(patterns) if fnmatch.fnmatchcase(name, p)) for name in names])
    return list(patterns), np.stack([counts[first == index].sum(0) for index in range(len(patterns))])


def _differing_settings(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """List settings in which runs differ, except the objective, seed and fold, which have columns of their own."""
    values_of: dict[str, set[str]] = {}
    for one in settings:
        for key, value in _flat(one):
            values_of.setdefault(key, set()).add(json.dumps(value))
    excluded = ("model.objective.", *_HAS_A_COLUMN)
    return [key for key, values in values_of.items() if len(values) > 1 and not key.startswith(excluded)]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, json.dumps(value) if isinstance(value, list | dict) else value
