"""A line through points of which some are only known to lie above or below a bound (a Tobit regression)."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import log_ndtr

from lorabench.analysis.estimate import Estimate, student, unknown

_STEPS, _CONVERGED = 5000, 1e-10


def censored_slope(
    x: np.ndarray, y: np.ndarray, bound: np.ndarray, groups: np.ndarray, floor: float, name: str
) -> Estimate:
    """Estimate the slope of a line, with an intercept for each group, by maximum likelihood.

    It is found by expectation maximization: a bounded value is replaced by its mean given the bound and the line. The
    degrees of freedom are those of the values that are known, and the error counts a bounded value by how much it says.

    Args:
        x: positions, shape (n,).
        y: values, or bounds of them, shape (n,).
        bound: 0 for a value that is known, 1 if the true value is at least y, -1 if it is at most y, shape (n,).
        groups: labels as whole numbers, shape (n,).
        floor: the least standard deviation of a value around the line, so that few points can not seem exact.
        name: names the slope, for draws.

    Returns:
        The slope; it is unknown if the known values of no group have two positions, and its error is unknown without a
        degree of freedom.
    """
    # A group without a known value has its own intercept, so it says nothing about the slope.
    informed = np.isin(groups, groups[bound == 0])
    x, y, bound, groups = x[informed], y[informed], bound[informed], groups[informed]
    design = np.column_stack([*(groups == group for group in np.unique(groups)), x]).astype(float)
    known = bound == 0
    if not len(x) or np.linalg.matrix_rank(design[known]) < design.shape[1]:
        return unknown()
    dof = int(known.sum()) - design.shape[1]
    coefficients = np.linalg.lstsq(design[known], y[known], rcond=None)[0]
    sigma = floor
    solver = np.linalg.pinv(design)
    for _ in range(_STEPS):
        fitted = design @ coefficients
        completed, left = _completed(y, bound, fitted, sigma)
        renewed = solver @ completed
        squares = float(((completed - design @ renewed) ** 2).sum() + sigma**2 * left.sum())
        sigma = max(floor, math.sqrt(squares / len(y)))
        moved = float(np.abs(renewed - coefficients).max())
        coefficients = renewed
        if moved < _CONVERGED:
            break
    weight = 1 - _completed(y, bound, design @ coefficients, sigma)[1]
    information = design.T @ (weight[:, None] * design)
    spread = math.sqrt(max(0.0, float(np.linalg.inv(information)[-1, -1])))
    # The likelihood takes sigma over all values; with few it is too low.
    wider = math.sqrt(known.sum() / dof) if dof > 0 else math.nan
    return student(float(coefficients[-1]), sigma * spread * wider, dof, name)


def _completed(y: np.ndarray, bound: np.ndarray, fitted: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the values with bounded ones replaced by their means, and the share of the variance that is left in each.

    A known value has nothing left, and a value whose bound says nothing has all of it.
    """
    # The distance of the bound from the line, in standard deviations, in the direction in which the value lies.
    distance = bound * (y - fitted) / sigma
    hazard = np.exp(-(distance**2) / 2 - log_ndtr(-distance)) / math.sqrt(2 * math.pi)
    completed = np.where(bound == 0, y, fitted + bound * sigma * hazard)
    left = np.where(bound == 0, 0.0, 1 - hazard * (hazard - distance))
    return completed, left
