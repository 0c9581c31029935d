"""Envelopes: the lowest loss over learning rates at every step, as in the paper's figure 1."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pandas as pd

from lorabench.analysis.arms import arm_table, check_runs, each_arm, first_seed


def envelopes(runs: pd.DataFrame, curves: pd.DataFrame, split: str = "validation", metric: str = "nll") -> pd.DataFrame:
    """Compute each arm's pointwise minimum of a metric over its LR grid (the runs with its first seed).

    A diverged run counts up to its last finite value.

    Args:
        runs: columns run_id, ARM, lr, seed.
        curves: columns run_id, step, split, metric, value, and optionally examples and tokens; null values are left
            out.
        split: the split of the curves, such as `validation`.
        metric: the metric of the curves, such as `nll`.

    Returns:
        One row per arm and step, ascending: step, examples and tokens (seen by that step), value (in the metric's
        unit; NLL is in nats per token), lr and run_id (of the run with the lowest value there), n_runs (number of runs
        with a value there).

    Raises:
        UserError: See `check_runs`.
    """
    check_runs(runs)
    columns = ["step", "examples", "tokens", "value", "lr", "run_id", "n_runs"]
    if curves.empty:
        return arm_table([], columns)
    chosen = curves[(curves["split"] == split) & (curves["metric"] == metric) & curves["value"].notna()]
    chosen = chosen.reindex(columns=["run_id", "step", "examples", "tokens", "value"])
    rows: list[dict[Hashable, Any]] = []
    for arm, of_arm in each_arm(runs):
        # Sorting by LR breaks ties, so that the result does not depend on the order of the table.
        points = chosen.merge(first_seed(of_arm)[["run_id", "lr"]], on="run_id").sort_values(["step", "value", "lr"])
        points["n_runs"] = points.groupby("step")["run_id"].transform("size")
        rows += [
            dict[Hashable, Any](arm) | point for point in points.drop_duplicates("step")[columns].to_dict("records")
        ]
    return arm_table(rows, columns)
