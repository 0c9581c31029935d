"""The runs around the lowest loss of each arm, which count for the fit, and the curves that are fitted to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from lorabench.runs import TIE, lowest

MAX_STEP = 3.5
"""The widest ratio of neighbouring LRs around a resolved optimum: about half a decade, as from 3e-4 to 1e-3."""


MIN_LRS = 3
"""Least number of LRs in a grid from which an optimum can be fitted."""

CLIFF = 2.0
"""How many times as much as a parabola a loss may rise to be fitted by one."""


def run_array(runs: pd.DataFrame) -> np.ndarray:
    """Return runs as a structured array, which is many times as fast as small tables.

    Its fields are run_id, lr, seed, validation_loss, test_loss, done (whether the run finished with a test loss),
    diverged, n (the number of seeds in a row) and sd (their standard deviation, NaN for a single run), and two that
    `counted_rows` fills: label (that of the arm) and x (ln LR over the arm's centre).
    """

    def numbers(column: str, missing: float = math.nan) -> np.ndarray:
        return runs[column].to_numpy(float, na_value=missing) if column in runs else np.full(len(runs), missing)

    types = {"run_id": object, "label": object, "seed": int, "n": int, "done": bool, "diverged": bool}
    array = np.empty(len(runs), [*types.items(), *((name, float) for name in ("lr", "x", *_LOSSES, "sd"))])
    for name in ("lr", "seed", *_LOSSES):
        array[name] = numbers(name)
    array["run_id"], array["n"], array["sd"] = runs["run_id"], numbers("n_seeds", 1), numbers("final_test_nll_sd")
    array["done"] = runs["status"].eq("done") & np.isfinite(array["test_loss"])
    array["diverged"] = runs["status"].eq("diverged")
    return array


_LOSSES = ("validation_loss", "test_loss")


@dataclass(frozen=True)
class ArmGrid:
    """The LRs of one arm around its lowest loss."""

    lrs: np.ndarray
    """All LRs with a finished run, ascending."""
    centre: int
    """Index of the LR with the lowest loss, by which the window is centred."""
    window: np.ndarray
    """Indices of the LRs that count for the fit."""
    edge: float | None
    """The LR to add on a side where no finished or diverged run bounds the lowest loss."""
    coarse: float | None
    """The LR to add between the lowest loss and a neighbour that is more than MAX_STEP away or diverged."""
    diverged: np.ndarray
    """LRs at which the run of the first seed diverged, ascending."""

    @property
    def reach(self) -> tuple[float, float]:
        """The ends between which an optimum may lie, as ln LR over the centre: a step beyond the window, since an
        optimum need not lie next to the LR with the lowest mean loss; but not beyond an edge, which bounds nothing."""
        x = np.log(self.lrs[self.window] / self.lrs[self.centre])
        below, above = (0 if self.edge and at_edge else 1 for at_edge in (self.centre == 0, self.centre > 0))
        return float(x[0] - below * (x[1] - x[0])), float(x[-1] + above * (x[-1] - x[-2]))


def arm_grid(runs: np.ndarray, cliffs: bool = False) -> ArmGrid | None:
    """Return the LRs of an arm from its `run_array`; None if no run finished. With `cliffs`, as in RL, where accuracies
    have flat tops and then break down, losses of any height count.

    The window is centred by the mean of validation and test loss, which is less noisy than either; or, if that is
    lowest at the first or last LR, by the validation loss, by which grids walk. Both are means over the seeds that
    finished at all LRs of the first seed.
    """
    first = runs["seed"] == runs["seed"].min()
    usable = first & runs["done"]
    if not usable.any():
        return None
    lrs = np.unique(runs["lr"][usable])
    counted = runs[runs["done"] & np.isin(runs["lr"], lrs)]
    seeds, row = np.unique(counted["seed"], return_inverse=True)

    last = len(lrs) - 1
    validation, test = counted["validation_loss"], counted["test_loss"]
    # A table with one evaluation set has one of the two losses.
    both, walked = np.nanmean([validation, test], axis=0), np.where(np.isfinite(validation), validation, test)
    for losses in (both, walked):
        by_seed = np.full((len(seeds), len(lrs)), math.nan)
        by_seed[row, np.searchsorted(lrs, counted["lr"])] = losses
        means = by_seed[np.isfinite(by_seed).all(1)].mean(0)
        centre: int = lrs.tolist().index(lowest(dict(zip(lrs.tolist(), means.tolist(), strict=True)), TIE))
        if 0 < centre < last:
            break
    diverged = np.sort(runs["lr"][first & runs["diverged"]])
    reach = MAX_STEP * 1.001
    window = np.flatnonzero((lrs >= lrs[centre] / reach) & (lrs <= lrs[centre] * reach))
    window = window if cliffs else _below_cliffs(window, lrs, means, centre)
    step = float(lrs[1] / lrs[0]) if last else MAX_STEP
    above = diverged[diverged > lrs[last]]
    edge = coarse = None
    if centre == 0:
        edge = lrs[0] / step
    elif centre == last and not len(above):
        edge = lrs[last] * step
    elif centre == last:
        coarse = math.sqrt(lrs[centre] * above[0])
    else:
        wide = [other for other in (lrs[centre - 1], lrs[centre + 1]) if not 1 / reach <= other / lrs[centre] <= reach]
        coarse = math.sqrt(wide[0] * lrs[centre]) if wide else None
    return ArmGrid(lrs, centre, window, edge, coarse, diverged)


def _below_cliffs(window: np.ndarray, lrs: np.ndarray, losses: np.ndarray, centre: int) -> np.ndarray:
    """Return the indices of the LRs that a parabola fits: the three neighbours around the centre with the lowest
    losses, and those of the window whose loss rises at most CLIFF times as much as the parabola through the three. A
    loss far above the best one is no part of a parabola."""
    x, reach = np.log(lrs), math.log(MAX_STEP) + 1e-3
    starts = [start for start in range(max(0, centre - 2), centre + 1) if start + 3 <= len(lrs)]
    starts = [start for start in starts if np.diff(x[start : start + 3]).max() <= reach]
    if not starts:
        return window
    first = min(starts, key=lambda start: losses[start : start + 3].sum())
    three = np.arange(first, first + 3)
    curve = np.polynomial.Polynomial.fit(x[three], losses[three], 2)
    rise, least = losses[window] - losses[three].min(), losses[three].min()
    allowed = np.maximum(CLIFF * (curve(x[window]) - least), losses[three].max() - least)
    return np.union1d(three, window[rise <= allowed])


class Bend(NamedTuple):
    """How the asymmetry bends the parabola of an arm: the position from which the third power is measured, and the
    arm's curvature over the mean of all."""

    centre: float
    size: float


@dataclass(frozen=True)
class FitRows:
    """The runs of one fit."""

    runs: np.ndarray
    """As from `run_array`, (runs,)."""
    in_arm: dict[str, np.ndarray]
    """Whether each run is of an arm, by the label of each arm that is fitted, (runs,)."""
    ends: dict[str, tuple[float, float]]
    """The lowest and the highest x of each arm."""
    seeds: list[int]
    cells: np.ndarray
    """The number of the cell of each run, one for each arm and seed, (runs,)."""
    weights: np.ndarray
    """The square root of the number of seeds in each row, (runs,); weighted rows all have the variance of a run."""

    def design(self, curvatures: Sequence[Sequence[str]], bends: Mapping[str, Bend] | None = None) -> np.ndarray:
        """Return the columns: an intercept and a slope by arm, a curvature by group of arms, contrasts of seeds, and
        with bends, by arm, the third power of the distance from their centres, times their sizes."""
        columns = []
        for in_arm in self.in_arm.values():
            columns += [in_arm.astype(float), in_arm * self.runs["x"]]
        columns += [np.any([self.in_arm[arm] for arm in group], axis=0) * self.runs["x"] ** 2 for group in curvatures]
        # The effects of seeds sum to 0, so that intercepts are means over seeds.
        last = (self.runs["seed"] == self.seeds[-1]).astype(float)
        columns += [(self.runs["seed"] == seed).astype(float) - last for seed in self.seeds[:-1]]
        if bends:
            centres, sizes = np.array([bends[arm] for arm in self.runs["label"].tolist()]).T
            columns.append(sizes * (self.runs["x"] - centres) ** 3)
        return np.column_stack(columns)


def counted_rows(arms: Mapping[str, np.ndarray], grids: Mapping[str, ArmGrid]) -> FitRows | None:
    """Return the runs that count, if any: of each arm's `run_array` the finished ones at the LRs of its window."""
    parts = []
    for label, grid in grids.items():
        if len(grid.window) >= 2:
            counted = arms[label][arms[label]["done"] & np.isin(arms[label]["lr"], grid.lrs[grid.window])]
            counted["label"], counted["x"] = label, np.log(counted["lr"] / grid.lrs[grid.centre])
            parts.append(counted)
    if not parts:
        return None
    runs = np.concatenate(parts)
    in_arm = {label: np.asarray(runs["label"] == label, bool) for label in dict.fromkeys(runs["label"].tolist())}
    x, cells = runs["x"], pd.factorize(pd.MultiIndex.from_arrays([runs["label"], runs["seed"]]))[0]
    ends = {label: (float(x[chosen].min()), float(x[chosen].max())) for label, chosen in in_arm.items()}
    return FitRows(runs, in_arm, ends, sorted(set(runs["seed"].tolist())), cells, np.sqrt(runs["n"].astype(float)))


def lowest_point(
    coefficients: np.ndarray, ends: tuple[float, float], bend: Bend | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return position and value of the lowest point of parabolas or cubics between two ends, (n,) each.

    Coefficients are the intercept, slope and curvature, (n, 3), of cubics also the asymmetry, (n, 4), which `bend`
    applies.
    """
    intercept, slope, curvature = coefficients.T[:3]
    centre, asymmetry = (0.0, 0.0) if bend is None else (bend.centre, bend.size * coefficients.T[3])

    def height(position: np.ndarray | float) -> np.ndarray:
        u = position - centre
        return np.asarray(intercept + position * (slope + curvature * position) + asymmetry * (u * u * u))

    # With u = position - centre, the slope of the curve is at_centre + 2 curvature u + 3 asymmetry u^2.
    at_centre = slope + 2 * curvature * centre
    discriminant = curvature**2 - 3 * asymmetry * at_centre
    convex = (curvature > 0) & (discriminant > 0)
    root = np.sqrt(np.where(convex, discriminant, 1.0))
    inner = np.clip(centre - at_centre / np.where(convex, curvature + root, 1.0), *ends)
    if convex.all():
        return inner, height(inner)
    lower_end = np.where(height(ends[0]) <= height(ends[1]), *ends)
    # Coefficients that are not known have no lowest point.
    position = np.where(np.isnan(curvature), math.nan, np.where(convex, inner, lower_end))
    return position, height(position)
