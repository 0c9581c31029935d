from __future__ import annotations

import math

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabench.analysis.gaps import best_losses, gap
from lorabench.errors import UserError

from ..handmade.sft import arm, tables


def test_best_losses_are_taken_over_seeds_at_the_lr_that_validation_picks():
    runs, _ = tables([arm(optimum=3e-4), arm(8, optimum=3e-3, offsets=(0.0, 0.01, 0.05))])
    runs.loc[runs["lr"] == 1e-2, "final_test_nll"] = 0.5  # best on test, which must not matter
    fullft, lora = (row for _, row in best_losses(runs).iterrows())
    assert (fullft["lr_best"], lora["lr_best"]) == (3e-4, 3e-3)
    assert lora["loss_mean"] == pytest.approx(2.02)
    assert lora["loss_sd"] == pytest.approx(pd.Series([0.0, 0.01, 0.05]).std())
    assert lora["seeds"] == [0, 1, 2]
    assert len(lora["run_ids"]) == lora["n_seeds"] == 3
    assert not lora["at_edge"]


def test_a_paired_gap_is_exact():
    runs, _ = tables(
        [
            arm(optimum=3e-4, floor=2.0, offsets=(0.0, 0.4, -0.3)),
            arm(8, optimum=3e-3, floor=2.1, offsets=(0.01, 0.41, -0.32)),
        ]
    )
    fullft, lora = (row for _, row in best_losses(runs).iterrows())
    paired = gap(runs, lora, fullft)
    differences = pd.Series([0.11, 0.11, 0.08])
    assert paired.estimate == pytest.approx(0.1)
    assert paired.sigma == pytest.approx(differences.std())
    # Student's t with 2 degrees of freedom: 4.302653.
    assert paired.ci_high - paired.estimate == pytest.approx(4.302653 * differences.std() / math.sqrt(3), rel=1e-5)
    assert paired.estimate - paired.ci_low == pytest.approx(paired.ci_high - paired.estimate)
    assert (paired.n_seeds, paired.n_diverged, paired.at_edge, len(paired.run_ids)) == (3, 0, False, 6)
    assert gap(runs, fullft, lora).estimate == pytest.approx(-0.1)


def test_seeds_are_paired_whatever_the_order_and_unpaired_ones_left_out():
    runs, _ = tables([arm(optimum=3e-4), arm(8, optimum=3e-3, floor=2.1)])
    fullft, lora = (row for _, row in best_losses(runs).iterrows())
    repeat = (runs["method"] == "fullft") & (runs["seed"] == 2)
    runs.loc[repeat, ["status", "final_test_nll"]] = ["diverged", math.nan]
    paired = gap(runs.sample(frac=1, random_state=0), lora, fullft)
    assert paired.estimate == pytest.approx(0.1)
    assert (paired.n_seeds, paired.n_diverged) == (2, 1)


def test_one_seed_has_no_interval():
    runs, _ = tables([arm(optimum=3e-4, offsets=(0.0,)), arm(8, optimum=3e-3, offsets=(0.0,))])
    fullft, lora = (row for _, row in best_losses(runs).iterrows())
    paired = gap(runs, lora, fullft)
    assert paired.n_seeds == 1
    assert math.isnan(paired.ci_low)
    assert math.isnan(paired.sigma)


def test_an_edge_is_told():
    runs, _ = tables([arm(optimum=1e-5), arm(8, optimum=3e-3)])
    fullft, lora = (row for _, row in best_losses(runs).iterrows())
    assert fullft["at_edge"]
    assert gap(runs, lora, fullft).at_edge


def test_an_arm_without_a_finished_run_gives_no_number():
    runs, _ = tables([arm(optimum=3e-4), arm(8, optimum=3e-3)])
    runs.loc[runs["rank"].eq(8), ["status", "final_valid_nll", "final_test_nll"]] = ["diverged", math.nan, math.nan]
    fullft, lora = (row for _, row in best_losses(runs).iterrows())
    assert math.isnan(lora["loss_mean"])
    assert lora["n_seeds"] == 0
    paired = gap(runs, lora, fullft)
    assert math.isnan(paired.estimate)
    assert paired.n_seeds == 0


def test_an_arm_that_is_not_there_is_named():
    runs, _ = tables([arm(optimum=3e-4)])
    absent = {
        "model": "tiny",
        "dataset": "instruct",
        "method": "lora",
        "rank": 4,
        "placement": "all",
        "batch_size": 16,
    }
    with pytest.raises(UserError, match="no runs of tiny/instruct LoRA r4"):
        gap(runs, absent, best_losses(runs).iloc[0])


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(-0.5, 0.5), min_size=2, max_size=6), st.floats(-1, 1))
def test_luck_that_both_arms_share_cancels(luck, difference):
    runs, _ = tables([arm(optimum=3e-4, offsets=luck), arm(8, optimum=3e-3, floor=2.0 + difference, offsets=luck)])
    fullft, lora = (row for _, row in best_losses(runs).iterrows())
    paired = gap(runs, lora, fullft)
    assert paired.estimate == pytest.approx(difference, abs=1e-9)
    assert paired.sigma == pytest.approx(0, abs=1e-9)
