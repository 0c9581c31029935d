"""The optimal learning rate and the lowest loss of each arm, as a table, from the fit of each comparison."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from lorabench.analysis.arm_grid import ArmGrid
from lorabench.analysis.arms import arm_label, arm_table, first_seed
from lorabench.analysis.comparison import Comparison, Judging, comparisons
from lorabench.analysis.losses import with_losses


def lr_optima(runs: pd.DataFrame, judging: Judging | None = None) -> pd.DataFrame:
    """Return the fitted optimum of each arm.

    Args:
        runs: columns run_id, ARM, lr, seed, status, and the losses (see `with_losses`).
        judging: the losses by test example, and seed noise from elsewhere.

    Returns:
        One row per arm: lr_best (the LR of the grid with the lowest loss), lr_opt (fitted), lr_low and lr_high (95%
        interval), loss_opt (fitted minimum; at an edge, or where the runs determine no fit, the best LR and the mean
        loss there stand in for both, without an interval), edge (whether the optimum may lie outside of the grid),
        resolved (see `LossFit`), n_runs and n_diverged (of the first seed), run_ids (runs of the first seed). NaN where
        no run finished.

    Raises:
        UserError: see `check_runs`.
    """
    rows = [
        arm | _optimum(comparison, arm_label(arm)) | _of_grid(comparison.rows[arm_label(arm)])
        for comparison in comparisons(runs, pd.DataFrame(), judging)
        for arm in comparison.arms
    ]
    columns = ["lr_best", "lr_opt", "lr_low", "lr_high", "loss_opt", "edge", "resolved", "n_runs", "n_diverged"]
    return arm_table(rows, [*columns, "run_ids"])


def _optimum(comparison: Comparison, label: str) -> dict[str, Any]:
    fit, nothing = comparison.fit, dict.fromkeys(["lr_best", "lr_opt", "lr_low", "lr_high", "loss_opt"], math.nan)
    grid: ArmGrid | None = fit.grids.get(label)
    if grid is None:
        return nothing | {"edge": False, "resolved": False}
    best = float(grid.lrs[grid.centre])
    runs = with_losses(comparison.rows[label])
    loss = float(runs.loc[(runs["lr"] == best) & (runs["status"] == "done"), "test_loss"].astype(float).mean())
    optimum = nothing | {"lr_best": best, "lr_opt": best, "loss_opt": loss}
    optimum |= {"edge": grid.edge is not None, "resolved": False}
    if label in fit.optima and grid.edge is None:
        low, high = fit.optima[label].interval()
        optimum |= {"lr_opt": math.exp(fit.optima[label].value), "lr_low": math.exp(low), "lr_high": math.exp(high)}
        optimum |= {"loss_opt": fit.minima[label].value, "resolved": fit.resolved[label]}
    return optimum


def _of_grid(of_arm: pd.DataFrame) -> dict[str, Any]:
    first = first_seed(of_arm)
    n_diverged = int((first["status"] == "diverged").sum())
    return {"n_runs": len(first), "n_diverged": n_diverged, "run_ids": list(first["run_id"])}
