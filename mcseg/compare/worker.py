"""Execute one run of a study in a separate process: ``python -m mcseg.compare.worker RUN_FOLDER``.

The run reads ``spec.json`` in its folder. It writes ``counts.npz``, pictures and the other files first and ``result.json``
last, so a folder with ``result.json`` is complete. A run that fails writes ``error.txt`` instead.
"""

import importlib.metadata
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from mcseg.atomic import write_atomically
from mcseg.callbacks.last_validation import LastValidation
from mcseg.callbacks.objective_monitor import ObjectiveMonitor
from mcseg.callbacks.panels import ConfusionPicture, PredictionPanel, TrainingCurves
from mcseg.callbacks.prediction_writer import PredictionWriter
from mcseg.compare.record import EvaluationRecord, TrainingRecord
from mcseg.compare.schedule import save_text
from mcseg.evaluation.metrics import Scores, rarest_third
from mcseg.messages import one_line
from mcseg.run.cli import SegmentationCLI, silence_warnings
from mcseg.run.signals import CheckpointOnSignal

FORMAT = 1  # of result.json and counts.npz


class _Run(SegmentationCLI):
    """The classes of ``mcseg fit`` without pictures and checkpoints, since a study has many runs."""

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer without callbacks for pictures and checkpoints."""
        trainer = super().instantiate_trainer(**kwargs)
        pictures = (ConfusionPicture, ObjectiveMonitor, PredictionPanel, PredictionWriter, TrainingCurves)
        excluded = (*pictures, pl.callbacks.ModelCheckpoint, CheckpointOnSignal, LastValidation)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [callback for callback in callbacks if not isinstance(callback, excluded)]  # type: ignore[attr-defined]
        return trainer


class _ExitWithParent(Callback):
    """Kill this process if its parent died, so that no run outlives a killed ``mcseg compare``."""

    def __init__(self) -> None:
        self._parent = os.getppid()

    def on_train_batch_start(self, *_: Any) -> None:
        """Check the parent."""
        if os.getppid() != self._parent:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path) -> None:
    """Train, evaluate the last weights once on the validation split, and write the results to ``folder``."""
    spec = json.loads((folder / "spec.json").read_text())
    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    arguments = [*spec["arguments"], f"--trainer.default_root_dir={folder}", "--trainer.devices=1"]
    if spec["start"]:
        arguments.append(f"--model.init_from={spec['start']}")
    cli = _Run(spec["recipe"], arguments, run=False)
    training = TrainingRecord()
    evaluation = EvaluationRecord(
        shifts=spec["shifts"], pictures=spec["pictures"], folder=folder / "pictures", log_probs=spec["log_probs"]
    )
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    trainer.callbacks += [training, _ExitWithParent()]  # type: ignore[attr-defined]

    start = time.perf_counter()
    trainer.fit(module, data)
    fitted = time.perf_counter()
    memory = {"process": _peak_memory()}
    if module.device.type == "cuda" or torch.cuda.is_available():
        memory["gpu"] = torch.cuda.max_memory_allocated()
    trainer.callbacks.append(evaluation)  # type: ignore[attr-defined]
    trainer.validate(module, data, verbose=False)
    evaluated = time.perf_counter()

    if spec["keep_weights"]:
        trainer.save_checkpoint(folder / ".last.ckpt", weights_only=True)
        (folder / ".last.ckpt").replace(folder / "last.ckpt")
    class_pixels = data.class_pixels()
    counts = {"names": np.array(evaluation.names), "counts": np.stack(evaluation.counts)}
    if spec["shifts"] is not None:
        counts["counts_shifted"] = np.stack(evaluation.counts_shifted)
    _save_arrays(folder / "counts.npz", **counts)
    if spec["log_probs"]:
        log_probs, target = (np.concatenate(part) for part in zip(*evaluation.sample, strict=True))
        _save_arrays(folder / "log_probs.npz", log_probs=log_probs, target=target)
    tail = rarest_third(class_pixels).tolist()
    result = spec["about"] | {
        "format": FORMAT,
        "key": spec["key"],
        "scores": _scores(counts["counts"], tail),
        "scores_shifted": _scores(counts["counts_shifted"], tail) if "counts_shifted" in counts else None,
        "shifts": spec["shifts"],
        "images": len(evaluation.names),
        "classes": {
            "names": list(data.class_names),
            "palette": [list(color) for color in data.palette],
            "training_pixels": class_pixels.tolist(),
            "tail": tail,
        },
        "offsets": _offsets(module.objective),
        "curves": training.curves,
        "steps": trainer.global_step,
        "seconds": training.seconds_per_step() | {"fit": fitted - start, "evaluation": evaluated - fitted},
        "memory_bytes": memory,
        "fingerprint": {"weights": training.weights, "batches": training.batches},
        "machine": {"device": _device(trainer), "threads": torch.get_num_threads(), "precision": str(trainer.precision)},
        "versions": _versions(),
        "settings": _settings(cli.config.as_dict()),
    }
    save_text(folder / "result.json", json.dumps(result, indent=1))


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Select the settings that results depend on, without paths of this machine, so that results can be shared."""
    kept = {key: config[key] for key in ("seed_everything", "model", "data", "inference", "trainer")}
    kept["trainer"] = {key: value for key, value in kept["trainer"].items() if key not in ("default_root_dir", "logger")}
    data = dict(kept["data"]["init_args"])
    if data.get("root"):
        data["root"] = Path(data["root"]).name
    kept["data"] = {**kept["data"], "init_args": data}
    if start := kept["model"].get("init_from"):
        kept["model"] = {**kept["model"], "init_from": "/".join(Path(start).parts[-3:])}  # relative to the study's folder
    return cast(dict[str, Any], json.loads(json.dumps(kept, default=str)))


def _scores(counts: np.ndarray[Any, Any], tail: list[int]) -> dict[str, Any]:
    """Compute scores from counts (N,3,C)."""
    scores = Scores.from_counts(*torch.from_numpy(counts.sum(0)))
    return {
        "miou": scores.miou,
        "miou_tail": _number(float(scores.iou[tail].nanmean())),
        "pixel_accuracy": scores.pixel_accuracy,
        "classes_averaged": scores.classes_averaged,
        "iou": [_number(value) for value in scores.iou.tolist()],
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _offsets(objective: Any) -> dict[str, list[float]] | None:
    """Return the margin offsets of an objective, or of one in a sum; None without offsets."""
    for module in objective.modules():
        offsets = getattr(module, "offsets", None)
        if offsets is not None and getattr(module, "is_calibrated", False):
            return {"foreground": offsets.foreground.tolist(), "background": offsets.background.tolist()}
    return None


def _peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _device(trainer: pl.Trainer) -> str:
    root = trainer.strategy.root_device
    return torch.cuda.get_device_name(root) if root.type == "cuda" else f"{root.type} {platform.processor()}".strip()


def _versions() -> dict[str, str | None]:
    from mcseg import __version__

    return {
        "mcseg": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "lightning": importlib.metadata.version("pytorch-lightning"),
        "python": platform.python_version(),
    }


def _commit() -> str | None:
    """Return the commit of the package's sources; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    if shutil.which("git") is None:
        return None
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def _save_arrays(path: Path, **arrays: np.ndarray[Any, Any]) -> None:
    write_atomically(path, lambda temporary: np.savez_compressed(temporary, **arrays))  # type: ignore[arg-type]


def main(folder: Path) -> None:
    """Execute the run; on an error write one line to ``error.txt`` and exit with 1."""
    try:
        with warnings.catch_warnings():
            silence_warnings()
            run(folder)
    except Exception as error:
        traceback.print_exc()
        save_text(folder / "error.txt", f"{type(error).__name__}: {one_line(error)}\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
