"""The LRs of an arm around its lowest loss, and the runs there, which count for the fit of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lorabench.analysis.least_squares import FitRows
from lorabench.runs import TIE, lowest

MAX_STEP = 3.5
"""The widest ratio of neighbouring LRs around a resolved optimum: about half a decade, as from 3e-4 to 1e-3."""


@dataclass(frozen=True)
class ArmRuns:
    """Runs as arrays, which are many times as fast as small tables."""

    run_id: np.ndarray
    lr: np.ndarray
    seed: np.ndarray
    done: np.ndarray
    """Whether the run finished with a test loss."""
    diverged: np.ndarray
    validation_loss: np.ndarray
    test_loss: np.ndarray
    n: np.ndarray
    """The number of seeds in a row."""
    sd: np.ndarray
    """Their standard deviation, which is NaN for a single run."""

    @classmethod
    def of(cls, runs: pd.DataFrame) -> ArmRuns:
        """Read them from a table."""

        def numbers(column: str) -> np.ndarray:
            if column not in runs:
                return np.full(len(runs), math.nan)
            return runs[column].to_numpy(float, na_value=math.nan)

        status, test_loss, n = runs["status"].to_numpy(object), numbers("test_loss"), numbers("n_seeds")
        return cls(
            runs["run_id"].to_numpy(object),
            numbers("lr"),
            numbers("seed").astype(int),
            (status == "done") & np.isfinite(test_loss),
            status == "diverged",
            numbers("validation_loss"),
            test_loss,
            np.where(np.isnan(n), 1, n).astype(int),
            numbers("final_test_nll_sd"),
        )

    def at(self, places: Sequence[int]) -> ArmRuns:
        """Return the runs at some places."""
        return ArmRuns(*(values[places] for values in vars(self).values()))


@dataclass(frozen=True)
class ArmGrid:
    """The LRs of one arm around its lowest loss."""

    label: str
    lrs: np.ndarray
    """All LRs with a finished run, ascending."""
    centre: int
    """Index of the LR with the lowest loss."""
    window: np.ndarray
    """Indices of the LRs that count for the fit."""
    edge: float | None
    """If no finished or diverged run bounds the lowest loss on one side, the LR to add there; else None."""
    coarse: float | None
    """If a neighbour of the lowest loss is more than MAX_STEP away or diverged, the LR to add between; else None."""
    diverged: np.ndarray
    """LRs at which the run of the first seed diverged, ascending."""

    def beside(self, optimum: float) -> float | None:
        """Return the LR to add if a fitted optimal LR lies at an end of the window; None if it lies within.

        It is halfway to the next LR on a logarithmic axis, or a step of the grid further where there is no next LR.
        """
        for end, inwards in ((self.window[0], 1), (self.window[-1], -1)):
            if not math.isclose(optimum, self.lrs[end], rel_tol=1e-6):
                continue
            tried = np.union1d(self.lrs, self.diverged)
            beyond = int(np.searchsorted(tried, self.lrs[end])) - inwards
            if 0 <= beyond < len(tried):
                return math.sqrt(self.lrs[end] * tried[beyond])
            return float(self.lrs[end] ** 2 / self.lrs[end + inwards])
        return None


def arm_grid(label: str, runs: ArmRuns) -> ArmGrid | None:
    """Return the LRs of an arm; None if no run finished.

    The lowest loss is sought among the LRs of the first seed, by the mean of validation and test loss, which is less
    noisy than either, over the seeds that finished at all of these LRs. It only centres the window.
    """
    first = runs.seed == runs.seed.min()
    usable = first & runs.done
    if not usable.any():
        return None
    lrs = np.unique(runs.lr[usable])
    best = lowest(dict(zip(lrs.tolist(), _mean_losses(runs, lrs).tolist(), strict=True)), TIE)
    centre = lrs.tolist().index(best)
    diverged = np.sort(runs.lr[first & runs.diverged])
    reach = MAX_STEP * 1.001
    window = np.flatnonzero((lrs >= lrs[centre] / reach) & (lrs <= lrs[centre] * reach))
    step = float(lrs[1] / lrs[0]) if len(lrs) > 1 else MAX_STEP
    above = diverged[diverged > lrs[centre]]
    edge = coarse = None
    if centre == 0:
        edge = lrs[0] / step
    elif centre == len(lrs) - 1 and not len(above):
        edge = lrs[-1] * step
    elif centre == len(lrs) - 1:
        coarse = math.sqrt(lrs[centre] * above[0])
    else:
        wide = [other for other in (lrs[centre - 1], lrs[centre + 1]) if not 1 / reach <= other / lrs[centre] <= reach]
        coarse = math.sqrt(wide[0] * lrs[centre]) if wide else None
    return ArmGrid(label, lrs, centre, window, edge, coarse, diverged)


def _mean_losses(runs: ArmRuns, lrs: np.ndarray) -> np.ndarray:
    """Return the mean of validation and test loss at each of some LRs, over the seeds that finished at all of them."""
    # A table with one evaluation set has one of the two losses.
    both = np.array([runs.validation_loss, runs.test_loss])
    known = np.isfinite(both)
    loss = np.where(known, both, 0.0).sum(0) / np.maximum(known.sum(0), 1)
    counted = runs.done & np.isin(runs.lr, lrs)
    seeds, row = np.unique(runs.seed[counted], return_inverse=True)
    by_seed = np.full((len(seeds), len(lrs)), math.nan)
    by_seed[row, np.searchsorted(lrs, runs.lr[counted])] = loss[counted]
    means: np.ndarray = by_seed[np.isfinite(by_seed).all(1)].mean(0)
    return means


def counted_rows(arms: Sequence[tuple[str, ArmRuns]], grids: Mapping[str, ArmGrid]) -> FitRows | None:
    """Return the runs that count for a fit, which are the finished ones at the LRs of their arm's window, if any."""
    parts: list[tuple[np.ndarray, ...]] = []
    for label, runs in arms:
        grid = grids.get(label)
        if grid is None or len(grid.window) < 2:
            continue
        counted = runs.done & np.isin(runs.lr, grid.lrs[grid.window])
        x = np.log(runs.lr[counted] / grid.lrs[grid.centre])
        labels = np.full(int(counted.sum()), label, object)
        columns = (runs.run_id[counted], labels, runs.seed[counted], x, runs.test_loss[counted])
        parts.append((*columns, runs.n[counted], runs.sd[counted]))
    return FitRows(*(np.concatenate(columns) for columns in zip(*parts, strict=True))) if parts else None
