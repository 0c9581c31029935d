"""How far the sampler's distribution is from the learner's in RL: their KL, and the ratios of their probabilities.

The objective weighs each token by the ratio of the learner's to the sampler's probability, without clipping or masking.
It is that of the paper while the two distributions are close, so that all ratios are close to 1.

KL(sampler || learner) is estimated on the responses of a step, so that it may be negative, by rounding or by chance.
Its absolute value counts.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from lorabench.analysis.arms import arm_table, each_arm
from lorabench.analysis.curves import metric_points
from lorabench.runs import MAX_KL
from lorabench.store.checks import is_rl

_COLUMNS = ["run_ids", "kl_mean", "kl_max", "ratio_mean", "ratio_max", "ratio_above_2", "n_measured", "n_above"]


def sampler_mismatch(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Return the measures of the sampler against the learner over the steps of all runs of each arm of RL.

    Args:
        runs: columns run_id, task and those of an arm; runs of supervised fine-tuning are left out.
        curves: columns run_id, step, split, metric, value; metrics that they lack become NaN.

    Returns:
        One row per arm: run_ids, kl_mean (nats per token), kl_max (the largest absolute value), ratio_mean, ratio_max,
        ratio_above_2 (the mean share of tokens), n_measured (runs with a KL), and n_above (see `runs_above_max_kl`).
    """
    metrics = ("kl", "ratio_mean", "ratio_max", "ratio_above_2")
    points = [metric_points(curves, "train", metric) for metric in metrics]
    above = runs_above_max_kl(curves)
    rows: list[dict[str, Any]] = []
    for arm, of_arm in each_arm(runs[is_rl(runs)]):
        kl, ratio_mean, ratio_max, above_2 = (of[of["run_id"].isin(of_arm["run_id"])] for of in points)
        rows.append(
            arm
            | {"run_ids": list(of_arm["run_id"])}
            | {"kl_mean": _floats(kl).mean(), "kl_max": _floats(kl).abs().max()}
            | {"ratio_mean": _floats(ratio_mean).mean(), "ratio_max": _floats(ratio_max).max()}
            | {"ratio_above_2": _floats(above_2).mean()}
            | {"n_measured": kl["run_id"].nunique(), "n_above": int(of_arm["run_id"].isin(above).sum())}
        )
    return arm_table(rows, _COLUMNS)


def runs_above_max_kl(curves: pd.DataFrame) -> set[str]:
    """Return the run_id of each run with a step whose KL has an absolute value above MAX_KL."""
    kl = metric_points(curves, "train", "kl")
    return set(kl.loc[_floats(kl).abs() > MAX_KL, "run_id"])


def _floats(points: pd.DataFrame) -> pd.Series[float]:
    return points["value"].astype(float)
