"""Seed noise: how far apart the losses of runs lie that differ in their seed only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from lorabench.analysis.arms import ARM, check_runs, rows_of, with_arm_columns

_CELL = [*ARM, "lr"]

GROUP = ["model", "dataset", "batch_size", "steps"]
"""Runs whose noise is pooled: what they are trained on and how long. The arm is not told apart."""


def seed_noise(runs: pd.DataFrame) -> pd.DataFrame:
    """Seed standard deviation of the final losses, per model, dataset, batch size and length (GROUP).

    Pooled over cells (arm and LR) that have at least two finished seeds: the root of the summed squared deviations
    from each cell's mean, over the summed degrees of freedom. Repeats are run at the best LR, so this is the noise
    near the optimum; at far larger LRs the noise is larger.

    Args:
        runs: columns run_id, ARM, lr, seed, status, final_valid_nll, final_test_nll.

    Returns:
        One row per GROUP: sigma (of final_test_nll, nats per token), sigma_valid (of final_valid_nll),
        dof (degrees of freedom of both), n_runs (runs behind them). Where no cell has two seeds the sigmas are NaN
        and dof is 0.

    Raises:
        UserError: see `check_runs`.
    """
    check_runs(runs)
    runs = with_arm_columns(runs)
    rows = []
    for key, group in runs.groupby(GROUP, dropna=False):
        done = group[group["status"] == "done"].dropna(subset=["final_valid_nll", "final_test_nll"])
        repeated = done[done.groupby(_CELL, dropna=False)["run_id"].transform("size") >= 2]
        cells = repeated.groupby(_CELL, dropna=False)
        dof = len(repeated) - cells.ngroups
        sigma, sigma_valid = (
            math.sqrt(((repeated[loss] - cells[loss].transform("mean")) ** 2).sum() / dof) if dof else math.nan
            for loss in ("final_test_nll", "final_valid_nll")
        )
        rows.append((*key, sigma, sigma_valid, dof, len(repeated)))
    frame = pd.DataFrame(rows, columns=[*GROUP, "sigma", "sigma_valid", "dof", "n_runs"])
    return frame.astype({"batch_size": "Int64", "steps": "Int64"})


def sigma_of(noise: pd.DataFrame, arm: Mapping[str, Any] | pd.Series, split: str) -> float:
    """The seed noise of an arm's GROUP on the split `validation` or `test`, in nats; NaN where not measured.

    A table by hand without `sigma_valid` stands for both splits, one without batch size or steps for all of them.
    """
    row = rows_of(noise, arm, [name for name in GROUP if name in noise])
    column = "sigma_valid" if split == "validation" and "sigma_valid" in noise else "sigma"
    return float(row[column].iloc[0]) if len(row) else math.nan
