"""Runs as of a step: with a constant LR and one data order, the first steps of a long run are a short run."""

from __future__ import annotations

import math

import pandas as pd

_POINT = ["run_id", "step", "split", "metric", "value"]


def at_step(runs: pd.DataFrame, curves: pd.DataFrame, step: int) -> pd.DataFrame:
    """What the runs table would be had training ended at a step, so that everything made for final losses fits.

    Both final losses are the validation NLL at that step: there is no test loss on the way. The optimal LR is found
    on the validation split anyway; a loss *at* that optimum is biased low by the choice, alike in all arms.

    Args:
        runs: columns run_id, status, and what the caller needs further; with `steps` and `diverged_at` if there.
        curves: columns run_id, step, split, metric, value.
        step: at which validation losses are read.

    Returns:
        The runs with `steps` and the final losses as of that step. A run that diverged later is done; one that
        diverged by then stays diverged. A run that has no validation loss there, or ended before, is left out.
    """
    if all(name in curves for name in _POINT):
        chosen = (curves["step"] == step) & (curves["split"] == "validation") & (curves["metric"] == "nll")
        points = curves[chosen.astype(bool)].drop_duplicates("run_id").set_index("run_id")["value"].astype(float)
    else:
        points = pd.Series(dtype=float)
    loss = runs["run_id"].map(points).astype(float)
    loss = loss.where(loss.abs() < math.inf)
    gone = (runs["status"] == "diverged") & loss.isna()
    if "diverged_at" in runs:
        gone &= (runs["diverged_at"].isna() | (runs["diverged_at"] <= step)).astype(bool)
    kept = loss.notna() | gone
    if "steps" in runs:
        kept &= (runs["steps"].isna() | (runs["steps"] >= step)).astype(bool)
    as_of = runs[kept].assign(
        steps=step,
        status=gone[kept].map({True: "diverged", False: "done"}),
        final_valid_nll=loss[kept],
        final_test_nll=loss[kept],
    )
    return as_of.astype({"steps": "Int64"})
