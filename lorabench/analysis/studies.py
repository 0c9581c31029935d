"""Seed studies: where several seeds have an LR grid each, every one of them picks its own best LR.

Picking the LR once and repeating there (`gaps.best_losses`) leaves out that another seed may have picked another. A
study is what a practitioner with one seed would have found; the spread over studies is what to expect of one.
"""

from __future__ import annotations

import math

import pandas as pd

from lorabench.analysis.arms import arm_table, check_runs, each_arm
from lorabench.analysis.optimum import best_index, is_edge, lr_grid

MIN_LRS = 3
"""Fewer LRs are no grid to pick from."""


def seed_studies(runs: pd.DataFrame) -> pd.DataFrame:
    """The best over LR of each arm and seed that has a grid.

    Args:
        runs: columns run_id, ARM, lr, seed, status, final_valid_nll, final_test_nll.

    Returns:
        One row per arm and seed with at least MIN_LRS rates: seed, lr_best (lowest validation loss), nll (test NLL
        there, nats per token), at_edge, n_lrs. NaN where no run of the study finished.

    Raises:
        UserError: see `check_runs`.
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
                    "nll": math.nan if best is None else float(grid.test[best]),
                    "at_edge": best is not None and is_edge(grid, best),
                    "n_lrs": len(grid.lr),
                }
            )
    return arm_table(rows, ["seed", "lr_best", "nll", "at_edge", "n_lrs"])


def over_studies(studies: pd.DataFrame) -> pd.DataFrame:
    """Median and range over studies of the best loss and of the LR that was picked.

    Args:
        studies: as from `seed_studies`.

    Returns:
        One row per arm: nll_median, nll_min, nll_max (nats per token), lr_median, lr_min, lr_max, n_studies (that have
        a finished run).
    """
    rows = []
    for arm, of_arm in each_arm(studies):
        done = of_arm.dropna(subset=["nll"])
        numbers = {
            f"{name}_{how}": float(getattr(done[column].astype(float), how)())
            for name, column in (("nll", "nll"), ("lr", "lr_best"))
            for how in ("median", "min", "max")
        }
        rows.append(arm | numbers | {"n_studies": len(done)})
    columns = [f"{name}_{how}" for name in ("nll", "lr") for how in ("median", "min", "max")]
    return arm_table(rows, [*columns, "n_studies"])
