"""Slopes: least-squares lines on linear and logarithmic axes, and a line through points that are partly bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import log_ndtr

from lorabench.analysis.estimate import Estimate, student, t_quantile, unknown


@dataclass(frozen=True)
class Line:
    """A least-squares line on logarithmic axes: the exponent of a power law with its 95% t interval, log10(y) at x = 1
    (with groups, of the line through the mean of all points), and the number of points used; NaN if not determined."""

    slope: float
    low: float
    high: float
    intercept: float
    n: int


def log_log(x: ArrayLike, y: ArrayLike, sigma: float = 0.0, groups: ArrayLike | None = None) -> Line:
    """Fit log10(y) against log10(x), (n,) each, by least squares, with t intervals. A point that is not positive
    and finite is left out. `sigma` is a known lower bound of the standard deviation of log10(y), or NaN. Each of the
    groups, (n,), has its own intercept, and all share the slope."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    points = pd.DataFrame({"x": np.log10(np.where(x > 0, x, math.nan)), "y": np.log10(np.where(y > 0, y, math.nan))})
    points["group"] = 0 if groups is None else pd.factorize(np.asarray(groups))[0]
    points = points[np.isfinite(points["x"]) & np.isfinite(points["y"])]
    # Subtracting each group's means is equivalent to fitting an intercept per group.
    within = points[["x", "y"]] - points.groupby("group")[["x", "y"]].transform("mean")
    within = within.where(within.abs() > 1e-12 * points[["x", "y"]].abs().max(), 0.0)
    centred, y_centred = within["x"].to_numpy(float), within["y"].to_numpy(float)
    squares, dof = float(centred @ centred), len(points) - points["group"].nunique() - 1
    half = math.nan
    slope = float(centred @ y_centred) / squares if squares > 0 else math.nan
    if squares > 0 and dof >= 1:
        scatter = math.sqrt(float(((y_centred - slope * centred) ** 2).sum()) / dof)
        half = t_quantile(dof) * float(np.fmax(scatter, sigma)) / math.sqrt(squares)
    intercept = float(points["y"].mean() - slope * points["x"].mean())
    return Line(slope, slope - half, slope + half, intercept, len(points))


def slopes_by_seed(curves: pd.DataFrame, first: float = 1) -> pd.Series[float]:
    """Return the slope of each column's values, by least squares, against log10 of the index, steps from a first one
    up; null values are left out, and a column with fewer than two steps has NaN."""
    curves = curves.loc[first:]
    values, steps = curves.to_numpy(float, na_value=math.nan), np.log10(curves.index.to_numpy(float))[:, None]
    with np.errstate(invalid="ignore"):  # a column without values
        centred = np.where(np.isnan(values), 0.0, steps - mean_log_step(curves))
        slopes = np.nansum(centred * values, axis=0) / (centred**2).sum(0)
    return pd.Series(slopes, curves.columns)


def mean_log_step(curves: pd.DataFrame) -> np.ndarray:
    """Return the mean of log10 of the index over the steps at which each column has a value, (columns,)."""
    known = curves.notna().to_numpy()
    with np.errstate(invalid="ignore"):
        return np.asarray(np.log10(curves.index.to_numpy(float)) @ known / known.sum(0))


def censored_slope(
    x: np.ndarray, y: np.ndarray, bound: np.ndarray, groups: np.ndarray, floor: float, name: str
) -> Estimate:
    """Estimate the slope of values y on x, (n,) each, some of which are only bounds (Tobit regression).

    The maximum likelihood is found by expectation maximization: a bounded value is replaced by its mean given the bound
    and the line. The degrees of freedom are those of the values that are known, and the error counts a bounded value by
    the information that it has. The slope is unknown if the known values of no group have two positions.

    Args:
        bound: 0 for a value that is known, 1 if the true value is at least y, -1 if it is at most y, (n,).
        groups: labels as whole numbers, (n,); each group has its own intercept.
        floor: the least standard deviation of a value around the line, so that few points can not seem exact.
    """
    # A group without a known value has its own intercept, so it says nothing about the slope.
    informed = np.isin(groups, groups[bound == 0])
    x, y, bound, groups = x[informed], y[informed], bound[informed], groups[informed]
    design = np.column_stack([*(groups == group for group in np.unique(groups)), x]).astype(float)
    known = bound == 0
    if not len(x) or np.linalg.matrix_rank(design[known]) < design.shape[1]:
        return unknown()
    dof = int(known.sum()) - design.shape[1]
    coefficients, sigma = np.linalg.lstsq(design[known], y[known], rcond=None)[0], floor
    solver = np.linalg.pinv(design)
    for _ in range(5000):
        completed, left = _completed(y, bound, design @ coefficients, sigma)
        renewed = solver @ completed
        squares = float(((completed - design @ renewed) ** 2).sum() + sigma**2 * left.sum())
        sigma = max(floor, math.sqrt(squares / len(y)))
        moved = float(np.abs(renewed - coefficients).max())
        coefficients = renewed
        if moved < 1e-10:
            break
    weight = 1 - _completed(y, bound, design @ coefficients, sigma)[1]
    spread = math.sqrt(max(0.0, float(np.linalg.inv(design.T @ (weight[:, None] * design))[-1, -1])))
    # The likelihood takes sigma over all values; with few it is too low.
    wider = math.sqrt(known.sum() / dof) if dof > 0 else math.nan
    return student(float(coefficients[-1]), sigma * spread * wider, dof, name)


def _completed(y: np.ndarray, bound: np.ndarray, fitted: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the values, bounded ones replaced by their means, and the share of the variance that is left in each."""
    # The distance of the bound from the line, in standard deviations, in the direction in which the value lies.
    distance = bound * (y - fitted) / sigma
    hazard = np.exp(-(distance**2) / 2 - log_ndtr(-distance)) / math.sqrt(2 * math.pi)
    completed = np.where(bound == 0, y, fitted + bound * sigma * hazard)
    left = np.where(bound == 0, 0.0, 1 - hazard * (hazard - distance))
    return completed, left
