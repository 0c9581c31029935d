"""Whether RL has learned the task and not a shortcut, whether its policies are healthy, and its sampler exact.

A policy that gives one answer to all problems, or follows a cheap rule, solves no problem, but may have a peak over
learning rates as any other. The accuracies of the best constant answer and of the best cheap rule are the controls of a
problem set (see `lorabench.data.problems`). The rules of this module are the only place that compares runs with them.

The objective weighs each token by the ratio of the learner's to the sampler's probability, without clipping or masking.
It is that of the paper while the two distributions are close, so that all ratios are close to 1. Their KL (sampler ||
learner) is estimated on the responses of a step, so that it may be negative, by rounding or by chance; its absolute
value counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_table, each_arm
from lorabench.analysis.curves import metric_points
from lorabench.runs import MAX_KL
from lorabench.store.checks import is_rl

LEAD = 0.15
"""The least lead in test accuracy over both controls with which a method counts as having learned the task."""

MAX_TRUNCATED = 0.1
"""The share of responses cut off at the end of training above which a run is sick."""

COLLAPSED = 0.02
"""The entropy in nats per token below which a policy hardly samples more than one response."""

MIN_GAIN = 0.05
"""The least gain in test accuracy over the base model that counts as learning; a loss of as much may be a breakdown."""

CONTROLS = {"constant_reward": "best constant answer", "rule_reward": "best cheap rule"}
"""The columns of `runs` with the accuracies of the controls, and their names."""


def is_sick(runs: pd.DataFrame) -> pd.Series[bool]:
    """Return which runs of RL ended sick, so that their accuracy is no peak.

    A run is sick if more than MAX_TRUNCATED of its last responses are cut off. So is one whose test accuracy is not
    above both controls, if its entropy is below COLLAPSED or the base was more accurate by MIN_GAIN. A run whose
    accuracy is exactly that of the base, as after no reward at all, is no peak and not sick. What is not known makes no
    run sick.

    Args:
        runs: columns final_truncated, final_entropy, base_reward, final_reward and CONTROLS, as far as they are known.
    """
    columns = ["final_truncated", "final_entropy", "base_reward", "final_reward", *CONTROLS]
    truncated, entropy, base, final, *controls = _numbers(runs, columns)
    broken = (entropy < COLLAPSED) | (base - final >= MIN_GAIN)
    collapsed = broken & (final <= np.fmax.reduce(controls))
    return pd.Series((final != base) & ((truncated > MAX_TRUNCATED) | collapsed), index=runs.index)


def _numbers(runs: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """Return columns as numbers, (columns, runs); null values, and columns that the runs lack, are NaN."""
    unknown = np.full(len(runs), math.nan)
    return np.array([runs[name].to_numpy(float, na_value=math.nan) if name in runs else unknown for name in columns])


def beyond_controls(runs: pd.DataFrame) -> pd.Series[bool]:
    """Return by model and dataset whether every method is ahead of both controls by LEAD or more.

    Args:
        runs: see `leads`.
    """
    lead = leads(runs)
    return (lead["lead"] >= LEAD).groupby([lead["model"], lead["dataset"]]).all()


def leads(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the lead of each method over the controls.

    Args:
        runs: runs of RL with the columns model, dataset, method, rank, placement, lr, status, final_reward and
            CONTROLS; sick runs do not count.

    Returns:
        One row per model, dataset and method: accuracy (the best mean over seeds at one LR, of any rank and placement),
        constant_reward, rule_reward, and lead (accuracy minus the higher control; NaN where no control is known).
    """
    *controls, rewards = _numbers(runs, [*CONTROLS, "final_reward"])
    counted = (runs["status"].eq("done") & ~is_sick(runs)).to_numpy(bool) & ~np.isnan(rewards)
    # Grouping by dictionaries is many times as fast as by pandas on the small tables of simulated runs.
    columns = [runs[name].to_numpy(object) for name in ("model", "dataset", "method", "rank", "placement", "lr")]
    columns = [np.where(pd.isna(values), np.array(None), values) for values in columns]
    by_method: dict[tuple[object, ...], dict[tuple[object, ...], list[float]]] = {}
    levels: dict[tuple[object, ...], list[list[float]]] = {}
    for place, key in enumerate(zip(*columns, strict=True)):
        by_lr = by_method.setdefault(key[:3], {})
        if counted[place]:
            by_lr.setdefault(key[3:], []).append(rewards[place])
        levels.setdefault(key[:2], []).append([control[place] for control in controls])
    rows = []
    for method, by_lr in by_method.items():
        accuracy = max(map(fmean, by_lr.values()), default=math.nan)
        level = np.fmax.reduce(levels[method[:2]])
        lead = (0.0 if math.isnan(accuracy) else accuracy) - np.fmax.reduce(level)
        rows.append((*method, accuracy, *level, lead))
    return pd.DataFrame(rows, columns=["model", "dataset", "method", "accuracy", *CONTROLS, "lead"])


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
    points = {metric: metric_points(curves, "train", metric).astype({"value": float}) for metric in metrics}
    above = runs_above_max_kl(curves)
    rows: list[dict[str, Any]] = []
    for arm, arm_runs in each_arm(runs[is_rl(runs)]):
        ids = arm_runs["run_id"]
        kl, mean, largest, above_2 = (table.loc[table["run_id"].isin(ids), "value"] for table in points.values())
        measures = {"kl_mean": kl.mean(), "kl_max": kl.abs().max(), "ratio_mean": mean.mean()}
        measures |= {"ratio_max": largest.max(), "ratio_above_2": above_2.mean()}
        counts = {"n_measured": int(ids.isin(points["kl"]["run_id"]).sum()), "n_above": int(ids.isin(above).sum())}
        rows.append(arm | {"run_ids": list(ids)} | measures | counts)
    columns = ["run_ids", "kl_mean", "kl_max", "ratio_mean", "ratio_max", "ratio_above_2", "n_measured", "n_above"]
    return arm_table(rows, columns)


def runs_above_max_kl(curves: pd.DataFrame) -> set[str]:
    """Return the run_id of each run with a step whose KL has an absolute value above MAX_KL."""
    kl = metric_points(curves, "train", "kl")
    return set(kl.loc[kl["value"].astype(float).abs() > MAX_KL, "run_id"])
