"""Gap curves: the difference between the learning curves of two arms."""

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
    """Compute the validation NLL of one arm minus another's by step, each at its best LR, paired by seed.

    Args:
        runs: columns as for `best_losses`.
        curves: columns run_id, step, split, metric, value.
        arm: values of the ARM columns.
        other: values of the ARM columns.

    Returns:
        One row per seed that both arms finished and step from 1 up that both curves have: seed, step, share (the step
        over the last of these steps), gap (nats per token).

    Raises:
        UserError: See `check_runs`.
    """
    return _difference(_at_best_lr(runs, curves, arm), _at_best_lr(runs, curves, other))


def envelope_gap(runs: pd.DataFrame, curves: pd.DataFrame, arm: Arm, other: Arm) -> pd.DataFrame:
    """Compute the envelope of one arm minus another's; each is over the LR grid of the arm's first seed.

    See `gap_curve` for the arguments and the result, and `envelopes`.
    """
    of_arms = (rows_of(runs, compared) for compared in (arm, other))
    return _difference(*(envelopes(rows, curves).assign(seed=rows["seed"].min()) for rows in of_arms))


def gap_at(curve: pd.DataFrame, share: float) -> pd.Series[float]:
    """Interpolate the gap at a share of the run, by seed; it is NaN where the curve starts later.

    The interpolation is linear in log(step), since losses nearly are.

    Args:
        curve: as from `gap_curve` or `envelope_gap`.
        share: share of the run's steps, above 0 and up to 1.

    Returns:
        The gap in nats per token, with the seeds as index.
    """
    by_seed = {}
    for seed, points in curve.groupby("seed"):
        ascending = points.sort_values("share")
        shares = np.log(ascending["share"].to_numpy(float))
        by_seed[seed] = float(np.interp(np.log(share), shares, ascending["gap"].to_numpy(float), left=np.nan))
    return pd.Series(by_seed, dtype=float)


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
