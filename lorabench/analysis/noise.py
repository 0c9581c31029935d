"""Seed noise: the standard deviation of the final loss of runs that differ in their seed only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from lorabench.analysis.arms import ARM, check_runs, rows_of, with_arm_columns, with_losses

_CELL = [*ARM, "lr"]

NOISE_GROUP = ["model", "dataset", "batch_size", "steps"]
"""Columns of a group of runs whose noise is pooled, over all of its arms."""


def seed_noise(runs: pd.DataFrame) -> pd.DataFrame:
    """Estimate the seed standard deviation of the final losses of each NOISE_GROUP.

    The estimate is pooled over the cells (arm and LR) that have at least two finished seeds: it is the root of the
    summed squared deviations from each cell's mean over the summed degrees of freedom. Seeds are repeated at the best
    LR, so this is the noise near the optimum; it is larger at far larger LRs.

    Args:
        runs: columns run_id, ARM, lr, seed, status, and the losses (see `with_losses`).

    Returns:
        One row per NOISE_GROUP: sigma (of the test loss, in its unit), sigma_valid (of the validation loss), dof
        (degrees of freedom of both), n_runs (number of runs in the cells). Without a cell of two seeds the sigmas are
        NaN and dof is 0.

    Raises:
        UserError: See `check_runs`.
    """
    check_runs(runs)
    runs = with_losses(with_arm_columns(runs))
    rows = []
    for key, group in runs.groupby(NOISE_GROUP, dropna=False):
        done = group[group["status"] == "done"].dropna(subset=["validation_loss", "test_loss"])
        repeated = done[done.groupby(_CELL, dropna=False)["run_id"].transform("size") >= 2]
        cells = repeated.groupby(_CELL, dropna=False)
        dof = len(repeated) - cells.ngroups
        sigma, sigma_valid = (
            math.sqrt(((repeated[loss] - cells[loss].transform("mean")) ** 2).sum() / dof) if dof else math.nan
            for loss in ("test_loss", "validation_loss")
        )
        rows.append((*key, sigma, sigma_valid, dof, len(repeated)))
    frame = pd.DataFrame(rows, columns=[*NOISE_GROUP, "sigma", "sigma_valid", "dof", "n_runs"])
    return frame.astype({"batch_size": "Int64", "steps": "Int64"})


def sigma_of(noise: pd.DataFrame, arm: Mapping[str, Any] | pd.Series, split: str) -> float:
    """Return the seed noise of an arm's NOISE_GROUP, in the unit of its loss; NaN where it was not measured.

    Args:
        noise: as from `seed_noise`. Without sigma_valid, sigma holds for both splits; without a column of NOISE_GROUP,
            a row holds for all of its values.
        arm: values of the ARM columns.
        split: `validation` or `test`.
    """
    row = rows_of(noise, arm, [name for name in NOISE_GROUP if name in noise])
    column = "sigma_valid" if split == "validation" and "sigma_valid" in noise else "sigma"
    return float(row[column].iloc[0]) if len(row) else math.nan
