"""The learning-rate grid of an arm: its losses by LR, and where the lowest lies."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from lorabench.analysis.arms import first_seed
from lorabench.analysis.losses import with_losses

_LOSSES = ("validation_loss", "test_loss")


class LrGrid(NamedTuple):
    """One arm's LRs with a run of the first seed, ascending; each field has shape (n,).

    Losses are means over the seeds that have finite losses wherever the first seed has.
    """

    lr: np.ndarray
    validation: np.ndarray
    """Validation losses; NaN where the first seed has no finite losses."""
    test: np.ndarray
    """Test losses; NaN where the first seed has no finite losses."""
    diverged: np.ndarray
    """Whether each run of the first seed diverged."""


def lr_grid(of_arm: pd.DataFrame) -> LrGrid:
    """Return the LR grid of an arm.

    Args:
        of_arm: the arm's runs, columns lr, seed, status, and the losses (see `with_losses`).
    """
    first = first_seed(of_arm).sort_values("lr")
    lrs = first["lr"].to_numpy(float)
    of_arm = with_losses(of_arm)
    finite = np.isfinite(of_arm[list(_LOSSES)].to_numpy(float, na_value=math.nan)).all(axis=1)
    usable = of_arm[(of_arm["status"] == "done").to_numpy(bool) & finite].astype(dict.fromkeys(_LOSSES, float))
    validation, test = (_over_seeds(usable, lrs, first["seed"].min(), loss) for loss in _LOSSES)
    return LrGrid(lrs, validation, test, (first["status"] == "diverged").to_numpy(bool))


def _over_seeds(usable: pd.DataFrame, lrs: np.ndarray, first: int, loss: str) -> np.ndarray:
    """Return the mean loss at each of some LRs over the seeds that are complete; NaN where the first seed has none."""
    by_seed = usable.pivot(index="seed", columns="lr", values=loss).reindex(columns=lrs)
    known = by_seed.columns[by_seed.reindex([first]).notna().to_numpy()[0]]
    means: np.ndarray = by_seed[known].dropna().mean().reindex(lrs).to_numpy(float)
    return means


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
