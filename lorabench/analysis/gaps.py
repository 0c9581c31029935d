"""Gaps: the final losses of each arm at its best learning rate, and the difference between two arms.

Losses are in the unit of `lorabench.analysis.losses`: NLL in nats per scored token, or in RL the error rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lorabench.analysis.arms import arm_label, arm_table, check_runs, each_arm, rows_of
from lorabench.analysis.losses import with_losses
from lorabench.analysis.lr_grid import best_index, is_edge, lr_grid
from lorabench.analysis.student import t_quantile
from lorabench.errors import UserError


@dataclass(frozen=True)
class Gap:
    """The final test loss of one arm minus another's, paired by seed; an unknown number is NaN."""

    estimate: float
    """Mean over seeds of the paired difference."""
    ci_low: float
    """Lower end of the 95% t interval of that mean; NaN with fewer than two seeds."""
    ci_high: float
    """Upper end of that interval."""
    n_seeds: int
    """Number of seeds that both arms finished at their best LR."""
    n_diverged: int
    """Number of runs of either arm at its best LR that diverged, so that their seeds are not paired."""
    sigma: float
    """Standard deviation of the paired differences over seeds."""
    at_edge: bool
    """Whether either arm's best LR is at the edge of its grid."""
    run_ids: tuple[str, ...]
    """Ids of the paired runs."""


def best_losses(runs: pd.DataFrame) -> pd.DataFrame:
    """Compute the final test losses of each arm at its best LR, which has the lowest validation loss of the LR grid.

    Args:
        runs: columns run_id, ARM, lr, seed, status, and the losses (see `with_losses`).

    Returns:
        One row per arm: lr_best, loss_mean and loss_sd (over seeds; NaN sd with one seed), n_seeds (finished),
        n_diverged, at_edge (whether lr_best is at the edge of the grid), and the lists seeds, losses, run_ids of the
        finished runs at that LR. An arm without a finished run has NaN and empty lists.

    Raises:
        UserError: See `check_runs`.
    """
    check_runs(runs)
    runs = with_losses(runs)
    rows = []
    for arm, of_arm in each_arm(runs):
        grid = lr_grid(of_arm)
        best = best_index(grid)
        lr_best = math.nan if best is None else float(grid.lr[best])
        at_best = of_arm[of_arm["lr"] == lr_best].sort_values("seed")
        done = at_best[at_best["status"] == "done"].dropna(subset=["test_loss"])
        rows.append(
            arm
            | {
                "lr_best": lr_best,
                "loss_mean": float(done["test_loss"].mean()),
                "loss_sd": float(done["test_loss"].std()),
                "n_seeds": len(done),
                "n_diverged": int((at_best["status"] == "diverged").sum()),
                "at_edge": best is not None and is_edge(grid, best),
                "seeds": [int(seed) for seed in done["seed"]],
                "losses": [float(loss) for loss in done["test_loss"]],
                "run_ids": list(done["run_id"]),
            }
        )
    columns = ["lr_best", "loss_mean", "loss_sd", "n_seeds", "n_diverged", "at_edge", "seeds", "losses", "run_ids"]
    return arm_table(rows, columns)


def gap(runs: pd.DataFrame, arm_a: Mapping[str, Any] | pd.Series, arm_b: Mapping[str, Any] | pd.Series) -> Gap:
    """Compute the final test loss of `arm_a` minus that of `arm_b`, each at its own best LR, paired by seed.

    Runs are paired because all arms see the same data in the same order with one seed. The first seed also chose the
    LR, on the validation split; both arms have that small bias.

    Args:
        runs: columns as for `best_losses`.
        arm_a: values of the ARM columns, for example a row of `best_losses`.
        arm_b: values of the ARM columns.

    Raises:
        UserError: The table has no run of an arm, or see `check_runs`.
    """
    (losses_a, best_a), (losses_b, best_b) = (_losses_by_seed(runs, arm) for arm in (arm_a, arm_b))
    pairs = losses_a.merge(losses_b, on="seed", suffixes=("_a", "_b"))
    difference = pairs["test_loss_a"] - pairs["test_loss_b"]
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
    """Return the final test losses of an arm's finished runs at its best LR, with the seeds as index.

    Args:
        runs: columns as for `best_losses`.
        arm: values of the ARM columns.

    Raises:
        UserError: The table has no run of the arm, or see `check_runs`.
    """
    losses, _ = _losses_by_seed(runs, arm)
    return losses.set_index("seed")["test_loss"]


def mean_interval(values: pd.Series[float]) -> tuple[float, float, float]:
    """Return the mean and the ends of its 95% t interval, which are NaN with fewer than two values."""
    n = len(values)
    half = t_quantile(n - 1) * float(values.std()) / math.sqrt(n) if n > 1 else math.nan
    mean = float(values.mean())
    return mean, mean - half, mean + half


def _losses_by_seed(runs: pd.DataFrame, arm: Mapping[str, Any] | pd.Series) -> tuple[pd.DataFrame, pd.Series]:
    """Return the seed, loss and id of each finished run of an arm at its best LR, and its row of `best_losses`."""
    of_arm = rows_of(with_losses(runs), arm)
    if of_arm.empty:
        raise UserError(f"no runs of {arm['model']}/{arm['dataset']} {arm_label(arm)}")
    best = best_losses(of_arm).iloc[0]
    done = of_arm[of_arm["run_id"].isin(best["run_ids"])]
    return done[["seed", "test_loss", "run_id"]], best
