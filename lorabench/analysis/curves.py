"""Curves: a metric by step, of single runs, of an arm by seed, of one arm minus another, and of early ranks.

A seed fixes the order of the data, so the difficulty of a batch cancels in the difference of the training losses of two
runs of one seed, which is far less noisy than either loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from lorabench.analysis.estimate import Estimate, combined, mean_over_seeds, unknown
from lorabench.analysis.finding import Finding, decide, nats, worst
from lorabench.analysis.rules import Problem, Rule
from lorabench.analysis.slopes import mean_log_step, slopes_by_seed


def curves_of(curves: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the curves of some runs; a table without the column run_id is returned unchanged."""
    return curves[curves["run_id"].isin(runs["run_id"])] if "run_id" in curves else curves


def metric_points(
    curves: pd.DataFrame, split: str, metric: str, columns: Sequence[str] = ("run_id", "step", "value")
) -> pd.DataFrame:
    """Return the points of one metric of a split whose value is not null; a column to return that the curves lack is
    null, and an empty table may lack all."""
    if curves.empty:
        return pd.DataFrame(columns=list(columns))
    chosen = (curves["split"] == split) & (curves["metric"] == metric) & curves["value"].notna()
    points: pd.DataFrame = curves[chosen.to_numpy(bool, na_value=False)]
    return points.reindex(columns=list(columns))


def train_curves(runs: pd.DataFrame, curves: pd.DataFrame, metric: str = "nll", split: str = "train") -> pd.DataFrame:
    """Return the columns of runs with step and value of a metric (see `metric_points`), ordered by run and step. The
    split `train` is measured on a step's batch before its update, other splits after it."""
    points = metric_points(curves, split, metric)
    if points.empty:
        return runs.iloc[:0].assign(step=pd.Series(dtype="Int64"), value=pd.Series(dtype=float))
    return runs.merge(points, on="run_id").sort_values(["run_id", "step"])


def at_step(runs: pd.DataFrame, curves: pd.DataFrame, step: int) -> pd.DataFrame:
    """Return the supervised runs as if training had ended at a step, with the validation NLL there as final losses. A
    run that diverged later is done. A run that ended earlier, or has no such loss, is left out."""
    points = metric_points(curves, "validation", "nll")
    at_that_step = points[points["step"] == step].groupby("run_id")["value"].first()
    loss = runs["run_id"].map(at_that_step.astype(float)).astype(float)
    loss = loss.where(loss.abs() < math.inf)
    ends = runs.reindex(columns=["diverged_at", "steps"]).astype(float)
    diverged = (runs["status"] == "diverged") & loss.isna() & ~(ends["diverged_at"] > step)
    kept = (loss.notna() | diverged) & ~(ends["steps"] < step)
    status = diverged[kept].map({True: "diverged", False: "done"})
    as_of = runs[kept].assign(steps=step, status=status, final_valid_nll=loss[kept], final_test_nll=loss[kept])
    return as_of.astype({"steps": "Int64"})


def curves_by_seed(runs: pd.DataFrame, points: pd.DataFrame) -> pd.DataFrame:
    """Return the curve of one arm with a row for each step (index, ascending) and a column for each seed, given its
    points and maybe others. A seed has one run, or several whose curves are summed by the column weight."""
    seeds, seed = np.unique(runs["seed"].to_numpy(int), return_inverse=True)
    weights = runs["weight"].astype(float).fillna(1.0).to_numpy() if "weight" in runs else np.ones(len(runs))
    run = pd.Index(runs["run_id"]).get_indexer(points["run_id"])
    own = points[run >= 0]
    if own.empty:
        return pd.DataFrame(index=pd.Index([], dtype=int))
    run = run[run >= 0]
    steps, step = np.unique(own["step"].to_numpy(int), return_inverse=True)
    # Merging, grouping and unstacking tables as small as these takes several times as long.
    values, counts = np.zeros((2, len(steps), len(seeds)))
    np.add.at(values, (step, seed[run]), own["value"].to_numpy(float) * weights[run])
    np.add.at(counts, (step, seed[run]), 1)
    # A sum that lacks one of its runs at a step is no value of the arm.
    whole = np.where(counts == np.bincount(seed), values, math.nan)
    index, columns = pd.Index(steps, name="step"), pd.Index(seeds, name="seed")
    return pd.DataFrame(whole, index, columns).dropna(how="all").dropna(how="all", axis="columns")


Numbers = Callable[[pd.DataFrame], "pd.Series[float]"]
"""A linear function from curves by step to one number for each column, such as a mean or a slope."""


def log_windows(steps: ArrayLike, number: int, first: int = 2) -> list[tuple[int, int]]:
    """Return the first and last step of windows of ascending steps that are equally long on a logarithmic axis, fewer
    than `number` if the steps do not suffice. Before the first update all arms are the base model."""
    steps = np.asarray(steps, int)
    steps = steps[steps >= first]
    if not len(steps):
        return []
    edges = np.geomspace(steps[0], steps[-1] + 1, number + 1)
    inside = [steps[(steps >= low) & (steps < high)] for low, high in pairwise(edges)]
    return [(int(part[0]), int(part[-1])) for part in inside if len(part)]


def mean_between(first: float, last: float, curves: pd.DataFrame) -> pd.Series[float]:
    """Return the mean of each column of curves from one step to another; NaN without steps there."""
    return curves.loc[first:last].mean(skipna=False)


@dataclass(frozen=True)
class LrError:
    """What the error of an arm's optimal LR does to its curve: draws of the error of ln LR, (N_DRAWS,), and by step the
    coefficients of that error and of its square (two columns) in the curve, in the unit of the metric."""

    draws: np.ndarray
    by_power: pd.DataFrame

    def of(self, numbers: Numbers) -> np.ndarray:
        """Return draws of the error of a number of the curve, (N_DRAWS,)."""
        first, second = numbers(self.by_power).to_numpy(float)
        return np.asarray(first * self.draws + second * self.draws**2)


@dataclass(frozen=True)
class PairedCurves:
    """The differences of two arms by step (index, ascending) and seed that both have, in the unit of the metric."""

    by_seed: pd.DataFrame = field(repr=False)
    run_ids: tuple[str, ...] = field(repr=False)
    name: str = ""
    """Names the two arms, for draws."""
    lr_errors: tuple[LrError, ...] = field(default=(), repr=False)
    """What the errors of the optimal LRs of both arms do to the differences."""

    @property
    def n_seeds(self) -> int:
        """The number of paired seeds."""
        return self.by_seed.shape[1]

    @property
    def last(self) -> int:
        """The last step that all seeds have; 0 without steps."""
        return int(self.by_seed.index.max()) if len(self.by_seed) else 0

    def _estimate(self, numbers: Numbers, name: str) -> Estimate:
        """Estimate a number of the curves, as its mean over seeds with the error of the LRs at which they are taken."""
        mean = mean_over_seeds(numbers(self.by_seed.astype(float)), f"{self.name} {name}")
        return replace(mean, seed_part=sum((error.of(numbers) for error in self.lr_errors), mean.seed_part))

    def means(self, windows: Sequence[tuple[int, int]]) -> list[Estimate]:
        """Estimate the mean difference in each window of steps, with the error of a mean over seeds: these shift whole
        stretches, so no window borrows degrees of freedom from its steps or other windows."""
        return [self._estimate(partial(mean_between, low, high), f"steps {low} to {high}") for low, high in windows]

    def slope(self, first: int) -> Estimate:
        """Estimate the slope of the difference from a step on, per tenfold steps, as the mean of the seeds' slopes."""
        return self._estimate(partial(slopes_by_seed, first=first), f"slope from {first}")

    def crossing(self, first: int, level: float) -> Estimate:
        """Estimate log10 of the step where the line through the difference against log10(step), from a step on, reaches
        a level, which may be before that step; unknown if the difference does not grow. The mean line of the seeds
        gives the value, and the error is that of what the line has above the level there, divided by the slope."""
        curves = self.by_seed.loc[first:]
        slopes, y = slopes_by_seed(curves), curves.astype(float).mean()
        slope = float(slopes.mean())
        if not slope > 0:
            return unknown()
        value = float((slopes * mean_log_step(curves) - y).mean() + level) / slope

        def at_value(curves: pd.DataFrame) -> pd.Series[float]:
            # Each seed's line passes through its means.
            curves = curves.loc[first:]
            return curves.mean() + slopes_by_seed(curves) * (value - mean_log_step(curves))

        reached = self._estimate(at_value, f"reaches {level} from {first}")
        return combined(lambda height: value - (height - level) / slope, reached)


def paired(
    runs: pd.DataFrame, others: pd.DataFrame, by_seed: pd.DataFrame, others_by_seed: pd.DataFrame, name: str
) -> PairedCurves:
    """Pair the curves of two arms by seed, given their runs and their curves (see `curves_by_seed`)."""
    seeds = by_seed.columns.intersection(others_by_seed.columns)
    differences = (by_seed[seeds] - others_by_seed[seeds]).dropna() if len(seeds) else by_seed.iloc[:0, :0]
    both = pd.concat([runs, others])
    return PairedCurves(differences, tuple(both.loc[both["seed"].isin(seeds), "run_id"].astype(str)), name)


def scan(
    rule: Rule,
    curves: PairedCurves,
    windows: Sequence[tuple[int, int]],
    text: str,
    problems: Sequence[Problem] = (),
    margin_rule: str = "",
    number: Callable[[Estimate], str] = nats,
) -> Finding:
    """Judge the difference in every window of steps; the claim must hold in each. In the text {} stands for the
    difference, which `number` formats; see also `decide`."""
    findings = []
    for (low, high), estimate in zip(windows, curves.means(windows), strict=True):
        reason = f"{text.format(number(estimate))} in steps {low} to {high}"
        findings.append(decide(rule, estimate, reason, curves.run_ids, problems, margin_rule))
    decisive = worst(findings)
    return replace(decisive, reason=f"{decisive.reason} (one of {len(windows)} windows of steps)")


PAPER_RANK = 16
"""The lower of the two ranks that the paper compares; differences of lower ranks are far larger."""


@dataclass(frozen=True)
class EarlyDifference:
    """Training NLL of a rank minus that of a higher one, at one LR, paired by seed and step, in nats per token."""

    low: int
    high: int
    lr: float
    curves: PairedCurves
    """The difference, by the steps and the seeds that both ranks finished."""
    sigma_batch: float
    """Standard deviation of the training NLL over seeds, and so over batches, pooled over both ranks and all steps."""
    by_inverse_rank: pd.DataFrame = field(repr=False)
    """For each pair of ranks with runs at that LR and these seeds: low, high, inverse (1/low - 1/high) and difference
    (the mean over seeds and steps)."""
    n_diverged: int
    """Number of runs of either rank at that LR that diverged and so lack in `curves`."""


def inverse_rank_fit(by_inverse_rank: pd.DataFrame) -> tuple[float, float]:
    """Fit the differences of pairs of ranks as a multiple of 1/low - 1/high, as theory says; return the factor in nats
    per token, and the share of the sum of squares that it explains (NaN without two pairs)."""
    if len(by_inverse_rank) < 2:
        return math.nan, math.nan
    x, y = (by_inverse_rank[name].to_numpy(float) for name in ("inverse", "difference"))
    factor = float(x @ y / (x @ x))
    return factor, 1 - float(((y - factor * x) ** 2).sum() / (y @ y)) if y.any() else math.nan


def early_difference(runs: pd.DataFrame, curves: pd.DataFrame, first_steps: float = math.inf) -> EarlyDifference | None:
    """Compute the training NLL of a rank minus that of a higher one, at the LR with the most paired seeds, or the
    lowest such. The ranks stand for the paper's 16 and 256: the lowest from PAPER_RANK up, or else above 1, and the
    highest; None if they share no LR and finished seed. The runs differ in rank, LR and seed only."""
    ranks = sorted({int(rank) for rank in runs["rank"].dropna() if rank > 1})
    high_ranks = [rank for rank in ranks if rank >= PAPER_RANK]
    ranks = high_ranks if len(high_ranks) > 1 else ranks
    if len(ranks) < 2:
        return None
    lowest, highest = ranks[0], ranks[-1]
    points = train_curves(runs[runs["status"].eq("done") & runs["rank"].notna()], curves)
    points = points[points["step"] <= first_steps].astype({"rank": int, "step": int, "value": float})
    wide = points.pivot(index="step", columns=["lr", "rank", "seed"], values="value").sort_index(axis=1)
    cells: list[Any] = wide.columns.tolist()
    paired_seeds: dict[float, list[int]] = {lr: [] for lr, _, _ in cells}
    for lr, rank, seed in cells:
        if rank == lowest and (lr, highest, seed) in cells:
            paired_seeds[lr].append(seed)
    lr, seeds = max(paired_seeds.items(), key=lambda pair: len(pair[1]), default=(math.nan, []))
    if not seeds:
        return None
    at_lr = wide[lr]
    losses = {rank: at_lr[rank][seeds] for rank in at_lr.columns.unique(0) if set(seeds) <= set(at_lr[rank])}
    difference = (losses[lowest] - losses[highest]).dropna()
    if difference.empty:
        return None
    variance = [losses[rank].loc[difference.index].var(axis=1) for rank in (lowest, highest)]
    # Before the first update all ranks have the loss of the base model.
    by_inverse_rank = [
        (low, high, 1 / low - 1 / high, float(np.nanmean(apart)))
        for low, high in combinations(losses, 2)
        if np.isfinite(apart := (losses[low] - losses[high]).loc[2:].to_numpy(float)).any()
    ]
    both = runs[runs["rank"].isin([lowest, highest]) & (runs["lr"] == lr)]
    return EarlyDifference(
        lowest,
        highest,
        lr,
        curves=PairedCurves(difference, tuple(both.loc[both["seed"].isin(seeds), "run_id"])),
        sigma_batch=math.sqrt(float(pd.concat(variance).mean())) if len(seeds) > 1 else math.nan,
        by_inverse_rank=pd.DataFrame(by_inverse_rank, columns=["low", "high", "inverse", "difference"]),
        n_diverged=int((both["status"] == "diverged").sum()),
    )
