from __future__ import annotations

import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabench.analysis.at_step import at_step
from lorabench.analysis.noise import seed_noise
from lorabench.analysis.optimum import lr_optima

from ..handmade.sft import STEPS, arm, tables

FINAL = 128


def two_arms(**settings):
    return tables(arm(rank, optimum=optimum, **settings) for rank, optimum in ((None, 3.2e-4), (16, 3.3e-3)))


@given(step=st.sampled_from(STEPS[1:]))
def test_losses_are_those_of_the_curves_and_all_else_is_kept(step):
    runs, curves = two_arms()
    as_of_step = at_step(runs, curves, step)
    at = curves[curves["step"] == step].set_index("run_id")["value"]
    assert as_of_step["final_valid_nll"].tolist() == at[as_of_step["run_id"]].tolist()
    assert as_of_step["final_test_nll"].tolist() == as_of_step["final_valid_nll"].tolist()
    assert (as_of_step["steps"] == step).all()
    changed = ["steps", "status", "final_valid_nll", "final_test_nll"]
    pd.testing.assert_frame_equal(as_of_step.drop(columns=changed), runs.drop(columns=changed))


def test_the_table_given_is_not_changed():
    runs, curves = two_arms()
    before = runs.copy()
    at_step(runs, curves, 8)
    pd.testing.assert_frame_equal(runs, before)


def test_optima_and_noise_of_a_step_are_those_of_its_losses():
    runs, curves = two_arms()
    as_of_step = at_step(runs, curves, 16)
    noise = seed_noise(as_of_step)
    assert noise["sigma_valid"].item() == pytest.approx(0.004)
    assert noise["steps"].item() == 16
    optima = lr_optima(as_of_step, noise)
    assert optima["lr_opt"].tolist() == pytest.approx([3.2e-4, 3.3e-3])


def test_a_run_that_diverges_later_is_done_and_one_that_had_stays_diverged():
    # The curves of diverged runs end after step 4.
    runs, curves = two_arms(diverges_from=1e-2)
    lost = runs.loc[runs["status"] == "diverged", "run_id"]
    assert len(lost) == 4
    early, late = at_step(runs, curves, 4), at_step(runs, curves, 8)
    assert (early["status"] == "done").all()
    assert early["final_valid_nll"].notna().all()
    assert set(late.loc[late["status"] == "diverged", "run_id"]) == set(lost)
    assert late.loc[late["status"] == "diverged", "final_valid_nll"].isna().all()


def test_a_run_without_a_loss_there_is_left_out():
    runs, curves = two_arms()
    gone = runs["run_id"].iloc[0]
    no_point = curves[(curves["run_id"] != gone) | (curves["step"] != 8)]
    assert set(runs["run_id"]) - set(at_step(runs, no_point, 8)["run_id"]) == {gone}
    of_null = curves.assign(value=curves["value"].where((curves["run_id"] != gone) | (curves["step"] != 8)))
    assert set(runs["run_id"]) - set(at_step(runs, of_null, 8)["run_id"]) == {gone}
    infinite = of_null.fillna({"value": math.inf})
    assert set(runs["run_id"]) - set(at_step(runs, infinite, 8)["run_id"]) == {gone}


def test_a_run_that_diverged_later_but_was_not_evaluated_there_is_left_out():
    runs, curves = two_arms(diverges_from=1e-2)
    runs["diverged_at"] = pd.array([40 if status == "diverged" else None for status in runs["status"]], dtype="Int64")
    at_8 = at_step(runs, curves, 8)
    assert set(at_8["status"]) == {"done"}
    assert len(at_8) == len(runs) - 4
    assert (at_step(runs, curves, 64)["status"] == "diverged").sum() == 4


def test_other_splits_metrics_and_longer_runs_do_not_count():
    runs, curves = two_arms()
    assert at_step(runs, curves.assign(split="train"), 8).empty
    assert at_step(runs, curves.assign(metric="grad_norm"), 8).empty
    assert at_step(runs.assign(steps=4), curves, 8).empty
    assert len(at_step(runs.drop(columns="steps"), curves, 8)) == len(runs)


@pytest.mark.parametrize("curves", [pd.DataFrame(), two_arms()[1].iloc[:0]])
def test_without_curves_there_is_nothing(curves):
    assert at_step(two_arms()[0], curves, 8).empty
