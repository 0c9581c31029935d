"""Ratios of the optimal LRs of arms, as text and as findings, and the seed noise of comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from lorabench.analysis.arms import arm_label, is_standard, with_arm_columns
from lorabench.analysis.comparison import COMPARED, NEEDED, Arm, Comparison, comparisons
from lorabench.analysis.estimate import Estimate
from lorabench.analysis.finding import Finding, decide, exponential, in_unit
from lorabench.analysis.loss_fit import Noise
from lorabench.analysis.memorisation import is_memorisation
from lorabench.analysis.rules import Rule
from lorabench.errors import UserError
from lorabench.store.checks import is_rl
from lorabench.utils.formats import fixed_interval

PAPER_RATIO = 10.0
"""The ratio of optimal LRs, LoRA over FullFT, that the paper gives."""


def fitted_noise(parts: Sequence[Comparison]) -> pd.DataFrame:
    """Return the seed noise of comparisons, as their fits have it.

    Returns:
        One row per comparison: the columns COMPARED, sigma (standard deviation of a run's final test loss without the
        effect of its seed that all arms share, in the unit of the loss; NaN if it is not known), dof (its degrees of
        freedom), n_runs (that count for the fit).
    """
    rows = [
        {
            **{name: part.arms[0][name] for name in COMPARED},
            "sigma": part.fit.sigma if part.fit.dof else math.nan,
            "dof": part.fit.dof,
            "n_runs": sum(map(len, part.fit.run_ids.values())),
        }
        for part in parts
    ]
    table = pd.DataFrame(rows, columns=[*COMPARED, "sigma", "dof", "n_runs"])
    return table.astype({"batch_size": "Int64", "steps": "Int64", "sigma": float})


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
    repeated = [part for part in comparisons(chosen, pd.DataFrame()) if part.runs["seed"].nunique() > 1]
    fits = [part.fit for part in repeated if part.fit.dof >= 1 and part.fit.sigma > 0]
    dof = sum(fit.dof for fit in fits)
    if dof < 1:
        raise UserError(f"{source}: no comparison has repeated seeds, so its seed noise is not known")
    sigma = math.sqrt(sum(fit.sigma**2 * fit.dof for fit in fits) / dof)
    number = f"{len(fits)} comparison" + ("s" if len(fits) > 1 else "")
    return Noise(sigma, dof, f"{source} (SD {sigma:.4f} nats, {dof} degrees of freedom, {number})")


def ratio_interval(log_ratio: Estimate) -> tuple[float, float]:
    """Return the 95% interval of a ratio, from the estimate of its logarithm."""
    low, high = log_ratio.interval()
    return exponential(low), exponential(high)


def in_words(log_ratio: Estimate) -> str:
    """Return a ratio with its 95% interval as text, from the estimate of its logarithm."""
    return f"{exponential(log_ratio.value):.2f} {fixed_interval(*ratio_interval(log_ratio), 2)}"


def ratio_text(comparison: Comparison, arm: Arm, other: Arm) -> str:
    """Return the ratio of two optimal LRs with its interval and both LRs as text."""
    labels, fit = (arm_label(arm), arm_label(other)), comparison.fit
    ratio = in_words(fit.log_ratio(*labels))
    both = " / ".join(f"{math.exp(fit.optima[label].value):.2g}" if label in fit.optima else "?" for label in labels)
    source = f"; seed noise from {fit.noise_source}" if fit.noise_source else ""
    return f"optimal LR {labels[0]} / {labels[1]} = {ratio} ({both}){source}"


def as_ratio(judged: Finding) -> Finding:
    """Return a finding on the logarithm of a ratio with its numbers as ratios."""
    return in_unit(judged, exponential, exponential)


def judge_ratio(comparison: Comparison, arm: Arm, other: Arm, rule: Rule, margin_rule: str = "") -> Finding:
    """Judge the ratio of the optimal LR of an arm to that of another.

    Args:
        comparison: holds both arms.
        arm: the arm of the numerator.
        other: the arm of the denominator.
        rule: the rule on the natural logarithm of the ratio.
        margin_rule: the rule that gives its margin, as text.

    Returns:
        The finding, with its numbers as ratios.
    """
    log_ratio = comparison.fit.log_ratio(arm_label(arm), arm_label(other))
    text, ids = ratio_text(comparison, arm, other), comparison.run_ids([arm, other])
    problems = comparison.problems([arm, other], resolved=True)
    return as_ratio(decide(rule, log_ratio, text, ids, problems, margin_rule))
