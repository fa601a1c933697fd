"""Runs in processes of their own, several at a time; what is finished stays, what failed is reported."""

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

_PATIENCE = 10.0  # seconds that a process has to end when it is told to


@dataclass
class Folder:
    """Where a comparison lives: ``runs/<name>`` per run, with ``result.json`` once it is complete."""

    root: Path
    failed: dict[str, str] = field(default_factory=dict)  # by key; of this call
    _results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def path(self, run: Run) -> Path:
        """Folder of a run: an existing one with its key, whatever its name, or a new one."""
        return next(iter(sorted(self.root.glob(f"runs/*-{run.key}"))), self.root / "runs" / run.name)

    def outcome(self, run: Run) -> Outcome:
        """What a run found."""
        if run.key in self.failed:
            return "failed"
        if run.key not in self._results:
            path = self.path(run) / "result.json"
            if not path.is_file():
                return None
            self._results[run.key] = json.loads(path.read_text())
        return self._results[run.key]

    def shifts(self, held_out: list[Run]) -> Shifts:
        """Fit the shifts on the held-out images of these runs, or read what was fitted before."""
        key = hashlib.sha256("".join(run.key for run in held_out).encode()).hexdigest()[:12]
        path = self.root / "shifts" / f"{key}.json"
        if not path.is_file():
            found = [np.load(self.path(run) / "log_probs.npz") for run in held_out]
            shifts = fit_shifts([part["log_probs"] for part in found], [part["target"] for part in found])
            save_text(path, json.dumps({"runs": [run.name for run in held_out], "shifts": shifts.tolist()}))
        return tuple(json.loads(path.read_text())["shifts"])

    def runs(self, study: Study) -> list[tuple[Run, str]]:
        """Runs of a study that are known at this time, and why those that cannot run cannot."""
        return list(runs(study, self.outcome, self.shifts))


def save_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def default_jobs() -> int:
    """One run at a time for each GPU, or one on the CPU."""
    return max(1, len(_gpus()))


def execute(study: Study, folder: Folder, jobs: int, pictures: int = 4, keep_checkpoints: bool = False) -> dict[Run, str]:
    """Run what is missing.

    Args:
        study: what is compared.
        folder: where finished runs are found and new ones go.
        jobs: runs at the same time; they share the cores, and the GPUs in turn.
        pictures: validation images that each final run draws.
        keep_checkpoints: keep the last weights of final runs as well.

    Returns:
        The runs that failed, and why.
    """
    with exclusive_lock(folder.root, "compare"):
        active: dict[Run, subprocess.Popen[bytes]] = {}
        slots = list(range(jobs))
        taken: dict[Run, int] = {}
        started: dict[Run, float] = {}
        failures: dict[Run, str] = {}
        known = folder.runs(study)
        begun = {run.key for run, _ in known if folder.outcome(run) is not None}
        if begun:
            print(f"{len(begun)} runs are finished already", flush=True)
        try:
            while True:
                for run, blocked in known:
                    if run.key in begun or not slots:
                        continue
                    if blocked:
                        begun.add(run.key)
                        failures[run] = folder.failed[run.key] = blocked
                        print(f"{run}: not run, {blocked}", flush=True)
                    elif run.start is None or isinstance(folder.outcome(run.start), dict):
                        begun.add(run.key)
                        taken[run] = slots.pop(0)
                        started[run] = time.monotonic()
                        active[run] = _start(run, folder, taken[run], jobs, pictures, keep_checkpoints)
                        print(f"{run}: started ({len(begun)} of {_total(study, known)})", flush=True)
                ended = [run for run, process in active.items() if process.poll() is not None]
                if not ended and active:
                    time.sleep(0.1)
                    continue
                for run in ended:
                    code = active.pop(run).returncode
                    slots.append(taken.pop(run))
                    minutes = (time.monotonic() - started[run]) / 60
                    result = folder.outcome(run)
                    if isinstance(result, dict):
                        print(f"{run}: mIoU {100 * result['scores']['miou']:.2f} % after {minutes:.1f} min", flush=True)
                    else:
                        failures[run] = folder.failed[run.key] = _reason(folder.path(run), code)
                        print(f"{run}: failed after {minutes:.1f} min: {failures[run]}", flush=True)
                known = folder.runs(study)
                if not active and all(run.key in begun for run, _ in known):
                    return failures
        finally:
            _stop(list(active.values()))


def _total(study: Study, known: list[tuple[Run, str]]) -> int:
    """How many runs there will be, as far as that is known: final runs of which the settings are still open count."""
    final = len(study.objectives) * len(study.seeds)
    return len({run.key for run, _ in known if run.role != "final"}) + final


def _start(
    run: Run, folder: Folder, slot: int, jobs: int, pictures: int, keep_checkpoints: bool
) -> "subprocess.Popen[bytes]":
    path = folder.path(run)
    shutil.rmtree(path, ignore_errors=True)  # what an interrupted or failed attempt left
    path.mkdir(parents=True)
    gpus = _gpus()
    threads = None if gpus or jobs == 1 else max(1, _cores() // jobs)
    spec = {
        "key": run.key,
        "recipe": "compare",
        "words": list(run.words),
        "start": str(folder.path(run.start) / "last.ckpt") if run.start else None,
        "shifts": run.shifts,
        "keep_weights": run.keeps_weights or (keep_checkpoints and run.role == "final"),
        "log_probs": run.keeps_log_probs,
        "pictures": pictures if run.role == "final" else 0,
        "threads": threads,
        "about": run.about,
    }
    save_text(path / "spec.json", json.dumps(spec, indent=1))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([_source(), *_python_path()])}
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
            # A terminal's Ctrl-C reaches this process alone, which then ends the others.
            start_new_session=True,
        )


def _source() -> str:
    """Folder from which this process has mcseg, so that the others have the same."""
    return str(Path(mcseg.__file__).resolve().parents[1])


def _python_path() -> list[str]:
    return [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]


def _gpus() -> list[str]:
    """GPUs as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = [name for name in visible.split(",") if name.strip() not in ("", "-1")]
        return named if torch.cuda.device_count() else []
    return [str(index) for index in range(torch.cuda.device_count())]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_per_job(jobs: int) -> int:
    """Loader processes of a run: its share of the cores, at most 8; none where it has a single core."""
    share = _cores() // jobs
    return 0 if share <= 1 and jobs > 1 else min(8, max(1, share))


def _reason(path: Path, code: int) -> str:
    told = path / "error.txt"
    if not told.is_file():
        by = f"ended by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
        hint = ", perhaps out of memory" if code == -signal.SIGKILL else ""
        save_text(told, f"the process {by}{hint}; see log.txt\n")
    return told.read_text().strip()


def _stop(processes: "list[subprocess.Popen[bytes]]") -> None:
    """End processes and theirs."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        end = time.monotonic() + _PATIENCE
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            time.sleep(0.05)
        processes = [process for process in processes if process.poll() is None]
