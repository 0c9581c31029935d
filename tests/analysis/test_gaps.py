from __future__ import annotations

import math

import pandas as pd
import pytest

from lorabench.analysis.estimate import mean_interval
from lorabench.analysis.gaps import best_losses

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


def test_all_seeds_that_have_every_lr_choose_the_best_one():
    # By the first seed 3e-4 is best, by the mean of the two that have all LRs 1e-3; the third has one LR only.
    runs, _ = tables([arm(optimum=3e-4, offsets=(0.0, 0.0))])
    first = runs[runs["seed"] == 0]
    second = first.assign(seed=1, run_id="second-" + first["run_id"])
    second.loc[second["lr"] == 1e-3, ["final_valid_nll", "final_test_nll"]] -= 1.0
    third = first[first["lr"] == 3e-4].assign(seed=2, run_id="third", final_valid_nll=0.1)
    (row,) = best_losses(pd.concat([first, second, third])).to_dict("records")
    assert (row["lr_best"], row["seeds"]) == (1e-3, [0, 1])


def test_the_interval_of_a_mean_is_that_of_student():
    values = pd.Series([0.11, 0.11, 0.08])
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(0.1)
    # Student's t with 2 degrees of freedom: 4.302653.
    assert high - mean == pytest.approx(4.302653 * values.std() / math.sqrt(3), rel=1e-5)
    assert mean - low == pytest.approx(high - mean)
    assert math.isnan(mean_interval(values[:1])[1])


def test_an_edge_is_flagged():
    runs, _ = tables([arm(optimum=1e-5), arm(8, optimum=3e-3)])
    assert best_losses(runs)["at_edge"].tolist() == [True, False]


def test_an_arm_without_a_finished_run_gives_no_number():
    runs, _ = tables([arm(optimum=3e-4), arm(8, optimum=3e-3)])
    runs.loc[runs["rank"].eq(8), ["status", "final_valid_nll", "final_test_nll"]] = ["diverged", math.nan, math.nan]
    _, lora = (row for _, row in best_losses(runs).iterrows())
    assert math.isnan(lora["loss_mean"])
    assert lora["n_seeds"] == 0
