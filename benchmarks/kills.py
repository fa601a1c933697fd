"""Stop a training at random moments, resume it, and compare the result with that of an uninterrupted training.

python benchmarks/kills.py                                   # ten times, a few minutes on two cores
python benchmarks/kills.py --kills 30 --seed 1 --signals KILL

A run on drawn scenes receives SIGKILL or SIGTERM, in turn, and is resumed, again and again. The signal goes to all its
processes, after a random time between 0 and 0.4 of the duration of a whole run. The run has loader workers, validation,
checkpoints, a log, averaged weights, and gradients accumulated over two batches. Its result on the CPU must equal that of an
uninterrupted run with the same settings bit by bit: weights, averaged weights, optimiser, scores, rows of metrics.csv. Exits
with status 1 if anything differs.
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


def fit(arguments: list[str], number: signal.Signals = signal.SIGKILL, seconds: float | None = None) -> bool:
    """Run ``mcseg fit``, send the signal to all its processes after ``seconds``, and return whether it finished before."""
    command = [sys.executable, "-W", "ignore", "-m", "mcseg", "fit", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True) as process:
        try:
            _, error = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, number)
            process.communicate(timeout=60)  # fail if it takes longer to stop
            return False
    if process.returncode:
        sys.exit(error.decode())
    return True


def continue_run(folder: Path, arguments: list[str]) -> list[str]:
    """Return arguments that resume a run, or start it again if it was stopped before it wrote its settings."""
    if (folder / "config.yaml").is_file():
        return ["--resume", str(folder)]
    return [*arguments, f"--trainer.default_root_dir={folder}"]


def rows(folder: Path) -> list[dict[str, str]]:
    """Read the rows of a run's metrics.csv."""
    with (folder / "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def differences(whole: Path, killed: Path) -> list[str]:
    """Return the names of the parts in which two runs differ."""
    one, other = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (whole, killed))
    parts = ("state_dict", "current_model_state")
    differing = [
        f"{part}.{name}" for part in parts for name in one[part] if not torch.equal(one[part][name], other[part][name])
    ]
    differing += ["optimiser"] * (str(one["optimizer_states"]) != str(other["optimizer_states"]))
    differing += ["metrics.csv"] * (rows(whole) != rows(killed))
    files = [{path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (whole, killed)]
    return differing + [str(path) for path in files[0] ^ files[1]]


def main() -> None:
    """Train without and with interruptions, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", nargs="+", choices=("KILL", "TERM", "INT"), default=["KILL", "TERM"])
    parser.add_argument("--folder", help="new folder in which to keep both runs")
    options = parser.parse_args()
    arguments = ["synthetic", "--config", "options/ema", *(f"--{key}={value}" for key, value in SETTINGS.items())]
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() if options.folder is None else nullcontext(options.folder) as parent:
        whole, killed = Path(parent, "whole"), Path(parent, "killed")
        start = time.perf_counter()
        fit([*arguments, f"--trainer.default_root_dir={whole}"])
        duration = time.perf_counter() - start
        print(f"torch {torch.__version__}; uninterrupted: {duration:.0f} s, {len(rows(whole))} rows", flush=True)
        kills = 0
        while kills < options.kills:
            seconds = draw.uniform(0, 0.4 * duration)
            name = options.signals[kills % len(options.signals)]
            if fit(continue_run(killed, arguments), signal.Signals[f"SIG{name}"], seconds):
                break
            kills += 1
            checkpoint = killed / "checkpoints" / "last.ckpt"
            step = steps_done(checkpoint) if checkpoint.is_file() else 0
            left = sorted(path.name for path in killed.rglob(".*.tmp.*"))
            print(f"{name} after {seconds:.1f} s; step of the checkpoint: {step} {' '.join(left)}", flush=True)
        else:
            fit(continue_run(killed, arguments))
        differing = differences(whole, killed)
    print(f"{kills} signals; differs: {', '.join(differing) or 'nothing'}")
    sys.exit(int(bool(differing)))


if __name__ == "__main__":
    main()
