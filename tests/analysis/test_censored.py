from __future__ import annotations

import math

import numpy as np
import pytest

from lorabench.analysis.slopes import censored_slope


def fit(x, y, bound, groups=None, floor=0.01):
    x, y, bound = np.array(x, float), np.array(y, float), np.array(bound)
    return censored_slope(x, y, bound, np.zeros(len(x), int) if groups is None else np.array(groups), floor, "slope")


def test_without_bounds_it_is_least_squares():
    x = np.linspace(0, 3, 8)
    y = 2 * x + np.random.default_rng(0).normal(0, 0.1, 8)
    slope = fit(x, y, [0] * 8)
    assert slope.value == pytest.approx(np.polyfit(x, y, 1)[0])
    residual = y - np.polyval(np.polyfit(x, y, 1), x)
    error = math.sqrt((residual**2).sum() / 6 / ((x - x.mean()) ** 2).sum())
    low, high = slope.interval()
    assert (high - low) / 2 == pytest.approx(2.447 * error, rel=0.02)


def test_bounds_keep_the_slope_where_leaving_them_out_does_not():
    random, slopes, naive = np.random.default_rng(1), [], []
    for _ in range(60):
        x = random.uniform(0, 2, 40)
        y = x + random.normal(0, 0.5, 40)
        bound = (y > 1.2).astype(int)
        slopes.append(fit(x, np.minimum(y, 1.2), bound).value)
        naive.append(np.polyfit(x[bound == 0], y[bound == 0], 1)[0])
    assert np.mean(slopes) == pytest.approx(1, abs=0.05)
    assert np.mean(naive) < 0.8


def test_upper_bounds_count_as_lower_bounds_do():
    x, y, bound = np.array([0, 1, 2, 3.0]), np.array([0.1, 1.0, 1.9, 2.0]), np.array([0, 0, 0, 1])
    assert fit(x, -y, -bound).value == pytest.approx(-fit(x, y, bound).value)


def test_a_bound_that_says_nothing_changes_nothing():
    without = fit([0, 1, 2], [0.0, 1.1, 2.0], [0, 0, 0])
    with_it = fit([0, 1, 2, 3], [0.0, 1.1, 2.0, -50.0], [0, 0, 0, 1])
    assert with_it.value == pytest.approx(without.value, rel=1e-4)


def test_what_determines_no_slope():
    assert not fit([0, 1], [0.0, 1.0], [0, 1]).known
    two = fit([0, 1, 2], [0.0, 1.0, 1.5], [0, 0, 1])
    assert math.isfinite(two.value)
    assert not two.known
    # Of two groups, each has an intercept; a group with bounds alone is left out.
    slope = fit([0, 1, 2, 0, 1], [0.0, 1.1, 1.9, 7.0, 7.0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1])
    assert slope.value == pytest.approx(0.95)


def test_few_points_on_a_line_are_no_more_exact_than_the_floor():
    slope = fit([0, 1, 2], [0.0, 1.0, 2.0], [0, 0, 0], floor=0.1)
    assert slope.seed_error > 0.1 / math.sqrt(2)
