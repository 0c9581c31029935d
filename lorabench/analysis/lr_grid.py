"""The learning-rate grid of an arm: its losses by LR, and where the lowest lies."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from lorabench.analysis.arm_grid import ArmRuns
from lorabench.analysis.arms import with_losses
from lorabench.runs import TIE, lowest


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
    runs = ArmRuns.of(with_losses(of_arm))
    first = runs.seed == runs.seed.min()
    lrs = np.unique(runs.lr[first])
    usable = np.isin(lrs, runs.lr[first & runs.done & np.isfinite(runs.validation_loss)])
    validation, test = np.full(len(lrs), math.nan), np.full(len(lrs), math.nan)
    if usable.any():
        validation[usable] = over_seeds(runs, lrs[usable], runs.validation_loss)
        test[usable] = over_seeds(runs, lrs[usable], runs.test_loss)
    return LrGrid(lrs, validation, test, np.isin(lrs, runs.lr[first & runs.diverged]))


def over_seeds(runs: ArmRuns, lrs: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Return the mean of a loss at each of some LRs, over the seeds that finished at all of them.

    Args:
        runs: the runs of one arm.
        lrs: LRs at which a seed finished, ascending, shape (n,).
        loss: the loss of each run; runs with NaN do not count.

    Returns:
        Means, shape (n,).
    """
    counted = runs.done & np.isin(runs.lr, lrs)
    seeds, row = np.unique(runs.seed[counted], return_inverse=True)
    by_seed = np.full((len(seeds), len(lrs)), math.nan)
    by_seed[row, np.searchsorted(lrs, runs.lr[counted])] = loss[counted]
    means: np.ndarray = by_seed[np.isfinite(by_seed).all(1)].mean(0)
    return means


def best_index(grid: LrGrid) -> int | None:
    """Return the index of the lowest validation loss, the first of equals; None if no run finished."""
    best = lowest(dict(zip(grid.lr.tolist(), grid.validation.tolist(), strict=True)), TIE)
    return None if best is None else int(np.searchsorted(grid.lr, best))


def is_edge(grid: LrGrid, index: int) -> bool:
    """Return whether the optimum may lie beyond the grid, given the index of the lowest loss.

    It does not if the run at the next lower LR finished and the run at the next higher LR finished or diverged.
    """
    has_parabola, diverged_above = _bracket(grid, np.array([index]))
    return not (has_parabola | diverged_above).item()


def _bracket(grid: LrGrid, best: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return whether both neighbours of each index finished, and whether the lower finished and the upper diverged."""
    finished = np.concatenate([[False], np.isfinite(grid.validation), [False]])
    diverged = np.concatenate([[False], grid.diverged, [False]])
    # The arrays are padded by one, so `best` is the neighbour below and `best + 2` the neighbour above.
    return finished[best] & finished[best + 2], finished[best] & diverged[best + 2]
