"""Studies: runs, statistics and shifts against oracles; a real study end to end; its report."""

import base64
import csv
import html.parser
import inspect
import itertools
import json
import pkgutil
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import SHARED, at_work
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, jaccard_score

from mcseg import pictures
from mcseg.compare import compare, report, schedule, tables, worker
from mcseg.compare.counts import comparison, read_counts, write_counts
from mcseg.compare.plan import Run, runs
from mcseg.compare.record import _picture_index, sample_log_probs
from mcseg.compare.schedule import Folder, execute
from mcseg.compare.shifts import _GRID, _miou_on_grid, fit_shifts, shifted_miou
from mcseg.compare.statistics import class_iou, measures, paired_intervals
from mcseg.compare.study import (
    StudySettings,
    _parser,
    explicit_settings,
    make_study,
    parse_grid,
    setting_arguments,
)
from mcseg.evaluation.metrics import Scores, image_counts, rarest_third
from mcseg.palette import distinct_colors
from mcseg.run.cli import ParseOnlyCLI
from mcseg.run.main import main
from mcseg.run.recipes import RECIPES

SYNTHETIC = ["--config", str(RECIPES / "synthetic.yaml")]
TINY = {
    "data.train_scenes": 6,
    "data.val_scenes": 3,
    "data.size": [32, 48],
    "data.crop_size": [32, 32],
    "data.batch_size": 2,
    "data.eval_batch_size": 2,
    "model.encoder": "tu-test_resnet.r160_in1k",
    "model.network_options": {"decoder_channels": [16, 16, 8, 8, 8]},
    "trainer.max_epochs": 1,
    "trainer.accelerator": "cpu",
}


# Shifts


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 5), ties=st.booleans())
def test_grid_of_shifts_equals_direct_miou(seed, classes, ties):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (60, classes))
    logits = (np.round(logits) if ties else logits).astype(np.float32)
    labels = rng.integers(0, classes, 60)
    shifts = np.round(rng.normal(0, 1, classes), 0 if ties else 2)
    index = int(rng.integers(classes))
    scores = _miou_on_grid(logits, labels, shifts, index)
    for position in rng.choice(len(_GRID), 12, replace=False):
        other = shifts.copy()
        other[index] = _GRID[position]
        preds = (logits.astype(np.float64) + other).argmax(1)
        classes_seen = np.union1d(labels, preds)
        expected = jaccard_score(labels, preds, labels=classes_seen, average="macro")
        assert scores[position] == pytest.approx(expected, abs=1e-9)


def test_fit_shifts_recovers_planted_shifts():
    rng = np.random.default_rng(0)
    planted = np.array([0.0, 1.5, -1.0, 0.6])
    logits = [rng.normal(0, 2, (4000, 4)).astype(np.float16) for _ in range(2)]
    target = [(part.astype(np.float32) + planted).argmax(1).astype(np.uint8) for part in logits]
    shifts = fit_shifts(logits, target)
    assert shifts == pytest.approx(planted - planted.mean(), abs=0.05)
    assert shifted_miou(logits, target, np.zeros(4)) < 0.75
    assert shifted_miou(logits, target, shifts) > 0.97


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 6), folds=st.integers(1, 3))
def test_fitted_shifts_do_not_lower_miou(seed, classes, folds):
    rng = np.random.default_rng(seed)
    logits = [rng.normal(0, 1, (50, classes)).round(1).astype(np.float16) for _ in range(folds)]
    target = [rng.integers(0, classes, 50).astype(np.uint8) for _ in range(folds)]
    shifts = fit_shifts(logits, target)
    assert shifted_miou(logits, target, shifts) >= shifted_miou(logits, target, np.zeros(classes))
    assert shifts.sum() == pytest.approx(0, abs=1e-3)


# Records of a run


def test_sampled_log_probabilities_match_resized_logits():
    logits = torch.randn(5, 7, 9)
    target = torch.randint(0, 5, (16, 23))
    target[:4] = 255
    log_probs, labels = sample_log_probs(logits, target, 10**6, torch.Generator().manual_seed(0))
    full = F.interpolate(logits[None], (16, 23), mode="bilinear", align_corners=False)[0].log_softmax(0)
    order = torch.randperm(12 * 23, generator=torch.Generator().manual_seed(0))
    expected = full[:, 4:].flatten(1).T[order]
    torch.testing.assert_close(torch.from_numpy(log_probs).float(), expected, atol=1e-4, rtol=1e-3)  # float16
    assert np.array_equal(labels, target[4:].flatten()[order])
    few, _ = sample_log_probs(logits, target, 50, torch.Generator().manual_seed(0))
    assert np.array_equal(few, log_probs[:50])


def test_image_counts_match_a_confusion_matrix():
    preds, target = torch.randint(0, 4, (20, 30)), torch.randint(0, 4, (20, 30))
    target[5:9, 3:] = 255
    labelled = target != 255
    matrix = confusion_matrix(target[labelled], preds[labelled], labels=range(4))
    counts = image_counts(preds.to(torch.uint8), target, 4)
    assert np.array_equal(counts, [matrix.diagonal(), matrix.sum(1), matrix.sum(0)])


def test_pictures_are_evenly_spaced():
    chosen = [index for index in range(100) if _picture_index(index, 100, 4) is not None]
    assert chosen == [12, 37, 62, 87]
    assert [_picture_index(index, 2, 4) for index in range(2)] == [0, 1]


def test_rarest_third_excludes_absent_classes():
    assert rarest_third(torch.tensor([50, 0, 3, 900, 20])).tolist() == [2, 4]


# Statistics


def test_measures_match_scores():
    counts = np.random.default_rng(0).integers(1, 50, (3, 4))
    counts[1:] += counts[0]
    counts[:, 2] = 0
    scores = Scores.from_counts(*torch.from_numpy(counts))
    assert measures(counts, [1, 2]) == pytest.approx([scores.miou, float(scores.iou[1]), scores.pixel_accuracy])
    assert np.array_equal(class_iou(counts), scores.iou.numpy(), equal_nan=True)


def counts_of(hits):
    """Counts (S,N,3,2): ``hits`` of the 10 pixels of class 0 are correct, the rest are predicted as class 1, as are its own 10."""
    hits = np.asarray(hits)
    hit = np.stack([hits, np.full_like(hits, 10)], -1)
    target = np.full_like(hit, 10)
    predicted = np.stack([hits, 20 - hits], -1)
    return np.stack([hit, target, predicted], -2)


def accuracy(hits):
    return (np.asarray(hits) + 10) / 20


def test_bootstrap_pairs_images():
    ours, theirs = counts_of([[9, 2]]), counts_of([[8, 6]])
    interval = paired_intervals(ours, theirs, [0], draws=3000)[2]
    assert interval.difference == pytest.approx(accuracy([9, 2]).mean() - accuracy([8, 6]).mean())
    # possible draws: image 0 twice, both images, image 1 twice
    assert interval.low == pytest.approx(accuracy(2) - accuracy(6))
    assert interval.high == pytest.approx(accuracy(9) - accuracy(8))


def test_bootstrap_pairs_seeds_and_draws_one_fewer():
    ours, theirs = np.array([5, 9, 7]), np.array([4, 9, 9])
    interval = paired_intervals(counts_of(ours[:, None]), counts_of(theirs[:, None]), [0], draws=5000)[2]
    single = accuracy(ours) - accuracy(theirs)
    pairs = [np.mean(pair) for pair in itertools.product(single, repeat=2)]
    assert interval.difference == pytest.approx(single.mean())
    assert (interval.low, interval.high) == (pytest.approx(min(pairs)), pytest.approx(max(pairs)))


def test_bootstrap_is_deterministic_and_zero_for_equal_counts():
    rng = np.random.default_rng(1)
    ours, theirs = (counts_of(rng.integers(0, 11, (3, 20))) for _ in range(2))
    assert paired_intervals(ours, theirs, [0]) == paired_intervals(ours, theirs, [0])
    assert all(tuple(interval) == (0, 0, 0) for interval in paired_intervals(ours, ours, [0]))
    with pytest.raises(ValueError, match=r"\(3, 20, 3, 2\) and \(2, 20, 3, 2\)"):
        paired_intervals(ours, theirs[:2], [0])


def test_intervals_cover_a_planted_difference():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        ease = rng.uniform(0.2, 0.7, (1, 40))  # per image, the same for both objectives
        luck = rng.normal(0, 0.02, (2, 6, 1))  # per seed
        ours, theirs = (rng.binomial(400, ease + gain + luck[i]) / 40 for i, gain in enumerate((0.1, 0.0)))
        interval = paired_intervals(counts_of(ours), counts_of(theirs), [0], draws=300)[2]
        covered.append(interval.low <= 0.1 * 10 / 20 <= interval.high)
    assert 0.86 <= np.mean(covered) <= 0.99


def test_tail_of_absent_classes_has_no_interval():
    counts = np.zeros((2, 3, 3, 2), dtype=np.int64)
    counts[..., 0] = 5
    assert np.isnan(paired_intervals(counts, counts, [1], draws=50)[1]).all()


# Studies


def study_of(objectives=("cross_entropy", "dice"), arguments=(), **options):
    return make_study("synthetic", [*SYNTHETIC, *arguments], StudySettings(objectives, **options))


def test_objectives_are_given_by_name_settings_or_file(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("model: {objective: {class_path: mcseg.losses.DiceLoss}}")
    written = ["cross_entropy", "margin_calibration:tau=3,scheme=miou,model.optimizer.lr=0.1", "objectives/focal", str(own)]
    study = study_of(
        written,
        seeds=[4, 2],
        baseline="objectives/focal",
        tune={"model.scheduler.power": ["0.5", 1]},
        folds=["train-000*", ["train-0020", "train-0021"]],
    )
    assert [objective.label for objective in study.objectives] == written
    assert study.objectives[1].arguments[3:] == (
        "--model.objective.tau=3",
        "--model.objective.scheme=miou",
        "--model.optimizer.lr=0.1",
    )
    # Arguments of the data recipe's objective must not leak into another objective
    assert study.objectives[3].arguments == ("--model.objective=null", "--config", str(own))
    assert all(
        objective.trials == (("--model.scheduler.power=0.5",), ("--model.scheduler.power=1",))
        for objective in study.objectives
    )
    assert study.folds == (("train-000*",), ("train-0020", "train-0021"))
    assert (study.seeds, study.baseline) == ((4, 2), "objectives/focal")
    assert parse_grid(["tau=1,10", "x=[1,2],[3,4]"]) == {"tau": ["1", "10"], "x": ["[1,2]", "[3,4]"]}


TRIALS = {
    "a": {"recipe": "dice", "trials": [{"smooth": 1}, {"smooth": 2}]},
    "b": {"recipe": "dice", "trials": [{"smooth": 1}]},
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objectives": ["crossentropy"]}, "crossentropy: .*cross_entropy"),
        ({"objectives": ["cross_entropy:tau=3"]}, "cross_entropy:tau=3: .*tau' is not accepted"),
        ({"objectives": ["margin_calibration:scheme=best"]}, "scheme.*best"),
        ({"objectives": ["dice", "dice"]}, "dice twice"),
        ({"objectives": []}, "objectives: found none"),
        ({"objectives": ["dice:smooth"]}, "KEY=VALUE"),
        ({"objectives": [{"name": "dice"}]}, "found name, expected recipe.*overrides.*trials"),
        ({"objectives": TRIALS, "folds": ["train-0000"]}, "a 2, b 1"),
        ({"tune": {"model.scheduler.power": [1, 2]}}, "folds: found none"),
        ({"tune": {"tau": [1, 2]}, "folds": ["train-0000"]}, "cross_entropy: .*tau' is not accepted"),
        ({"folds": ["train-0000", "0001TP_*"]}, "0001TP_\\* matches no training image.*such as train-0000"),
        ({"folds": ["*"]}, "every training image"),
        ({"baseline": "focal"}, "baseline: found focal"),
        ({"seeds": [1, 1]}, "seeds: found \\[1, 1\\]"),
        ({"then": {"trainer.max_epochs": 1}}, "then: .*first"),
        ({"first": "dice", "then": {"trainer.max_epochz": 1}}, "max_epochz"),
        ({"arguments": ["--data.held_out=[a]"]}, "data.held_out: .*folds"),
    ],
)
def test_invalid_studies_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        study_of(**options)
    assert "\n" not in str(error.value)


def test_study_remarks_on_settings_that_differ():
    assert study_of(["cross_entropy", "dice:model.optimizer.lr=0.1"]).remarks == ()
    (line,) = study_of(["cross_entropy", "dice:trainer.max_epochs=3"]).remarks
    assert "trainer.max_epochs: cross_entropy 10, dice:trainer.max_epochs=3 3" in line


def test_shifts_are_not_fitted_with_test_time_augmentation():
    study = study_of(folds=["train-000*"], arguments=["--inference.flip=true"])
    assert not study.shifts
    assert "shifts" in study.remarks[0]
    assert not any(run.keeps_log_probs for run, _ in planned(study).values())
    outcomes = {f"{name}, trial 0, fold 0, seed 0": miou(0.5) for name in ("cross_entropy", "dice")}
    final = planned(study, outcomes, (1.0,))["dice, seed 0"][0]
    assert final.shifts is None
    assert study_of(folds=["train-000*"]).shifts


def planned(study, outcomes=None, shifts=()):
    """Map each run's description to the run and the reason why it cannot start, given outcomes by description."""
    outcomes = outcomes or {}
    return {str(run): (run, blocked) for run, blocked in runs(study, lambda run: outcomes.get(str(run)), lambda _: shifts)}


def test_runs_without_folds_are_objectives_times_seeds():
    plan = planned(study_of(seeds=[0, 1]))
    assert list(plan) == ["cross_entropy, seed 0", "dice, seed 0", "cross_entropy, seed 1", "dice, seed 1"]
    assert all(run.start is run.shifts is None and not blocked for run, blocked in plan.values())
    assert plan["dice, seed 1"][0].arguments[-1] == "--seed_everything=1"


def miou(value):
    return {"scores": {"miou": value}}


def test_final_runs_use_the_best_trial_of_each_objective():
    study = study_of(
        ["cross_entropy", "dice"],
        seeds=[3, 4],
        folds=["train-000*", "train-001*"],
        tune={"model.scheduler.power": [1, 2, 3]},
    )
    outcomes = {}
    assert len(planned(study)) == 2 * 2 * 3
    for objective, trial, fold in itertools.product(["cross_entropy", "dice"], range(3), range(2)):
        outcomes[f"{objective}, trial {trial}, fold {fold}, seed 3"] = miou(
            [[0.1, 0.5], [0.4, 0.4], [0.2, 0.2]][trial][fold]
        )
    outcomes["dice, trial 1, fold 1, seed 3"] = "failed"
    missing = outcomes.pop("cross_entropy, trial 0, fold 0, seed 3")
    plan = planned(study, outcomes, (0.5, -0.5))
    assert {name for name in plan if "trial" not in name} == {"dice, seed 3", "dice, seed 4"}
    run = plan["dice, seed 4"][0]
    assert (run.trial, run.shifts) == (0, (0.5, -0.5))  # mean 0.3; the trial with a failed run does not count
    assert "--model.scheduler.power=1" in run.arguments
    assert not any("held_out" in argument for argument in run.arguments)
    outcomes["cross_entropy, trial 0, fold 0, seed 3"] = missing
    run = planned(study, outcomes, (0.5, -0.5))["cross_entropy, seed 3"][0]
    assert run.trial == 1
    fold = plan["dice, trial 0, fold 1, seed 3"][0]
    assert '--data.held_out=["train-001*"]' in fold.arguments
    assert fold.keeps_log_probs
    assert not run.keeps_log_probs
    outcomes |= {name: "failed" for name in outcomes if name.startswith("dice")}
    assert "folds failed" in planned(study, outcomes)["dice, seed 3"][1]


def test_second_stage_starts_from_the_first_stage_of_its_seed_and_fold():
    study = study_of(
        ["cross_entropy", "dice"], seeds=[0, 1], folds=["train-000*"], first="focal", then={"trainer.max_epochs": 2}
    )
    outcomes = {f"{name}, trial 0, fold 0, seed 0": miou(0.5) for name in ("cross_entropy", "dice")}
    plan = planned(study, outcomes, ())
    assert str(plan["dice, trial 0, fold 0, seed 0"][0].start) == "focal, first stage, fold 0, seed 0"
    final = plan["dice, seed 1"][0]
    assert str(final.start) == "focal, first stage, seed 1"
    assert final.start.keeps_weights
    assert "--trainer.max_epochs=2" in final.arguments
    assert "--trainer.max_epochs=2" not in final.start.arguments
    outcomes["focal, first stage, seed 1"] = "failed"
    assert "first stage" in planned(study, outcomes)["dice, seed 1"][1]


CAMVID = ("--config", str(RECIPES / "camvid.yaml"))


def test_key_depends_on_settings_that_change_results(tmp_path):
    recipe = tmp_path / "a.yaml"

    def key(content="model: {aux_weight: 1}", name=recipe, label="x", **options):
        name.write_text(content)
        return Run(label, "final", 0, (*CAMVID, "--config", str(name), *options.pop("arguments", ())), **options).key

    base = key()
    assert base == key(label="y") == key("# the same\nmodel:\n  aux_weight: 1\n") == key(name=tmp_path / "b.yaml")
    assert base == key(arguments=("--trainer.enable_progress_bar=false",)) == key(arguments=("--trainer.logger=false",))
    assert (
        key(arguments=("--data.root", "x"))
        == key(arguments=("--data.root=x",))
        == key(arguments=("--data.root=elsewhere/x",))
    )
    assert key(arguments=("--data.root=x",)) != key(arguments=("--data.root=y",))
    others = [key("model: {aux_weight: 2}"), key(arguments=("--seed_everything=1",)), key(shifts=(1.0, -1.0))]
    others.append(key(start=Run("z", "first", 0, CAMVID)))
    assert len({base, *others}) == 5


def test_key_depends_on_effective_settings():
    def key(*arguments):
        return Run("x", "final", 0, (*CAMVID, *arguments)).key

    old = "--model.objective={class_path: mcseg.losses.DiceLoss, init_args: {smooth: 1, classes: all}}"
    new = "--model.objective={class_path: mcseg.losses.JaccardLoss, init_args: {smooth: 1}}"
    assert key(old, "--model.objective=null", new) == key(new)
    assert key(old, "--model.objective.smooth=2", "--model.objective.smooth=1") == key(old)
    assert key(old, "--model.objective.smooth=2") == key(old, "--model.objective.init_args.smooth=2.0")
    assert key(old, "--model.aux_weight=1") == key("--model.aux_weight=1", old) == key("--model={aux_weight: 1.0}", old)
    # A new class keeps those arguments of the old one that it accepts, as in the parser
    kept = "--model.objective={class_path: mcseg.losses.JaccardLoss, init_args: {smooth: 1, classes: all}}"
    assert key(old, new) == key(kept)
    assert key(old, new, old) == key(old)
    different = [(new,), (old, new), (old,), (old, "--model.objective.smooth=3"), (old, "--model.objective.smooth=2")]
    different += [("--data=SyntheticData",), ("--data.root=x",), ()]
    assert len({key(*arguments) for arguments in different}) == len(different)
    # Settings of the default objective and logger, whose classes are not named
    assert key("--model.objective.power=0.3") != key("--model.objective.power=0.4") != key("--trainer.logger.name=x")


@pytest.mark.parametrize("objective", sorted(path.stem for path in (RECIPES / "objectives").glob("*.yaml")))
def test_explicit_settings_and_defaults_give_all_settings(objective, tmp_path):
    """A run's key covers all its settings: parsing the explicit settings on top of the defaults gives the same config."""
    arguments = (*CAMVID, "--model.objective=null", "--config", str(RECIPES / "objectives" / f"{objective}.yaml"))
    arguments += ("--data.root=x", "--model.optimizer.lr=0.5", '--data.held_out=["a*"]', "--seed_everything=3")
    (tmp_path / "explicit.yaml").write_text(json.dumps(explicit_settings(arguments)))
    whole = _parser().parse_args(list(arguments))
    again = _parser().parse_args(["--model.objective=null", "--config", str(tmp_path / "explicit.yaml")])
    assert whole.pop("config") != again.pop("config")  # the files
    assert again.as_dict() == whole.as_dict()


# Processes


class FakeProcess:
    """Process that writes a result and exits, fails, or never ends."""

    def __init__(self, path, run, kind):
        self.pid, self.returncode, self.kind = 0, None, kind
        if kind == "fine":
            path.mkdir(parents=True, exist_ok=True)
            (path / "result.json").write_text(json.dumps({"key": run.key, "scores": {"miou": 0.25}}))

    def poll(self):
        self.returncode = {"fine": 0, "fails": -signal.SIGKILL, "hangs": None}[self.kind]
        return self.returncode


@pytest.fixture
def started(monkeypatch):
    """List of started runs, and a mapping from runs to how they end: ``fine`` (default), ``fails`` or ``hangs``."""
    names, kinds = [], {}

    def start(run, folder, **_):
        names.append(str(run))
        folder.path(run).mkdir(parents=True, exist_ok=True)
        return FakeProcess(folder.path(run), run, kinds.get(str(run), "fine"))

    monkeypatch.setattr(schedule, "_start", start)
    return names, kinds


def test_execute_keeps_finished_runs_and_repeats_failed_ones(started, tmp_path, capsys):
    names, kinds = started
    study = study_of(["cross_entropy", "dice", "focal"], seeds=[0, 1])
    kinds["dice, seed 0"] = "fails"
    failures = execute(study, Folder(tmp_path), jobs=2)
    assert len(names) == 6
    assert [str(run) for run in failures] == ["dice, seed 0"]
    assert re.search("SIGKILL.*memory", next(iter(failures.values())))
    assert "dice, seed 0: failed" in capsys.readouterr().out
    names.clear()
    kinds.clear()
    assert execute(study, Folder(tmp_path), jobs=1) == {}
    assert names == ["dice, seed 0"]
    names.clear()
    execute(study_of(["cross_entropy", "dice", "focal:gamma=1"], seeds=[0, 1]), Folder(tmp_path), jobs=1)
    assert names == ["focal:gamma=1, seed 0", "focal:gamma=1, seed 1"]


def test_second_stage_waits_for_the_first_and_needs_its_success(started, tmp_path):
    names, kinds = started
    study = study_of(["dice"], seeds=[0, 1], first="cross_entropy")
    kinds["cross_entropy, first stage, seed 0"] = "fails"
    failures = execute(study, Folder(tmp_path), jobs=4)
    assert names == ["cross_entropy, first stage, seed 0", "cross_entropy, first stage, seed 1", "dice, seed 1"]
    assert "first stage" in failures[next(run for run in failures if run.role == "final")]


def test_interrupt_stops_the_runs(tmp_path, monkeypatch):
    processes = []

    def start(*_, **__):
        command = ["sh", "-c", "sleep 60 & sleep 60"]
        processes.append(subprocess.Popen(command, start_new_session=True))
        return processes[-1]

    def interrupt(_):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(schedule, "_start", start)
    monkeypatch.setattr(schedule.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        execute(study_of(), Folder(tmp_path), jobs=2)
    assert [process.returncode for process in processes] == [-signal.SIGTERM] * 2
    time.sleep(0.1)
    group = ["ps", "-o", "stat=", "-g", ",".join(str(process.pid) for process in processes)]
    states = subprocess.run(group, capture_output=True, text=True, check=False).stdout.split()
    assert all(state.startswith("Z") for state in states)


def test_second_compare_in_a_folder_is_refused(tmp_path):
    with at_work(tmp_path), pytest.raises(RuntimeError, match="another mcseg compare"):
        execute(study_of(), Folder(tmp_path), jobs=1)


def test_runs_share_the_cores(monkeypatch):
    monkeypatch.setattr(schedule, "_cores", lambda: 8)
    assert [schedule.workers_per_job(jobs) for jobs in (1, 2, 8, 16)] == [8, 4, 0, 0]
    monkeypatch.setattr(schedule, "_cores", lambda: 1)
    assert schedule.workers_per_job(1) == 1


def in_process(folder, run, monkeypatch, start=None):
    """Execute a run as the worker does, but in this process."""
    path = Folder(folder).path(run)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: None)
    schedule._start(run, Folder(folder), slot=0, jobs=1, pictures=2, keep_checkpoints=False)
    monkeypatch.undo()
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    worker.run(path)
    return path, json.loads((path / "result.json").read_text())


def tiny_arguments():
    return [*SYNTHETIC, *setting_arguments(TINY), "--data.num_workers=0"]


@pytest.mark.filterwarnings("ignore:.*has no labelled pixels:UserWarning", "ignore:.*no pixels of class")
def test_second_stage_starts_from_the_last_weights_of_the_first(tmp_path, monkeypatch):
    study = make_study("synthetic", tiny_arguments(), StudySettings(["dice"], seeds=[0], first="cross_entropy"))
    plan = [run for run, _ in Folder(tmp_path).runs(study)]
    first, first_result = in_process(tmp_path, plan[0], monkeypatch)
    _, result = in_process(tmp_path, plan[1], monkeypatch)
    assert result["fingerprint"]["batches"] == first_result["fingerprint"]["batches"]
    assert result["settings"]["model"]["init_from"] == f"runs/{first.name}/last.ckpt"
    assert str(tmp_path) not in json.dumps(result)
    assert result["fingerprint"]["weights"] != first_result["fingerprint"]["weights"]
    again = Run("other", "final", 0, (*plan[1].arguments, "--trainer.limit_train_batches=1"), start=plan[0])
    assert in_process(tmp_path, again, monkeypatch)[1]["fingerprint"]["weights"] == result["fingerprint"]["weights"]
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["last.ckpt"]
    state = torch.load(first / "last.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())


@pytest.mark.parametrize("path", sorted((RECIPES / "objectives").glob("*.yaml")), ids=lambda path: path.stem)
def test_objectives_do_not_use_the_random_generator(path):
    """Otherwise initial weights or crops would differ between the objectives of a comparison."""
    written = yaml.safe_load(path.read_text())["model"]["objective"]
    kind = pkgutil.resolve_name(written["class_path"])
    counted = {"num_classes": 3} if "num_classes" in inspect.signature(kind).parameters else {}
    before = torch.get_rng_state()
    objective = kind(**counted, **written.get("init_args", {}))
    if hasattr(objective, "calibrate"):
        objective.calibrate(torch.tensor([500, 40, 3]))
    logits = torch.linspace(-2, 3, 2 * 3 * 8 * 8).view(2, 3, 8, 8).sin().requires_grad_()
    objective(logits, torch.arange(128).view(2, 8, 8) % 3).backward()
    assert torch.equal(torch.get_rng_state(), before)


# Tables and report


class Fabricated:
    """Folder of a finished study with random results; ``edit`` changes each result before it is written."""

    def __init__(self, root, study, edit=lambda result: None):
        self.study, self.folder = study, Folder(root)
        rng = np.random.default_rng(0)
        ready = 0
        while ready < len(plan := self.folder.runs(study)):
            ready = len(plan)
            for run, _ in plan:
                if self.folder.outcome(run) is None:
                    self._write(run, rng, edit)

    def _write(self, run, rng, edit):
        path = self.folder.path(run)
        (path / "pictures").mkdir(parents=True)
        counts = {}
        for name in ("counts", "counts_shifted") if run.shifts else ("counts",):
            hit = rng.integers(0, 30, (5, 3)) + (9 if run.objective == "dice" else 0)
            counts[name] = np.stack([hit, np.full_like(hit, 40), hit + rng.integers(0, 9, (5, 3))], axis=1)
        patterns = [] if run.fold is None else list(self.study.folds[run.fold])
        names = [patterns[i % len(patterns)].replace("*", str(i)) if patterns else "abcde"[i] for i in range(5)]
        np.savez(path / "counts.npz", names=np.array(names), **counts)
        if run.keeps_log_probs:
            np.savez(path / "log_probs.npz", log_probs=rng.normal(size=(40, 3)), target=rng.integers(0, 3, 40))
        if run.role == "final":
            pixels = torch.randint(0, 3, (6, 8), dtype=torch.uint8)
            pictures.save(pictures.image_picture(torch.rand(3, 6, 8)), path / "pictures" / "0-image.jpg")
            for name in ("target", "prediction"):
                pictures.save(pictures.palette_image(pixels, distinct_colors(3)), path / "pictures" / f"0-{name}.png")
        result = {"objective": run.objective, "role": run.role, "seed": run.seed, "fold": run.fold, "trial": run.trial}
        result |= {name.replace("counts", "scores"): worker._scores(value, [2]) for name, value in counts.items()}
        result |= {"key": run.key, "shifts": run.shifts, "images": 5, "steps": 12}
        result["classes"] = {
            "names": ["road", "sky", "pole"],
            "palette": [[1, 2, 3]] * 3,
            "training_pixels": [90, 9, 1],
            "tail": [2],
        }
        result["offsets"] = {"foreground": [1, 2, 0.5], "background": [0.1, 0.02, 0]} if run.objective == "dice" else None
        result["curves"] = [{"epoch": epoch, "loss": 1 / epoch, "miou": 0.1 * epoch, "seconds": 1.0} for epoch in (1, 2)]
        result["seconds"] = {"step": 0.05 + 0.01 * run.seed, "step_with_data": 0.08, "fit": 3.0, "evaluation": 1.0}
        result["memory_bytes"] = {"process": 3 * 2**20}
        objective = {"class_path": "A" if run.objective == "dice" else "B", "init_args": {"x": run.trial}}
        result["settings"] = {
            "seed_everything": run.seed,
            "model": {"objective": objective, "aux_weight": 1 + (run.trial or 0), "warmup_steps": 5},
            "data": {"init_args": {"held_out": patterns}},
        }
        result["fingerprint"] = {"weights": f"w{run.seed}", "batches": f"b{run.seed}"}
        result |= {"machine": {"device": "cpu"}, "versions": {"torch": "2"}}
        result.setdefault("scores_shifted", None)
        edit(result)
        (path / "result.json").write_text(json.dumps(result))

    @property
    def results(self):
        return tables.Results(self.study, Folder(self.folder.root))

    def report(self):
        return report.write(self.results).read_text()


def test_table_has_means_deviations_and_intervals(tmp_path):
    made = Fabricated(tmp_path, study_of(["cross_entropy", "dice"], seeds=[0, 1, 2]))
    results = made.results
    ours, theirs = results.table().to_dict("records")[::-1]
    finals = {(run.objective, run.seed): result for run, result, _ in results.runs}
    scores = [finals["dice", seed]["scores"] for seed in range(3)]
    for name in ("miou", "miou_tail", "pixel_accuracy"):
        assert ours[f"{name}_mean"] == pytest.approx(np.mean([s[name] for s in scores]))
        assert ours[f"{name}_sd"] == pytest.approx(np.std([s[name] for s in scores], ddof=1))
        assert ours[f"{name}_difference"] == pytest.approx(ours[f"{name}_mean"] - theirs[f"{name}_mean"])
        assert ours[f"{name}_difference_low"] < ours[f"{name}_difference"] < ours[f"{name}_difference_high"]
        assert np.isnan(theirs[f"{name}_difference"])
    assert ours["iou/sky_mean"] == pytest.approx(np.mean([s["iou"][1] for s in scores]))
    assert (ours["seeds"], ours["step_ms"], ours["memory_mib"]) == (3, pytest.approx(60), 3)


def test_files_of_a_study(tmp_path):
    study = study_of(
        ["cross_entropy", "dice"], seeds=[0, 1], folds=["train-000*", "train-001*"], tune={"model.scheduler.power": [1, 2]}
    )
    study = replace(study, remarks=("a remark",))
    made = Fabricated(tmp_path, study)
    tables.write(made.results)
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["finished"] * (2 * 2 * 2 + 2 * 2)
    assert (rows[3]["objective"], rows[3]["fold"], rows[3]["trial"], rows[3]["settings"]) == (
        "cross_entropy",
        "1",
        "1",
        "model.scheduler.power=2",
    )
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["objective"], row["shifted"]) for row in rows] == [
        ("cross_entropy", "False"),
        ("dice", "False"),
        ("cross_entropy", "True"),
        ("dice", "True"),
    ]
    # With shifts: differences to the baseline without and with shifts
    for ending, other in (("difference", 0), ("difference_to_shifted", 2)):
        gap = float(rows[3]["miou_mean"]) - float(rows[other]["miou_mean"])
        assert float(rows[3][f"miou_{ending}"]) == pytest.approx(gap)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["remarks"] == ["a remark"]
    assert len(content["shifts"]["dice"]) == 3
    assert [len(scores) for scores in content["tuning"]["dice"].values()] == [2, 2]
    text = str(made.results.comparison).splitlines()
    assert text[2].startswith("dice")
    assert f"{100 * max(row['miou_mean'] for row in content['table']):.2f} ±" in text[2]


def read_plainly(path):
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".csv.xz"])
def test_counts_reproduce_the_comparison(tmp_path, ending, capsys):
    study = study_of(
        {"NA": "cross_entropy", "dice": "dice"},
        seeds=[0, 1],
        folds=["train-000*", ["train-001*", "train-002*"]],
        tune={"model.aux_weight": [1, 2]},
    )

    def edit(result):
        result["classes"]["names"][2] = "a/b"

    made = Fabricated(tmp_path / "study", study, edit)
    runs_of = [(made.folder.path(run), run.about) for run, _, _ in made.results.runs]
    path = tmp_path / f"kept{ending}"
    write_counts(runs_of, path)
    content = path.read_bytes()
    write_counts(runs_of, path)
    assert path.read_bytes() == content
    again = comparison(read_counts(path))
    assert (again.baseline_label, again.class_names, again.tail) == ("NA", ["road", "sky", "a/b"], [2])
    assert len(again.rows) == len(made.results.comparison.rows) == 4
    for ours, theirs in zip(again.rows, made.results.comparison.rows, strict=True):
        assert ours == pytest.approx(theirs, nan_ok=True)
    main(["compare", "--read", str(path), "--baseline", "dice"])
    assert "mIoU minus dice's" in capsys.readouterr().out
    # The same counts, read without mcseg
    table = read_plainly(path)
    # Patterns for runs on folds; images for final runs, without and with shifts
    assert len(table) == 4 * (1 + 2) + 2 * 2 * 2 * 5
    for run, result, _ in made.results.runs:
        rows = table[table.run == run.key]
        assert set(rows.objective) == {run.objective}
        assert json.loads(rows["model.objective"].iloc[0]) == result["settings"]["model"]["objective"]
        assert set(rows["model.aux_weight"]) == {result["settings"]["model"]["aux_weight"]}
        with np.load(made.folder.path(run) / "counts.npz") as file:
            names, expected = file["names"], {False: file["counts"], True: file.get("counts_shifted")}
        for shifted, part in rows.groupby("shifted"):
            columns = [f"{kind}/{name}" for kind in ("correct", "target", "predicted") for name in ("road", "sky", "a/b")]
            got = part[columns].to_numpy().reshape(len(part), 3, 3)
            if run.fold is None:
                assert list(part.images) == list(names)
                assert np.array_equal(got, expected[shifted])
            else:
                patterns = list(study.folds[run.fold])
                assert list(part.images) == patterns
                for pattern, sums in zip(patterns, got, strict=True):
                    prefix = np.char.startswith(names, pattern[:-1])
                    assert np.array_equal(sums, expected[shifted][prefix].sum(0))
            shifts = part[["shift/road", "shift/sky", "shift/a/b"]].drop_duplicates().to_numpy()
            assert shifts == pytest.approx(np.array([run.shifts if shifted else 3 * [np.nan]]), nan_ok=True)
    assert "model.warmup_steps" not in table
    assert "data.init_args.held_out" not in table


def test_shared_run_has_counts_for_each_label(tmp_path):
    """Two objectives with the same settings share a run."""
    study = study_of({"first": "dice", "second": "dice"}, seeds=[0])
    made = Fabricated(tmp_path, study)
    assert len(list(tmp_path.glob("runs/*"))) == 1
    tables.write(made.results)
    assert list(read_plainly(tmp_path / "counts.csv.xz").objective) == 5 * ["first"] + 5 * ["second"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n1,2,3,4\n", "not a table of pixel counts"),
        ("objective,role,seed,shifted\nx,final,0,False\n", "no column images"),
        ("objective,role,seed,shifted,images\nx,final,0,False,a\n", "no column correct/<class>"),
    ],
)
def test_reading_other_files_is_refused_in_one_line(tmp_path, content, message, capsys):
    (tmp_path / "kept.csv").write_text(content)
    with pytest.raises(SystemExit):
        main(["compare", "--read", str(tmp_path / "kept.csv")])
    error = capsys.readouterr().err.strip()
    assert error.startswith("mcseg: error: ")
    assert "kept.csv" in error
    assert message in error
    assert "\n" not in error


def test_mismatched_batches_are_reported(tmp_path):
    def other(result):
        if (result["objective"], result["seed"]) == ("dice", 1):
            result["fingerprint"]["batches"] = "others"

    made = Fabricated(tmp_path, study_of(seeds=[0, 1]), other)
    assert made.results.condition_mismatches() == ["seed 1: batches differ between cross_entropy | dice"]
    assert "seed 1: batches differ" in made.report()


def test_runs_on_different_images_are_refused(tmp_path):
    made = Fabricated(tmp_path, study_of(seeds=[0, 1]))
    path = next(tmp_path.glob("runs/dice-final-seed1*/counts.npz"))
    with np.load(path) as file:
        np.savez(path, names=file["names"][::-1], counts=file["counts"])
    with pytest.raises(ValueError, match="dice-final-seed1.*other images"):
        _ = made.results


class Reader(html.parser.HTMLParser):
    """Text that a page shows without scripts, and the URLs that it loads."""

    def __init__(self, page):
        super().__init__()
        self.text, self.sources, self.tags, self._silent = [], [], [], 0
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster")]
        self._silent += tag in ("script", "style")

    def handle_endtag(self, tag):
        self._silent -= tag in ("script", "style")

    def handle_data(self, data):
        if not self._silent:
            self.text.append(data.strip())


HOSTILE = "<img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"


def test_report_needs_no_scripts_and_loads_no_urls(tmp_path):
    study = study_of(["cross_entropy", "dice"], seeds=[0, 1], folds=["train-000*"], tune={"model.scheduler.power": [1, 2]})
    study = replace(study, remarks=("a remark",))
    made = Fabricated(tmp_path, study)
    page = made.report()
    reader = Reader(page)
    shown = " ".join(reader.text)
    row = max(made.results.rows(), key=lambda row: row["miou_mean"])
    for expected in (
        f"{100 * row['miou_mean']:.2f} ± {100 * row['miou_sd']:.2f}",
        f"{100 * row['iou/pole_mean']:.1f}",
        "a remark",
        "dice + shifts",
        "power=2",
        "90.0",  # share of the most frequent class
        *("road", "sky", "pole"),
    ):
        assert expected in shown, expected
    assert reader.sources
    assert all(source.startswith("data:image/") for source in reader.sources)
    assert not re.search(r"https?:|url\(|@import|//cdn", page)
    # Differences without and with shifts, curves of both objectives, offsets of dice
    pictures_of_charts = [source.partition(",")[2] for source in reader.sources if source.startswith("data:image/svg")]
    charts = [ElementTree.fromstring(base64.b64decode(content)) for content in pictures_of_charts]
    texts = [" ".join(chart.itertext()) for chart in charts]
    assert [("rare third" in text, "training loss" in text, "offset in logits" in text) for text in texts] == [
        *2 * [(True, False, False)],
        *2 * [(False, True, False)],
        (False, False, True),
    ]
    dice = next(row for row in made.results.rows() if row["objective"] == "dice" and not row["shifted"])
    for end in ("", "_low", "_high"):
        for measure in ("miou", "miou_tail", "pixel_accuracy"):
            assert f"{100 * dice[f'{measure}_difference{end}']:+.2f}".replace("-", "\N{MINUS SIGN}") in texts[0]


def test_report_escapes_names(tmp_path):
    def hostile(result):
        result["classes"]["names"][2] = HOSTILE
        result["machine"]["device"] = HOSTILE

    study = study_of({HOSTILE: "cross_entropy", "b</td><script>alert(2)</script>": "dice"}, seeds=[0])
    reader = Reader(Fabricated(tmp_path, replace(study, remarks=(HOSTILE,)), hostile).report())
    assert HOSTILE in reader.text
    assert "b</td><script>alert(2)</script>" in reader.text
    assert reader.tags.count("script") == 1
    assert all(source.startswith("data:") for source in reader.sources)


def test_report_lists_missing_and_failed_runs(tmp_path):
    study = study_of(["cross_entropy", "dice"], seeds=[0, 1])
    made = Fabricated(tmp_path, study)
    shutil.rmtree(next(tmp_path.glob("runs/dice-final-seed1*")))
    failed = next(tmp_path.glob("runs/cross_entropy-final-seed1*"))
    (failed / "result.json").unlink()
    (failed / "error.txt").write_text("ValueError: too bad")
    shown = " ".join(Reader(made.report()).text)
    assert "cross_entropy, seed 1: ValueError: too bad" in shown
    assert "No final run yet: cross_entropy, seed 1; dice, seed 1" in shown
    for path in tmp_path.glob("runs/*/result.json"):
        path.unlink()
    assert "No final run is finished" in " ".join(Reader(made.report()).text)
    assert str(made.results.comparison) == "no final run is finished"


# End to end


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_compare_end_to_end(tmp_path, capsys):
    folder = tmp_path / "study"
    options = {"seeds": [0, 1], "folds": ["train-000[01]"], "settings": TINY, "folder": folder, "jobs": 2}
    table = compare("synthetic", ["cross_entropy", "margin_calibration:tau=2", "dice:smooth=-1"], **options)
    assert "dice:smooth=-1, trial 0, fold 0, seed 0: ValueError: smooth: found -1" in capsys.readouterr().out
    assert table[["objective", "shifted", "seeds"]].to_numpy().tolist() == [
        ["cross_entropy", False, 2],
        ["margin_calibration:tau=2", False, 2],
        ["cross_entropy", True, 2],
        ["margin_calibration:tau=2", True, 2],
    ]
    results = {
        path.parent.name.rsplit("-", 1)[0]: json.loads(path.read_text()) for path in folder.glob("runs/*/result.json")
    }
    assert len(results) == 2 * (1 + 2)
    for seed in (0, 1):
        ours, theirs = (results[f"{name}-final-seed{seed}"] for name in ("cross_entropy", "margin_calibration_tau=2"))
        assert ours["fingerprint"] == theirs["fingerprint"]
        assert ours["scores"] != theirs["scores"]
        assert len(ours["curves"]) == 1
        assert ours["curves"][0]["miou"] == pytest.approx(ours["scores"]["miou"], abs=1e-6)  # validated twice, same weights
        assert theirs["offsets"]["background"][7] > theirs["offsets"]["background"][0] > 0
        assert ours["offsets"] is None
    assert results["cross_entropy-final-seed0"]["fingerprint"] != results["cross_entropy-final-seed1"]["fingerprint"]
    fold = results["cross_entropy-fold-fold0-trial0-seed0"]
    assert (fold["images"], fold["steps"]) == (2, 2)  # two of the six training images are held out
    assert results["cross_entropy-final-seed0"]["images"] == 3
    reader = Reader((folder / "report.html").read_text())
    assert all(source.startswith("data:image/") for source in reader.sources)
    assert not list(folder.rglob("*.ckpt"))
    for path in (
        *folder.glob("runs/*/result.json"),
        *(folder / name for name in ("study.json", "results.json", "runs.csv")),
    ):
        assert not any(str(local) in path.read_text() for local in (tmp_path, RECIPES)), path  # results can be shared
    table = read_counts(folder / "counts.csv.xz")
    assert not table.astype(str).apply(lambda column: column.str.contains(str(tmp_path), regex=False)).to_numpy().any()
    assert set(table["run"]) == {json.loads(path.read_text())["key"] for path in folder.glob("runs/*/result.json")}
    assert json.loads((folder / "study.json").read_text())["words"][:2] == ["--config", "synthetic"]
    assert results["cross_entropy-final-seed0"]["settings"]["model"]["arch"] == "unet"

    times = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/result.json")}
    lost = next(folder.glob("runs/margin_calibration_tau=2-final-seed1-*/result.json"))
    before = json.loads(lost.read_text())
    lost.unlink()
    objectives = ["cross_entropy", "margin_calibration:tau=2"]
    options = ["--folds", "train-000[01]", "--seeds", "0", "1", "--jobs", "2", "--folder", str(folder)]
    main(["compare", "synthetic", "--objectives", *objectives, *options, *setting_arguments(TINY)])
    after = json.loads(lost.read_text())
    assert (after["scores"], after["scores_shifted"]) == (before["scores"], before["scores_shifted"])
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/result.json")}
    assert {path for path in times if kept[path] == times[path]} == set(times) - {lost}


def test_command_reports_errors_in_one_line(capsys, tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text("objectives: [dice]\nobjektives: 3\n")
    for arguments, message in (
        (["--seeds", "0"], "--objectives"),
        (["--objectives", "nonsense"], "objective nonsense"),
        (["--objectives", "dice", "--trainer.max_epochz", "1"], "max_epochz"),
        (["--objectives", "dice", "--jobs", "x"], "--jobs"),
        (["--objectives", "dice", "--jobs", "0"], "jobs: found 0"),
        (["--study", str(study)], "found objektives, expected"),
        (["--study", "nowhere.yaml"], "nowhere.yaml"),
    ):
        with pytest.raises(SystemExit):
            main(["compare", "synthetic", *arguments])
        error = capsys.readouterr().err.strip()
        assert error.startswith("mcseg: error: ")
        assert message in error
        assert "\n" not in error
    assert not (tmp_path / "runs").exists()


def test_study_file_and_command_line_override_the_recipe(tmp_path, monkeypatch):
    written = {
        "objectives": {"plain": "cross_entropy", "soft": {"recipe": "dice", "overrides": {"smooth": 2}}},
        "seeds": [5],
        "settings": {"trainer.max_epochs": 7, "data.batch_size": 3},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(written))
    seen = []
    monkeypatch.setattr("mcseg.compare.execute", lambda study, *_, **__: seen.append(study))
    main(["compare", "synthetic", "--study", "study.yaml", "--baseline", "soft", "--trainer.max_epochs", "9"])
    (study,) = seen
    assert (study.seeds, study.baseline) == ((5,), "soft")
    config = _parsed(study)
    assert (config.trainer.max_epochs, config.data.init_args.batch_size, config.model.objective.init_args.smooth) == (
        9,
        3,
        2,
    )


def _parsed(study):
    return ParseOnlyCLI(study.recipe, [*study.arguments, *study.objectives[1].arguments], run=False).config


STUDIES = [Path(__file__).parents[1] / "benchmarks" / "study" / f"{name}.yaml" for name in ("finetune", "scratch")]


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_study_files_of_the_repository_are_valid(path, tmp_path, monkeypatch):
    """The command accepts all settings, all objectives have three trials, and the folds match CamVid's images."""
    if not (SHARED / "data" / "camvid").is_dir():
        pytest.skip("no shared data")
    seen = []
    monkeypatch.setattr("mcseg.compare.execute", lambda study, *_, **__: seen.append(study))
    main(["compare", "camvid", "--study", str(path), "--root", str(SHARED / "data" / "camvid"), "--folder", str(tmp_path)])
    (study,) = seen
    kept = (tmp_path / "study.json").read_text()
    assert str(SHARED) not in kept
    assert '"camvid"' in kept
    assert len(study.folds) == 2
    assert study.shifts
    assert not study.remarks
    recipes = {argument.rpartition("/")[2] for objective in study.objectives for argument in objective.arguments}
    assert recipes >= {f"{name}.yaml" for name in ("cross_entropy", "focal", "lovasz", "dice", "jaccard", "ldam")}
    assert {len(objective.trials) for objective in study.objectives} == {3}
    assert len(study.seeds) >= 3
