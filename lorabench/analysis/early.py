"""The first steps of runs: the early difference between two ranks, and short runs from long ones.

On the same batches the paper compares the early curves of ranks 16 and 256, and theory says that the difference of two
ranks goes as 1/r1 - 1/r2. With a constant LR and the same order of the data, a run's first steps are a short run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.special import ndtri

from lorabench.analysis.comparison import Comparison
from lorabench.analysis.curves import metric_points, train_curves
from lorabench.analysis.estimate import N_DRAWS, Estimate, mean_interval, normal

_MOST = 0.999
"""The largest correlation of residuals that is believed."""

PAPER_RANK = 16
"""The lower of the two ranks that the paper compares; differences of lower ranks are far larger."""


@dataclass(frozen=True)
class EarlyDifference:
    """Training NLL of a rank minus that of a higher one, at one LR, paired by seed and step.

    Runs with one seed see the same batches, so that the difficulty of a batch cancels. NLL is in nats per token.
    """

    low: int
    """The lower of the two ranks."""
    high: int
    """The higher of the two ranks."""
    lr: float
    by_seed: pd.DataFrame = field(repr=False)
    """The difference, with a row per step (index) and a column per seed that both ranks finished."""
    sigma_batch: float
    """Standard deviation of the training NLL over seeds, and so over batches, pooled over both ranks and all steps.
    It is NaN with fewer than two seeds."""
    by_inverse_rank: pd.DataFrame = field(repr=False)
    """For each pair of ranks with runs at that LR and these seeds: low, high, inverse (1/low - 1/high) and difference
    (the mean over seeds and steps)."""
    n_diverged: int
    """Number of runs of either rank at that LR that diverged and so lack in `by_seed`."""
    run_ids: tuple[str, ...] = field(repr=False)

    @property
    def n_seeds(self) -> int:
        return self.by_seed.shape[1]

    def over_seeds(self) -> pd.DataFrame:
        """Return by step (index) the mean difference over seeds and its 95% t interval (`low`, `high`)."""
        rows = [mean_interval(differences) for _, differences in self.by_seed.iterrows()]
        return pd.DataFrame(rows, columns=["mean", "low", "high"], index=self.by_seed.index, dtype=float)


def compared_ranks(ranks: Iterable[int]) -> tuple[int, int] | None:
    """Return the ranks that stand for the paper's 16 and 256: the lowest from PAPER_RANK up, and the highest.

    Without two such ranks it is the lowest above 1 and the highest; None without two ranks above 1.
    """
    ordered = sorted(set(ranks))
    for lowest in (PAPER_RANK, 2):
        enough = [rank for rank in ordered if rank >= lowest]
        if len(enough) > 1:
            return enough[0], enough[-1]
    return None


def inverse_rank_fit(by_inverse_rank: pd.DataFrame) -> tuple[float, float]:
    """Fit the differences of pairs of ranks as a multiple of 1/low - 1/high.

    Args:
        by_inverse_rank: as of `EarlyDifference`.

    Returns:
        The factor in nats per token, and the share of the sum of squares that it explains; NaN without two pairs.
    """
    if len(by_inverse_rank) < 2:
        return math.nan, math.nan
    x, y = (by_inverse_rank[name].to_numpy(float) for name in ("inverse", "difference"))
    factor = float(x @ y / (x @ x))
    return factor, 1 - float(((y - factor * x) ** 2).sum() / (y @ y)) if y.any() else math.nan


def early_difference(
    runs: pd.DataFrame, curves: pd.DataFrame, first_steps: int | None = None
) -> EarlyDifference | None:
    """Compute the training NLL of a rank minus that of a higher one (see `compared_ranks`), at one LR that both have.

    If they share several LRs, the LR with the most paired seeds is taken, and the lowest of equals.

    Args:
        runs: LoRA runs that differ in rank, LR and seed only: columns run_id, rank, lr, seed, status.
        curves: as for `train_curves`.
        first_steps: the last step to include; by default all steps are.

    Returns:
        The difference; None if there are no two ranks above 1 that share an LR and a finished seed.
    """
    pair = compared_ranks(int(rank) for rank in runs["rank"].dropna())
    if pair is None:
        return None
    low, high = pair
    losses = train_curves(runs[runs["status"] == "done"], curves)
    if first_steps is not None:
        losses = losses[losses["step"] <= first_steps]
    wide = losses.pivot(index="step", columns=["lr", "seed", "rank"], values="value").astype(float)
    wide.index = wide.index.astype(int)
    paired = {
        lr: seeds
        for lr in sorted(set(losses["lr"]))
        if (seeds := [s for s in sorted(set(losses["seed"])) if all((lr, s, r) in wide for r in pair)])
    }
    if not paired:
        return None
    lr = max(paired, key=lambda candidate: len(paired[candidate]))
    losses_of = {
        rank: pd.DataFrame({seed: wide[(lr, seed, rank)] for seed in paired[lr]})
        for rank in sorted(set(losses["rank"]))
        if all((lr, seed, rank) in wide for seed in paired[lr])
    }
    kept = (losses_of[low] - losses_of[high]).dropna().index
    if kept.empty:
        return None
    variance = [losses_of[rank].loc[kept].var(axis=1) for rank in pair]
    # Before the first update all ranks have the loss of the base model.
    later = {rank: losses.loc[2:] for rank, losses in losses_of.items()}
    by_inverse_rank = [
        (low_rank, high_rank, 1 / low_rank - 1 / high_rank, float(np.nanmean(apart)))
        for low_rank, high_rank in combinations(later, 2)
        if np.isfinite(apart := (later[low_rank] - later[high_rank]).to_numpy(float)).any()
    ]
    both = runs[runs["rank"].isin(pair) & (runs["lr"] == lr)]
    return EarlyDifference(
        low=low,
        high=high,
        lr=float(lr),
        by_seed=(losses_of[low] - losses_of[high]).loc[kept],
        sigma_batch=math.sqrt(float(pd.concat(variance).mean())) if len(paired[lr]) > 1 else math.nan,
        by_inverse_rank=pd.DataFrame(by_inverse_rank, columns=["low", "high", "inverse", "difference"]),
        n_diverged=int((both["status"] == "diverged").sum()),
        run_ids=tuple(both.loc[both["seed"].isin(paired[lr]), "run_id"]),
    )


def at_step(runs: pd.DataFrame, curves: pd.DataFrame, step: int) -> pd.DataFrame:
    """Return the runs table as if training had ended at a step, for estimators that use final losses.

    Both final losses are the validation NLL at that step, since the test loss is measured only after the last step.
    The optimal LR is picked on the validation split anyway; the loss at that optimum is biased low by the choice, in
    all arms alike.

    Args:
        runs: supervised runs, columns run_id, status, and any others; steps and diverged_at are optional.
        curves: columns run_id, step, split, metric, value.
        step: the step whose validation losses are read.

    Returns:
        The runs with steps, status, final_valid_nll and final_test_nll as of that step. A run that diverged later is
        done, and a run that had diverged by then stays diverged. A run that ended earlier, or that has no validation
        loss at that step, is left out.
    """
    points = metric_points(curves, "validation", "nll")
    at_that_step = points[points["step"] == step].drop_duplicates("run_id").set_index("run_id")["value"]
    loss = runs["run_id"].map(at_that_step.astype(float)).astype(float)
    loss = loss.where(loss.abs() < math.inf)
    diverged = (runs["status"] == "diverged") & loss.isna()
    if "diverged_at" in runs:
        diverged &= (runs["diverged_at"].isna() | (runs["diverged_at"] <= step)).astype(bool)
    kept = loss.notna() | diverged
    if "steps" in runs:
        kept &= (runs["steps"].isna() | (runs["steps"] >= step)).astype(bool)
    as_of = runs[kept].assign(
        steps=step,
        status=diverged[kept].map({True: "diverged", False: "done"}),
        final_valid_nll=loss[kept],
        final_test_nll=loss[kept],
    )
    return as_of.astype({"steps": "Int64"})


def at_end(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs table with the final validation NLL as both final losses, to compare with `at_step`."""
    return runs.assign(final_test_nll=runs["final_valid_nll"])


def coupled(
    short: Comparison, full: Comparison, from_short: Estimate, from_full: Estimate, name: str
) -> tuple[Estimate, Estimate]:
    """Couple the errors of two numbers, one from the losses at a step and one from those at the end of the same runs.

    A run that has luck at a step has some of it at the end too, so the errors of numbers from the two fits are
    correlated as the residuals of the runs are. That correlation is taken at the lower end of its 68% interval, since
    a large one makes the difference of the numbers look precise, times the share of runs that both fits have; and no
    lower than 0. The draws of the second number are reordered so that their ranks have this correlation.

    Returns:
        Both numbers, each with the same distribution as before.
    """
    if not (from_short.known and from_full.known):
        return from_short, from_full
    residuals = pd.concat({"short": _residuals(short), "full": _residuals(full)}, axis=1)
    common = residuals.dropna()
    products = float((common["short"] * common["full"]).sum())
    squares = float((common["short"] ** 2).sum() * (common["full"] ** 2).sum())
    dof, correlation = min(short.fit.dof, full.fit.dof), 0.0
    if dof >= 2 and squares > 0:
        lower = math.tanh(math.atanh(min(products / math.sqrt(squares), _MOST)) - 1 / math.sqrt(dof - 1))
        correlation = max(0.0, lower) * len(common) / len(residuals)
    order = np.argsort(from_short.seed_part, kind="stable")
    scores = np.empty(N_DRAWS)
    scores[order] = ndtri((np.arange(N_DRAWS) + 0.5) / N_DRAWS)
    scores = correlation * scores + math.sqrt(1 - correlation**2) * normal(f"coupled {name}")
    reordered = np.empty(N_DRAWS)
    reordered[np.argsort(scores, kind="stable")] = np.sort(from_full.seed_part)
    return from_short, replace(from_full, seed_part=reordered)


def _residuals(comparison: Comparison) -> pd.Series[float]:
    """Return by run_id the losses of a fit's runs minus its parabolas, without the mean of each seed."""
    fit, parts = comparison.fit, []
    for label, run_ids in fit.run_ids.items():
        arm_rows = comparison.rows[label]
        arm_rows = arm_rows[arm_rows["run_id"].isin(run_ids)].set_index("run_id")
        distance = np.log(arm_rows["lr"].astype(float)) - fit.optima[label].value
        fitted = fit.minima[label].value + fit.curvature[label] * distance**2
        parts.append(arm_rows[["seed"]].assign(residual=arm_rows["final_test_nll"].astype(float) - fitted))
    if not parts:
        return pd.Series(dtype=float)
    rows = pd.concat(parts)
    residuals: pd.Series[float] = rows["residual"] - rows.groupby("seed")["residual"].transform("mean")
    return residuals
