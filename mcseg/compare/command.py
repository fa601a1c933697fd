"""``mcseg compare``: the options of a comparison; all others go to the runs."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

from mcseg.compare import run_study
from mcseg.compare.counts import comparison, read_counts
from mcseg.compare.study import StudySettings, setting_words

_DESCRIPTION = """\
Trains every objective with every seed on one data recipe, and compares mIoU, rare classes and cost on the validation split.
The same command continues where it stopped. All other options are those of fit, and hold for every run."""
_EXAMPLE = """\
example:
  mcseg compare camvid --root CamVid --objectives cross_entropy lovasz margin_calibration:tau=20 --seeds 0 1 2 --jobs 2 \\
    --folds '0001TP_*' '0006R0_*' '0016E5_*' --tune model.optimizer.lr=0.001,0.003 --trainer.max_epochs 30"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"compare: {message}")


def command(recipe: str, words: Sequence[str]) -> None:
    """Run ``mcseg compare``.

    Args:
        recipe: name of the data recipe.
        words: after the verb, recipes as paths.

    Raises:
        SystemExit: 1 if a run failed, 130 after Ctrl-C.
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
    own = {setting.name: dict(setting.metadata) for setting in fields(StudySettings) if setting.metadata}
    read = {name: metadata.pop("read") for name, metadata in own.items() if "read" in metadata}
    for name, metadata in own.items():
        option(f"--{name}", default=None, **metadata)
    option("--study", metavar="FILE", help="YAML file with such settings, and with trials for each objective")
    option("--only_report", action="store_true", help="run nothing; make tables and report of what there is")
    option("--read", metavar="FILE", help="run nothing; print the comparison of a study that was kept as counts.csv.xz")
    option("--config", "-c", action="append", default=[], metavar="NAME_OR_PATH", help="data recipe; several are layered")
    found, shared = parser.parse_known_args(list(words))
    if found.read:
        print(comparison(read_counts(found.read), found.baseline))
        return
    given = {name: getattr(found, name) for name in own if getattr(found, name) is not None}
    given |= {name: read_words(given[name]) for name, read_words in read.items() if name in given}
    settings = StudySettings(**(_read_study(Path(found.study)) if found.study else {}) | given)
    # settings of the command line come last and win
    shared = [*(f"--config={path}" for path in found.config), *setting_words(settings.settings or {}), *shared]
    if not settings.objectives:
        raise ValueError("compare: no --objectives given; name some, for example --objectives cross_entropy lovasz")
    try:
        results = run_study(recipe, shared, settings, only_report=found.only_report)
    except KeyboardInterrupt:
        print("interrupted; the same command continues with what is missing")
        raise SystemExit(130) from None
    if results.failures:
        raise SystemExit(1)


def _read_study(path: Path) -> dict[str, Any]:
    known = [setting.name for setting in fields(StudySettings)]
    if not path.is_file():
        raise ValueError(f"--study {path}: no such file; expected a YAML file with some of {', '.join(known)}")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    unknown = [str(key) for key in found if key not in known] if isinstance(found, dict) else [type(found).__name__]
    if unknown:
        raise ValueError(f"{path}: found {', '.join(unknown)}, expected some of {', '.join(known)}")
    return dict(found)
