"""Slopes: least-squares lines on linear and logarithmic axes, their intervals, and the curvature of the points."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

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
    r2: float
    """Share of the variance of y (within groups) that the line explains."""
    quadratic: float
    """Coefficient of x squared of the least-squares parabola."""
    quadratic_low: float
    """Lower end of the 95% t interval of that coefficient."""
    quadratic_high: float
    """Upper end of that interval."""
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
    slope, half, r2 = _last_coefficient([within["x"]], within["y"], n_groups, sigma)
    # Centring x leaves the coefficient unchanged and keeps the numbers small.
    square = (points["x"] - points["x"].mean()) ** 2
    square -= square.groupby(points["group"]).transform("mean")
    quadratic, quadratic_half, _ = _last_coefficient([within["x"], square], within["y"], n_groups, sigma)
    return Line(
        slope=slope,
        low=slope - half,
        high=slope + half,
        intercept=float(points["y"].mean() - slope * points["x"].mean()),
        r2=r2,
        quadratic=quadratic,
        quadratic_low=quadratic - quadratic_half,
        quadratic_high=quadratic + quadratic_half,
        n=len(points),
    )


def against_log(x: ArrayLike, y: ArrayLike, sigma: float = 0.0, groups: ArrayLike | None = None) -> Line:
    """Fit y against log10(x); the slope is in units of y per tenfold x. See `fit_line`.

    Points with x <= 0 are left out.
    """
    return fit_line(_log10(x), y, sigma, groups)


def log_log(x: ArrayLike, y: ArrayLike, sigma: float = 0.0, groups: ArrayLike | None = None) -> Line:
    """Fit log10(y) against log10(x); the slope is the exponent of a power law. See `fit_line`.

    A point whose x or y is not positive is left out and not counted in `n`. `sigma` is in units of log10(y).
    """
    return fit_line(_log10(x), _log10(y), sigma, groups)


def _log10(values: ArrayLike) -> np.ndarray:
    positive = np.asarray(values, float)
    return np.asarray(np.log10(positive, out=np.full(positive.shape, math.nan), where=positive > 0))


def _last_coefficient(
    columns: list[pd.Series[Any]], y: pd.Series[Any], n_means: int, sigma: float
) -> tuple[float, float, float]:
    """Return the last column's least-squares coefficient, the half width of its 95% t interval, and R squared.

    All are NaN where the columns do not determine the coefficient; the half width is NaN where no degree of freedom
    is left.
    """
    design = np.column_stack([column.to_numpy(float) for column in columns])
    if len(y) == 0 or np.linalg.matrix_rank(design) < design.shape[1]:
        return math.nan, math.nan, math.nan
    values = y.to_numpy(float)
    coefficients = np.linalg.lstsq(design, values, rcond=None)[0]
    residual = float(((values - design @ coefficients) ** 2).sum())
    total = float((values**2).sum())
    r2 = 1 - residual / total if total > 0 else math.nan
    dof = len(values) - n_means - design.shape[1]
    if dof < 1:
        return float(coefficients[-1]), math.nan, r2
    scatter = float(np.fmax(math.sqrt(residual / dof), sigma))
    spread = math.sqrt(float(np.linalg.inv(design.T @ design)[-1, -1]))
    return float(coefficients[-1]), t_quantile(dof) * scatter * spread, r2
