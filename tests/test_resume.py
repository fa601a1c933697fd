"""A killed and resumed run ends like an uninterrupted one, bit by bit: weights, optimiser, scores and logged rows."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import at_work

from mcseg.checkpoints.files import CheckpointFile, steps_done
from mcseg.run import signals
from mcseg.run.resume import expand_resume, refuse_other_batches

# Imports once and forks for each attempt. The parent computes nothing, as its threads would be missing in the children.
ATTEMPTS = """
import functools, json, os, signal, sys
import pytorch_lightning as pl
from mcseg.checkpoints import files as checkpoints
from mcseg.run.main import main

class Killer(pl.Callback):
    def __init__(self, moment):
        self.kind, self.place = moment.split()
        self.place = int(self.place)
        if self.kind == "checkpoint":  # half of the file is written
            save = checkpoints.torch.save
            def half(checkpoint, file):
                if checkpoint["global_step"] == self.place and "last" in os.path.basename(file.name):
                    file.write(b"half")
                    file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
                save(checkpoint, file)
            checkpoints.torch.save = half
        if self.kind == "written":  # the file is complete, and nothing follows
            write = checkpoints.CheckpointFile.save_checkpoint
            def last(self_, checkpoint, path, **options):
                write(self_, checkpoint, path, **options)
                if checkpoint["global_step"] == self.place and str(path).endswith("last.ckpt"):
                    os.kill(os.getpid(), signal.SIGKILL)
            checkpoints.CheckpointFile.save_checkpoint = last

    def on_before_zero_grad(self, trainer, module, optimizer):  # in the middle of a step
        if trainer.global_step == self.place and self.kind in ("step", "term"):
            os.kill(os.getpid(), signal.SIGKILL if self.kind == "step" else signal.SIGTERM)

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, *_):
        if trainer.global_step == self.place and batch_idx == 1 and self.kind in ("validation", "term-validation"):
            os.kill(os.getpid(), signal.SIGKILL if self.kind == "validation" else signal.SIGTERM)

folder, moments, words = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
fresh = ["fit", *words, "--trainer.default_root_dir", folder]
codes, steps, going = [], [], fresh
for moment in [*moments, None]:
    child = os.fork()
    if child == 0:
        if moment:
            make = pl.Trainer.__init__
            @functools.wraps(make)  # the parser reads the types of the arguments
            def init(self, *args, callbacks=None, **options):
                make(self, *args, callbacks=[*(callbacks or []), Killer(moment)], **options)
            pl.Trainer.__init__ = init
        try:
            main(going)
        except SystemExit as error:
            os._exit(error.code)
        os._exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    last = folder + "/checkpoints/last.ckpt"
    steps.append(checkpoints.steps_done(last) if os.path.exists(last) else 0)
    if os.path.exists(folder + "/config.yaml"):
        going = ["fit", "--resume", folder]
print("ATTEMPTS", json.dumps([codes, steps]))
"""
WORDS = [
    "--config",
    "synthetic",
    "--data.train_scenes",
    "20",
    "--data.val_scenes",
    "3",
    "--data.size",
    "[64,96]",
    "--data.crop_size",
    "[48,64]",
    "--data.batch_size",
    "4",
    "--data.eval_batch_size",
    "1",
    "--data.num_workers",
    "0",
    "--trainer.max_epochs",
    "4",
    "--model.encoder",
    "tu-test_resnet.r160_in1k",
    "--model.arch",
    "fpn",
    "--model.network_options",
    '{"decoder_dropout":0.3}',
    "--trainer.accelerator",
    "cpu",
    "--trainer.log_every_n_steps",
    "1",
    "--panel.every_n_epochs",
    "9",
    "--confusion.every_n_epochs",
    "9",
    "--trainer.enable_progress_bar",
    "false",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a function that trains for 20 steps and kills the run at the given moments.

    It returns the run folder, the exit codes of the attempts, the steps of the checkpoint after each, and the output.
    """

    def train(*moments, more=()):
        folder = tmp_path_factory.mktemp("run") / "run"
        script = folder.with_name("attempts.py")
        script.write_text(ATTEMPTS)
        words = [sys.executable, str(script), str(folder), json.dumps(moments), *WORDS, *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=500, check=True, env=environment, cwd=folder.parent
        )
        result = next((line for line in done.stdout.splitlines() if line.startswith("ATTEMPTS")), None)
        assert result, done.stderr[-3000:]
        return folder, *json.loads(result.removeprefix("ATTEMPTS")), done.stdout + done.stderr

    return train


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def assert_same_end(whole, folder):
    """Compare the last checkpoints and rows of two runs; return the checkpoint of the first."""
    one, other = (torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (whole, folder))
    assert one["global_step"] == other["global_step"]
    for part in ("state_dict", "current_model_state"):
        state, its = one.get(part, {}), other.get(part, {})
        assert state.keys() == its.keys()
        for name, weights in state.items():
            assert torch.equal(weights, its[name]), name
    for part in ("optimizer_states", "lr_schedulers", "averaging_state"):
        assert str(one.get(part)) == str(other.get(part))
    assert rows(whole) == rows(folder)
    return one


@pytest.mark.slow
def test_a_killed_run_ends_like_an_uninterrupted_one(run):
    """Killed before the first checkpoint, in validation and while writing a checkpoint; SIGTERM in a step and in validation."""
    whole, codes, _, output = run()
    assert codes == [0], output[-3000:]
    # Five steps an epoch: before the first checkpoint, in the second validation, in the third checkpoint, and in steps
    folder, codes, steps, output = run(
        "step 3", "validation 10", "written 10", "checkpoint 15", "step 12", "term 13", "term-validation 15", "step 17"
    )
    assert codes == [-9, -9, -9, -9, -9, 128 + 15, 128 + 15, -9, 0], output[-3000:]
    assert steps == [0, 5, 10, 10, 10, 14, 15, 15, 20]  # SIGTERM loses no step
    assert output.count("resume with: mcseg fit --resume") == 2
    assert assert_same_end(whole, folder)["global_step"] == 20
    assert {int(row["step"]) for row in rows(folder) if "train/loss" in row} == set(range(20))
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert left == {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_gradients_averages_and_schedule_of_a_killed_run(run):
    """Two batches per step, averaged weights, and a learning rate that falls if the score does not rise by half."""
    more = ["--trainer.accumulate_grad_batches", "2", "--config", "options/ema", "--model.scheduler"]
    more += ["torch.optim.lr_scheduler.ReduceLROnPlateau", "--model.scheduler.mode", "max"]
    more += ["--model.scheduler.patience", "0", "--model.scheduler.threshold", "0.5"]
    whole, codes, _, output = run(more=more)
    assert codes == [0], output[-3000:]
    # Three steps an epoch, SIGTERM in the first batch of a step and in validation; no checkpoint holds a partial gradient
    folder, codes, steps, output = run("step 4", "term 4", "term-validation 6", "validation 9", "term 10", more=more)
    assert codes == [-9, 143, 143, -9, 143, 0], output[-3000:]
    assert steps == [3, 5, 6, 6, 11, 12]
    last = assert_same_end(whole, folder)
    assert last["current_model_state"].keys() == last["state_dict"].keys()
    assert last["lr_schedulers"][0]["_last_lr"][0] < last["lr_schedulers"][0]["factor"] * float(rows(whole)[0]["lr-AdamW"])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system does not report the sender of a signal")
@pytest.mark.parametrize(
    ("seconds", "others_seconds", "steps"),
    [
        (0.25, 0.1, [1, 5, 9, 10, 14]),  # step 10 ends an epoch
        (0.1, 0.25, [1, 5, 9, 10, 14]),  # the slower process decides
        (2.0, 0.1, list(range(1, 15))),
        (1e-3, 1e-3, [1, 10]),
    ],
)
def test_processes_ask_for_signals_about_once_a_second(seconds, others_seconds, steps, monkeypatch):
    now, exchanges = 0.0, []

    def largest_of_both(values, reduce_op):
        assert reduce_op == "max"
        exchanges.append(step)
        other = torch.tensor([float(step >= 12), others_seconds])  # the other process receives a signal in step 12
        return torch.maximum(values, other)

    stopped = []
    monkeypatch.setattr(signals, "accumulates_gradient", lambda trainer: False)
    monkeypatch.setattr(signals, "request_stop", lambda trainer: stopped.append(step))
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    callback = signals.CheckpointOnSignal("unused")
    strategy = SimpleNamespace(root_device="cpu", reduce=largest_of_both)
    for step in range(1, 15):
        now += seconds
        trainer = SimpleNamespace(world_size=2, is_last_batch=step == 10, strategy=strategy)
        callback.on_train_batch_end(trainer, None, None, None, 0)
    assert exchanges == steps
    assert stopped == [step for step in steps if step >= 12]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes_of_a_run(number, code, tmp_path):
    """As SLURM, systemd and the terminal send it: loader workers get it as well and must finish the step."""
    folder = tmp_path / "run"
    words = [*WORDS, "--data.num_workers", "2", "--trainer.max_epochs", "1000", "--trainer.default_root_dir", str(folder)]
    command = [sys.executable, "-m", "mcseg", "fit", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        end = time.monotonic() + 120
        while time.monotonic() < end and not (folder / "checkpoints/last.ckpt").exists():
            time.sleep(0.1)
        before = steps_done(folder / "checkpoints/last.ckpt")
        os.killpg(process.pid, number)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output[-3000:]
    assert "resume with: mcseg fit --resume" in output
    assert steps_done(folder / "checkpoints/last.ckpt") > before
    assert max(int(row["step"]) for row in rows(folder)) == steps_done(folder / "checkpoints/last.ckpt") - 1


@pytest.mark.parametrize("tensors", [1, 40])  # torch's writer fails in its first write, or in a later one
def test_a_checkpoint_that_cannot_be_written_leaves_the_former_one(tensors, tmp_path):
    """A limit of 40 kB on the size of files acts like a full disk."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "checkpoints" / "last.ckpt"
    writer = CheckpointFile()
    writer.save_checkpoint({"global_step": 1, "weights": torch.ones(3)}, path)
    large = {"global_step": 2, "weights": [torch.ones(40_000 // tensors) for _ in range(tensors)]}
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, most))
    try:
        with pytest.raises(OSError, match=r"last.ckpt: the checkpoint cannot be written \(File too large\); .*is intact"):
            writer.save_checkpoint(large, path)
        with pytest.raises(OSError, match=r"\(File too large\); there is no earlier one"):
            writer.save_checkpoint(large, path.with_name("other.ckpt"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert writer.load_checkpoint(path)["global_step"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.slow
def test_one_run_at_a_time_in_a_folder(tmp_path, capsys):
    """A second one would overwrite the checkpoints of the first and mix its rows with theirs."""
    from mcseg.run.main import main

    folder = tmp_path / "run"
    words = ["fit", *WORDS, "--trainer.max_epochs=1", f"--trainer.default_root_dir={folder}"]
    with at_work(folder):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 1
        assert f"{folder}: another mcseg fit uses this folder" in capsys.readouterr().err
        assert {path.name for path in folder.iterdir()} == {".lock"}
    main(words)  # the lock of a killed process is released
    assert steps_done(folder / "checkpoints" / "last.ckpt") == 5


class Malicious:
    """Runs code when its pickle is read."""

    def __reduce__(self):
        return Path.write_text, (Path("owned"), "")


def test_a_checkpoint_with_a_malicious_pickle_is_refused(tmp_path):
    path = tmp_path / "bad.ckpt"
    torch.save({"state_dict": {}, "payload": Malicious()}, path)
    with pytest.raises(Exception, match="weights_only"):
        CheckpointFile().load_checkpoint(path)
    assert not Path("owned").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["validate", "--resume", "runs"], "--resume: found the verb 'validate', expected mcseg fit --resume RUN_FOLDER"),
        (["--resume", "runs"], "--resume: found no verb, expected mcseg fit --resume RUN_FOLDER"),
        (
            ["fit", "--resume", "runs", "--ckpt_path=x"],
            "--resume: found --ckpt_path, but a resumed run has its own last.ckpt",
        ),
        (["fit", "--resume", "runs", "--trainer.default_root_dir", "x"], "found --trainer.default_root_dir, but a resumed"),
        (["fit", "--resume", "nowhere"], "no nowhere/config.yaml; expected the folder of a run"),
    ],
)
def test_wrong_uses_of_resume(words, message, capsys):
    from mcseg.run.main import main

    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err


def test_changed_settings_of_a_resumed_run(tmp_path, capsys, caplog):
    """Settings of the module are refused, because the checkpoint's count; the others are written to config.yaml."""
    from mcseg.run.main import main

    folder = tmp_path / "run"
    main(["fit", *WORDS, "--trainer.max_epochs=1", f"--trainer.default_root_dir={folder}"])
    settings = folder / "config.yaml"
    former = settings.read_text()
    resume = ["fit", "--resume", str(folder), "--trainer.max_epochs=2"]
    for words, kept, found in (
        (["--model.optimizer.lr", "1"], "model.optimizer.lr 0.002", "1"),
        (["--model.arch", "unet"], "model.arch fpn", "unet"),
        (["--model.objective", "FocalLoss"], "model.objective mcseg.DiceLoss", "mcseg.losses.FocalLoss"),
        (["--config", "objectives/lovasz", "--model.aux_weight=0.5"], "model.aux_weight 0", "0.5"),
    ):
        with pytest.raises(SystemExit):
            main([*resume, *words])
        line = capsys.readouterr().err.splitlines()[-1]
        assert "--resume keeps the run's " in line
        assert kept in line
        assert found in line.partition("; found ")[2].partition("; start a new run with --model.init_from")[0]
    assert settings.read_text() == former
    objective = ["--model.objective", "DiceLoss", "--model.objective.classes=all", "--model.objective.power=0.5"]
    with caplog.at_level("INFO"):
        main([*resume, "--model.optimizer.lr", "0.002", "--model.arch", "fpn", *objective])
    assert f"{settings}: updated, the resumed run has trainer.max_epochs 2 instead of 1" in caplog.text
    old, new = yaml.safe_load(former), yaml.safe_load(settings.read_text())
    old["trainer"]["max_epochs"] = 2
    assert new == old
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
    assert steps_done(folder / "checkpoints" / "last.ckpt") == 10
    caplog.clear()
    with caplog.at_level("INFO"):
        main(["fit", "--resume", str(folder)])
    assert f"{folder}: the run is complete after 10 steps" in caplog.text
    assert yaml.safe_load(settings.read_text()) == new


@pytest.mark.slow
def test_settings_of_a_resumed_run_are_obeyed(tmp_path, monkeypatch):
    """Batch size, epochs, clipping, precision and patience; the rates reach 0 at the new end."""
    from pytorch_lightning.callbacks import EarlyStopping

    from mcseg.run.cli import SegmentationCLI
    from mcseg.run.main import main

    folder, ends = tmp_path / "run", []
    monkeypatch.setattr(SegmentationCLI, "after_fit", lambda cli: ends.append(cli.trainer))
    stop = ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/miou", "--trainer.callbacks.patience=1"]
    main(["fit", *WORDS, *stop, "--trainer.max_epochs=1", f"--trainer.default_root_dir={folder}"])
    others = ["--trainer.callbacks.patience=7", "--trainer.gradient_clip_val=0.5", "--trainer.precision=bf16-true"]
    main(["fit", "--resume", str(folder), "--trainer.max_epochs=3", "--data.batch_size=10", *others])
    trainer = ends[-1]
    assert trainer.global_step == 5 + 2 * 2  # 20 images
    assert [c.patience for c in trainer.callbacks if isinstance(c, EarlyStopping)] == [7]
    assert (trainer.gradient_clip_val, trainer.precision) == (0.5, "bf16-true")
    rates = [float(row["lr-AdamW"]) for row in rows(folder) if "lr-AdamW" in row]
    assert rates[5:] == pytest.approx([0.002 * (1 - step / 9) ** 0.9 for step in range(5, 9)])


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"data.batch_size": (4, 8)}, "data.batch_size 8 instead of 4"),
        ({"data.val_fraction": (0.2, 0.1), "trainer.max_epochs": (1, 2)}, "data.val_fraction 0.1 instead of 0.2"),
        ({"trainer.limit_train_batches": (None, 3)}, "trainer.limit_train_batches 3 instead of null"),
        ({"data.num_workers": (0, 2), "data.eval_batch_size": (1, 2), "trainer.precision": ("32", "16")}, ""),
    ],
)
def test_other_batches_within_an_epoch_are_refused(changed, found, tmp_path):
    progress = {"is_last_batch": False, "current": {"processed": 3}}
    for last, message in ((False, found), (True, "")):  # at the end of an epoch, all settings may change
        loops = {"fit_loop": {"epoch_loop.batch_progress": {**progress, "is_last_batch": last}}}
        torch.save({"state_dict": {}, "loops": loops}, tmp_path / "last.ckpt")
        if message:
            with pytest.raises(ValueError, match=f"--resume: found {message}, but the run stopped after 3 batches"):
                refuse_other_batches(changed, tmp_path / "last.ckpt")
        else:
            refuse_other_batches(changed, tmp_path / "last.ckpt")


def test_resume_finds_the_checkpoint_where_the_run_keeps_it(tmp_path):
    """``checkpoint.dirpath`` may be another folder; without its last.ckpt the run would start again."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(f"checkpoint:\n  dirpath: {tmp_path}/kept\n")
    words = ["fit", "--resume", str(tmp_path / "run")]
    assert "--ckpt_path" not in expand_resume(words)[0]
    CheckpointFile().save_checkpoint({"global_step": 1}, tmp_path / "kept" / "last.ckpt")
    assert expand_resume(words)[0][-2:] == ["--ckpt_path", f"{tmp_path}/kept/last.ckpt"]


def test_resume_names_the_folder_of_the_run(tmp_path, capsys):
    from mcseg.run.main import main

    run = tmp_path / "runs" / "synthetic" / "20260102-030405"
    older = run.with_name("20260101-030405")
    for index, folder in enumerate((older, run)):
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").touch()
        (folder / "checkpoints" / "last.ckpt").touch()
        os.utime(folder / "config.yaml", (index, index))
    for path, expected in {
        tmp_path / "runs": run,
        run.parent: run,
        older / "checkpoints": older,
        older / "checkpoints" / "last.ckpt": older,
        older / "config.yaml": older,
    }.items():
        with pytest.raises(SystemExit):
            main(["fit", "--resume", str(path)])
        assert capsys.readouterr().err.endswith(f"; use --resume {expected}\n")
