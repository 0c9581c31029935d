"""A sweep and its job: a diverged run affects no other, finished runs are kept, repeats are at the best LR."""

from __future__ import annotations

from unittest.mock import create_autospec

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from pandas.testing import assert_frame_equal

from lorabench.errors import UserError
from lorabench.runs import Job
from lorabench.training import context, sft
from lorabench.training.context import Base
from lorabench.training.job import run_job

from .conftest import trained


def rows_of(plan, layout, *sweeps):
    """Train sweeps as one job and return its rows."""
    run_job(plan, Job(sweeps), layout, lambda line: None)
    return pq.read_table(layout.job(Job(sweeps))).to_pylist()


@pytest.mark.slow
def test_a_diverged_run_is_a_result_and_touches_no_other(ready):
    sound, _ = trained(*ready("sound", lora=[1e-3, 3e-3]), "lora")
    mixed, lines = trained(*ready("mixed", lora=[1e-3, 3e-3, 1e3]), "lora")
    lost = mixed[mixed.lr == 1e3]
    assert list(lost.status) == ["diverged"]
    assert lost[["final_valid_nll", "final_test_nll"]].isna().all(axis=None)
    assert lost.diverged_at.item() > 1
    assert any("lr 1000, seed 0: diverged at step" in line for line in lines)
    # Runs before it in the same process, and the repeat after it, are as without it.
    columns = ["run_id", "lr", "seed", "status", "final_valid_nll", "final_test_nll"]
    rest = mixed[mixed.lr < 1e3][columns].reset_index(drop=True)
    assert_frame_equal(rest, sound[columns].reset_index(drop=True), check_exact=True)
    assert list(rest.seed) == [0, 0, 1]


def test_a_sweep_of_diverged_runs_only_has_no_repeats_and_a_second_call_trains_nothing(ready, monkeypatch):
    plan, layout = ready("lost", lora=[500.0, 1e3])
    runs, _ = trained(plan, layout, "lora")
    assert list(runs.status) == ["diverged", "diverged"]
    assert (runs.diverged_at > 1).all()
    assert not list(layout.runs.glob("*/weights"))
    monkeypatch.setattr(sft, "train_sft", None)
    again, _ = trained(plan, layout, "lora")
    assert again.to_json() == runs.to_json()


def test_wrong_weights_stop_the_job_in_its_first_seconds(ready, monkeypatch):
    real = context.load_model

    def scrambled(spec):
        model = real(spec)
        torch.manual_seed(0)
        with torch.no_grad():
            model.lm_head.weight.normal_(std=3.0)
        return model

    monkeypatch.setattr(context, "load_model", scrambled)
    with pytest.raises(UserError, match="base model tiny has a validation loss of .* worse than guessing"):
        trained(*ready("scrambled"), "lora")


@pytest.mark.slow
def test_sweeps_of_a_job_share_base_and_data_and_learn_what_each_does_by_itself(ready, monkeypatch):
    plan, layout = ready("apart", ranks=[2, 4])
    apart = [row for sweep in plan.sweeps for row in rows_of(plan, layout, sweep)]
    plan, layout = ready("together", ranks=[2, 4])
    calls = {}
    # The base model is taken for its evaluation.
    for place, name in ((context, "load_model"), (sft, "read_tokens"), (Base, "sharded")):
        calls[name] = create_autospec(getattr(place, name), side_effect=getattr(place, name))
        monkeypatch.setattr(place, name, calls[name])
    methods = [sweep.condition.method for sweep in plan.sweeps]
    assert sorted(methods) == ["fullft", "lora", "lora"]
    together = rows_of(plan, layout, *plan.sweeps)
    # Full fine-tuning uses up the base in its grid and in its repeat; a sweep after it loads the base again.
    again = methods[-1] != "fullft"
    counts = {name: call.call_count for name, call in calls.items()}
    assert counts == {"load_model": 2 + again, "read_tokens": 1, "sharded": 1}
    columns = ["run_id", "lr", "seed", "status", "final_valid_nll", "final_test_nll", "dataset_sha256", "model_sha256"]
    assert_frame_equal(pd.DataFrame(together)[columns], pd.DataFrame(apart)[columns], check_exact=True)
    assert len(together) == 3 * 2
