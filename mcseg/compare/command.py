"""``mcseg compare``: parse the options of a study; all other options are passed to its runs."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

from mcseg.compare import run_study
from mcseg.compare.counts import comparison, read_counts
from mcseg.compare.study import StudySettings, setting_arguments

_DESCRIPTION = """\
Train every objective with every seed on one data recipe; compare mIoU, rare classes and cost on the validation split.
Repeat the command to continue a study that stopped. All other options are those of mcseg fit and apply to every run."""
_EXAMPLE = """\
example:
  mcseg compare camvid --root CamVid --objectives cross_entropy lovasz margin_calibration:tau=20 --seeds 0 1 2 --jobs 2 \\
    --folds '0001TP_*' '0006R0_*' '0016E5_*' --tune model.optimizer.lr=0.001,0.003 --trainer.max_epochs 30"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"compare: {message}")


def command(recipe: str, arguments: Sequence[str]) -> None:
    """Run ``mcseg compare``.

    Args:
        recipe: name of the data recipe.
        arguments: command line after the verb, with recipes as paths.

    Raises:
        SystemExit: 1 if a run failed, 130 after Ctrl-C.
        ValueError: an option is invalid.
    """
    parser = _Parser(
        prog="mcseg compare [RECIPE]",
        allow_abbrev=False,
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    options = {setting.name: dict(setting.metadata) for setting in fields(StudySettings) if setting.metadata}
    parsers = {name: metadata.pop("parse") for name, metadata in options.items() if "parse" in metadata}
    for name, metadata in options.items():
        add(f"--{name}", default=None, **metadata)
    add("--study", metavar="FILE", help="YAML file with these settings and, if needed, trials for each objective")
    add("--only_report", action="store_true", help="start no run; write tables and report of the finished runs")
    add("--read", metavar="FILE", help="start no run; print the comparison of a study from its counts.csv.xz")
    add(
        "--config",
        "-c",
        action="append",
        default=[],
        metavar="NAME_OR_PATH",
        help="data recipe; several are merged in order",
    )
    parsed, shared = parser.parse_known_args(list(arguments))
    if parsed.read:
        print(comparison(read_counts(parsed.read), parsed.baseline))
        return
    given = {name: getattr(parsed, name) for name in options if getattr(parsed, name) is not None}
    given |= {name: parse(given[name]) for name, parse in parsers.items() if name in given}
    settings = StudySettings(**(_read_study(Path(parsed.study)) if parsed.study else {}) | given)
    # Options of the command line come last, so they override the study file
    shared = [*(f"--config={path}" for path in parsed.config), *setting_arguments(settings.settings or {}), *shared]
    if not settings.objectives:
        raise ValueError("compare: no objectives; name at least one, for example --objectives cross_entropy lovasz")
    try:
        results = run_study(recipe, shared, settings, only_report=parsed.only_report)
    except KeyboardInterrupt:
        print("interrupted; repeat the command to run the missing runs")
        raise SystemExit(130) from None
    if results.failures:
        raise SystemExit(1)


def _read_study(path: Path) -> dict[str, Any]:
    known = [setting.name for setting in fields(StudySettings)]
    if not path.is_file():
        raise ValueError(f"--study {path}: no such file; expected a YAML file with some of {', '.join(known)}")
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    unknown = [str(key) for key in settings if key not in known] if isinstance(settings, dict) else [type(settings).__name__]
    if unknown:
        raise ValueError(f"{path}: found {', '.join(unknown)}, expected some of {', '.join(known)}")
    return dict(settings)
