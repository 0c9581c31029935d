"""Whether RL has learned the task and not a shortcut, and whether its policies are healthy.

A policy that gives one answer to all problems, or follows a cheap rule, solves no problem, but may have a peak over
learning rates as any other. The accuracies of the best constant answer and of the best cheap rule are the controls of a
problem set (see `lorabench.data.controls`). The rules of this module are the only place that compares runs with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np
import pandas as pd

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

_METHOD, _SETTING = ("model", "dataset", "method"), ("rank", "placement", "lr")


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
    columns = [runs[name].to_numpy(object).copy() for name in (*_METHOD, *_SETTING)]
    for values in columns:
        values[pd.isna(values)] = None
    by_lr: dict[tuple[object, ...], dict[tuple[object, ...], list[float]]] = {}
    levels: dict[tuple[object, ...], list[np.ndarray]] = {}
    for place, key in enumerate(zip(*columns, strict=True)):
        of_method = by_lr.setdefault(key[: len(_METHOD)], {})
        if counted[place]:
            of_method.setdefault(key[len(_METHOD) :], []).append(rewards[place])
        levels.setdefault(key[:2], []).append(np.array([control[place] for control in controls]))
    rows = []
    for method, of_method in by_lr.items():
        accuracy = max(map(fmean, of_method.values()), default=math.nan)
        level = np.fmax.reduce(levels[method[:2]])
        lead = (0.0 if math.isnan(accuracy) else accuracy) - np.fmax.reduce(level)
        rows.append((*method, accuracy, *level, lead))
    return pd.DataFrame(rows, columns=[*_METHOD, "accuracy", *CONTROLS, "lead"])
