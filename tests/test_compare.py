"""Comparisons: plan, statistics and shifts against oracles, a real one end to end, and its report."""

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
from mcseg.compare.record import _place, sample_log_probs
from mcseg.compare.schedule import Folder, execute
from mcseg.compare.shifts import _GRID, _miou_on_grid, fit_shifts, shifted_miou
from mcseg.compare.statistics import class_iou, measures, paired_intervals
from mcseg.compare.study import StudySettings, _ParseOnly, _parser, explicit_settings, make_study, parse_grid, setting_arguments
from mcseg.evaluation.metrics import Scores, image_counts, rarest_third
from mcseg.palette import distinct_colors
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
def test_one_histogram_gives_the_miou_of_every_shift(seed, classes, ties):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (60, classes))
    logits = (np.round(logits) if ties else logits).astype(np.float32)
    labels = rng.integers(0, classes, 60)
    shifts = np.round(rng.normal(0, 1, classes), 0 if ties else 2)
    index = int(rng.integers(classes))
    found = _miou_on_grid(logits, labels, shifts, index)
    for place in rng.choice(len(_GRID), 12, replace=False):
        other = shifts.copy()
        other[index] = _GRID[place]
        preds = (logits.astype(np.float64) + other).argmax(1)
        classes_seen = np.union1d(labels, preds)
        expected = jaccard_score(labels, preds, labels=classes_seen, average="macro")
        assert found[place] == pytest.approx(expected, abs=1e-9)


def test_planted_shifts_are_found():
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
def test_shifts_never_lower_the_miou_they_are_fitted_to(seed, classes, folds):
    rng = np.random.default_rng(seed)
    logits = [rng.normal(0, 1, (50, classes)).round(1).astype(np.float16) for _ in range(folds)]
    target = [rng.integers(0, classes, 50).astype(np.uint8) for _ in range(folds)]
    shifts = fit_shifts(logits, target)
    assert shifted_miou(logits, target, shifts) >= shifted_miou(logits, target, np.zeros(classes))
    assert shifts.sum() == pytest.approx(0, abs=1e-3)


# What a run records


def test_sampled_log_probabilities_are_those_of_resized_logits():
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


def test_image_counts_are_those_of_a_confusion_matrix():
    preds, target = torch.randint(0, 4, (20, 30)), torch.randint(0, 4, (20, 30))
    target[5:9, 3:] = 255
    labelled = target != 255
    matrix = confusion_matrix(target[labelled], preds[labelled], labels=range(4))
    found = image_counts(preds.to(torch.uint8), target, 4)
    assert np.array_equal(found, [matrix.diagonal(), matrix.sum(1), matrix.sum(0)])


def test_pictures_are_spread_evenly():
    chosen = [index for index in range(100) if _place(index, 100, 4) is not None]
    assert chosen == [12, 37, 62, 87]
    assert [_place(index, 2, 4) for index in range(2)] == [0, 1]


def test_rarest_third_leaves_out_absent_classes():
    assert rarest_third(torch.tensor([50, 0, 3, 900, 20])).tolist() == [2, 4]


# Statistics


def test_measures_are_those_of_the_scores():
    counts = np.random.default_rng(0).integers(1, 50, (3, 4))
    counts[1:] += counts[0]
    counts[:, 2] = 0
    scores = Scores.from_counts(*torch.from_numpy(counts))
    found = measures(counts, [1, 2])
    assert found == pytest.approx([scores.miou, float(scores.iou[1]), scores.pixel_accuracy])
    assert np.array_equal(class_iou(counts), scores.iou.numpy(), equal_nan=True)


def counts_of(hits):
    """(S,N,3,2) counts: per seed and image, pixels of class 0 right of 10, the others taken for class 1, which is right."""
    hits = np.asarray(hits)
    hit = np.stack([hits, np.full_like(hits, 10)], -1)
    target = np.full_like(hit, 10)
    predicted = np.stack([hits, 20 - hits], -1)
    return np.stack([hit, target, predicted], -2)


def accuracy(hits):
    return (np.asarray(hits) + 10) / 20


def test_bootstrap_draws_images_in_pairs():
    ours, theirs = counts_of([[9, 2]]), counts_of([[8, 6]])
    interval = paired_intervals(ours, theirs, [0], draws=3000)[2]
    assert interval.difference == pytest.approx(accuracy([9, 2]).mean() - accuracy([8, 6]).mean())
    # all draws: image 0 twice, both, image 1 twice
    assert interval.low == pytest.approx(accuracy(2) - accuracy(6))
    assert interval.high == pytest.approx(accuracy(9) - accuracy(8))


def test_bootstrap_draws_seeds_in_pairs_one_fewer_than_there_are():
    ours, theirs = np.array([5, 9, 7]), np.array([4, 9, 9])
    interval = paired_intervals(counts_of(ours[:, None]), counts_of(theirs[:, None]), [0], draws=5000)[2]
    single = accuracy(ours) - accuracy(theirs)
    pairs = [np.mean(pair) for pair in itertools.product(single, repeat=2)]
    assert interval.difference == pytest.approx(single.mean())
    assert (interval.low, interval.high) == (pytest.approx(min(pairs)), pytest.approx(max(pairs)))


def test_bootstrap_is_seeded_and_zero_for_the_same_counts():
    rng = np.random.default_rng(1)
    ours, theirs = (counts_of(rng.integers(0, 11, (3, 20))) for _ in range(2))
    assert paired_intervals(ours, theirs, [0]) == paired_intervals(ours, theirs, [0])
    assert all(tuple(interval) == (0, 0, 0) for interval in paired_intervals(ours, ours, [0]))
    with pytest.raises(ValueError, match="same seeds"):
        paired_intervals(ours, theirs[:2], [0])


def test_intervals_cover_a_planted_difference():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        ease = rng.uniform(0.2, 0.7, (1, 40))  # of an image, common to both objectives
        luck = rng.normal(0, 0.02, (2, 6, 1))  # of a seed
        ours, theirs = (rng.binomial(400, ease + gain + luck[i]) / 40 for i, gain in enumerate((0.1, 0.0)))
        interval = paired_intervals(counts_of(ours), counts_of(theirs), [0], draws=300)[2]
        covered.append(interval.low <= 0.1 * 10 / 20 <= interval.high)
    assert 0.86 <= np.mean(covered) <= 0.99


def test_tail_of_a_class_that_is_nowhere_has_no_interval():
    counts = np.zeros((2, 3, 3, 2), dtype=np.int64)
    counts[..., 0] = 5
    assert np.isnan(paired_intervals(counts, counts, [1], draws=50)[1]).all()


# Studies


def study_of(objectives=("cross_entropy", "dice"), arguments=(), **options):
    return make_study("synthetic", [*SYNTHETIC, *arguments], StudySettings(objectives, **options))


def test_objectives_as_people_write_them(tmp_path):
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
    # what an objective below it has set, here margin_calibration's tau in the data's recipe, must not leak into it
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
    ("options", "told"),
    [
        ({"objectives": ["crossentropy"]}, "neither a YAML file nor a recipe.*cross_entropy"),
        ({"objectives": ["cross_entropy:tau=3"]}, "cross_entropy:tau=3: .*tau' is not accepted"),
        ({"objectives": ["margin_calibration:scheme=best"]}, "scheme.*best"),
        ({"objectives": ["dice", "dice"]}, "dice given twice"),
        ({"objectives": []}, "none given"),
        ({"objectives": ["dice:smooth"]}, "KEY=VALUE"),
        ({"objectives": [{"name": "dice"}]}, "expected recipe, overrides, trials"),
        ({"objectives": TRIALS, "folds": ["train-0000"]}, "same number, found a 2, b 1"),
        ({"tune": {"model.scheduler.power": [1, 2]}}, "give folds"),
        ({"tune": {"tau": [1, 2]}, "folds": ["train-0000"]}, "cross_entropy: .*tau' is not accepted"),
        ({"folds": ["train-0000", "0001TP_*"]}, "0001TP_\\* is the name of no training image.*such as train-0000"),
        ({"folds": ["*"]}, "every training image"),
        ({"baseline": "focal"}, "baseline: found focal"),
        ({"seeds": [1, 1]}, "each once"),
        ({"then": {"trainer.max_epochs": 1}}, "no first stage"),
        ({"first": "dice", "then": {"trainer.max_epochz": 1}}, "max_epochz"),
        ({"arguments": ["--data.held_out=[a]"]}, "use seeds, folds or first"),
    ],
)
def test_a_study_that_cannot_run_is_refused_in_one_line(options, told):
    with pytest.raises(ValueError, match=told) as error:
        study_of(**options)
    assert "\n" not in str(error.value)


def test_differences_beyond_the_objective_are_remarked():
    assert study_of(["cross_entropy", "dice:model.optimizer.lr=0.1"]).remarks == ()
    (line,) = study_of(["cross_entropy", "dice:trainer.max_epochs=3"]).remarks
    assert line == "the objectives differ in trainer.max_epochs: cross_entropy 10, dice:trainer.max_epochs=3 3"


def test_averaged_probabilities_leave_no_logits_to_shift():
    study = study_of(folds=["train-000*"], arguments=["--inference.flip=true"])
    assert not study.shifts
    assert "no shifts" in study.remarks[0]
    assert not any(run.keeps_log_probs for run, _ in planned(study).values())
    outcomes = {f"{name}, trial 0, fold 0, seed 0": miou(0.5) for name in ("cross_entropy", "dice")}
    final = planned(study, outcomes, (1.0,))["dice, seed 0"][0]
    assert final.shifts is None
    assert study_of(folds=["train-000*"]).shifts


def planned(study, outcomes=None, shifts=()):
    """Runs by description, given outcomes by description."""
    outcomes = outcomes or {}
    return {str(run): (run, blocked) for run, blocked in runs(study, lambda run: outcomes.get(str(run)), lambda _: shifts)}


def test_plan_without_folds_is_objectives_times_seeds():
    found = planned(study_of(seeds=[0, 1]))
    assert list(found) == ["cross_entropy, seed 0", "dice, seed 0", "cross_entropy, seed 1", "dice, seed 1"]
    assert all(run.start is run.shifts is None and not blocked for run, blocked in found.values())
    assert found["dice, seed 1"][0].arguments[-1] == "--seed_everything=1"


def miou(value):
    return {"scores": {"miou": value}}


def test_plan_takes_the_best_trial_of_each_objective_into_the_final_runs():
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
    found = planned(study, outcomes, (0.5, -0.5))
    assert {name for name in found if "trial" not in name} == {"dice, seed 3", "dice, seed 4"}
    run = found["dice, seed 4"][0]
    assert (run.trial, run.shifts) == (0, (0.5, -0.5))  # 0.3 on average, the failed one does not count
    assert "--model.scheduler.power=1" in run.arguments
    assert not any("held_out" in word for word in run.arguments)
    outcomes["cross_entropy, trial 0, fold 0, seed 3"] = missing
    run = planned(study, outcomes, (0.5, -0.5))["cross_entropy, seed 3"][0]
    assert run.trial == 1
    fold = found["dice, trial 0, fold 1, seed 3"][0]
    assert '--data.held_out=["train-001*"]' in fold.arguments
    assert fold.keeps_log_probs
    assert not run.keeps_log_probs
    outcomes |= {name: "failed" for name in outcomes if name.startswith("dice")}
    assert "all its runs on the folds have failed" in planned(study, outcomes)["dice, seed 3"][1]


def test_plan_of_two_stages_starts_each_run_from_the_same_data_and_seed():
    study = study_of(
        ["cross_entropy", "dice"], seeds=[0, 1], folds=["train-000*"], first="focal", then={"trainer.max_epochs": 2}
    )
    outcomes = {f"{name}, trial 0, fold 0, seed 0": miou(0.5) for name in ("cross_entropy", "dice")}
    found = planned(study, outcomes, ())
    assert str(found["dice, trial 0, fold 0, seed 0"][0].start) == "focal, first stage, fold 0, seed 0"
    final = found["dice, seed 1"][0]
    assert str(final.start) == "focal, first stage, seed 1"
    assert final.start.keeps_weights
    assert "--trainer.max_epochs=2" in final.arguments
    assert "--trainer.max_epochs=2" not in final.start.arguments
    outcomes["focal, first stage, seed 1"] = "failed"
    assert planned(study, outcomes)["dice, seed 1"][1] == "its first stage has failed"


CAMVID = ("--config", str(RECIPES / "camvid.yaml"))


def test_key_follows_what_changes_the_numbers(tmp_path):
    recipe = tmp_path / "a.yaml"

    def key(content="model: {aux_weight: 1}", name=recipe, label="x", **options):
        name.write_text(content)
        return Run(label, "final", 0, (*CAMVID, "--config", str(name), *options.pop("arguments", ())), **options).key

    base = key()
    assert base == key(label="y") == key("# the same\nmodel:\n  aux_weight: 1\n") == key(name=tmp_path / "b.yaml")
    assert base == key(arguments=("--trainer.enable_progress_bar=false",)) == key(arguments=("--trainer.logger=false",))
    assert key(arguments=("--data.root", "x")) == key(arguments=("--data.root=x",)) == key(arguments=("--data.root=elsewhere/x",))
    assert key(arguments=("--data.root=x",)) != key(arguments=("--data.root=y",))
    others = [key("model: {aux_weight: 2}"), key(arguments=("--seed_everything=1",)), key(shifts=(1.0, -1.0))]
    others.append(key(start=Run("z", "first", 0, CAMVID)))
    assert len({base, *others}) == 5


def test_key_is_of_the_settings_that_hold_in_the_end():
    def key(*arguments):
        return Run("x", "final", 0, (*CAMVID, *arguments)).key

    old = "--model.objective={class_path: mcseg.losses.DiceLoss, init_args: {smooth: 1, classes: all}}"
    new = "--model.objective={class_path: mcseg.losses.JaccardLoss, init_args: {smooth: 1}}"
    assert key(old, "--model.objective=null", new) == key(new)
    assert key(old, "--model.objective.smooth=2", "--model.objective.smooth=1") == key(old)
    assert key(old, "--model.objective.smooth=2") == key(old, "--model.objective.init_args.smooth=2.0")
    assert key(old, "--model.aux_weight=1") == key("--model.aux_weight=1", old) == key("--model={aux_weight: 1.0}", old)
    # as the parser does, a new class keeps the arguments of the old one that it knows
    kept = "--model.objective={class_path: mcseg.losses.JaccardLoss, init_args: {smooth: 1, classes: all}}"
    assert key(old, new) == key(kept)
    assert key(old, new, old) == key(old)
    different = [(new,), (old, new), (old,), (old, "--model.objective.smooth=3"), (old, "--model.objective.smooth=2")]
    different += [("--data=SyntheticData",), ("--data.root=x",), ()]
    assert len({key(*arguments) for arguments in different}) == len(different)
    # of the default objective and logger, which the arguments do not name
    assert key("--model.objective.power=0.3") != key("--model.objective.power=0.4") != key("--trainer.logger.name=x")


@pytest.mark.parametrize("objective", sorted(path.stem for path in (RECIPES / "objectives").glob("*.yaml")))
def test_explicit_settings_over_the_defaults_are_all_settings(objective, tmp_path):
    """So that the key of a run has all that holds: what is parsed without defaults gives, over the defaults, the same."""
    arguments = (*CAMVID, "--model.objective=null", "--config", str(RECIPES / "objectives" / f"{objective}.yaml"))
    arguments += ("--data.root=x", "--model.optimizer.lr=0.5", '--data.held_out=["a*"]', "--seed_everything=3")
    (tmp_path / "explicit.yaml").write_text(json.dumps(explicit_settings(arguments)))
    whole = _parser().parse_args(list(arguments))
    again = _parser().parse_args(["--model.objective=null", "--config", str(tmp_path / "explicit.yaml")])
    assert whole.pop("config") != again.pop("config")  # the files
    assert again.as_dict() == whole.as_dict()


# Processes


class FakeProcess:
    """Ends at once and leaves a result, or fails, or goes on for ever."""

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
    """Runs that were started, in their order; ``kinds`` says how those end that do not end well."""
    names, kinds = [], {}

    def start(run, folder, *_):
        names.append(str(run))
        folder.path(run).mkdir(parents=True, exist_ok=True)
        return FakeProcess(folder.path(run), run, kinds.get(str(run), "fine"))

    monkeypatch.setattr(schedule, "_start", start)
    return names, kinds


def test_finished_runs_are_kept_and_a_failed_one_is_tried_again(started, tmp_path, capsys):
    names, kinds = started
    study = study_of(["cross_entropy", "dice", "focal"], seeds=[0, 1])
    kinds["dice, seed 0"] = "fails"
    failures = execute(study, Folder(tmp_path), jobs=2)
    assert len(names) == 6
    assert [str(run) for run in failures] == ["dice, seed 0"]
    assert "SIGKILL), perhaps out of memory" in next(iter(failures.values()))
    assert "dice, seed 0: failed" in capsys.readouterr().out
    names.clear()
    kinds.clear()
    assert execute(study, Folder(tmp_path), jobs=1) == {}
    assert names == ["dice, seed 0"]
    names.clear()
    execute(study_of(["cross_entropy", "dice", "focal:gamma=1"], seeds=[0, 1]), Folder(tmp_path), jobs=1)
    assert names == ["focal:gamma=1, seed 0", "focal:gamma=1, seed 1"]


def test_second_stage_waits_for_the_first_and_is_not_run_after_its_failure(started, tmp_path):
    names, kinds = started
    study = study_of(["dice"], seeds=[0, 1], first="cross_entropy")
    kinds["cross_entropy, first stage, seed 0"] = "fails"
    failures = execute(study, Folder(tmp_path), jobs=4)
    assert names == ["cross_entropy, first stage, seed 0", "cross_entropy, first stage, seed 1", "dice, seed 1"]
    assert failures[next(run for run in failures if run.role == "final")] == "its first stage has failed"


def test_interrupt_ends_the_runs(tmp_path, monkeypatch):
    processes = []

    def start(*_):
        arguments = ["sh", "-c", "sleep 60 & sleep 60"]
        processes.append(subprocess.Popen(arguments, start_new_session=True))
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


def test_one_comparison_at_a_time_in_a_folder(tmp_path):
    with at_work(tmp_path), pytest.raises(RuntimeError, match="another mcseg compare is at work here"):
        execute(study_of(), Folder(tmp_path), jobs=1)


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.setattr(schedule, "_cores", lambda: 8)
    assert [schedule.workers_per_job(jobs) for jobs in (1, 2, 8, 16)] == [8, 4, 0, 0]
    monkeypatch.setattr(schedule, "_cores", lambda: 1)
    assert schedule.workers_per_job(1) == 1


def in_process(folder, run, monkeypatch, start=None):
    """Run as the worker does, in this process."""
    path = Folder(folder).path(run)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: None)
    schedule._start(run, Folder(folder), 0, 1, 2, False)
    monkeypatch.undo()
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    worker.run(path)
    return path, json.loads((path / "result.json").read_text())


def tiny_arguments():
    return [*SYNTHETIC, *setting_arguments(TINY), "--data.num_workers=0"]


@pytest.mark.filterwarnings("ignore:.*has no labelled pixels:UserWarning", "ignore:.*no pixels of class")
def test_second_stage_begins_with_the_last_weights_of_the_first(tmp_path, monkeypatch):
    study = make_study("synthetic", tiny_arguments(), StudySettings(["dice"], seeds=[0], first="cross_entropy"))
    plan = [run for run, _ in Folder(tmp_path).runs(study)]
    first, found_first = in_process(tmp_path, plan[0], monkeypatch)
    _, found = in_process(tmp_path, plan[1], monkeypatch)
    assert found["fingerprint"]["batches"] == found_first["fingerprint"]["batches"]
    assert found["settings"]["model"]["init_from"] == f"runs/{first.name}/last.ckpt"
    assert str(tmp_path) not in json.dumps(found)
    assert found["fingerprint"]["weights"] != found_first["fingerprint"]["weights"]
    again = Run("other", "final", 0, (*plan[1].arguments, "--trainer.limit_train_batches=1"), start=plan[0])
    assert in_process(tmp_path, again, monkeypatch)[1]["fingerprint"]["weights"] == found["fingerprint"]["weights"]
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["last.ckpt"]
    state = torch.load(first / "last.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())


@pytest.mark.parametrize("path", sorted((RECIPES / "objectives").glob("*.yaml")), ids=lambda path: path.stem)
def test_objectives_draw_no_random_numbers(path):
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
    """A folder as a finished study leaves it, its numbers drawn; ``edit`` changes each result before it is written."""

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


def test_table_is_mean_and_deviation_of_scores_and_intervals_of_counts(tmp_path):
    made = Fabricated(tmp_path, study_of(["cross_entropy", "dice"], seeds=[0, 1, 2]))
    results = made.results
    ours, theirs = results.table().to_dict("records")[::-1]
    finals = {(run.objective, run.seed): found for run, found, _ in results.runs}
    scores = [finals["dice", seed]["scores"] for seed in range(3)]
    for name in ("miou", "miou_tail", "pixel_accuracy"):
        assert ours[f"{name}_mean"] == pytest.approx(np.mean([s[name] for s in scores]))
        assert ours[f"{name}_sd"] == pytest.approx(np.std([s[name] for s in scores], ddof=1))
        assert ours[f"{name}_difference"] == pytest.approx(ours[f"{name}_mean"] - theirs[f"{name}_mean"])
        assert ours[f"{name}_difference_low"] < ours[f"{name}_difference"] < ours[f"{name}_difference_high"]
        assert np.isnan(theirs[f"{name}_difference"])
    assert ours["iou/sky_mean"] == pytest.approx(np.mean([s["iou"][1] for s in scores]))
    assert (ours["seeds"], ours["step_ms"], ours["memory_mib"]) == (3, pytest.approx(60), 3)


def test_files_of_a_comparison(tmp_path):
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
    # with shifts: against the baseline without them, and with them
    for ending, other in (("difference", 0), ("difference_to_shifted", 2)):
        gap = float(rows[3]["miou_mean"]) - float(rows[other]["miou_mean"])
        assert float(rows[3][f"miou_{ending}"]) == pytest.approx(gap)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["remarks"] == ["a remark"]
    assert len(found["shifts"]["dice"]) == 3
    assert [len(scores) for scores in found["tuning"]["dice"].values()] == [2, 2]
    text = str(made.results.comparison).splitlines()
    assert text[2].startswith("dice")
    assert f"{100 * max(row['miou_mean'] for row in found['table']):.2f} ±" in text[2]


def read_plainly(path):
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".csv.xz"])
def test_table_of_counts_gives_the_comparison_again(tmp_path, ending, capsys):
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
    # and read without mcseg
    table = read_plainly(path)
    # patterns of the runs on folds, images of the others with and without shifts
    assert len(table) == 4 * (1 + 2) + 2 * 2 * 2 * 5
    for run, found, _ in made.results.runs:
        rows = table[table.run == run.key]
        assert set(rows.objective) == {run.objective}
        assert json.loads(rows["model.objective"].iloc[0]) == found["settings"]["model"]["objective"]
        assert set(rows["model.aux_weight"]) == {found["settings"]["model"]["aux_weight"]}
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


def test_counts_of_a_run_go_by_its_label_in_the_study(tmp_path):
    """Two objectives with the same settings share a run."""
    study = study_of({"first": "dice", "second": "dice"}, seeds=[0])
    made = Fabricated(tmp_path, study)
    assert len(list(tmp_path.glob("runs/*"))) == 1
    tables.write(made.results)
    assert list(read_plainly(tmp_path / "counts.csv.xz").objective) == 5 * ["first"] + 5 * ["second"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a,b\n1,2\n1,2,3,4\n", "not a table of pixel counts"),
        ("objective,role,seed,shifted\nx,final,0,False\n", "no column images"),
        ("objective,role,seed,shifted,images\nx,final,0,False,a\n", "no column correct/<class>"),
    ],
)
def test_what_is_no_table_of_counts_is_refused_in_one_line(tmp_path, content, told, capsys):
    (tmp_path / "kept.csv").write_text(content)
    with pytest.raises(SystemExit):
        main(["compare", "--read", str(tmp_path / "kept.csv")])
    said = capsys.readouterr().err.strip()
    assert said.startswith("mcseg: error: ")
    assert "kept.csv" in said
    assert told in said
    assert "\n" not in said


def test_runs_that_did_not_see_the_same_are_named(tmp_path):
    def other(result):
        if (result["objective"], result["seed"]) == ("dice", 1):
            result["fingerprint"]["batches"] = "others"

    made = Fabricated(tmp_path, study_of(seeds=[0, 1]), other)
    assert made.results.condition_mismatches() == ["seed 1: batches differ between cross_entropy | dice"]
    assert "seed 1: batches differ" in made.report()


def test_runs_on_other_images_are_not_compared(tmp_path):
    made = Fabricated(tmp_path, study_of(seeds=[0, 1]))
    path = next(tmp_path.glob("runs/dice-final-seed1*/counts.npz"))
    with np.load(path) as file:
        np.savez(path, names=file["names"][::-1], counts=file["counts"])
    with pytest.raises(ValueError, match="evaluated other images"):
        _ = made.results


class Reader(html.parser.HTMLParser):
    """What a page shows without scripts, and where it would fetch from."""

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


def test_report_shows_everything_without_scripts_and_fetches_nothing(tmp_path):
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
    # differences without and with shifts, curves of both objectives, offsets of dice
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


def test_report_of_an_unfinished_comparison_says_what_is_missing(tmp_path):
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
    found = {path.parent.name.rsplit("-", 1)[0]: json.loads(path.read_text()) for path in folder.glob("runs/*/result.json")}
    assert len(found) == 2 * (1 + 2)
    for seed in (0, 1):
        ours, theirs = (found[f"{name}-final-seed{seed}"] for name in ("cross_entropy", "margin_calibration_tau=2"))
        assert ours["fingerprint"] == theirs["fingerprint"]
        assert ours["scores"] != theirs["scores"]
        assert len(ours["curves"]) == 1
        assert ours["curves"][0]["miou"] == pytest.approx(ours["scores"]["miou"], abs=1e-6)  # validated twice, same weights
        assert theirs["offsets"]["background"][7] > theirs["offsets"]["background"][0] > 0
        assert ours["offsets"] is None
    assert found["cross_entropy-final-seed0"]["fingerprint"] != found["cross_entropy-final-seed1"]["fingerprint"]
    fold = found["cross_entropy-fold-fold0-trial0-seed0"]
    assert (fold["images"], fold["steps"]) == (2, 2)  # two of the six training images are held out
    assert found["cross_entropy-final-seed0"]["images"] == 3
    reader = Reader((folder / "report.html").read_text())
    assert all(source.startswith("data:image/") for source in reader.sources)
    assert not list(folder.rglob("*.ckpt"))
    for path in (
        *folder.glob("runs/*/result.json"),
        *(folder / name for name in ("study.json", "results.json", "runs.csv")),
    ):
        assert not any(str(place) in path.read_text() for place in (tmp_path, RECIPES)), path  # results can be shared
    table = read_counts(folder / "counts.csv.xz")
    assert not table.astype(str).apply(lambda column: column.str.contains(str(tmp_path), regex=False)).to_numpy().any()
    assert set(table["run"]) == {json.loads(path.read_text())["key"] for path in folder.glob("runs/*/result.json")}
    assert json.loads((folder / "study.json").read_text())["words"][:2] == ["--config", "synthetic"]
    assert found["cross_entropy-final-seed0"]["settings"]["model"]["arch"] == "unet"

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


def test_command_says_what_is_wrong_in_one_line(capsys, tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text("objectives: [dice]\nobjektives: 3\n")
    for arguments, told in (
        (["--seeds", "0"], "no --objectives given"),
        (["--objectives", "nonsense"], "neither a YAML file nor a recipe"),
        (["--objectives", "dice", "--trainer.max_epochz", "1"], "max_epochz"),
        (["--objectives", "dice", "--jobs", "x"], "--jobs"),
        (["--objectives", "dice", "--jobs", "0"], "expected at least 1"),
        (["--study", str(study)], "found objektives, expected some of"),
        (["--study", "nowhere.yaml"], "no such file"),
    ):
        with pytest.raises(SystemExit):
            main(["compare", "synthetic", *arguments])
        said = capsys.readouterr().err.strip()
        assert said.startswith("mcseg: error: ")
        assert told in said
        assert "\n" not in said
    assert not (tmp_path / "runs").exists()


def test_settings_of_a_study_file_and_the_command_line_win_over_the_recipe(tmp_path, monkeypatch):
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
    return _ParseOnly(study.recipe, [*study.arguments, *study.objectives[1].arguments], run=False).config


STUDIES = [Path(__file__).parents[1] / "benchmarks" / "study" / f"{name}.yaml" for name in ("finetune", "scratch")]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_of_the_repository_are_ready_to_run(path, tmp_path, monkeypatch):
    """All settings are known to the command, all objectives have as many trials, the folds hold out real images."""
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
    recipes = {word.rpartition("/")[2] for objective in study.objectives for word in objective.arguments}
    assert recipes >= {f"{name}.yaml" for name in ("cross_entropy", "focal", "lovasz", "dice", "jaccard", "ldam")}
    assert {len(objective.trials) for objective in study.objectives} == {3}
    assert len(study.seeds) >= 3
