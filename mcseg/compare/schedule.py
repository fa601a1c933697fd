"""Execute the runs of a study in subprocesses, several at a time. Finished runs are not repeated."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mcseg
from mcseg.atomic import write_atomically
from mcseg.compare.plan import Outcome, Run, Shifts, runs
from mcseg.compare.shifts import fit_shifts
from mcseg.compare.study import Study
from mcseg.run.folder import exclusive_lock

_GRACE = 10.0  # seconds that a process has to exit after a signal


@dataclass
class Folder:
    """Folder of a study, with a folder ``runs/<name>`` per run, which holds ``result.json`` once the run is complete."""

    root: Path
    failed: dict[str, str] = field(default_factory=dict)  # reason by key, of this call only
    _results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def path(self, run: Run) -> Path:
        """Return the folder of a run: the existing one that ends in its key, else the one to create."""
        return next(iter(sorted(self.root.glob(f"runs/*-{run.key}"))), self.root / "runs" / run.name)

    def outcome(self, run: Run) -> Outcome:
        """Return the result of a run, "failed", or None while it is not finished."""
        if run.key in self.failed:
            return "failed"
        if run.key not in self._results:
            path = self.path(run) / "result.json"
            if not path.is_file():
                return None
            self._results[run.key] = json.loads(path.read_text())
        return self._results[run.key]

    def shifts(self, held_out: list[Run]) -> Shifts:
        """Fit the shifts on the held-out images of these runs, or read those fitted earlier."""
        key = hashlib.sha256("".join(run.key for run in held_out).encode()).hexdigest()[:12]
        path = self.root / "shifts" / f"{key}.json"
        if not path.is_file():
            files = [np.load(self.path(run) / "log_probs.npz") for run in held_out]
            shifts = fit_shifts([file["log_probs"] for file in files], [file["target"] for file in files])
            save_text(path, json.dumps({"runs": [run.name for run in held_out], "shifts": shifts.tolist()}))
        return tuple(json.loads(path.read_text())["shifts"])

    def runs(self, study: Study) -> list[tuple[Run, str]]:
        """Return the runs of a study that are known so far, each with the reason why it cannot start or ""."""
        return list(runs(study, self.outcome, self.shifts))


def save_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def default_jobs() -> int:
    """Return the default number of simultaneous runs: one per GPU, or one on the CPU."""
    return max(1, len(_gpus()))


def execute(study: Study, folder: Folder, jobs: int, pictures: int = 4, keep_checkpoints: bool = False) -> dict[Run, str]:
    """Execute the missing runs of a study.

    Args:
        study: the study.
        folder: folder of finished and new runs.
        jobs: number of simultaneous runs; they share the cores and take GPUs in turn.
        pictures: number of validation images that each final run draws.
        keep_checkpoints: also keep the last weights of final runs.

    Returns:
        The reason of each failed run.

    Raises:
        RuntimeError: another ``mcseg compare`` is using the folder.
    """
    with exclusive_lock(folder.root, "compare"):
        active: dict[Run, subprocess.Popen[bytes]] = {}
        free_slots = list(range(jobs))
        slot_of: dict[Run, int] = {}
        start_time: dict[Run, float] = {}
        failures: dict[Run, str] = {}
        known = folder.runs(study)
        started = {run.key for run, _ in known if folder.outcome(run) is not None}
        if started:
            print(f"{len(started)} runs are already finished", flush=True)
        try:
            while True:
                for run, blocked in known:
                    if run.key in started or not free_slots:
                        continue
                    if blocked:
                        started.add(run.key)
                        failures[run] = folder.failed[run.key] = blocked
                        print(f"{run}: not started, {blocked}", flush=True)
                    elif run.start is None or isinstance(folder.outcome(run.start), dict):
                        started.add(run.key)
                        slot_of[run] = free_slots.pop(0)
                        start_time[run] = time.monotonic()
                        active[run] = _start(
                            run, folder, slot=slot_of[run], jobs=jobs, pictures=pictures, keep_checkpoints=keep_checkpoints
                        )
                        print(f"{run}: started ({len(started)} of {_total(study, known)})", flush=True)
                ended = [run for run, process in active.items() if process.poll() is not None]
                if not ended and active:
                    time.sleep(0.1)
                    continue
                for run in ended:
                    code = active.pop(run).returncode
                    free_slots.append(slot_of.pop(run))
                    minutes = (time.monotonic() - start_time[run]) / 60
                    result = folder.outcome(run)
                    if isinstance(result, dict):
                        print(f"{run}: mIoU {100 * result['scores']['miou']:.2f} % after {minutes:.1f} min", flush=True)
                    else:
                        failures[run] = folder.failed[run.key] = _reason(folder.path(run), code)
                        print(f"{run}: failed after {minutes:.1f} min: {failures[run]}", flush=True)
                known = folder.runs(study)
                if not active and all(run.key in started for run, _ in known):
                    return failures
        finally:
            _stop(list(active.values()))


def _total(study: Study, known: list[tuple[Run, str]]) -> int:
    """Count all runs of the study, including final runs whose settings are not chosen yet."""
    final = len(study.objectives) * len(study.seeds)
    return len({run.key for run, _ in known if run.role != "final"}) + final


def _start(
    run: Run, folder: Folder, *, slot: int, jobs: int, pictures: int, keep_checkpoints: bool
) -> "subprocess.Popen[bytes]":
    path = folder.path(run)
    shutil.rmtree(path, ignore_errors=True)  # files of an interrupted or failed attempt
    path.mkdir(parents=True)
    gpus = _gpus()
    threads = None if gpus or jobs == 1 else max(1, _cores() // jobs)
    spec = {
        "key": run.key,
        "recipe": "compare",
        "arguments": list(run.arguments),
        "start": str(folder.path(run.start) / "last.ckpt") if run.start else None,
        "shifts": run.shifts,
        "keep_weights": run.keeps_weights or (keep_checkpoints and run.role == "final"),
        "log_probs": run.keeps_log_probs,
        "pictures": pictures if run.role == "final" else 0,
        "threads": threads,
        "about": run.about,
    }
    save_text(path / "spec.json", json.dumps(spec, indent=1))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([_package_root(), *_python_path()])}
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    with (path / "log.txt").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "mcseg.compare.worker", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            # Ctrl-C in a terminal reaches only this process, which then stops its children
            start_new_session=True,
        )


def _package_root() -> str:
    """Folder from which this process imports mcseg, so that its children import the same."""
    return str(Path(mcseg.__file__).resolve().parents[1])


def _python_path() -> list[str]:
    return [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]


def _gpus() -> list[str]:
    """Available GPUs, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = [name for name in visible.split(",") if name.strip() not in ("", "-1")]
        return named if torch.cuda.device_count() else []
    return [str(index) for index in range(torch.cuda.device_count())]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_per_job(jobs: int) -> int:
    """Return the number of loader workers of a run: its share of the cores, at most 8, or 0 if runs share one core."""
    share = _cores() // jobs
    return 0 if share <= 1 and jobs > 1 else min(8, max(1, share))


def _reason(path: Path, code: int) -> str:
    """Return the content of ``error.txt``; write it first if the process died without writing it."""
    error = path / "error.txt"
    if not error.is_file():
        status = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exited with code {code}"
        hint = ", possibly out of memory" if code == -signal.SIGKILL else ""
        save_text(error, f"the process {status}{hint}; see log.txt\n")
    return error.read_text().strip()


def _stop(processes: "list[subprocess.Popen[bytes]]") -> None:
    """Stop processes and their children."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        deadline = time.monotonic() + _GRACE
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        processes = [process for process in processes if process.poll() is None]
