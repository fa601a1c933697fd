"""Resume a run from its folder: the arguments of the command, and loggers that append."""

import argparse
import csv
import os
import pkgutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor

from mcseg.checkpoints.files import read_checkpoint
from mcseg.lightning_internals import batches_of_unfinished_epoch, set_csv_columns

# Options that belong to the run that is resumed -> what they set
_OF_THE_RUN = {"--ckpt_path": "last.ckpt", "--trainer.default_root_dir": "folder"}
# Settings outside the data that decide which images the batches of an epoch have
_ORDER = (
    "seed_everything", "trainer.devices", "trainer.num_nodes", "trainer.limit_train_batches", "trainer.overfit_batches",
    "trainer.accumulate_grad_batches",
)  # fmt: skip
# Settings of the data that do not
_NO_ORDER = (
    "root", "eval_batch_size", "num_workers", "crop_size", "image_scale", "scale_range", "max_class_share", "flip",
    "color_jitter", "rare_crop_share", "max_side", "predict_root", "predict_split", "cache_dir", "val_scenes", "test_scenes",
    "test_root",
)  # fmt: skip


class ContinuedCSVLogger(CSVLogger):
    """Lightning's CSV logger, which appends to an existing file instead of deleting it.

    Args:
        step: Completed training steps; rows of later steps are dropped, because the resumed run writes them again.
        save_dir: Folder of ``metrics.csv``.
        **options: Options of the CSV logger.
    """

    def __init__(self, step: int, save_dir: str | Path, **options: Any) -> None:
        super().__init__(save_dir, **options)
        self._step = step
        self._has_taken_over = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, on rank 0; its first use copies the existing rows."""
        if not self._has_taken_over:
            self._has_taken_over = True
            path = Path(self.log_dir) / "metrics.csv"
            kept = path.with_suffix(".kept")
            if path.is_file() and not kept.exists():
                path.replace(kept)  # the writer would delete it
            writer: Any = super().experiment
            if kept.is_file():
                with kept.open(newline="", encoding="utf-8") as file:
                    reader = csv.DictReader(file)
                    keys = list(reader.fieldnames or [])
                    # the last row may be incomplete
                    rows = [row for row in reader if (row["step"] or "").isdigit() and int(row["step"]) < self._step]
                with path.open("w", newline="", encoding="utf-8") as file:
                    output = csv.DictWriter(file, keys)
                    output.writeheader()
                    output.writerows(rows)
                set_csv_columns(writer, keys)
                kept.unlink()
        return super().experiment


def resume_logger(logger: Namespace, step: int) -> None:
    """Make a logger append to the run's records and drop rows after the checkpoint's step.

    Args:
        logger: Class path and arguments of the logger; modified. Loggers other than the CSV logger, TensorBoard and W&B are
            unchanged.
        step: Completed training steps of the checkpoint; 0 without one.
    """
    kind, settings = logger.class_path.rpartition(".")[2], logger.init_args
    folder = Path(settings.get("save_dir") or ".")
    if kind == "CSVLogger":
        logger.class_path = f"{ContinuedCSVLogger.__module__}.{ContinuedCSVLogger.__qualname__}"
        settings.step = step
    elif kind == "TensorBoardLogger":
        versions = [path.name.removeprefix("version_") for path in (folder / settings.name).glob("version_*")]
        if settings.version is None:
            settings.version = max((int(version) for version in versions if version.isdigit()), default=0)
        settings.purge_step = step
    elif kind == "WandbLogger":
        # run-<time>-<id>. Ignore offline-run-...: W&B's server does not have such a run yet, and syncing a resumed part
        # would replace the first one.
        ids = [path.name.split("-", 2)[2] for path in sorted(folder.glob("wandb/run-*-*"))]
        if ids and settings.id is None and "WANDB_RUN_ID" not in os.environ:
            settings.id = ids[-1]
            if "resume" in settings:  # some versions of the parser replace Lightning's default by null
                settings.resume = "allow"


def expand_resume(words: list[str]) -> tuple[list[str], Path | None]:
    """Replace ``fit --resume RUN_FOLDER`` by the run's settings, its folder and its last checkpoint, if there is one.

    Args:
        words: Verb and arguments.

    Returns:
        The arguments, and the run folder; the same arguments and None without ``--resume``.

    Raises:
        FileNotFoundError: The folder has no ``config.yaml``.
        ValueError: The verb is not ``fit``.
    """
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("--resume")
    chosen, rest = options.parse_known_args(words)
    if chosen.resume is None:
        return words, None
    for word in rest:
        if (flag := word.partition("=")[0]) in _OF_THE_RUN:
            raise ValueError(f"--resume: found {flag}, but a resumed run has its own {_OF_THE_RUN[flag]}; remove it")
    if rest[:1] != ["fit"]:
        verb = f"the verb {rest[0]!r}" if rest else "no verb"
        raise ValueError(f"--resume: found {verb}, expected mcseg fit --resume RUN_FOLDER")
    folder = Path(chosen.resume)
    settings = folder / "config.yaml"
    if not settings.is_file():
        run = _run_near(folder)
        advice = f"use --resume {run}" if run else "expected the folder of a run, such as runs/camvid/<time>"
        raise FileNotFoundError(f"--resume: no {settings}; {advice}")
    last = _checkpoint_folder(settings) / "last.ckpt"
    words = ["fit", "--config", str(settings), "--trainer.default_root_dir", str(folder), *rest[1:]]
    return words + (["--ckpt_path", str(last)] if last.is_file() else []), folder


def _checkpoint_folder(settings: Path) -> Path:
    """Return the folder of a run's checkpoints, which ``checkpoint.dirpath`` may have set."""
    default = settings.parent / "checkpoints"
    with suppress(yaml.YAMLError, AttributeError):  # find_recipes reports a broken file
        content = yaml.safe_load(settings.read_text(encoding="utf-8"))
        return Path((content.get("checkpoint") or {}).get("dirpath") or default)
    return default


def _run_near(path: Path) -> Path | None:
    """Return the run folder that contains ``path``, or else the last run in a subfolder; None if there is none."""
    inside = [parent for parent in list(path.parents)[:2] if path.exists() and (parent / "config.yaml").is_file()]
    below = [*path.glob("*/config.yaml"), *path.glob("*/*/config.yaml")] if path.is_dir() else []
    last = max(below, key=lambda file: file.stat().st_mtime, default=None)
    return inside[0] if inside else last.parent if last else None


def changed_settings(run: Namespace, given: Namespace) -> dict[str, tuple[Any, Any]]:
    """Compare two configurations.

    Args:
        run: Settings of the run.
        given: Settings of the run and the command line.

    Returns:
        Setting, as on the command line -> its two values. If a class differs, its arguments are left out.
    """
    old, new = dict(run.items()), dict(given.items())
    keys = [key for key in {**old, **new} if not _is_same(key, old.get(key), new.get(key))]
    classes = tuple(key.removesuffix("class_path") for key in keys if key.endswith(".class_path"))
    return {
        key.replace(".init_args", "").removesuffix(".class_path"): (old.get(key), new.get(key))
        for key in keys
        if key.endswith(".class_path") or not key.startswith(classes)
    }


def _is_same(key: str, old: Any, new: Any) -> bool:
    if key.endswith(".class_path") and old and new:  # a class may have several paths
        return pkgutil.resolve_name(old) is pkgutil.resolve_name(new)
    if isinstance(old, Tensor) and isinstance(new, Tensor):  # class weights of a loss of torch
        return torch.equal(old, new)
    return bool(old == new)


def refuse_model_settings(changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise ValueError if a setting of the module differs from the run's: the checkpoint would silently override it."""
    model = {name: values for name, values in changed.items() if name.startswith("model.")}
    if model:
        kept = " and ".join(f"{name} {_text(old)}" for name, (old, _) in model.items())
        found = " and ".join(_text(new) for _, new in model.values())
        raise ValueError(f"--resume keeps the run's {kept}; found {found}; start a new run with --model.init_from")


def refuse_other_batches(changed: Mapping[str, tuple[Any, Any]], checkpoint: Path) -> None:
    """Raise ValueError if a setting changes the batches of an epoch that the checkpoint has begun but not finished."""
    done = batches_of_unfinished_epoch(read_checkpoint(checkpoint))
    names = [
        name
        for name in changed
        if name in _ORDER or (name.partition(".")[0] == "data" and name.removeprefix("data.") not in _NO_ORDER)
    ]
    if done and names:
        found = " and ".join(f"{name} {_text(changed[name][1])} instead of {_text(changed[name][0])}" for name in names)
        raise ValueError(
            f"--resume: found {found}, but the run stopped after {done} batches of an epoch, and the rest of it would have "
            "other images; resume with the former value until the end of the epoch, or start a new run with "
            "--model.init_from"
        )


def describe_changes(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """List changed settings with both values in one line."""
    return ", ".join(f"{name} {_text(new)} instead of {_text(old)}" for name, (old, new) in changed.items())


def _text(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else "null" if value is None else str(value)
