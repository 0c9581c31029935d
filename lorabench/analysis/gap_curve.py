"""The gap between two arms along their learning curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis.arms import rows_of
from lorabench.analysis.envelopes import envelopes
from lorabench.analysis.gaps import best_losses

_COLUMNS = ["seed", "step", "share", "gap"]

Arm = Mapping[str, Any] | pd.Series


def gap_curve(runs: pd.DataFrame, curves: pd.DataFrame, arm: Arm, other: Arm) -> pd.DataFrame:
    """Validation NLL of one arm minus another's, each at its best LR, paired by seed.

    Args:
        runs: columns as for `best_losses`.
        curves: columns run_id, step, split, metric, value.
        arm: values of the ARM columns.
        other: likewise.

    Returns:
        One row per seed that both arms finished and step from 1 up that both curves have: seed, step, share (of the
        last such step), gap (nats per token).

    Raises:
        UserError: see `check_runs`.
    """
    return _difference(_at_best_lr(runs, curves, arm), _at_best_lr(runs, curves, other))


def envelope_gap(runs: pd.DataFrame, curves: pd.DataFrame, arm: Arm, other: Arm) -> pd.DataFrame:
    """As `gap_curve`, between the envelopes of two arms, which are of their first seeds."""
    of_arms = (rows_of(runs, one) for one in (arm, other))
    return _difference(*(envelopes(rows, curves).assign(seed=rows["seed"].min()) for rows in of_arms))


def gap_at(curve: pd.DataFrame, share: float) -> pd.Series[float]:
    """The gap at a share of the run, by seed: linear in log(step) between points, as losses nearly are.

    NaN where the curve begins later.
    """
    found = {}
    for seed, points in curve.groupby("seed"):
        ascending = points.sort_values("share")
        shares = np.log(ascending["share"].to_numpy(float))
        found[seed] = float(np.interp(np.log(share), shares, ascending["gap"].to_numpy(float), left=np.nan))
    return pd.Series(found, dtype=float)


def _at_best_lr(runs: pd.DataFrame, curves: pd.DataFrame, arm: Arm) -> pd.DataFrame:
    of_arm = rows_of(runs, arm)
    at_best = of_arm[of_arm["run_id"].isin([run_id for ids in best_losses(of_arm)["run_ids"] for run_id in ids])]
    if curves.empty:
        return pd.DataFrame(columns=["seed", "step", "value"])
    points = curves[(curves["split"] == "validation") & (curves["metric"] == "nll")]
    return points.merge(at_best[["run_id", "seed"]], on="run_id")


def _difference(points: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    columns = ["seed", "step", "value"]
    both = points[columns].merge(others[columns], on=["seed", "step"], suffixes=("", "_other")).dropna()
    both = both[both["step"] > 0]
    both = both.assign(share=both["step"] / both["step"].max(), gap=both["value"] - both["value_other"])
    return both[_COLUMNS].sort_values(["seed", "step"], ignore_index=True)
