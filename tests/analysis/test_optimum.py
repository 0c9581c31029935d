from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabench.analysis.optimum import lr_draws, lr_optima, vertex
from lorabench.errors import UserError

from ..handmade.sft import LRS, arm, noise_table, tables

NOISE = noise_table(0.002)


def optimum(noise=NOISE, **settings_of_arm):
    runs, _ = tables([arm(8, **settings_of_arm)])
    return lr_optima(runs, noise).iloc[0]


@pytest.mark.parametrize("lr_opt", [3.3e-4, 8e-4, 1e-3, 1.7e-3, 9e-3])
def test_the_vertex_of_a_parabola_is_found(lr_opt):
    estimate = optimum(optimum=lr_opt)
    assert math.log(estimate["lr_opt"]) == pytest.approx(math.log(lr_opt), abs=1e-6)
    assert estimate["loss_opt"] == pytest.approx(2.0, abs=1e-9)
    assert estimate["lr_low"] < lr_opt < estimate["lr_high"]
    assert estimate["resolved"]
    assert not estimate["edge"]
    assert (estimate["n_runs"], estimate["n_diverged"], len(estimate["run_ids"])) == (6, 0, 6)


def test_the_interval_widens_with_noise_and_covers():
    small, large = optimum(optimum=2e-3), optimum(optimum=2e-3, noise=noise_table(0.02))
    assert math.log(large["lr_high"] / large["lr_low"]) > 5 * math.log(small["lr_high"] / small["lr_low"])
    rng = np.random.default_rng(1)
    runs, _ = tables([arm(8, optimum=2e-3, offsets=(0.0,))])
    covered = []
    for _ in range(40):
        noisy = runs.assign(final_valid_nll=runs["final_valid_nll"] + rng.normal(0, 0.02, len(runs)))
        estimate = lr_optima(noisy, noise_table(0.02), n_bootstrap=300).iloc[0]
        covered.append(estimate["lr_low"] <= 2e-3 <= estimate["lr_high"])
    assert np.mean(covered) > 0.85


@pytest.mark.parametrize("beyond", [3e-5, 1e-1])
def test_a_minimum_at_the_grids_edge_is_flagged(beyond):
    estimate = optimum(optimum=beyond)
    assert estimate["edge"]
    assert not estimate["resolved"]
    assert estimate["lr_opt"] == estimate["lr_best"]


def test_a_diverged_upper_neighbour_brackets_without_a_parabola():
    estimate = optimum(optimum=5e-3, diverges_from=1e-2)
    assert estimate["lr_opt"] == estimate["lr_best"] == 3e-3
    assert (estimate["lr_low"], estimate["lr_high"]) == (1e-3, 1e-2)
    assert not estimate["edge"]
    assert not optimum(optimum=5e-3, diverges_from=1e-2, noise=noise_table(math.nan))["resolved"]
    assert estimate["n_diverged"] == 2


def test_a_diverged_lower_neighbour_brackets_nothing():
    runs, _ = tables([arm(8, optimum=1e-3)])
    runs.loc[runs["lr"] == 3e-4, ["status", "final_valid_nll", "final_test_nll"]] = ["diverged", math.nan, math.nan]
    assert lr_optima(runs, NOISE)["edge"].item()


def test_a_loss_that_is_missing_is_refused():
    runs, _ = tables([arm(8, optimum=1e-3)])
    runs.loc[runs["lr"] == 3e-3, "final_test_nll"] = math.nan
    with pytest.raises(UserError, match="0.003-0: final_test_nll = missing; allowed: a finite number where status is"):
        lr_optima(runs, NOISE)


def test_without_sigma_there_is_an_optimum_but_no_interval():
    estimate = optimum(optimum=1e-3, noise=NOISE.iloc[:0])
    assert estimate["lr_opt"] == pytest.approx(1e-3)
    assert math.isnan(estimate["lr_low"])
    assert not estimate["resolved"]


def test_a_grid_coarser_than_half_a_decade_resolves_nothing():
    assert not optimum(optimum=1e-3, lrs=(1e-4, 1e-3, 1e-2))["resolved"]


def test_an_interval_that_reaches_the_edge_is_not_resolved():
    # The loss is almost flat between the two lowest LRs: with this noise the first may well be the best.
    estimate = optimum(optimum=1.8e-4, noise=noise_table(0.05))
    assert not estimate["edge"]
    assert estimate["lr_low"] == pytest.approx(LRS[0])
    assert not estimate["resolved"]


def test_an_arm_of_which_every_run_diverged_stays_in_the_table():
    runs, _ = tables([arm(8, optimum=1e-3)])
    runs = runs.assign(status="diverged", final_valid_nll=math.nan, final_test_nll=math.nan)
    estimate = lr_optima(runs, NOISE).iloc[0]
    assert math.isnan(estimate["lr_opt"])
    assert not estimate["resolved"]
    assert estimate["n_diverged"] == estimate["n_runs"] == 6


def test_the_lr_is_picked_on_validation_and_its_loss_read_on_test():
    runs, _ = tables([arm(8, optimum=1e-3)])
    runs["final_test_nll"] = 7.0 + 0.5 * np.log(runs["lr"] / 3e-3) ** 2
    estimate = lr_optima(runs, NOISE).iloc[0]
    assert estimate["lr_opt"] == pytest.approx(1e-3)
    assert estimate["loss_opt"] == pytest.approx(7.0 + 0.5 * math.log(1 / 3) ** 2)


def test_an_arms_interval_depends_neither_on_other_arms_nor_on_row_order():
    eight, others = arm(8, optimum=2e-3), [arm(optimum=3e-4), arm(1, optimum=1e-3)]
    alone = lr_optima(tables([eight])[0], NOISE).iloc[0]
    shuffled = tables([*others, eight])[0].sample(frac=1, random_state=3)
    among = lr_optima(shuffled, NOISE).set_index("rank").loc[8]
    assert (alone["lr_low"], alone["lr_high"]) == (among["lr_low"], among["lr_high"])
    draws = lr_draws(tables([eight])[0], NOISE)
    assert np.quantile(draws, [0.025, 0.975]) == pytest.approx([alone["lr_low"], alone["lr_high"]])


@settings(max_examples=10, deadline=None)
@given(
    losses=st.lists(st.floats(1.0, 4.0), min_size=4, max_size=7),
    shift=st.floats(-1.0, 3.0),
    scale=st.floats(0.01, 100.0),
)
def test_the_optimum_ignores_a_constant_and_scales_with_the_lrs(losses, shift, scale):
    losses = np.round(losses, 3)
    lrs = [1e-3 * 3**i for i in range(len(losses))]
    runs, _ = tables([arm(8, optimum=1e-3, lrs=lrs, offsets=(0.0,))])
    runs = runs.assign(final_valid_nll=losses, final_test_nll=losses)
    estimate = lr_optima(runs, NOISE, n_bootstrap=50).iloc[0]
    shifted = lr_optima(runs.assign(final_valid_nll=losses + shift), NOISE, n_bootstrap=50).iloc[0]
    scaled = lr_optima(runs.assign(lr=runs["lr"] * scale), NOISE, n_bootstrap=50).iloc[0]
    for name in ("lr_opt", "lr_low", "lr_high"):
        assert scaled[name] / scale == pytest.approx(estimate[name], rel=1e-6)
        if len(set(losses)) == len(losses):
            assert shifted[name] == pytest.approx(estimate[name], rel=1e-4)
    assert lrs[0] <= estimate["lr_opt"] <= lrs[-1] * (1 + 1e-12)
    assert estimate["loss_opt"] <= max(losses) + 1e-9


@settings(deadline=None)
@given(st.floats(0.1, 3.0), st.floats(0.1, 3.0), st.floats(0.0, 2.0), st.floats(0.0, 2.0), st.floats(-10, 10))
def test_a_vertex_lies_between_its_neighbours(left, right, rise_left, rise_right, middle):
    x = np.array([middle - left, middle, middle + right])
    estimate = vertex(x, np.array([rise_left, 0.0, rise_right]))
    assert x[0] - 1e-9 <= estimate <= x[2] + 1e-9
