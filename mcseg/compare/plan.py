"""The runs of a study: which there are, given what earlier ones have found."""

import hashlib
import json
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from mcseg.compare.study import Objective, Study, Words, explicit_settings

# What a finished run found (result.json); "failed"; None while it is not finished.
Outcome = dict[str, Any] | Literal["failed"] | None
Shifts = tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """One training with one evaluation.

    Attributes:
        objective: its label.
        role: ``first`` stage, on a ``fold``, or ``final``.
        seed: random seed.
        words: settings as words of ``mcseg fit``.
        fold: index of the fold that is held out; None trains on the whole training split.
        trial: index of the objective's trial; None in the first stage.
        start: run whose last weights this one begins with.
        shifts: per class, for a second prediction.
        keeps_log_probs: whether shifts are chosen on its held-out images.
    """

    objective: str
    role: Literal["first", "fold", "final"]
    seed: int
    words: Words
    fold: int | None = None
    trial: int | None = None
    start: "Run | None" = None
    shifts: Shifts | None = None
    keeps_log_probs: bool = False

    @property
    def keeps_weights(self) -> bool:
        """Whether others start from its weights."""
        return self.role == "first"

    @property
    def about(self) -> dict[str, Any]:
        """What it is in the study."""
        return {"objective": self.objective, "role": self.role, "seed": self.seed, "fold": self.fold, "trial": self.trial}

    @cached_property
    def key(self) -> str:
        """Hash of what the run's numbers depend on: the settings that hold in the end, not the label or the files' paths.

        Of the data's root the last folder counts: results stay valid where data set and study are moved to another place.
        """
        found = {
            "settings": explicit_settings(self.words),
            "start": self.start.key if self.start else None,
            "shifts": self.shifts,
            "keeps": [self.keeps_weights, self.keeps_log_probs],
        }
        return hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """Readable name of its folder."""
        parts = [re.sub(r"[^\w.=-]+", "_", self.objective)[:60], self.role]
        parts += [] if self.fold is None else [f"fold{self.fold}"]
        parts += [f"trial{self.trial}"] if self.role == "fold" else []
        return "-".join([*parts, f"seed{self.seed}", self.key])

    def __str__(self) -> str:
        parts = [{"first": "first stage", "fold": f"trial {self.trial}", "final": ""}[self.role]]
        parts += [f"fold {self.fold}" if self.fold is not None else "", f"seed {self.seed}"]
        return ", ".join([self.objective, *filter(None, parts)])


def runs(
    study: Study, outcome: Callable[[Run], Outcome], choose_shifts: Callable[[list[Run]], Shifts]
) -> Iterator[tuple[Run, str]]:
    """List the runs that are known at this time, finished or not, the ones to be run first in front.

    The settings of final runs are known once all runs of their objective on the folds have ended.

    Args:
        study: what is compared.
        outcome: of a run.
        choose_shifts: from finished runs of one trial, one per fold.

    Yields:
        A run, and "" or the reason why it cannot run.
    """

    def start(seed: int, fold: int | None) -> Run | None:
        if study.first is None:
            return None
        words = (*study.words, *study.first.words, *_where(study, seed, fold))
        return Run(study.first.label, "first", seed, words, fold)

    for fold in range(len(study.folds)):
        if first := start(study.seeds[0], fold):
            yield first, ""
    for objective in study.objectives:
        for run in _fold_runs(study, objective, start):
            yield run, _blocked(run, outcome)
    for seed in study.seeds:
        if first := start(seed, None):
            yield first, ""
    for seed in study.seeds:
        for objective in study.objectives:
            choice = choose_trial(study, objective, outcome, start)
            if choice is None:
                continue
            trial, held_out = choice
            words = _second_words(study, objective, trial or 0) + _where(study, seed, None)
            shifts = choose_shifts(held_out) if held_out and study.shifts else None
            run = Run(objective.label, "final", seed, words, None, trial or 0, start(seed, None), shifts)
            yield run, "all its runs on the folds have failed" if trial is None else _blocked(run, outcome)


def choose_trial(
    study: Study, objective: Objective, outcome: Callable[[Run], Outcome], start: Callable[[int, int | None], Run | None]
) -> tuple[int | None, list[Run]] | None:
    """Choose the trial with the highest mIoU, averaged over the folds.

    Returns:
        None while runs are missing; the trial (None where all have failed) and its runs, one per fold.
    """
    if not study.folds:
        return 0, []
    scores: dict[int, float] = {}
    found = list(_fold_runs(study, objective, start))
    for trial in range(len(objective.trials)):
        outcomes = [_ended(run, outcome) for run in found if run.trial == trial]
        if None in outcomes:
            return None
        results = [result for result in outcomes if isinstance(result, dict)]
        if len(results) == len(outcomes):
            scores[trial] = statistics.fmean(result["scores"]["miou"] for result in results)
    if not scores:
        return None, []
    best = max(scores, key=lambda trial: scores[trial])
    return best, [run for run in found if run.trial == best]


def _fold_runs(study: Study, objective: Objective, start: Callable[[int, int | None], Run | None]) -> Iterator[Run]:
    seed = study.seeds[0]
    for trial in range(len(objective.trials)):
        for fold in range(len(study.folds)):
            words = _second_words(study, objective, trial) + _where(study, seed, fold)
            yield Run(objective.label, "fold", seed, words, fold, trial, start(seed, fold), None, study.shifts)


def _second_words(study: Study, objective: Objective, trial: int) -> Words:
    return (*study.words, *study.then, *objective.words, *objective.trials[trial])


def _where(study: Study, seed: int, fold: int | None) -> Words:
    held_out = () if fold is None else (f"--data.held_out={json.dumps(study.folds[fold])}",)
    return (f"--seed_everything={seed}", *held_out)


def _ended(run: Run, outcome: Callable[[Run], Outcome]) -> Outcome:
    """Outcome of a run; failed as well where the run that it starts from has failed."""
    return "failed" if _blocked(run, outcome) else outcome(run)


def _blocked(run: Run, outcome: Callable[[Run], Outcome]) -> str:
    return "its first stage has failed" if run.start and outcome(run.start) == "failed" else ""
