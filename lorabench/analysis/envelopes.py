"""Envelopes: at every step the lowest loss over learning rates, as the paper's figure 1 draws them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pandas as pd

from lorabench.analysis.arms import arm_table, check_runs, each_arm, first_seed


def envelopes(runs: pd.DataFrame, curves: pd.DataFrame, split: str = "validation", metric: str = "nll") -> pd.DataFrame:
    """Pointwise minimum over the LR grid of the first seed. A diverged run counts for as long as it was finite.

    Args:
        runs: columns run_id, ARM, lr, seed.
        curves: columns run_id, step, split, metric, value, and examples and tokens, which may be missing; null values
            are left out.
        split: of the curves.
        metric: of the curves.

    Returns:
        One row per arm and step, ascending: step, examples, tokens, value (in the metric's unit; NLL is nats per
        token), lr and run_id (of the run that is lowest there), n_runs (runs that have a value there).

    Raises:
        UserError: see `check_runs`.
    """
    check_runs(runs)
    columns = ["step", "examples", "tokens", "value", "lr", "run_id", "n_runs"]
    if curves.empty:
        return arm_table([], columns)
    chosen = curves[(curves["split"] == split) & (curves["metric"] == metric) & curves["value"].notna()]
    chosen = chosen.reindex(columns=["run_id", "step", "examples", "tokens", "value"])
    rows: list[dict[Hashable, Any]] = []
    for arm, of_arm in each_arm(runs):
        # Of equal values the lower LR, whatever the table's order.
        points = chosen.merge(first_seed(of_arm)[["run_id", "lr"]], on="run_id").sort_values(["step", "value", "lr"])
        points["n_runs"] = points.groupby("step")["run_id"].transform("size")
        rows += [
            dict[Hashable, Any](arm) | point for point in points.drop_duplicates("step")[columns].to_dict("records")
        ]
    return arm_table(rows, columns)
