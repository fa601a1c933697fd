"""Train for thousands of steps and monitor memory, file handles, processes and threads.

The run has loader workers, validation, pictures, checkpoints and a log, as usual.

python benchmarks/soak.py                    # 5000 steps in 100 epochs of drawn scenes, a few minutes on two cores
python benchmarks/soak.py --steps 50000 --accelerator gpu

Each epoch is sampled once, in its middle: the resident memory of the training process; that of the training process and
its loader workers together, with shared pages counted once; the memory that glibc has allocated for the training process;
and the number of Python objects, including uncollected cycles. The loader workers are restarted every five epochs. Growth
compares the median of the last fifth with that of the second fifth; the first fifth is warm-up. Exits with status 1 if the
training process grew by 2 % or more, or the number of handles, processes or threads grew at all.
"""

import argparse
import csv
import ctypes
import gc
import json
import re
import statistics
import sys
import tempfile
from pathlib import Path

import pytorch_lightning as pl
import torch

from mcseg.run.main import main as mcseg

COLUMNS = ("step", "training_mib", "all_mib", "allocated_mib", "objects", "handles", "processes", "threads")


class _Mallinfo(ctypes.Structure):
    """Result of glibc's ``mallinfo2``."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _allocated() -> int:
    """Return the bytes that glibc has allocated and not freed; 0 without glibc 2.33."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


def _number(file: str, key: str) -> int:
    """Read a number from a file in ``/proc``."""
    match = re.search(rf"^{key}:\s+(\d+)", Path("/proc", file).read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])


class Recorder(pl.Callback):
    """Append a row of ``COLUMNS`` to a CSV file in the middle of each epoch.

    Args:
        path: the CSV file.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Record a row after the middle batch."""
        if batch_idx == int(trainer.num_training_batches) // 2:
            children = [
                child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()
            ]
            handles = len(list(Path("/proc/self/fd").iterdir())) - 1  # without the handle of the listing
            pages = sum(_number(f"{process}/smaps_rollup", "Pss") for process in ("self", *children)) / 1024
            row = (
                _number("self/status", "VmRSS") / 1024,
                pages,
                _allocated() / 2**20,
                len(gc.get_objects()),
                handles,
                len(children),
                _number("self/status", "Threads"),
            )
            with Path(self.path).open("a") as file:
                csv.writer(file).writerow([trainer.global_step, *(round(value, 1) for value in row)])


def main() -> None:
    """Train, print the table, and check the growth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--accelerator", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "soak.csv"
        settings: dict[str, dict[str, object]] = {
            "data": {"train_scenes": 200, "val_scenes": 8, "size": [96, 128], "crop_size": [64, 96]}
            | {"batch_size": 4, "eval_batch_size": 1, "num_workers": options.workers},
            "model": {"arch": "fpn", "encoder": "tu-test_resnet.r160_in1k", "encoder_weights": None}
            | {"network_options": {"decoder_dropout": 0.1}},
            "trainer": {"max_epochs": max(5, options.steps // 50), "accelerator": options.accelerator, "devices": 1}
            | {"reload_dataloaders_every_n_epochs": 5, "enable_progress_bar": False, "default_root_dir": f"{folder}/run"},
            "panel": {"every_n_epochs": 1},
            "confusion": {"every_n_epochs": 1},
        }
        arguments = [
            f"--{section}.{key}={value if isinstance(value, str) else json.dumps(value)}"
            for section, values in settings.items()
            for key, value in values.items()
        ]
        mcseg(["fit", "synthetic", *arguments, "--trainer.callbacks+=soak.Recorder", f"--trainer.callbacks.path={path}"])
        with path.open() as file:
            rows = [[float(value) for value in row] for row in csv.reader(file)]
    print(f"torch {torch.__version__}, {options.accelerator}, {options.workers} loader workers")
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---:|" * len(COLUMNS))
    for row in rows[:: max(1, len(rows) // 10)]:
        print("| " + " | ".join(f"{value:.0f}" for value in row) + " |")
    fifth = len(rows) // 5
    bad = False
    for index, name in enumerate(COLUMNS[1:], 1):
        before, after = (statistics.median(row[index] for row in part) for part in (rows[fifth : 2 * fifth], rows[-fifth:]))
        growth = after / before - 1
        bad |= growth >= 0.02 if name == "training_mib" else after > before and name in ("handles", "processes", "threads")
        print(f"{name}: {before:.1f} to {after:.1f}, {growth:+.2%}")
    sys.exit(int(bad))


if __name__ == "__main__":
    main()
