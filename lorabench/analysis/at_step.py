"""Short runs from long ones: with a constant LR and the same data order, a run's first steps are a short run."""

from __future__ import annotations

import math

import pandas as pd

_POINT = ["run_id", "step", "split", "metric", "value"]


def at_step(runs: pd.DataFrame, curves: pd.DataFrame, step: int) -> pd.DataFrame:
    """Return the runs table as if training had ended at a step, for estimators that use final losses.

    Both final losses are the validation NLL at that step, since the test loss is measured only after the last step.
    The optimal LR is picked on the validation split anyway; the loss at that optimum is biased low by the choice, in
    all arms alike.

    Args:
        runs: supervised runs, columns run_id, status, and any others; steps and diverged_at are optional.
        curves: columns run_id, step, split, metric, value.
        step: the step whose validation losses are read.

    Returns:
        The runs with steps, status, final_valid_nll and final_test_nll as of that step. A run that diverged later is
        done, and a run that had diverged by then stays diverged. A run that ended earlier, or that has no validation
        loss at that step, is left out.
    """
    if all(name in curves for name in _POINT):
        chosen = (curves["step"] == step) & (curves["split"] == "validation") & (curves["metric"] == "nll")
        points = curves[chosen.astype(bool)].drop_duplicates("run_id").set_index("run_id")["value"].astype(float)
    else:
        points = pd.Series(dtype=float)
    loss = runs["run_id"].map(points).astype(float)
    loss = loss.where(loss.abs() < math.inf)
    diverged = (runs["status"] == "diverged") & loss.isna()
    if "diverged_at" in runs:
        diverged &= (runs["diverged_at"].isna() | (runs["diverged_at"] <= step)).astype(bool)
    kept = loss.notna() | diverged
    if "steps" in runs:
        kept &= (runs["steps"].isna() | (runs["steps"] >= step)).astype(bool)
    as_of = runs[kept].assign(
        steps=step,
        status=diverged[kept].map({True: "diverged", False: "done"}),
        final_valid_nll=loss[kept],
        final_test_nll=loss[kept],
    )
    return as_of.astype({"steps": "Int64"})
