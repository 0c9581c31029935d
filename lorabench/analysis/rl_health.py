"""Whether RL has learned the task and not a shortcut, and whether its policies are healthy.

A policy that gives one answer to all problems, or follows a cheap rule, solves no problem, but may have a peak over
learning rates as any other. The accuracies of the best constant answer and of the best cheap rule are the controls of a
problem set (see `lorabench.data.controls`). The rules of this module are the only place that compares runs with them.
"""

from __future__ import annotations

import pandas as pd

LEAD = 0.15
"""The least lead in test accuracy over both controls with which a method counts as having learned the task."""

MAX_TRUNCATED = 0.1
"""The share of responses cut off at the end of training above which a run is sick."""

COLLAPSED = 0.02
"""The entropy in nats per token below which a policy hardly samples more than one response."""

CONTROLS = {"constant_reward": "best constant answer", "rule_reward": "best cheap rule"}
"""The columns of `runs` with the accuracies of the controls, and their names."""


def is_sick(runs: pd.DataFrame) -> pd.Series[bool]:
    """Return which runs of RL ended sick, so that their accuracy is no peak.

    A run is sick if more than MAX_TRUNCATED of its last responses are cut off, or if its entropy is below COLLAPSED and
    its test accuracy not above both controls. A run whose accuracy is exactly that of the base, as after no reward at
    all, is no peak and not sick. What is not known makes no run sick.

    Args:
        runs: columns final_truncated, final_entropy, base_reward, final_reward and CONTROLS, as far as they are known.
    """
    columns = ["final_truncated", "final_entropy", "base_reward", "final_reward", *CONTROLS]
    numbers = runs.reindex(columns=columns).astype(float)
    level = numbers[list(CONTROLS)].max(axis=1)
    collapsed = (numbers["final_entropy"] < COLLAPSED) & (numbers["final_reward"] <= level)
    moved = numbers["final_reward"] != numbers["base_reward"]
    return moved & ((numbers["final_truncated"] > MAX_TRUNCATED) | collapsed)


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
    runs = runs.assign(**{name: runs.reindex(columns=[name])[name].astype(float) for name in CONTROLS})
    group = ["model", "dataset", "method"]
    levels = runs.groupby(["model", "dataset"], as_index=False)[list(CONTROLS)].max()
    healthy = runs[runs["status"].eq("done") & ~is_sick(runs)].astype({"final_reward": float})
    by_lr = healthy.groupby([*group, "rank", "placement", "lr"], dropna=False, as_index=False)["final_reward"].mean()
    best = by_lr.groupby(group)["final_reward"].max().rename("accuracy")
    table = runs[group].drop_duplicates().merge(best, how="left", on=group).merge(levels, on=["model", "dataset"])
    return table.assign(lead=table["accuracy"].fillna(0.0) - table[list(CONTROLS)].max(axis=1))
