"""Slopes: least-squares lines on linear and logarithmic axes, and their intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from lorabench.analysis.student import t_quantile


@dataclass(frozen=True)
class Line:
    """A least-squares line; a number that the points do not determine is NaN."""

    slope: float
    """Units of y per unit of x."""
    low: float
    """Lower end of the 95% t interval of the slope; NaN without a degree of freedom."""
    high: float
    """Upper end of that interval."""
    intercept: float
    """Value at x = 0; with groups, of the line through the mean of all points."""
    n: int
    """Number of points used."""


def fit_line(x: ArrayLike, y: ArrayLike, sigma: float = 0.0, groups: ArrayLike | None = None) -> Line:
    """Fit a line by ordinary least squares, with t intervals.

    The residuals of few or smooth points can be smaller than the known noise. The intervals are then made from
    `sigma` instead, so that points which lie on a line by chance do not give an interval that is too narrow.

    Args:
        x: positions, shape (n,); a point whose position or value is not finite is left out.
        y: values, shape (n,).
        sigma: known lower bound of the standard deviation of a value, in units of y; NaN stands for unknown.
        groups: one label per point, shape (n,); each group has its own intercept, and all share the slope.
    """
    points = pd.DataFrame({"x": np.asarray(x, float), "y": np.asarray(y, float)})
    points["group"] = 0 if groups is None else pd.factorize(np.asarray(groups))[0]
    points = points[np.isfinite(points["x"]) & np.isfinite(points["y"])]
    # Subtracting each group's means is equivalent to fitting an intercept per group.
    within = points[["x", "y"]] - points.groupby("group")[["x", "y"]].transform("mean")
    within = within.where(within.abs() > 1e-12 * points[["x", "y"]].abs().max(), 0.0)
    n_groups = points["group"].nunique()
    slope, half = _slope_and_half_width(within["x"].to_numpy(float), within["y"].to_numpy(float), n_groups, sigma)
    return Line(
        slope=slope,
        low=slope - half,
        high=slope + half,
        intercept=float(points["y"].mean() - slope * points["x"].mean()),
        n=len(points),
    )


def log_log(x: ArrayLike, y: ArrayLike, sigma: float = 0.0, groups: ArrayLike | None = None) -> Line:
    """Fit log10(y) against log10(x); the slope is the exponent of a power law. See `fit_line`.

    A point whose x or y is not positive is left out and not counted in `n`. `sigma` is in units of log10(y).
    """
    return fit_line(_log10(x), _log10(y), sigma, groups)


def slopes_by_seed(curves: pd.DataFrame) -> pd.Series[float]:
    """Fit each column's values against log10 of the index by least squares.

    Args:
        curves: a row for each step (index, from 1 up) and a column for each seed; null values are left out.

    Returns:
        The slope of each column per tenfold steps; NaN for one with fewer than two steps.
    """
    x, values = np.log10(curves.index.to_numpy(float)), curves.to_numpy(float)
    return pd.Series([_slope(x, of_seed) for of_seed in values.T], curves.columns, dtype=float)


def means_by_seed(curves: pd.DataFrame) -> tuple[pd.Series[float], pd.Series[float]]:
    """Return the mean of log10 of the index and that of the values, by column: the middle of each least-squares line.

    Args:
        curves: as for `slopes_by_seed`.
    """
    x = np.log10(curves.index.to_numpy(float))[:, None] + 0 * curves.astype(float)
    return x.mean(), curves.astype(float).mean()


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    known = ~np.isnan(y)
    if known.sum() < 2:
        return math.nan
    x = x[known] - x[known].mean()
    return float(x @ y[known] / (x @ x))


def _log10(values: ArrayLike) -> np.ndarray:
    positive = np.asarray(values, float)
    return np.asarray(np.log10(positive, out=np.full(positive.shape, math.nan), where=positive > 0))


def _slope_and_half_width(x: np.ndarray, y: np.ndarray, n_means: int, sigma: float) -> tuple[float, float]:
    """Return the slope of centred points and the half width of its 95% t interval.

    Both are NaN where the points do not determine the slope; the half width is NaN where no degree of freedom is left.
    """
    squares = float(x @ x)
    if not squares > 0:
        return math.nan, math.nan
    slope = float(x @ y) / squares
    dof = len(y) - n_means - 1
    if dof < 1:
        return slope, math.nan
    scatter = float(np.fmax(math.sqrt(float(((y - slope * x) ** 2).sum()) / dof), sigma))
    return slope, t_quantile(dof) * scatter / math.sqrt(squares)
