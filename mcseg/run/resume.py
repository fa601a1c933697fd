"""Resume a run from its folder: the arguments of the command, and loggers that append."""

import argparse
import csv
import os
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger

from mcseg.lightning_internals import set_csv_columns


class ContinuedCSVLogger(CSVLogger):
    """Lightning's CSV logger, which appends to an existing file instead of deleting it.

    Args:
        step: completed training steps; rows of later steps are dropped, as the resumed run writes them again.
        save_dir: folder of ``metrics.csv``.
        **options: of the CSV logger.
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
        logger: class path and arguments of the logger; modified. Loggers other than the CSV logger, TensorBoard and W&B stay
            as they are.
        step: completed training steps of the checkpoint, 0 without one.
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
        # run-<time>-<id>. Not offline-run-...: W&B's server does not have such a run yet, and syncing a resumed part would
        # replace the first one.
        ids = [path.name.split("-", 2)[2] for path in sorted(folder.glob("wandb/run-*-*"))]
        if ids and settings.id is None and "WANDB_RUN_ID" not in os.environ:
            settings.id = ids[-1]
            if "resume" in settings:  # some versions of the parser replace Lightning's default by null
                settings.resume = "allow"


def expand_resume(words: list[str]) -> tuple[list[str], Path | None]:
    """Replace ``fit --resume RUN_FOLDER`` by the run's settings, its folder and its last checkpoint, if there is one.

    Args:
        words: verb and arguments.

    Returns:
        The arguments, and the run folder; the same arguments and None without ``--resume``.

    Raises:
        FileNotFoundError: the folder has no ``config.yaml``.
        ValueError: the verb is not ``fit``.
    """
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("--resume")
    chosen, rest = options.parse_known_args(words)
    if chosen.resume is None:
        return words, None
    if rest[:1] != ["fit"]:
        verb = f"the verb {rest[0]!r}" if rest else "no verb"
        raise ValueError(f"--resume: found {verb}, expected mcseg fit --resume RUN_FOLDER")
    folder = Path(chosen.resume)
    settings, last = folder / "config.yaml", folder / "checkpoints" / "last.ckpt"
    if not settings.is_file():
        raise FileNotFoundError(f"--resume: no {settings}; expected the folder of a run, such as runs/camvid/<time>")
    words = ["fit", "--config", str(settings), "--trainer.default_root_dir", str(folder), *rest[1:]]
    return words + (["--ckpt_path", str(last)] if last.is_file() else []), folder
