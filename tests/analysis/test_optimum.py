"""The table of optima has the numbers of the fit, and keeps arms that have none."""

from __future__ import annotations

import math

import pytest

from lorabench.analysis.optima import lr_optima
from lorabench.errors import UserError

from ..handmade.sft import arm, tables


def optimum(**settings_of_arm):
    runs, _ = tables([arm(8, **settings_of_arm)])
    return lr_optima(runs).iloc[0]


@pytest.mark.parametrize("lr_opt", [3.3e-4, 1e-3, 1.7e-3, 9e-3])
def test_the_optimum_of_a_parabola_is_exact(lr_opt):
    estimate = optimum(optimum=lr_opt)
    assert math.log(estimate["lr_opt"]) == pytest.approx(math.log(lr_opt), abs=1e-6)
    assert estimate["loss_opt"] == pytest.approx(2.0, abs=1e-9)
    assert not estimate["edge"]
    assert (estimate["n_runs"], estimate["n_diverged"], len(estimate["run_ids"])) == (6, 0, 6)


@pytest.mark.parametrize("beyond", [3e-5, 1e-1])
def test_a_minimum_at_the_edge_of_the_grid_is_flagged(beyond):
    estimate = optimum(optimum=beyond)
    assert estimate["edge"]
    assert not estimate["resolved"]


def test_a_grid_coarser_than_half_a_decade_resolves_nothing():
    assert not optimum(optimum=1e-3, lrs=(1e-4, 1e-3, 1e-2))["resolved"]


def test_a_diverged_lower_neighbour_bounds_nothing():
    runs, _ = tables([arm(8, optimum=1e-3)])
    runs.loc[runs["lr"] <= 3e-4, ["status", "final_valid_nll", "final_test_nll"]] = ["diverged", math.nan, math.nan]
    assert lr_optima(runs)["edge"].item()


def test_a_loss_that_is_missing_is_refused():
    runs, _ = tables([arm(8, optimum=1e-3)])
    runs.loc[runs["lr"] == 3e-3, "final_test_nll"] = math.nan
    with pytest.raises(UserError, match="0.003-0: final_test_nll = missing; allowed: a finite number where status is"):
        lr_optima(runs)


def test_an_arm_of_which_every_run_diverged_stays_in_the_table():
    runs, _ = tables([arm(8, optimum=1e-3), arm(optimum=1e-4)])
    lost = runs["method"] == "lora"
    runs.loc[lost, ["status", "final_valid_nll", "final_test_nll"]] = ["diverged", math.nan, math.nan]
    estimate = lr_optima(runs).set_index("method").loc["lora"]
    assert math.isnan(estimate["lr_opt"])
    assert not estimate["resolved"]
    assert estimate["n_diverged"] == estimate["n_runs"] == 6
