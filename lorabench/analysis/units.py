"""Findings in another unit, such as a ratio that was judged by its logarithm."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from lorabench.analysis.finding import Finding

Unit = Callable[[float], float]
"""A monotonic function from the unit of a rule to that of the reader."""


def in_unit(judged: Finding, unit: Unit, of_difference: Unit | None = None) -> Finding:
    """Return a finding with its numbers in another unit.

    Args:
        judged: the finding in the unit of its rule.
        unit: gives the estimate, its interval and the margin in the other unit; if it decreases, ends are exchanged.
        of_difference: gives the detectable effect in the other unit; by default it is unchanged, as for a shift.
    """
    low, high = sorted((unit(judged.ci_low), unit(judged.ci_high)))
    margin_low, margin_high = sorted((unit(judged.margin_low), unit(judged.margin_high)))
    return replace(
        judged,
        estimate=unit(judged.estimate),
        ci_low=low,
        ci_high=high,
        margin_low=margin_low,
        margin_high=margin_high,
        detectable=of_difference(judged.detectable) if of_difference else judged.detectable,
    )


def exponential(logarithm: float) -> float:
    """Return e to a power, or infinity where it is too large for a float."""
    return math.exp(logarithm) if not logarithm >= 700 else math.inf
