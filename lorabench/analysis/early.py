"""Training curves, and the early difference between two ranks on the same batches (the paper's early curves)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pandas as pd

from lorabench.analysis.gaps import mean_interval


@dataclass(frozen=True)
class EarlyDifference:
    """Training NLL of the lowest rank above 1 minus that of the highest, at one LR, paired by seed and step.

    Runs with one seed see the same batches, so that the difficulty of a batch cancels. NLL is in nats per token.
    """

    low: int
    """The lower of the two ranks."""
    high: int
    """The higher of the two ranks."""
    lr: float
    by_seed: pd.DataFrame = field(repr=False)
    """The difference, with a row per step (index) and a column per seed that both ranks finished."""
    loss: pd.Series[float] = field(repr=False)
    """Mean training NLL of both ranks over the seeds of `by_seed`, by step."""
    sigma_batch: float
    """Standard deviation of the training NLL over seeds, and so over batches, pooled over both ranks and all steps.
    It is NaN with fewer than two seeds."""
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
    if curves.empty:
        return runs.iloc[:0].assign(step=pd.Series(dtype="Int64"), value=pd.Series(dtype=float))
    chosen = curves[(curves["split"] == split) & (curves["metric"] == metric) & curves["value"].notna()]
    return runs.merge(chosen[["run_id", "step", "value"]], on="run_id").sort_values(["run_id", "step"])


def early_difference(
    runs: pd.DataFrame, curves: pd.DataFrame, first_steps: int | None = None
) -> EarlyDifference | None:
    """Compute the training NLL of the lowest rank above 1 minus that of the highest, at one LR that both have.

    If they share several LRs, the LR with the most paired seeds is taken, and the lowest of equals.

    Args:
        runs: LoRA runs that differ in rank, LR and seed only: columns run_id, rank, lr, seed, status.
        curves: as for `train_curves`.
        first_steps: the last step to include; by default all steps are.

    Returns:
        The difference; None if there are no two ranks above 1 that share an LR and a finished seed.
    """
    ranked = runs[runs["rank"].gt(1).fillna(False).astype(bool)]
    if ranked["rank"].nunique() < 2:
        return None
    low, high = int(ranked["rank"].min()), int(ranked["rank"].max())
    both = ranked[ranked["rank"].isin([low, high])]
    losses = train_curves(both[both["status"] == "done"], curves)
    if first_steps is not None:
        losses = losses[losses["step"] <= first_steps]
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
