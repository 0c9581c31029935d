"""Slopes: a straight line through points, its interval, and how straight the points lie; also on logarithmic axes."""

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
    """A least-squares line. What the points do not tell is NaN."""

    slope: float
    """Units of y per unit of x."""
    low: float
    """95% t interval of the slope; NaN with no degree of freedom."""
    high: float
    intercept: float
    """At x = 0; with groups, that of the mean over all points."""
    r2: float
    """Share of the variance of y (within groups) that the line explains."""
    quadratic: float
    """Coefficient of x squared if a parabola is fitted instead."""
    quadratic_low: float
    """95% t interval of that coefficient."""
    quadratic_high: float
    n: int
    """Points used."""


def fit_line(x: ArrayLike, y: ArrayLike, sigma: float = 0.0, groups: ArrayLike | None = None) -> Line:
    """Ordinary least squares with t intervals.

    Residuals of few or smooth points can be smaller than the noise is known to be; intervals are then made from
    `sigma` instead, so that points that happen to lie on a line are not taken for certain.

    Args:
        x: positions; pairs in which either is not finite are left out.
        y: values.
        sigma: standard deviation that one value is known to have at least, in units of y; NaN counts as not known.
        groups: one label per point; each group gets an intercept of its own, the slope is shared.
    """
    points = pd.DataFrame({"x": np.asarray(x, float), "y": np.asarray(y, float)})
    points["group"] = 0 if groups is None else pd.factorize(np.asarray(groups))[0]
    points = points[np.isfinite(points["x"]) & np.isfinite(points["y"])]
    # Taking out the means of the groups is the same as fitting an intercept to each.
    within = points[["x", "y"]] - points.groupby("group")[["x", "y"]].transform("mean")
    within = within.where(within.abs() > 1e-12 * points[["x", "y"]].abs().max(), 0.0)
    n_groups = points["group"].nunique()
    slope, half, r2 = _last_coefficient([within["x"]], within["y"], n_groups, sigma)
    # Centred: the coefficient is the same, and the numbers stay small.
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
    """The line of y against log10(x): units of y per tenfold x. A point with x <= 0 is left out. See `fit_line`."""
    return fit_line(_log10(x), y, sigma, groups)


def log_log(x: ArrayLike, y: ArrayLike, sigma: float = 0.0, groups: ArrayLike | None = None) -> Line:
    """The line of log10(y) against log10(x): its slope is the exponent of a power law.

    A point that is not positive in both is left out, and `n` tells how many were not. `sigma` is that of log10(y).
    See `fit_line`.
    """
    return fit_line(_log10(x), _log10(y), sigma, groups)


def _log10(values: ArrayLike) -> np.ndarray:
    positive = np.asarray(values, float)
    return np.asarray(np.log10(positive, out=np.full(positive.shape, math.nan), where=positive > 0))


def _last_coefficient(
    columns: list[pd.Series[Any]], y: pd.Series[Any], n_means: int, sigma: float
) -> tuple[float, float, float]:
    """Of the last column: its least-squares coefficient and the half width of the interval; and R squared.

    All are NaN where the columns do not determine it, the half width where no degree of freedom is left.
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
