"""Estimates have the intervals of Student's t, and functions of estimates keep what their errors have in common."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lorabench.analysis.estimate import N_DRAWS, Estimate, combined, exact, mean_over_seeds, student, unknown


@pytest.mark.parametrize("dof", [2, 8, 30])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_intervals_are_those_of_student(dof, level):
    low, high = student(1.0, 0.1, dof, "a").interval(level)
    expected = stats.t.interval(level, dof, 1.0, 0.1)
    assert (low, high) == pytest.approx(expected, rel=0.01)


def test_the_mean_over_seeds_has_the_interval_of_scipy_and_leaves_out_missing_values():
    values = [0.2, 0.5, 0.3, math.nan]
    estimate = mean_over_seeds(values, "b")
    known = stats.ttest_1samp(values[:3], 0.0).confidence_interval(0.95)
    assert estimate.interval() == pytest.approx((known.low, known.high), abs=0.005 * (known.high - known.low))
    assert (estimate.value, estimate.n_seeds) == (pytest.approx(1 / 3), 3)


def test_errors_that_are_not_known_are_said_to_be_unknown():
    assert not mean_over_seeds([0.4], "c").known
    assert not mean_over_seeds([], "c").known
    assert not unknown(1.0).known
    assert exact(2.0).known
    assert exact(2.0).interval() == (2.0, 2.0)


def test_the_detectable_effect_is_seen_with_a_power_of_80_percent():
    # With a known error of 1 an effect of 1.96 + 0.84 is seen in 80% of experiments.
    assert student(0.0, 1.0, 10_000, "d").detectable == pytest.approx(2.80, abs=0.02)


def test_draws_of_one_fit_cancel_where_they_are_the_same_and_those_of_two_names_do_not():
    first, second = student(1.0, 0.3, 20, "e"), student(2.0, 0.3, 20, "f")
    assert combined(np.subtract, first, first).interval() == (0.0, 0.0)
    both = combined(np.subtract, second, first)
    assert both.value == 1.0
    assert both.seed_error == pytest.approx(0.3 * math.sqrt(2), rel=0.08)


def test_both_parts_of_an_error_go_through_a_function():
    random = np.random.default_rng(0)
    number = Estimate(0.0, 0.1 * random.standard_normal(N_DRAWS), 0.2 * random.standard_normal(N_DRAWS), 3, 120)
    ratio = combined(np.exp, number)
    assert ratio.seed_error == pytest.approx(0.1, rel=0.1)
    assert ratio.example_error == pytest.approx(0.2, rel=0.1)
    assert (ratio.n_seeds, ratio.n_examples) == (3, 120)
    # The error from test examples is known only if it is known for all.
    assert combined(np.subtract, number, exact(1.0)).example_part is None
