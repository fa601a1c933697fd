"""Resume a run from its folder."""

import argparse
import csv
from pathlib import Path
from typing import Any

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
        """The writer, on rank 0; its first use takes the rows over."""
        if not self._has_taken_over:
            self._has_taken_over = True
            path = Path(self.log_dir) / "metrics.csv"
            kept = path.with_suffix(".kept")
            if path.is_file() and not kept.exists():
                path.replace(kept)  # out of the way of the writer, which would delete it
            writer: Any = super().experiment
            if kept.is_file():
                with kept.open(newline="", encoding="utf-8") as file:
                    reader = csv.DictReader(file)
                    keys = list(reader.fieldnames or [])
                    # the last row may have been cut off
                    rows = [row for row in reader if (row["step"] or "").isdigit() and int(row["step"]) < self._step]
                with path.open("w", newline="", encoding="utf-8") as file:
                    output = csv.DictWriter(file, keys)
                    output.writeheader()
                    output.writerows(rows)
                set_csv_columns(writer, keys)
                kept.unlink()
        return super().experiment


def expand_resume(words: list[str]) -> tuple[list[str], Path | None]:
    """Spell out ``fit --resume RUN_FOLDER``: the run's settings, its folder, and its last checkpoint if there is one."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("--resume")
    chosen, rest = options.parse_known_args(words)
    if chosen.resume is None:
        return words, None
    if rest[0] != "fit":
        raise ValueError(f"--resume: found with {rest[0]!r}, expected mcseg fit --resume RUN_FOLDER")
    folder = Path(chosen.resume)
    settings, last = folder / "config.yaml", folder / "checkpoints" / "last.ckpt"
    if not settings.is_file():
        raise FileNotFoundError(f"--resume: no {settings}; expected the folder of a run, such as runs/camvid/<time>")
    words = ["fit", "--config", str(settings), "--trainer.default_root_dir", str(folder), *rest[1:]]
    return words + (["--ckpt_path", str(last)] if last.is_file() else []), folder
