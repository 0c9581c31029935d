"""The part of the error from test examples that the error from seeds has in it already."""

from __future__ import annotations

import numpy as np

_NEGLIGIBLE = 1e-12
"""The least share of the largest variance that a direction is taken to have, so that it can be divided by."""


def without_run_noise(
    draws: np.ndarray, influences: np.ndarray, design: np.ndarray, hat: np.ndarray, covariance: np.ndarray
) -> np.ndarray:
    """Take out of the error from test examples what single examples do to single runs.

    Two runs of one arm differ on single test examples for no reason but chance. The spread between runs, which makes
    the error from seeds, has this in it; resampled examples have it too. Only what an example does to all runs of an
    arm, or to the shape of its loss against the LR, is an error of its own. The losses of each example are fitted like
    the mean losses, and the variance of what the fit leaves is taken from that of the coefficients.

    Args:
        draws: draws of the coefficients' error from resampled examples, (draws, coefficients).
        influences: what each example adds to each run's mean loss, times the number of examples, (runs, examples).
        design: the design matrix of the fit, (runs, coefficients).
        hat: makes coefficients from losses, (coefficients, runs).
        covariance: the covariance of runs over the variance of their noise, (runs, runs).

    Returns:
        The draws with the smaller covariance, otherwise changed as little as possible.
    """
    runs, n = influences.shape
    # A coefficient that is held near a value known before the runs takes less than a degree of freedom.
    dof = runs - float(np.trace(hat @ design))
    if dof < 1 or n < 2:
        return draws
    of_examples = hat @ influences
    residual = influences - design @ of_examples
    variance = float((residual * np.linalg.solve(covariance, residual)).sum()) / (n - 1) / dof
    unscaled = hat @ covariance @ hat.T
    total = of_examples @ of_examples.T / (n - 1)
    values, vectors = np.linalg.eigh(total)
    if not values.max() > 0:
        return draws
    scales = np.sqrt(np.maximum(values, _NEGLIGIBLE * values.max()))
    root, whitened = vectors * scales, vectors / scales
    shares, axes = np.linalg.eigh(whitened.T @ unscaled @ whitened * variance)
    shrink = (axes * np.sqrt(np.clip(1 - shares, 0.0, 1.0))) @ axes.T
    shrunk: np.ndarray = draws @ (whitened @ shrink @ root.T)
    return shrunk
