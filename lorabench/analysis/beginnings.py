"""Beginnings of runs, judged as runs of their own: with a constant LR the first steps of a long run are a short run.

Of a beginning there are validation losses only.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.special import ndtri

from lorabench.analysis.comparison import Comparison
from lorabench.analysis.curves import metric_points
from lorabench.analysis.estimate import N_DRAWS, Estimate, normal


def at_step(runs: pd.DataFrame, curves: pd.DataFrame, step: int) -> pd.DataFrame:
    """Return the runs table as if training had ended at a step, for estimators that use final losses.

    Both final losses are the validation NLL at that step, since the test loss is measured only after the last step. The
    optimal LR is picked on the validation split anyway; the loss at that optimum is biased low by the choice, in all
    arms alike.

    Returns:
        The supervised runs with steps, status, final_valid_nll and final_test_nll as of that step. A run that diverged
        later is done, and a run that had diverged by then stays diverged. A run that ended earlier, or that has no
        validation loss at that step, is left out.
    """
    points = metric_points(curves, "validation", "nll").set_index("run_id")
    at_that_step = points.loc[points["step"] == step, "value"].groupby(level=0).first()
    loss = runs["run_id"].map(at_that_step.astype(float)).astype(float)
    loss = loss.where(loss.abs() < math.inf)
    diverged = (runs["status"] == "diverged") & loss.isna()
    if "diverged_at" in runs:
        diverged &= (runs["diverged_at"].isna() | (runs["diverged_at"] <= step)).astype(bool)
    kept = loss.notna() | diverged
    if "steps" in runs:
        kept &= (runs["steps"].isna() | (runs["steps"] >= step)).astype(bool)
    status = diverged[kept].map({True: "diverged", False: "done"})
    as_of = runs[kept].assign(steps=step, status=status, final_valid_nll=loss[kept], final_test_nll=loss[kept])
    return as_of.astype({"steps": "Int64"})


def at_end(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs table with the final validation NLL as both final losses, to compare with `at_step`."""
    return runs.assign(final_test_nll=runs["final_valid_nll"])


def coupled(short: Comparison, full: Comparison, from_short: Estimate, from_full: Estimate, name: str) -> Estimate:
    """Couple the error of a number from the losses at the end to that of one from the losses at a step of these runs.

    A run that has luck at a step has some of it at the end too, so the errors of numbers from the two fits are
    correlated as the residuals of the runs are. That correlation is taken at the lower end of its 68% interval, since
    a large one makes the difference of the numbers look precise, times the share of runs that both fits have; and no
    lower than 0. The number from the end is returned with its draws reordered so that their ranks have this
    correlation; its distribution is unchanged.
    """
    if not (from_short.known and from_full.known):
        return from_full
    residuals = pd.concat({"short": _residuals(short), "full": _residuals(full)}, axis=1)
    common = residuals.dropna()
    products = float((common["short"] * common["full"]).sum())
    squares = float((common["short"] ** 2).sum() * (common["full"] ** 2).sum())
    dof, correlation = min(short.fit.dof, full.fit.dof), 0.0
    if dof >= 2 and squares > 0:
        # No correlation above 0.999 is believed.
        lower = math.tanh(math.atanh(min(products / math.sqrt(squares), 0.999)) - 1 / math.sqrt(dof - 1))
        correlation = max(0.0, lower) * len(common) / len(residuals)
    order = np.argsort(from_short.seed_part, kind="stable")
    scores = np.empty(N_DRAWS)
    scores[order] = ndtri((np.arange(N_DRAWS) + 0.5) / N_DRAWS)
    scores = correlation * scores + math.sqrt(1 - correlation**2) * normal(f"coupled {name}")
    reordered = np.empty(N_DRAWS)
    reordered[np.argsort(scores, kind="stable")] = np.sort(from_full.seed_part)
    return replace(from_full, seed_part=reordered)


def _residuals(comparison: Comparison) -> pd.Series[float]:
    """Return by run_id the losses of a fit's runs minus its parabolas, without the mean of each seed."""
    fit, parts = comparison.fit, []
    for label, run_ids in fit.run_ids.items():
        arm_rows = comparison.rows[label].set_index("run_id").loc[list(run_ids)]
        optimum, minimum = fit.lowest[label]
        distance = np.log(arm_rows["lr"].astype(float)) - optimum
        fitted = minimum + fit.curvature[label] * distance**2
        parts.append(arm_rows[["seed"]].assign(residual=arm_rows["final_test_nll"].astype(float) - fitted))
    rows = pd.concat(parts)
    residuals: pd.Series[float] = rows["residual"] - rows.groupby("seed")["residual"].transform("mean")
    return residuals
