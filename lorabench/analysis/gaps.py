"""The final losses of each arm at the best learning rate of its grid, for tables, and the interval of a mean.

Losses are in the unit of `lorabench.analysis.losses`: NLL in nats per scored token, or in RL the error rate.
"""

from __future__ import annotations

import math

import pandas as pd

from lorabench.analysis.arms import arm_table, check_runs, each_arm, with_losses
from lorabench.analysis.lr_grid import best_index, is_edge, lr_grid


def best_losses(runs: pd.DataFrame) -> pd.DataFrame:
    """Compute the final test losses of each arm at its best LR, which has the lowest validation loss (see `LrGrid`).

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
