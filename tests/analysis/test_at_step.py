"""Short runs from long ones: losses of a step, and what errors at two lengths share."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabench.analysis.at_step import at_end, at_step, coupled
from lorabench.analysis.comparison import comparisons
from lorabench.analysis.estimate import combined, student

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


def test_optima_of_a_step_are_those_of_its_losses():
    runs, curves = two_arms()
    [comparison] = comparisons(at_step(runs, curves, 16), curves)
    assert comparison.label == "tiny/instruct"
    optima = {label: math.exp(optimum.value) for label, optimum in comparison.fit.optima.items()}
    assert optima == pytest.approx({"FullFT": 3.2e-4, "LoRA r16": 3.3e-3})


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
    assert at_step(runs, pd.DataFrame(), 8).empty
    assert at_step(runs.assign(steps=4), curves, 8).empty
    assert len(at_step(runs.drop(columns="steps"), curves, 8)) == len(runs)


def noisy(sigma, shared, number):
    """Return a comparison of runs with noise, of which a share of the variance is the same for all numbers."""
    runs, curves = two_arms()
    own, common = (np.random.default_rng(seed).standard_normal(len(runs)) for seed in (number, 0))
    loss = runs["final_valid_nll"] + sigma * (math.sqrt(shared) * common + math.sqrt(1 - shared) * own)
    [comparison] = comparisons(at_end(runs.assign(final_valid_nll=loss)), curves)
    return comparison


@pytest.mark.parametrize(("shared", "low", "high"), [(1.0, 0.9, 1.0), (0.0, -0.05, 0.4)])
def test_errors_of_two_lengths_are_coupled_as_the_residuals_of_their_runs(shared, low, high):
    short, full = noisy(0.01, shared, 1), noisy(0.01, shared, 2)
    first, second = student(0.5, 1.0, 10, "first"), student(0.2, 2.0, 10, "second")
    same, reordered = coupled(short, full, first, second, "ratio")
    assert same is first
    assert reordered.value == 0.2
    np.testing.assert_array_equal(np.sort(reordered.seed_part), np.sort(second.seed_part))
    assert low < np.corrcoef(first.seed_part, reordered.seed_part)[0, 1] < high
    assert combined(np.subtract, first, reordered).value == pytest.approx(0.3)


def test_an_unknown_error_is_coupled_to_nothing():
    short, full = noisy(0.01, 1.0, 1), noisy(0.01, 1.0, 2)
    unknown = student(0.5, math.nan, 0, "unknown")
    assert coupled(short, full, unknown, unknown, "ratio") == (unknown, unknown)
