"""Lines are those of scipy, also through points that are partly bounds."""

import math

import numpy as np
import pytest
from scipy import stats

from lorabench.analysis.slopes import censored_slope, log_log

X = np.arange(8.0)
SCATTER = np.array([1.0, -1.0, -0.5, 0.5, 0.7, -0.7, 0.2, -0.2])


def fit_line(x, y, **options):
    return log_log(10.0 ** np.asarray(x), 10.0 ** np.asarray(y), **options)


def test_slope_and_interval_are_those_of_scipy():
    y = 3 - 0.5 * X + 0.1 * SCATTER
    line, known = fit_line(X, y), stats.linregress(X, y)
    half = stats.t.ppf(0.975, len(X) - 2) * known.stderr
    assert (line.slope, line.intercept, line.n) == pytest.approx((known.slope, known.intercept, len(X)))
    assert (line.low, line.high) == pytest.approx((known.slope - half, known.slope + half))


def test_too_few_points_tell_nothing():
    for x, y in (([], []), ([1.0], [2.0]), ([0.1, 0.1, 0.1], [1.0, 2.0, 3.0])):
        assert math.isnan(fit_line(x, y).slope)
    two = fit_line([0.0, 1.0], [0.0, 2.0])
    assert (two.slope, math.isnan(two.low)) == (pytest.approx(2), True)


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


def test_what_determines_no_slope():
    assert not fit([0, 1], [0.0, 1.0], [0, 1]).known
    assert not fit([0, 1, 2], [0.0, 1.0, 1.5], [0, 0, 1]).known
    # Of two groups, each has an intercept; a group with bounds alone is left out.
    slope = fit([0, 1, 2, 0, 1], [0.0, 1.1, 1.9, 7.0, 7.0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1])
    assert slope.value == pytest.approx(0.95)
