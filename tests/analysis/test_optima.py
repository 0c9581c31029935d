"""Optima and edges of single arms, and the seed noise of comparisons."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabench.analysis.comparison import comparisons
from lorabench.analysis.optima import fitted_noise
from lorabench.errors import UserError

from ..handmade.sft import arm, tables


def fitted(**settings_of_arm):
    [comparison] = comparisons(tables([arm(8, **settings_of_arm)])[0], pd.DataFrame())
    return comparison.fit


@settings(max_examples=10, deadline=None)
@given(st.floats(math.log(3.1e-4), math.log(9.9e-3)))
def test_the_optimum_of_a_parabola_is_exact(log_lr):
    fit = fitted(optimum=math.exp(log_lr))
    assert fit.optima["LoRA r8"].value == pytest.approx(log_lr, abs=1e-6)
    assert fit.minima["LoRA r8"].value == pytest.approx(2.0, abs=1e-9)
    assert fit.grids["LoRA r8"].edge is None


@pytest.mark.parametrize("beyond", [3e-5, 1e-1])
def test_a_minimum_at_the_edge_of_the_grid_is_flagged(beyond):
    fit = fitted(optimum=beyond)
    assert fit.grids["LoRA r8"].edge is not None
    assert not fit.resolved.get("LoRA r8", False)


def test_a_grid_coarser_than_half_a_decade_resolves_nothing():
    assert not fitted(optimum=1e-3, lrs=(1e-4, 1e-3, 1e-2)).resolved.get("LoRA r8", False)


def test_a_diverged_lower_neighbour_bounds_nothing():
    runs, _ = tables([arm(8, optimum=1e-3)])
    runs.loc[runs["lr"] <= 3e-4, ["status", "final_valid_nll", "final_test_nll"]] = ["diverged", math.nan, math.nan]
    assert comparisons(runs, pd.DataFrame())[0].fit.grids["LoRA r8"].edge is not None


def test_a_loss_that_is_missing_is_refused():
    runs, _ = tables([arm(8, optimum=1e-3)])
    runs.loc[runs["lr"] == 3e-3, "final_test_nll"] = math.nan
    with pytest.raises(UserError, match="0.003-0: final_test_nll = missing; allowed: a finite number where status is"):
        comparisons(runs, pd.DataFrame())


def test_seed_noise_is_that_of_each_comparison_without_what_all_arms_share():
    random = np.random.default_rng(0)
    shared, seeds = random.normal(0, 0.1, 40), range(40)
    noisy = [
        arm(rank, optimum=1e-3, offsets=[shared[seed] + random.normal(0, 0.02) for seed in seeds]) for rank in (None, 8)
    ]
    runs, _ = tables([*noisy, arm(8, optimum=1e-3, offsets=(0.0,), dataset="once")])
    noise = fitted_noise(comparisons(runs, pd.DataFrame())).set_index("dataset")
    assert noise.loc["instruct", "sigma"] == pytest.approx(0.02, rel=0.25)
    assert noise.loc["instruct", "dof"] >= 30
    assert noise.loc["instruct", "n_runs"] == 84
    assert math.isnan(noise.loc["once", "sigma"])
