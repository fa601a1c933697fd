"""List the runs of a study. Later runs depend on the results of earlier ones."""

import hashlib
import json
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from mcseg.compare.study import Arguments, Objective, Study, explicit_settings

# Content of result.json; "failed"; None while the run is not finished.
Outcome = dict[str, Any] | Literal["failed"] | None
Shifts = tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """One training with one evaluation.

    Attributes:
        objective: label of the objective.
        role: ``first`` (stage), ``fold`` or ``final``.
        seed: random seed.
        arguments: settings as arguments of ``mcseg fit``.
        fold: index of the held-out fold; None to train on the whole training split.
        trial: index of the objective's trial; None in the first stage.
        start: run whose last weights initialise this one; None if there is no first stage.
        shifts: shift of each class's logit for a second prediction; None for no second prediction.
        keeps_log_probs: whether to save log-probabilities of the held-out images, to fit shifts.
    """

    objective: str
    role: Literal["first", "fold", "final"]
    seed: int
    arguments: Arguments
    fold: int | None = None
    trial: int | None = None
    start: "Run | None" = None
    shifts: Shifts | None = None
    keeps_log_probs: bool = False

    @property
    def keeps_weights(self) -> bool:
        """Whether to save the last weights: the second stage starts from those of the first."""
        return self.role == "first"

    @property
    def about(self) -> dict[str, Any]:
        """Objective, role, seed, fold and trial, as columns of the tables."""
        return {"objective": self.objective, "role": self.role, "seed": self.seed, "fold": self.fold, "trial": self.trial}

    @cached_property
    def key(self) -> str:
        """Hash of everything that the results depend on: the effective settings, but neither the label nor paths of files.

        Only the last folder of the data's root counts, so results stay valid when the data set or the study moves.
        """
        dependencies = {
            "settings": explicit_settings(self.arguments),
            "start": self.start.key if self.start else None,
            "shifts": self.shifts,
            "keeps": [self.keeps_weights, self.keeps_log_probs],
        }
        return hashlib.sha256(json.dumps(dependencies, sort_keys=True, default=str).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """Name of the run's folder."""
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
    """List the runs that are known so far, finished or not, in the order in which to start them.

    An objective's final runs are known once all its runs on the folds have finished or failed.

    Args:
        study: the study.
        outcome: returns the outcome of a run.
        choose_shifts: returns the shifts fitted on the finished runs of one trial, one run per fold.

    Yields:
        A run, and the reason why it cannot start or "".
    """

    def start(seed: int, fold: int | None) -> Run | None:
        if study.first is None:
            return None
        arguments = (*study.arguments, *study.first.arguments, *_seed_and_fold(study, seed, fold))
        return Run(objective=study.first.label, role="first", seed=seed, arguments=arguments, fold=fold)

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
            run = Run(
                objective=objective.label,
                role="final",
                seed=seed,
                arguments=_second_stage_arguments(study, objective, trial or 0) + _seed_and_fold(study, seed, None),
                trial=trial or 0,
                start=start(seed, None),
                shifts=choose_shifts(held_out) if held_out and study.shifts else None,
            )
            yield run, "all its runs on the folds failed" if trial is None else _blocked(run, outcome)


def choose_trial(
    study: Study, objective: Objective, outcome: Callable[[Run], Outcome], start: Callable[[int, int | None], Run | None]
) -> tuple[int | None, list[Run]] | None:
    """Choose the trial with the highest mean mIoU over the folds.

    Returns:
        None while runs are missing; else the trial (None if all failed) and its runs, one per fold.
    """
    if not study.folds:
        return 0, []
    scores: dict[int, float] = {}
    fold_runs = list(_fold_runs(study, objective, start))
    for trial in range(len(objective.trials)):
        outcomes = [_outcome_or_blocked(run, outcome) for run in fold_runs if run.trial == trial]
        if None in outcomes:
            return None
        results = [result for result in outcomes if isinstance(result, dict)]
        if len(results) == len(outcomes):
            scores[trial] = statistics.fmean(result["scores"]["miou"] for result in results)
    if not scores:
        return None, []
    best = max(scores, key=lambda trial: scores[trial])
    return best, [run for run in fold_runs if run.trial == best]


def _fold_runs(study: Study, objective: Objective, start: Callable[[int, int | None], Run | None]) -> Iterator[Run]:
    seed = study.seeds[0]
    for trial in range(len(objective.trials)):
        for fold in range(len(study.folds)):
            yield Run(
                objective=objective.label,
                role="fold",
                seed=seed,
                arguments=_second_stage_arguments(study, objective, trial) + _seed_and_fold(study, seed, fold),
                fold=fold,
                trial=trial,
                start=start(seed, fold),
                keeps_log_probs=study.shifts,
            )


def _second_stage_arguments(study: Study, objective: Objective, trial: int) -> Arguments:
    return (*study.arguments, *study.then, *objective.arguments, *objective.trials[trial])


def _seed_and_fold(study: Study, seed: int, fold: int | None) -> Arguments:
    held_out = () if fold is None else (f"--data.held_out={json.dumps(study.folds[fold])}",)
    return (f"--seed_everything={seed}", *held_out)


def _outcome_or_blocked(run: Run, outcome: Callable[[Run], Outcome]) -> Outcome:
    """Outcome of a run; "failed" also if its first stage failed."""
    return "failed" if _blocked(run, outcome) else outcome(run)


def _blocked(run: Run, outcome: Callable[[Run], Outcome]) -> str:
    return "its first stage failed" if run.start and outcome(run.start) == "failed" else ""
