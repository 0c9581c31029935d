"""The learning-rate grid of an arm: the losses of its first seed by LR, and where the lowest lies."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from lorabench.analysis.arms import first_seed
from lorabench.analysis.losses import with_losses


class LrGrid(NamedTuple):
    """One arm's runs of one seed, ascending in LR; each field has shape (n,)."""

    lr: np.ndarray
    validation: np.ndarray
    """Validation losses; NaN where a run has no finite losses."""
    test: np.ndarray
    """Test losses; NaN where a run has no finite losses."""
    diverged: np.ndarray
    """Whether each run diverged."""


def lr_grid(of_arm: pd.DataFrame) -> LrGrid:
    """Return the LR grid of an arm, from its runs with the first seed.

    Args:
        of_arm: the arm's runs, columns lr, seed, status, and the losses (see `with_losses`).
    """
    ascending = with_losses(first_seed(of_arm)).sort_values("lr")
    validation, test = (ascending[loss].to_numpy(float, na_value=math.nan) for loss in ("validation_loss", "test_loss"))
    usable = (ascending["status"] == "done").to_numpy(bool) & np.isfinite(validation) & np.isfinite(test)
    return LrGrid(
        lr=ascending["lr"].to_numpy(float),
        validation=np.where(usable, validation, math.nan),
        test=np.where(usable, test, math.nan),
        diverged=(ascending["status"] == "diverged").to_numpy(bool),
    )


def best_index(grid: LrGrid) -> int | None:
    """Return the index of the lowest validation loss, the first of equals; None if no run finished."""
    return int(np.nanargmin(grid.validation)) if np.isfinite(grid.validation).any() else None


def is_edge(grid: LrGrid, index: int) -> bool:
    """Return whether the optimum may lie beyond the grid, given the index of the lowest loss.

    It does not if the run at the next lower LR finished and the run at the next higher LR finished or diverged.
    """
    has_parabola, diverged_above = _bracket(grid, np.array([index]))
    return not (has_parabola | diverged_above).item()


def vertex(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the position of the minimum of the parabola through three points, of which the middle is the lowest.

    Args:
        x: ascending positions, shape (..., 3).
        y: values, shape (..., 3).

    Returns:
        Positions, shape (...); the middle position if the three values are equal.
    """
    left, right = x[..., 0] - x[..., 1], x[..., 2] - x[..., 1]
    rise_left, rise_right = y[..., 0] - y[..., 1], y[..., 2] - y[..., 1]
    curvature = rise_left * right - rise_right * left
    flat = curvature == 0
    shift = (rise_left * right**2 - rise_right * left**2) / np.where(flat, 1.0, 2 * curvature)
    return np.asarray(x[..., 1] + np.where(flat, 0.0, shift))


def _bracket(grid: LrGrid, best: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return whether both neighbours of each index finished, and whether the lower finished and the upper diverged."""
    finished = np.concatenate([[False], np.isfinite(grid.validation), [False]])
    diverged = np.concatenate([[False], grid.diverged, [False]])
    # The arrays are padded by one, so `best` is the neighbour below and `best + 2` the neighbour above.
    return finished[best] & finished[best + 2], finished[best] & diverged[best + 2]
