"""The ratio of two arms' optimal learning rates."""

from __future__ import annotations

import math

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison
from lorabench.analysis.estimate import Estimate
from lorabench.analysis.finding import Finding, decide
from lorabench.analysis.rules import Rule
from lorabench.analysis.units import exponential, in_unit
from lorabench.utils.formats import fixed_interval

PAPER_RATIO = 10.0
"""The ratio of optimal LRs, LoRA over FullFT, that the paper gives."""


def ratio_interval(log_ratio: Estimate) -> tuple[float, float]:
    """Return the 95% interval of a ratio, from the estimate of its logarithm."""
    low, high = log_ratio.interval()
    return exponential(low), exponential(high)


def in_words(log_ratio: Estimate) -> str:
    """Return a ratio with its 95% interval in words, from the estimate of its logarithm."""
    return f"{exponential(log_ratio.value):.2f} {fixed_interval(*ratio_interval(log_ratio), 2)}"


def ratio_text(comparison: Comparison, arm: Arm, other: Arm) -> str:
    """Return the ratio of two optimal LRs with its interval and both LRs in words."""
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
        margin_rule: where its margin comes from, in words.

    Returns:
        The finding, with its numbers as ratios.
    """
    log_ratio = comparison.fit.log_ratio(arm_label(arm), arm_label(other))
    text, ids = ratio_text(comparison, arm, other), comparison.run_ids([arm, other])
    problems = comparison.problems([arm, other], resolved=True)
    return as_ratio(decide(rule, log_ratio, text, ids, problems, margin_rule))
