"""The runs that stand for an arm at its fitted optimal learning rate, whose curves are compared.

The optimum lies between the LRs of a grid, and half a step of the grid costs about as much as the margin of a loss.
Where enough seeds have the three LRs around it, their curves are therefore interpolated at the optimum.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison
from lorabench.analysis.finding import MIN_SEEDS
from lorabench.analysis.paired_curves import PairedCurves, paired, points_by_seed
from lorabench.analysis.remedy import Problem, Remedy

MAX_LOST = 0.1
"""The share of an effect that the distances of two arms from their optimal LRs may add to it."""


def runs_at_optimum(comparison: Comparison, arm: Arm) -> pd.DataFrame:
    """Return the finished runs of an arm that stand for it at its fitted optimum, with their weights.

    Returns:
        The runs with a column weight. If MIN_SEEDS seeds have the three LRs around the optimum, these runs have the
        weights of a parabola in ln LR through them, which sum to 1 for each seed. Otherwise they are those of
        `Comparison.at_optimum`, one for each seed, with weight 1.
    """
    key = ("runs at the optimum", arm_label(arm))
    if key not in comparison.memo:
        comparison.memo[key] = _runs_at_optimum(comparison, arm)
    return comparison.memo[key]


def curves_at_optimum(comparison: Comparison, arm: Arm) -> pd.DataFrame:
    """Return the training NLL of an arm at its fitted optimum: a row for each step and a column for each seed."""
    key = ("curves at the optimum", arm_label(arm))
    if key not in comparison.memo:
        comparison.memo[key] = points_by_seed(runs_at_optimum(comparison, arm), comparison.points("train", "nll"))
    return comparison.memo[key]


def _runs_at_optimum(comparison: Comparison, arm: Arm) -> pd.DataFrame:
    label = arm_label(arm)
    grid, fitted = comparison.fit.grids.get(label), comparison.fit.optima.get(label)
    if grid is not None and fitted is not None and len(grid.window) >= 3:
        distance = np.log(grid.lrs[grid.window]) - fitted.value
        around = np.sort(np.argsort(np.abs(distance), kind="stable")[:3])
        weights = dict(zip(grid.lrs[grid.window][around], _weights(distance[around]), strict=True))
        runs = comparison.rows[label]
        lr, seed = runs["lr"].to_numpy(float), runs["seed"].to_numpy(int)
        chosen = (runs["status"].to_numpy(object) == "done") & np.isin(lr, list(weights))
        lrs_of: dict[int, set[float]] = {}
        for of_run, at in zip(seed[chosen].tolist(), lr[chosen].tolist(), strict=True):
            lrs_of.setdefault(of_run, set()).add(at)
        complete = [of_run for of_run, lrs in lrs_of.items() if len(lrs) == 3]
        if len(complete) >= MIN_SEEDS:
            kept = chosen & np.isin(seed, complete)
            around_optimum: pd.DataFrame = runs[kept]
            return around_optimum.assign(weight=[weights[at] for at in lr[kept].tolist()])
    return comparison.at_optimum(arm).assign(weight=1.0)


def _weights(distance: np.ndarray) -> list[float]:
    """Return the weights with which the values at three positions give the value of their parabola at 0."""
    a, b, c = distance.tolist()
    return [b * c / ((a - b) * (a - c)), a * c / ((b - a) * (b - c)), a * b / ((c - a) * (c - b))]


def pair_at_optimum(comparison: Comparison, arm: Arm, other: Arm) -> PairedCurves:
    """Pair the training NLL of two arms, each at its fitted optimum (see `runs_at_optimum`)."""
    name = f"{comparison.label} {arm_label(arm)} - {arm_label(other)}"
    runs, others = (runs_at_optimum(comparison, compared) for compared in (arm, other))
    of_runs, of_others = (curves_at_optimum(comparison, compared) for compared in (arm, other))
    return paired(runs, others, of_runs, of_others, name)


def off_optimum(comparison: Comparison, arm: Arm, other: Arm, effect: float) -> list[Problem]:
    """Return what speaks against comparing the curves of two arms because of the LRs that they are from.

    Args:
        comparison: holds both arms.
        arm: an arm.
        other: the arm that it is compared with.
        effect: the least difference that matters to the comparison, in nats per token.
    """
    added = _lost(comparison, arm) - _lost(comparison, other)
    if not abs(added) > MAX_LOST * effect:
        return []
    labels = f"{arm_label(arm)} and {arm_label(other)}"
    text = f"{labels}: the LRs of their curves, which are not the fitted optima, add {added:.4f} nats to the gap"
    return [
        Problem(
            text, Remedy(f"{MIN_SEEDS} seeds at the three LRs around the optima of {labels}", MIN_SEEDS, around=True)
        )
    ]


def _lost(comparison: Comparison, arm: Arm) -> float:
    """Return what the runs of an arm lose by their distance from its optimum; 0 if they are interpolated there."""
    label, runs = arm_label(arm), runs_at_optimum(comparison, arm)
    fitted = comparison.fit.optima.get(label)
    if fitted is None or runs.empty or (runs["weight"] != 1.0).any():
        return 0.0
    return comparison.fit.curvature[label] * (math.log(float(runs["lr"].iloc[0])) - fitted.value) ** 2
