"""Losses that are NaN or infinite: stop with the images' names, or skip the step in all processes."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from mcseg.nonfinite import LossGuard

GOOD, NAN, INFINITE = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("inf"))


def test_it_stops_one_step_later_with_the_names():
    guard = LossGuard("stop")
    assert guard.accepts(GOOD, ["a"], 4)
    guard.check()
    assert guard.accepts(INFINITE, ["b", "c"], 5)  # not checked yet
    with pytest.raises(RuntimeError, match=r"train/loss is inf in step 5, images b, c; .*set model\.on_nonfinite"):
        guard.check()
    guard.check()  # raised only once


def test_it_skips_steps_and_names_the_first_ten():
    guard = LossGuard("skip")
    for step in range(24):
        assert guard.accepts(NAN if step % 2 else GOOD, [f"image {step}"] if step > 2 else [], step) == (step % 2 == 0)
        guard.check()
    with pytest.warns(UserWarning, match=r"12 steps were skipped.*: \(without names\); image 3; .*image 19; \.\.\.$"):
        guard.summarize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard.summarize()  # warned only once


def test_an_unknown_policy():
    with pytest.raises(ValueError, match="on_nonfinite: found 'ignore', expected 'stop' or 'skip'"):
        LossGuard("ignore")


def guard_as_rank(rank, world, folder):
    store = torch.distributed.FileStore(f"{folder}/store", world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    guard = LossGuard("skip")
    accepted = [guard.accepts(NAN if (step, rank) == (1, 1) else GOOD, [], step) for step in range(3)]
    Path(folder, f"{rank}.json").write_text(json.dumps(accepted))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_processes_skip_the_same_steps(tmp_path):
    torch.multiprocessing.spawn(guard_as_rank, (2, str(tmp_path)), nprocs=2)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [[True, False, True]] * 2
