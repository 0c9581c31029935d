"""Finished runs that are saved in the repository: a clone goes on from them with equal numbers, or refuses them."""

from __future__ import annotations

import shutil

import pandas as pd
import pytest

import saved_runs
from lorabench.errors import UserError
from lorabench.planning.plan import make_plan
from lorabench.runs import Job
from lorabench.store.progress import finished_runs
from lorabench.training import sft
from lorabench.training.job import SweepContext, run_job
from saved_runs import restore_runs, save_runs

from .conftest import BrokenError, sweep_of, trained

LRS = [1e-3, 3e-3, 1e-2]
NUMBERS = ["run_id", "lr", "seed", "final_valid_nll", "final_test_nll"]


def train_some(plan, layout, number: int) -> None:
    """Train the LoRA sweep until a number of its runs is finished."""
    write, finished = SweepContext.write, []

    def write_until_cut(context, run, *rest) -> None:
        write(context, run, *rest)
        finished.append(run)
        if len(finished) == number:
            raise BrokenError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SweepContext, "write", write_until_cut)
        with pytest.raises(BrokenError):
            run_job(plan, Job((sweep_of(plan, "lora"),)), layout, lambda line: None)


def wipe_results(layout) -> None:
    """Remove what git ignores, but keep the data, which are made alike in every clone."""
    for folder in ("runs", "jobs", "locks", "progress"):
        shutil.rmtree(layout.root / folder, ignore_errors=True)


@pytest.fixture
def saved(ready):
    """A plan of which 2 of 4 runs of a sweep were trained and saved, and whose results were wiped."""
    plan, layout = ready("part", lora=LRS)
    train_some(plan, layout, 2)
    assert save_runs(plan, layout)[0] == 2
    wipe_results(layout)
    return plan, layout


@pytest.mark.slow
def test_an_unfinished_sweep_goes_on_with_the_numbers_of_an_uninterrupted_one(ready, saved, monkeypatch):
    plan, layout = saved
    assert restore_runs(plan, layout) == (2, 0, 0)
    assert restore_runs(plan, layout) == (0, 2, 0)
    assert finished_runs(plan, layout)[0] == 2
    started = []
    train_sft = sft.train_sft
    monkeypatch.setattr(sft, "train_sft", lambda run, *rest: started.append(run.run_id) or train_sft(run, *rest))
    rows, _ = trained(plan, layout, "lora")
    monkeypatch.undo()
    whole, _ = trained(*ready("whole", lora=LRS), "lora")
    assert set(started) == set(whole.run_id[2:])
    assert len(started) == len(whole) - 2 == 2
    pd.testing.assert_frame_equal(rows[NUMBERS], whole[NUMBERS], check_exact=True)
    assert [list(value) for value in rows["test_losses"]] == [list(value) for value in whole["test_losses"]]
    assert [list(points) for points in rows["curve"]] == [list(points) for points in whole["curve"]]


def test_saving_elsewhere_keeps_what_was_saved_and_runs_of_another_version_or_settings_are_refused(saved, monkeypatch):
    plan, layout = saved
    assert save_runs(plan, layout)[0] == 2
    protocol = plan.preset.protocol.model_copy(update={"clip_norm": 0.5})
    other = make_plan(plan.preset.model_copy(update={"protocol": protocol}))
    with pytest.raises(UserError, match="no run in .* is in the plan of preset mine: its models"):
        restore_runs(other, layout)
    monkeypatch.setattr(saved_runs, "PROTOCOL_VERSION", 99)
    with pytest.raises(UserError, match=r"holds runs of protocol version \d+, but this code computes version 99"):
        restore_runs(plan, layout)
    assert not layout.runs.exists()
