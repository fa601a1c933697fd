"""End a training at random moments and compare what comes of it with one that was left alone.

python benchmarks/kills.py                                   # ten times, a few minutes on two cores
python benchmarks/kills.py --kills 30 --seed 1 --signals KILL

A run of drawn scenes gets a signal, with all its processes at once, after a time drawn evenly from 0 to 0.4 of that of a
whole run, is then resumed, and so on; SIGKILL and SIGTERM in turn. The run has loaders, validation, checkpoints, a log,
averaged weights, and gradients that are accumulated over two batches. What it ends with must be that of a run of the same
settings that was never stopped, on the CPU bit by bit: weights, their average, optimiser, scores, rows of metrics.csv. Ends
with status 1 where anything differs.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from mcseg.checkpoints.files import steps_done

SETTINGS = {
    "data.train_scenes": 60,
    "data.val_scenes": 6,
    "data.size": "[96,128]",
    "data.crop_size": "[64,96]",
    "data.batch_size": 4,
    "data.eval_batch_size": 1,
    "data.num_workers": 2,
    "model.arch": "fpn",
    "model.encoder": "tu-test_resnet.r160_in1k",
    "model.network_options": '{"decoder_dropout":0.3}',
    "trainer.max_epochs": 20,
    "trainer.accumulate_grad_batches": 2,
    "trainer.accelerator": "cpu",
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": "false",
}


def fit(words: list[str], number: signal.Signals = signal.SIGKILL, seconds: float | None = None) -> bool:
    """Run ``mcseg fit``; send it and its loaders a signal after some seconds. Whether it ended by itself."""
    command = [sys.executable, "-W", "ignore", "-m", "mcseg", "fit", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True) as process:
        try:
            _, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, number)
            process.communicate(timeout=60)  # longer it must not take
            return False
    if process.returncode:
        sys.exit(said.decode())
    return True


def rows(folder: Path) -> list[dict[str, str]]:
    """Rows of a run's log."""
    with (folder / "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def differences(whole: Path, killed: Path) -> list[str]:
    """What differs between two runs."""
    one, other = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (whole, killed))
    parts = ("state_dict", "current_model_state")
    found = [f"{part}.{name}" for part in parts for name in one[part] if not torch.equal(one[part][name], other[part][name])]
    found += ["optimiser"] * (str(one["optimizer_states"]) != str(other["optimizer_states"]))
    found += ["metrics.csv"] * (rows(whole) != rows(killed))
    files = [{path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (whole, killed)]
    return found + [str(path) for path in files[0] ^ files[1]]


def main() -> None:
    """Train, kill, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", nargs="+", choices=("KILL", "TERM", "INT"), default=["KILL", "TERM"])
    parser.add_argument("--folder", help="a new folder that is to keep both runs")
    options = parser.parse_args()
    words = ["synthetic", "--config", "options/ema", *(f"--{key}={value}" for key, value in SETTINGS.items())]
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() if options.folder is None else nullcontext(options.folder) as parent:
        whole, killed = Path(parent, "whole"), Path(parent, "killed")
        start = time.perf_counter()
        fit([*words, f"--trainer.default_root_dir={whole}"])
        length = time.perf_counter() - start
        print(f"torch {torch.__version__}; left alone: {length:.0f} s, {len(rows(whole))} rows", flush=True)
        kills = 0
        while kills < options.kills:
            going = ["--resume", str(killed)] if (killed / "config.yaml").is_file() else [
                *words, f"--trainer.default_root_dir={killed}"
            ]  # fmt: skip
            seconds = draw.uniform(0, 0.4 * length)
            name = options.signals[kills % len(options.signals)]
            if fit(going, signal.Signals[f"SIG{name}"], seconds):
                break
            kills += 1
            checkpoint = killed / "checkpoints" / "last.ckpt"
            step = steps_done(checkpoint) if checkpoint.is_file() else 0
            left = sorted(path.name for path in killed.rglob(".*.tmp.*"))
            print(f"{name} after {seconds:.1f} s; step of the checkpoint: {step} {' '.join(left)}", flush=True)
        else:
            fit(["--resume", str(killed)])
        found = differences(whole, killed)
    print(f"{kills} times; differs: {', '.join(found) or 'nothing'}")
    sys.exit(int(bool(found)))


if __name__ == "__main__":
    main()
