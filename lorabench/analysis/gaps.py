"""Final losses at each arm's best learning rate, and the gap between two arms, paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lorabench.analysis.arms import arm_label, arm_table, check_runs, each_arm, rows_of
from lorabench.analysis.optimum import best_index, is_edge, lr_grid
from lorabench.analysis.student import t_quantile
from lorabench.errors import UserError


@dataclass(frozen=True)
class Gap:
    """Final test NLL of one arm minus another's, in nats per token. Not known: NaN."""

    estimate: float
    """Mean over seeds of the paired difference."""
    ci_low: float
    """95% t interval of that mean; NaN with fewer than two seeds."""
    ci_high: float
    n_seeds: int
    """Seeds that both arms finished at their best LR."""
    n_diverged: int
    """Runs of either arm at its best LR that diverged, so that their seeds are missing above."""
    sigma: float
    """Standard deviation of the paired differences over seeds."""
    at_edge: bool
    """Whether either arm's best LR is at the edge of its grid."""
    run_ids: tuple[str, ...]
    """The paired runs."""


def best_losses(runs: pd.DataFrame) -> pd.DataFrame:
    """Final test NLL of each arm at the LR with the lowest validation loss on the first seed's grid, over seeds.

    Args:
        runs: columns run_id, ARM, lr, seed, status, final_valid_nll, final_test_nll.

    Returns:
        One row per arm: lr_best, nll_mean and nll_sd (nats per token; sd NaN with one seed), n_seeds, n_diverged,
        at_edge, seeds, nlls, run_ids (finished runs at that LR). An arm without a finished run has NaN and no seeds.

    Raises:
        UserError: see `check_runs`.
    """
    check_runs(runs)
    rows = []
    for arm, of_arm in each_arm(runs):
        grid = lr_grid(of_arm)
        best = best_index(grid)
        lr_best = math.nan if best is None else float(grid.lr[best])
        at_best = of_arm[of_arm["lr"] == lr_best].sort_values("seed")
        done = at_best[at_best["status"] == "done"].dropna(subset=["final_test_nll"])
        rows.append(
            arm
            | {
                "lr_best": lr_best,
                "nll_mean": float(done["final_test_nll"].mean()),
                "nll_sd": float(done["final_test_nll"].std()),
                "n_seeds": len(done),
                "n_diverged": int((at_best["status"] == "diverged").sum()),
                "at_edge": best is not None and is_edge(grid, best),
                "seeds": [int(seed) for seed in done["seed"]],
                "nlls": [float(nll) for nll in done["final_test_nll"]],
                "run_ids": list(done["run_id"]),
            }
        )
    columns = ["lr_best", "nll_mean", "nll_sd", "n_seeds", "n_diverged", "at_edge", "seeds", "nlls", "run_ids"]
    return arm_table(rows, columns)


def gap(runs: pd.DataFrame, arm_a: Mapping[str, Any] | pd.Series, arm_b: Mapping[str, Any] | pd.Series) -> Gap:
    """Final test NLL of `arm_a` minus that of `arm_b`, each at its own best LR, paired by seed.

    Pairing holds because all arms of one seed see the same data in the same order. The first seed also chose the LR,
    on the validation split; that small bias is the same in kind for both arms.

    Args:
        runs: columns as for `best_losses`.
        arm_a: values of the ARM columns, for example a row of `best_losses`.
        arm_b: likewise.

    Raises:
        UserError: the table has no run of an arm, or see `check_runs`.
    """
    (losses_a, best_a), (losses_b, best_b) = (_losses_by_seed(runs, arm) for arm in (arm_a, arm_b))
    pairs = losses_a.merge(losses_b, on="seed", suffixes=("_a", "_b"))
    difference = pairs["final_test_nll_a"] - pairs["final_test_nll_b"]
    estimate, low, high = mean_interval(difference)
    return Gap(
        estimate=estimate,
        ci_low=low,
        ci_high=high,
        n_seeds=len(pairs),
        n_diverged=int(best_a["n_diverged"] + best_b["n_diverged"]),
        sigma=float(difference.std()),
        at_edge=bool(best_a["at_edge"] or best_b["at_edge"]),
        run_ids=(*pairs["run_id_a"], *pairs["run_id_b"]),
    )


def losses_by_seed(runs: pd.DataFrame, arm: Mapping[str, Any] | pd.Series) -> pd.Series[float]:
    """Final test NLL (nats per token) of an arm's finished runs at its best LR, by seed; else as `gap`."""
    losses, _ = _losses_by_seed(runs, arm)
    return losses.set_index("seed")["final_test_nll"]


def mean_interval(values: pd.Series[float]) -> tuple[float, float, float]:
    """Mean and its 95% t interval, which is NaN with fewer than two values."""
    n = len(values)
    half = t_quantile(n - 1) * float(values.std()) / math.sqrt(n) if n > 1 else math.nan
    mean = float(values.mean())
    return mean, mean - half, mean + half


def _losses_by_seed(runs: pd.DataFrame, arm: Mapping[str, Any] | pd.Series) -> tuple[pd.DataFrame, pd.Series]:
    """Seed, loss and run of one arm at its best LR, and its row of `best_losses`."""
    of_arm = rows_of(runs, arm)
    if of_arm.empty:
        raise UserError(f"no runs of {arm['model']}/{arm['dataset']} {arm_label(arm)}")
    best = best_losses(of_arm).iloc[0]
    done = of_arm[of_arm["run_id"].isin(best["run_ids"])]
    return done[["seed", "final_test_nll", "run_id"]], best
