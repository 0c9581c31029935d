"""Curves at fitted optimal learning rates, and departures: the step at which one arm's curve leaves another's.

The optimum lies between the LRs of a grid, and half a step of the grid costs about as much as the margin of a loss.
Where enough seeds have the three LRs around it, their curves are therefore interpolated at the optimum.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison, kept_by_arm
from lorabench.analysis.curves import PairedCurves, paired, points_by_seed
from lorabench.analysis.estimate import Estimate, unknown
from lorabench.analysis.finding import MIN_SEEDS
from lorabench.analysis.rules import LEVEL, Problem, Remedy

WINDOWS = 8
"""The number of windows of steps, equally long on a logarithmic axis, in which a departure is sought."""

MAX_LOST = 0.1
"""The share of an effect that the distances of two arms from their optimal LRs may add to it."""


@kept_by_arm
def runs_at_optimum(comparison: Comparison, arm: Arm) -> pd.DataFrame:
    """Return the finished runs of an arm that stand for it at its fitted optimum, with their weights.

    Returns:
        The runs with a column weight. If MIN_SEEDS seeds have the three LRs around the optimum, these runs have the
        weights of a parabola in ln LR through them, which sum to 1 for each seed. Otherwise they are those of
        `Comparison.at_optimum`, one for each seed, with weight 1.
    """
    label = arm_label(arm)
    grid, fitted = comparison.fit.grids.get(label), comparison.fit.optima.get(label)
    if grid is not None and fitted is not None and len(grid.window) >= 3:
        distance = np.log(grid.lrs[grid.window]) - fitted.value
        around = np.sort(np.argsort(np.abs(distance), kind="stable")[:3])
        a, b, c = distance[around].tolist()
        # The values at three positions, so weighted, give the value of their parabola at 0.
        shares = [b * c / ((a - b) * (a - c)), a * c / ((b - a) * (b - c)), a * b / ((c - a) * (c - b))]
        weights = dict(zip(grid.lrs[grid.window][around], shares, strict=True))
        runs = comparison.rows[label]
        lr, seed = runs["lr"].to_numpy(float), runs["seed"].to_numpy(int)
        chosen = (runs["status"].to_numpy(object) == "done") & np.isin(lr, list(weights))
        cells = set(zip(seed[chosen].tolist(), lr[chosen].tolist(), strict=True))
        times = Counter(seed for seed, _ in cells)
        complete = [number for number, lrs in times.items() if lrs == 3]
        if len(complete) >= MIN_SEEDS:
            kept = chosen & np.isin(seed, complete)
            around_optimum: pd.DataFrame = runs[kept]
            return around_optimum.assign(weight=[weights[at] for at in lr[kept].tolist()])
    return comparison.at_optimum(arm).assign(weight=1.0)


@kept_by_arm
def curves_at_optimum(comparison: Comparison, arm: Arm) -> pd.DataFrame:
    """Return the training NLL of an arm at its fitted optimum: a row for each step and a column for each seed."""
    return points_by_seed(runs_at_optimum(comparison, arm), comparison.points("train", "nll"))


def pair_at_optimum(comparison: Comparison, arm: Arm, other: Arm) -> PairedCurves:
    """Pair the training NLL of two arms, each at its fitted optimum (see `runs_at_optimum`)."""
    name = f"{comparison.label} {arm_label(arm)} - {arm_label(other)}"
    runs, others = (runs_at_optimum(comparison, compared) for compared in (arm, other))
    of_runs, of_others = (curves_at_optimum(comparison, compared) for compared in (arm, other))
    return paired(runs, others, of_runs, of_others, name)


def off_optimum(comparison: Comparison, arm: Arm, other: Arm, effect: float) -> list[Problem]:
    """Return the reasons against comparing the curves of two arms at the LRs that they are from.

    Args:
        comparison: holds both arms.
        arm: an arm.
        other: the arm that it is compared with.
        effect: the least difference that matters to the comparison, in nats per token.
    """

    def lost(compared: Arm) -> float:
        """Return the loss that an arm adds by its distance from its optimum; 0 if it is interpolated there."""
        label, runs = arm_label(compared), runs_at_optimum(comparison, compared)
        fitted = comparison.fit.optima.get(label)
        if fitted is None or runs.empty or (runs["weight"] != 1.0).any():
            return 0.0
        return comparison.fit.curvature[label] * (math.log(float(runs["lr"].iloc[0])) - fitted.value) ** 2

    added = lost(arm) - lost(other)
    if not abs(added) > MAX_LOST * effect:
        return []
    labels = f"{arm_label(arm)} and {arm_label(other)}"
    text = f"{labels}: the LRs of their curves, which are not the fitted optima, add {added:.4f} nats to the gap"
    remedy = Remedy(f"{MIN_SEEDS} seeds at the three LRs around the optima of {labels}", MIN_SEEDS, around=True)
    return [Problem(text, remedy)]


@dataclass(frozen=True)
class Departure:
    """Whether and where a curve leaves another for good."""

    first: int | None
    """The first step of the window from which it has left; None if it has not left."""
    before: int | None
    """The first step of the window before; None without one, or if it has not left."""
    past: int | None
    """The first step of the window after, from which on the curve has left for certain: it leaves somewhere within a
    window, and its steps, which chose it, are no evidence of what comes after. None if it has not left."""
    growth: Estimate | None
    """The slope of the gap against log10(step) from there on, per tenfold steps. If the curve stays above to the end
    but the gap does not grow, it is the slope from where it stays above; None if it does not stay above."""

    @property
    def left(self) -> bool:
        """Whether it has left."""
        return self.first is not None


def paired_departure(curves: PairedCurves, margin: float) -> Departure:
    """Find where one arm's loss leaves another's because the arm runs out of capacity.

    The gap must lie above the margin in each window to the end, with an interval above 0 that holds for all WINDOWS
    windows at once. LoRA starts slowly, since B is zero, and a gap that shrinks again is no lack of capacity; so the
    departure is the window with the smallest gap of these, from which on the gap must grow. The last window alone shows
    no growth, so no departure is sought there.

    Args:
        curves: the loss of the arm minus that of the other.
        margin: the least gap that matters, in nats per token.
    """
    windows = curves.windows(WINDOWS)
    level = 1 - LEVEL / max(1, len(windows))
    means = curves.means(windows)
    above = [gap.known and gap.value >= margin and gap.interval(level)[0] > 0 for gap in means]
    if not above or not above[-1]:
        return Departure(None, None, None, None)
    start = len(above) - above[::-1].index(False) if False in above else 0
    stretch = len(windows) - 1 - start
    if stretch < 1:
        return Departure(None, None, None, curves.slope(windows[start][0]))
    place = min(range(start, len(windows) - 1), key=lambda index: means[index].value)
    first = windows[place][0]
    growth = curves.slope(first)
    # The lowest of several windows gives a slope that noise alone makes larger, so the level is divided by them.
    if growth.known and growth.interval(1 - LEVEL / stretch)[0] > 0:
        return Departure(first, windows[place - 1][0] if place else None, windows[place + 1][0], growth)
    return Departure(None, None, None, curves.slope(windows[start][0]))


def rank_departures(comparison: Comparison) -> dict[int, Departure]:
    """Return where each rank leaves the curve of the highest rank, by rank, ascending; the highest rank is left out.

    The curves are training NLL at the fitted optima, and the margin is that of the comparison.
    """
    return {
        rank: paired_departure(pair_at_optimum(comparison, arm, comparison.highest), comparison.margin.value)
        for rank, arm in comparison.lora.items()
        if comparison.highest is not None and rank != comparison.highest["rank"]
    }


def log_threshold(comparison: Comparison, rank: int, departure: Departure) -> Estimate:
    """Estimate where a rank runs out of capacity: where its gap to the highest rank reaches the margin.

    The gap is that of a line, which is fitted against log10(step) from the window after that of the departure on.

    Returns:
        log10(step). It is unknown if the rank does not leave, or never joined the shared curve: LoRA starts slowly,
        since B is zero, and such a curve does not show when a lack of capacity sets in. It is unknown, too, if the line
        reaches the margin before the window before the departure with 95% confidence.
    """
    if comparison.highest is None or departure.before is None or departure.past is None:
        return unknown()
    curves = pair_at_optimum(comparison, comparison.lora[rank], comparison.highest)
    crossing = curves.crossing(departure.past, comparison.margin.value)
    early = crossing.known and crossing.interval()[1] < math.log10(departure.before)
    return unknown() if early else crossing


def tokens_at(comparison: Comparison, arm: Arm, step: float) -> float:
    """Return the training tokens that an arm's runs at its optimum have seen up to a step, interpolated between steps.

    The result is NaN if the curves have no tokens.
    """
    curves = comparison.curves
    if "tokens" not in curves:
        return math.nan
    ids = runs_at_optimum(comparison, arm)["run_id"]
    points = curves[curves["run_id"].isin(ids) & (curves["split"] == "train")]
    tokens = points.groupby("step")["tokens"].max().astype(float)
    return float(np.interp(step, [0, *tokens.index], [0.0, *tokens]))
