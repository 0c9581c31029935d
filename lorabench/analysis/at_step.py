"""Short runs from long ones: with a constant LR and the same data order, a run's first steps are a short run."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.special import ndtri

from lorabench.analysis.comparison import Comparison
from lorabench.analysis.curves import metric_points
from lorabench.analysis.estimate import N_DRAWS, Estimate, normal

_MOST = 0.999
"""The largest correlation of residuals that is believed."""


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
    points = metric_points(curves, "validation", "nll")
    at_that_step = points[points["step"] == step].drop_duplicates("run_id").set_index("run_id")["value"]
    loss = runs["run_id"].map(at_that_step.astype(float)).astype(float)
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


def at_end(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs table with the final validation NLL as both final losses, to compare with `at_step`."""
    return runs.assign(final_test_nll=runs["final_valid_nll"])


def coupled(
    short: Comparison, full: Comparison, of_short: Estimate, of_full: Estimate, name: str
) -> tuple[Estimate, Estimate]:
    """Couple the errors of two numbers, one from the losses at a step and one from those at the end of the same runs.

    A run that has luck at a step has some of it at the end too, so the errors of numbers from the two fits are
    correlated as the residuals of the runs are. That correlation is taken at the lower end of its 68% interval, since
    a large one makes the difference of the numbers look precise, times the share of runs that both fits have; and no
    lower than 0. The draws of the second number are reordered so that their ranks have this correlation.

    Returns:
        Both numbers, each with the same distribution as before.
    """
    if not (of_short.known and of_full.known):
        return of_short, of_full
    residuals = pd.concat({"short": _residuals(short), "full": _residuals(full)}, axis=1)
    common = residuals.dropna()
    products = float((common["short"] * common["full"]).sum())
    squares = float((common["short"] ** 2).sum() * (common["full"] ** 2).sum())
    dof, correlation = min(short.fit.dof, full.fit.dof), 0.0
    if dof >= 2 and squares > 0:
        lower = math.tanh(math.atanh(min(products / math.sqrt(squares), _MOST)) - 1 / math.sqrt(dof - 1))
        correlation = max(0.0, lower) * len(common) / len(residuals)
    order = np.argsort(of_short.seed_part, kind="stable")
    scores = np.empty(N_DRAWS)
    scores[order] = ndtri((np.arange(N_DRAWS) + 0.5) / N_DRAWS)
    scores = correlation * scores + math.sqrt(1 - correlation**2) * normal(f"coupled {name}")
    reordered = np.empty(N_DRAWS)
    reordered[np.argsort(scores, kind="stable")] = np.sort(of_full.seed_part)
    return of_short, replace(of_full, seed_part=reordered)


def _residuals(comparison: Comparison) -> pd.Series[float]:
    """Return by run_id the losses of a fit's runs minus its parabolas, without the mean of each seed."""
    fit, parts = comparison.fit, []
    for label, run_ids in fit.run_ids.items():
        of_arm = comparison.rows[label]
        of_arm = of_arm[of_arm["run_id"].isin(run_ids)].set_index("run_id")
        distance = np.log(of_arm["lr"].astype(float)) - fit.optima[label].value
        fitted = fit.minima[label].value + fit.curvature[label] * distance**2
        parts.append(of_arm[["seed"]].assign(residual=of_arm["final_test_nll"].astype(float) - fitted))
    if not parts:
        return pd.Series(dtype=float)
    rows = pd.concat(parts)
    residuals: pd.Series[float] = rows["residual"] - rows.groupby("seed")["residual"].transform("mean")
    return residuals
