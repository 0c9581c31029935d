"""Early training curves by rank, and the difference of two ranks on the same batches (the paper's early curves)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pandas as pd

from lorabench.analysis.gaps import mean_interval


@dataclass(frozen=True)
class EarlyDifference:
    """Training NLL of the lowest rank above 1 minus that of the highest, at one LR, paired by seed and step.

    Runs of one seed see the same batches, so that the batch's own difficulty cancels. NLL in nats per token.
    """

    low: int
    """The lower rank."""
    high: int
    lr: float
    by_seed: pd.DataFrame = field(repr=False)
    """The difference: a row per step (index), a column per seed that both ranks finished."""
    loss: pd.Series[float] = field(repr=False)
    """Mean training NLL of both ranks over those seeds, by step."""
    sigma_batch: float
    """Standard deviation of the training NLL over seeds, that is over batches: pooled over both ranks and all steps.
    NaN with fewer than two seeds."""
    n_diverged: int
    """Runs of either rank at that LR that diverged, so that their seeds are missing."""
    run_ids: tuple[str, ...] = field(repr=False)

    @property
    def n_seeds(self) -> int:
        return self.by_seed.shape[1]

    def over_seeds(self) -> pd.DataFrame:
        """By step (index): the mean difference over seeds, and its 95% t interval (`low`, `high`)."""
        rows = [mean_interval(differences) for _, differences in self.by_seed.iterrows()]
        return pd.DataFrame(rows, columns=["mean", "low", "high"], index=self.by_seed.index, dtype=float)


def train_curves(runs: pd.DataFrame, curves: pd.DataFrame, metric: str = "nll", split: str = "train") -> pd.DataFrame:
    """A metric of some runs by step, of training unless another split is given.

    Args:
        runs: column run_id, and others.
        curves: columns run_id, step, split, metric, value; null values are left out.
        metric: `nll` (of a step's batch before its update, nats per token), or another of that split.
        split: `validation` has `nll` after a step's update.

    Returns:
        The runs' columns with step and value, by run and ascending in step.
    """
    if curves.empty:
        return runs.iloc[:0].assign(step=pd.Series(dtype="Int64"), value=pd.Series(dtype=float))
    chosen = curves[(curves["split"] == split) & (curves["metric"] == metric) & curves["value"].notna()]
    return runs.merge(chosen[["run_id", "step", "value"]], on="run_id").sort_values(["run_id", "step"])


def early_difference(
    runs: pd.DataFrame, curves: pd.DataFrame, first_steps: int | None = None
) -> EarlyDifference | None:
    """The difference of the lowest and the highest rank above 1; None without two such ranks that share an LR.

    Where they share several LRs, it is the one at which most seeds can be paired, the lowest of equals.

    Args:
        runs: LoRA runs that differ in rank, LR and seed only: columns run_id, rank, lr, seed, status.
        curves: as for `train_curves`.
        first_steps: leave out what comes after that step.
    """
    ranked = runs[runs["rank"].gt(1).fillna(False).astype(bool)]
    if ranked["rank"].nunique() < 2:
        return None
    low, high = int(ranked["rank"].min()), int(ranked["rank"].max())
    both = ranked[ranked["rank"].isin([low, high])]
    losses = train_curves(both[both["status"] == "done"], curves)
    if first_steps is not None:
        losses = losses[losses["step"] <= first_steps]
    # One column per LR, seed and rank.
    wide = losses.pivot(index="step", columns=["lr", "seed", "rank"], values="value").dropna()
    wide.index = wide.index.astype(int)
    paired = {
        lr: seeds
        for lr in sorted(set(losses["lr"]))
        if (seeds := [s for s in sorted(set(losses["seed"])) if all((lr, s, r) in wide for r in (low, high))])
    }
    if not paired or wide.empty:
        return None
    lr = max(paired, key=lambda candidate: len(paired[candidate]))
    of_rank = {r: pd.DataFrame({s: wide[(lr, s, r)] for s in paired[lr]}).astype(float) for r in (low, high)}
    variance = [of_rank[r].var(axis=1) for r in of_rank]
    at_lr = both[both["lr"] == lr]
    return EarlyDifference(
        low=low,
        high=high,
        lr=float(lr),
        by_seed=of_rank[low] - of_rank[high],
        loss=(of_rank[low] + of_rank[high]).mean(axis=1) / 2,
        sigma_batch=math.sqrt(float(pd.concat(variance).mean())) if len(paired[lr]) > 1 else math.nan,
        n_diverged=int((at_lr["status"] == "diverged").sum()),
        run_ids=tuple(at_lr.loc[at_lr["seed"].isin(paired[lr]), "run_id"]),
    )
