"""``mcseg compare``: the options of a comparison; all others go to the runs."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from mcseg.compare import run_study
from mcseg.compare.counts import comparison, read_counts
from mcseg.compare.study import parse_grid, parse_overrides, setting_words

_DESCRIPTION = """\
Trains every objective with every seed on one data recipe, and compares mIoU, rare classes and cost on the validation split.
The same command goes on where it stopped. All other options are those of fit, and hold for every run."""
_EXAMPLE = """\
example:
  mcseg compare camvid --root CamVid --objectives cross_entropy lovasz margin_calibration:tau=20 --seeds 0 1 2 --jobs 2 \\
    --folds '0001TP_*' '0006R0_*' '0016E5_*' --tune model.optimizer.lr=0.001,0.003 --trainer.max_epochs 30"""

# Settings of a study, on the command line or in a file; `settings`, those of all runs, are options of their own there.
_STUDY = (
    *("objectives", "seeds", "baseline", "folds", "tune", "first", "then"),
    *("settings", "folder", "jobs", "keep_checkpoints"),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"compare: {message}")


def command(recipe: str, words: Sequence[str]) -> None:
    """Run ``mcseg compare``.

    Args:
        recipe: name of the data recipe.
        words: behind the verb, recipes as paths.

    Raises:
        SystemExit: 1 where a run failed, 130 after Ctrl-C.
        ValueError: an option cannot be used.
    """
    parser = _Parser(
        prog="mcseg compare [RECIPE]",
        allow_abbrev=False,
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--objectives", nargs="+", metavar="NAME[:KEY=VALUE,...]", help="recipes below objectives, or YAML files")
    option("--seeds", nargs="+", type=int, metavar="N", help="seeds of the final runs (0 1 2)")
    option("--baseline", metavar="NAME", help="objective that the others are compared to (the first)")
    option("--folds", nargs="+", metavar="PATTERN", help="names of the training images that each fold holds out")
    option("--tune", nargs="+", metavar="KEY=V1,V2", help="settings of which each objective's best are chosen on the folds")
    option("--first", metavar="NAME", help="objective of a first stage; all others start from its weights")
    option("--then", nargs="+", metavar="KEY=VALUE", help="settings of the second stage")
    option("--study", metavar="FILE", help="YAML file with such settings, and with trials for each objective")
    option("--folder", metavar="DIR", help="where results go and are looked for (runs/compare/RECIPE)")
    option("--jobs", type=int, metavar="N", help="runs at the same time (one for each GPU, or 1)")
    option("--keep_checkpoints", action="store_true", default=None, help="keep the last weights of the final runs")
    option("--only_report", action="store_true", help="run nothing; make tables and report of what there is")
    option("--read", metavar="FILE", help="run nothing; print the comparison of a study that was kept as counts.csv.xz")
    option("--config", "-c", action="append", default=[], metavar="NAME_OR_PATH", help="data recipe; several are layered")
    found, shared = parser.parse_known_args(list(words))
    if found.read:
        print(comparison(read_counts(found.read), found.baseline))
        return
    given = {key: value for key, value in vars(found).items() if value is not None and key in _STUDY}
    given |= {key: read(given[key]) for key, read in (("tune", parse_grid), ("then", parse_overrides)) if key in given}
    settings = (_read_study(Path(found.study)) if found.study else {}) | given
    # what is said on the command line comes last and wins
    configs = [f"--config={path}" for path in found.config]
    shared = [*configs, *setting_words(settings.pop("settings", None) or {}), *shared]
    if not settings.get("objectives"):
        raise ValueError("compare: no --objectives given; name some, for example --objectives cross_entropy lovasz")
    try:
        results = run_study(recipe, shared, only_report=found.only_report, **settings)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is missing")
        raise SystemExit(130) from None
    if results.failures:
        raise SystemExit(1)


def _read_study(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--study {path}: no such file; expected a YAML file with some of {', '.join(_STUDY)}")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    unknown = [str(key) for key in found if key not in _STUDY] if isinstance(found, dict) else [type(found).__name__]
    if unknown:
        raise ValueError(f"{path}: found {', '.join(unknown)}, expected some of {', '.join(_STUDY)}")
    return dict(found)
