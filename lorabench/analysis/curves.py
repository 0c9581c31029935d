"""Curves: a metric by step, of single runs, of an arm by seed, and of one arm minus another.

A seed fixes the order of the data, so two runs of one seed see the same batches, and the difficulty of a batch cancels
in the difference of their training losses. That makes the difference far less noisy than either loss.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_table, check_runs, each_arm, first_seed
from lorabench.analysis.estimate import Estimate, mean_over_seeds, unknown
from lorabench.analysis.finding import Finding, decide, worst
from lorabench.analysis.rules import Problem, Rule
from lorabench.analysis.slopes import slopes_by_seed


def curves_of(curves: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the curves of some runs; a table without the column run_id is returned unchanged."""
    return curves[curves["run_id"].isin(runs["run_id"])] if "run_id" in curves else curves


def metric_points(
    curves: pd.DataFrame, split: str, metric: str, columns: Sequence[str] = ("run_id", "step", "value")
) -> pd.DataFrame:
    """Return the points of one metric whose value is not null.

    Args:
        curves: columns run_id, step, split, metric, value; an empty table may lack them.
        split: the split, such as `train`.
        metric: the metric, such as `nll`.
        columns: the columns to return; one that the curves lack is null.
    """
    if curves.empty:
        return pd.DataFrame(columns=list(columns))
    chosen = (curves["split"] == split) & (curves["metric"] == metric) & curves["value"].notna()
    known = [name for name in columns if name in curves]
    points: pd.DataFrame = curves.loc[chosen.to_numpy(bool, na_value=False), known]
    return points if len(known) == len(columns) else points.reindex(columns=list(columns))


def train_curves(runs: pd.DataFrame, curves: pd.DataFrame, metric: str = "nll", split: str = "train") -> pd.DataFrame:
    """Return a metric of the given runs by step.

    Args:
        runs: column run_id, and any others.
        curves: columns run_id, step, split, metric, value; null values are left out.
        metric: `nll` (nats per token), or another metric of the split.
        split: `train` (measured on a step's batch before its update) or another split (measured after the update).

    Returns:
        The columns of the runs with step and value, ordered by run and step.
    """
    points = metric_points(curves, split, metric)
    if points.empty:
        return runs.iloc[:0].assign(step=pd.Series(dtype="Int64"), value=pd.Series(dtype=float))
    return runs.merge(points, on="run_id").sort_values(["run_id", "step"])


def curves_by_seed(runs: pd.DataFrame, points: pd.DataFrame) -> pd.DataFrame:
    """Return the curve of one arm for each seed.

    Args:
        runs: columns run_id, seed, and optionally weight. A seed has one run, or several whose curves are summed by
            their weights (see `runs_at_optimum`).
        points: columns run_id, step, value, as from `metric_points`; those of other runs do not count.

    Returns:
        A row for each step (index, ascending) that some seed has, and a column for each seed.
    """
    run = pd.Index(runs["run_id"]).get_indexer(points["run_id"]) if len(points) else np.array([], int)
    if not (run >= 0).any():
        return pd.DataFrame(index=pd.Index([], dtype=int))
    steps, row = np.unique(points["step"].to_numpy(int)[run >= 0], return_inverse=True)
    seeds, column_of = np.unique(runs["seed"].to_numpy(int), return_inverse=True)
    weights = runs["weight"].to_numpy(float, na_value=1.0) if "weight" in runs else np.ones(len(runs))
    values = points["value"].to_numpy(float)[run >= 0] * weights[run[run >= 0]]
    cells, shape = row * len(seeds) + column_of[run[run >= 0]], (len(steps), len(seeds))
    sums, sizes = (np.bincount(cells, with_weights, len(steps) * len(seeds)) for with_weights in (values, None))
    # A sum that lacks one of its runs at a step is no value of the arm.
    whole = sizes.reshape(shape) == np.bincount(column_of)
    kept = np.ix_(whole.any(axis=1), whole.any(axis=0))
    by_seed = np.where(whole, sums.reshape(shape), np.nan)[kept]
    return pd.DataFrame(by_seed, pd.Index(steps[whole.any(axis=1)]), pd.Index(seeds[whole.any(axis=0)], name="seed"))


def envelopes(runs: pd.DataFrame, curves: pd.DataFrame, split: str = "validation", metric: str = "nll") -> pd.DataFrame:
    """Compute each arm's pointwise minimum of a metric over its LR grid (the runs with its first seed).

    A diverged run counts up to its last finite value.

    Args:
        runs: columns run_id, ARM, lr, seed.
        curves: columns run_id, step, split, metric, value, and optionally examples and tokens; null values are left
            out.
        split: the split of the curves, such as `validation`.
        metric: the metric of the curves, such as `nll`.

    Returns:
        One row per arm and step, ascending: step, examples and tokens (seen by that step), value (in the metric's
        unit; NLL is in nats per token), lr and run_id (of the run with the lowest value there), n_runs (number of runs
        with a value there).

    Raises:
        UserError: See `check_runs`.
    """
    check_runs(runs)
    columns = ["step", "examples", "tokens", "value", "lr", "run_id", "n_runs"]
    if curves.empty:
        return arm_table([], columns)
    chosen = curves[(curves["split"] == split) & (curves["metric"] == metric) & curves["value"].notna()]
    chosen = chosen.reindex(columns=["run_id", "step", "examples", "tokens", "value"])
    rows: list[dict[Hashable, Any]] = []
    for arm, arm_runs in each_arm(runs):
        # Sorting by LR breaks ties, so that the result does not depend on the order of the table.
        points = chosen.merge(first_seed(arm_runs)[["run_id", "lr"]], on="run_id").sort_values(["step", "value", "lr"])
        points["n_runs"] = points.groupby("step")["run_id"].transform("size")
        rows += [
            dict[Hashable, Any](arm) | point for point in points.drop_duplicates("step")[columns].to_dict("records")
        ]
    return arm_table(rows, columns)


@dataclass(frozen=True)
class PairedCurves:
    """The differences of two arms by step and seed, in the unit of the metric."""

    by_seed: pd.DataFrame = field(repr=False)
    """A row for each step (index, ascending) and a column for each seed that both arms have."""
    run_ids: tuple[str, ...] = field(repr=False)
    name: str = ""
    """Names the two arms, for draws."""

    @property
    def n_seeds(self) -> int:
        """The number of paired seeds."""
        return self.by_seed.shape[1]

    @property
    def last(self) -> int:
        """The last step that all seeds have; 0 without steps."""
        return int(self.by_seed.index.max()) if len(self.by_seed) else 0

    def windows(self, number: int, first: int = 2) -> list[tuple[int, int]]:
        """Split the steps into windows that are equally long on a logarithmic axis.

        Args:
            number: the number of windows; there are fewer if the steps do not suffice for one each.
            first: the first step that counts. Before the first update all arms are the base model.

        Returns:
            The first and last step of each window.
        """
        steps = self.by_seed.index[self.by_seed.index >= first].to_numpy(int)
        if not len(steps):
            return []
        edges = np.geomspace(steps[0], steps[-1] + 1, number + 1)
        inside = [steps[(steps >= low) & (steps < high)] for low, high in pairwise(edges)]
        return [(int(part[0]), int(part[-1])) for part in inside if len(part)]

    def means(self, windows: Sequence[tuple[int, int]]) -> list[Estimate]:
        """Estimate the mean difference in each window of steps, with the error of a mean over seeds.

        The steps of a run are no substitute for seeds: a seed shifts whole stretches of the difference, in some windows
        by far more than its steps scatter. So no window borrows degrees of freedom from its steps or other windows.
        """
        steps, values = self.by_seed.index.to_numpy(), self.by_seed.to_numpy(float)
        inside = [values[(steps >= low) & (steps <= high)] for low, high in windows]
        return [
            mean_over_seeds(part.mean(axis=0) if len(part) else [], f"{self.name} steps {low} to {high}")
            for part, (low, high) in zip(inside, windows, strict=True)
        ]

    def slope(self, first: int) -> Estimate:
        """Estimate the slope of the difference against log10(step) from a step on, as the mean over the seeds' slopes.

        It is in the unit of the metric per tenfold steps.
        """
        return mean_over_seeds(slopes_by_seed(self._between(first, self.last)), f"{self.name} slope from {first}")

    def crossing(self, first: int, level: float) -> Estimate:
        """Estimate where the line through the difference against log10(step), from a step on, reaches a level.

        The line may reach it before that step. The mean line of the seeds gives the value. The error is that of a mean
        over seeds of what each seed's line has above the level there, divided by the slope.

        Args:
            first: the first step that counts.
            level: in the unit of the metric.

        Returns:
            log10(step); it is unknown if the difference does not grow.
        """
        curves = self._between(first, self.last)
        slopes = slopes_by_seed(curves)
        slope = float(slopes.mean())
        # Each seed's line passes through its means.
        values = curves.astype(float)
        x, y = (np.log10(curves.index.to_numpy(float))[:, None] + 0 * values).mean(), values.mean()
        if not slope > 0:
            return unknown()
        value = float((slopes * x - y).mean() + level) / slope
        above = y + slopes * (value - x) - level
        return mean_over_seeds(value - above / slope, f"{self.name} reaches {level} from {first}")

    def _between(self, low: int, high: int) -> pd.DataFrame:
        return self.by_seed[(self.by_seed.index >= low) & (self.by_seed.index <= high)]


def paired(
    runs: pd.DataFrame, others: pd.DataFrame, by_seed: pd.DataFrame, others_by_seed: pd.DataFrame, name: str
) -> PairedCurves:
    """Pair the curves of two arms by seed.

    Args:
        runs: the runs of one arm: columns run_id, seed.
        others: the runs of the other arm.
        by_seed: the curves of the one arm, as from `curves_by_seed`.
        others_by_seed: the curves of the other arm.
        name: names the two arms, for draws.
    """
    seeds = [seed for seed in by_seed.columns if seed in others_by_seed.columns]
    steps, place, other_place = np.intersect1d(by_seed.index, others_by_seed.index, return_indices=True)
    difference = by_seed[seeds].to_numpy(float)[place] - others_by_seed[seeds].to_numpy(float)[other_place]
    whole = ~np.isnan(difference).any(axis=1) & bool(seeds)
    differences = pd.DataFrame(difference[whole], pd.Index(steps[whole], dtype=int), pd.Index(seeds, name="seed"))
    ids = [
        str(run_id)
        for arm_runs in (runs, others)
        for run_id, seed in zip(arm_runs["run_id"], arm_runs["seed"], strict=True)
        if seed in seeds
    ]
    return PairedCurves(differences, tuple(ids), name)


def scan(
    rule: Callable[[tuple[int, int]], Rule],
    curves: PairedCurves,
    windows: Sequence[tuple[int, int]],
    text: Callable[[Estimate], str],
    problems: Sequence[Problem] = (),
    margin_rule: str = "",
) -> Finding:
    """Judge the difference in every window of steps; the claim must hold in each.

    It is contradicted if one of the k windows contradicts it at the k-th part of the level, so that the intervals hold
    for all windows at once.

    Args:
        rule: makes the rule for a window.
        curves: the paired curves.
        windows: the first and last step of each window; at least one.
        text: formats a difference.
        problems: reasons against a verdict.
        margin_rule: the rule that gives the margin, as text.
    """
    findings = [
        decide(
            rule(window),
            estimate,
            f"{text(estimate)} in steps {window[0]} to {window[1]}",
            curves.run_ids,
            problems,
            margin_rule,
        )
        for window, estimate in zip(windows, curves.means(windows), strict=True)
    ]
    decisive = worst(findings)
    return replace(decisive, reason=f"{decisive.reason} (one of {len(windows)} windows of steps)")
