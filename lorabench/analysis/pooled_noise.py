"""Seed noise from tables of other runs, for comparisons with one seed."""

from __future__ import annotations

import math

import pandas as pd

from lorabench.analysis.arms import is_standard, with_arm_columns
from lorabench.analysis.comparison import NEEDED, Comparison, comparisons
from lorabench.analysis.loss_fit import Noise
from lorabench.analysis.memorisation import is_memorisation
from lorabench.errors import UserError
from lorabench.store.checks import is_rl


def pooled_noise(runs: pd.DataFrame, source: str) -> Noise:
    """Return the seed noise of supervised runs: each comparison's variance, weighted by its degrees of freedom.

    The noise of a comparison is that of its `LossFit`: the standard deviation of a run's final test loss without the
    effect of its seed that all arms share. Random facts are left out, since the loss on memorized text varies far more.

    Args:
        runs: the table `runs`.
        source: where the runs are from, for the reasons of verdicts.

    Raises:
        UserError: the table lacks a column, or no comparison has two seeds.
    """
    if missing := [name for name in NEEDED if name not in runs]:
        raise UserError(f"{source}: the runs table has no column {', '.join(missing)}, so its seed noise is not known")
    runs = with_arm_columns(runs)
    chosen = runs[~is_rl(runs) & is_standard(runs) & ~is_memorisation(runs)]
    measured = [part for part in comparisons(chosen, pd.DataFrame()) if _has_noise(part)]
    dof = sum(part.fit.dof for part in measured)
    if dof < 1:
        raise UserError(f"{source}: no comparison has repeated seeds, so its seed noise is not known")
    sigma = math.sqrt(sum(part.fit.sigma**2 * part.fit.dof for part in measured) / dof)
    number = f"{len(measured)} comparison" + ("s" if len(measured) > 1 else "")
    return Noise(sigma, dof, f"{source} (SD {sigma:.4f} nats, {dof} degrees of freedom, {number})")


def _has_noise(comparison: Comparison) -> bool:
    return len(set(comparison.runs["seed"])) > 1 and comparison.fit.dof >= 1 and comparison.fit.sigma > 0
