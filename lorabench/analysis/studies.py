"""Studies: LR grids of several seeds, each of which picks its own best LR.

Picking the LR with one seed and repeating it with others (`gaps.best_losses`) ignores that another seed may pick
another LR. A study is the LR sweep that a practitioner with one seed would run; the spread over studies shows how much
such a result depends on the seed.
"""

from __future__ import annotations

import math

import pandas as pd

from lorabench.analysis.arms import arm_table, check_runs, each_arm
from lorabench.analysis.comparison import MIN_LRS
from lorabench.analysis.lr_grid import best_index, is_edge, lr_grid


def seed_studies(runs: pd.DataFrame) -> pd.DataFrame:
    """Pick the best LR of each arm and seed that has an LR grid.

    Args:
        runs: columns run_id, ARM, lr, seed, status, and the losses (see `with_losses`).

    Returns:
        One row per arm and seed with at least MIN_LRS LRs: seed, lr_best (lowest validation loss), loss (test loss
        there), at_edge (whether lr_best is at the edge of the grid), n_lrs. NaN where no run of the study finished.

    Raises:
        UserError: See `check_runs`.
    """
    check_runs(runs)
    rows = []
    for arm, of_arm in each_arm(runs):
        for seed, study in of_arm.groupby("seed"):
            if study["lr"].nunique() < MIN_LRS:
                continue
            grid = lr_grid(study)
            best = best_index(grid)
            rows.append(
                arm
                | {
                    "seed": seed,
                    "lr_best": math.nan if best is None else float(grid.lr[best]),
                    "loss": math.nan if best is None else float(grid.test[best]),
                    "at_edge": best is not None and is_edge(grid, best),
                    "n_lrs": len(grid.lr),
                }
            )
    return arm_table(rows, ["seed", "lr_best", "loss", "at_edge", "n_lrs"])


def over_studies(studies: pd.DataFrame) -> pd.DataFrame:
    """Compute the median and range over studies of the test loss at the best LR and of that LR.

    Args:
        studies: as from `seed_studies`.

    Returns:
        One row per arm: loss_median, loss_min, loss_max, lr_median, lr_min, lr_max, n_studies (with a finished run).
    """
    rows = []
    for arm, of_arm in each_arm(studies):
        done = of_arm.dropna(subset=["loss"])
        numbers = {
            f"{name}_{how}": float(getattr(done[column].astype(float), how)())
            for name, column in (("loss", "loss"), ("lr", "lr_best"))
            for how in ("median", "min", "max")
        }
        rows.append(arm | numbers | {"n_studies": len(done)})
    columns = [f"{name}_{how}" for name in ("loss", "lr") for how in ("median", "min", "max")]
    return arm_table(rows, [*columns, "n_studies"])
