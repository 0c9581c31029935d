"""The ratio of two arms' optimal learning rates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison
from lorabench.analysis.finding import (
    Finding,
    finding,
    interval_text,
    noise_problems,
    within,
)

RATIO_BAND = (6.0, 16.0)
"""LR ratios that count as the paper's 10: within a factor of 1.6."""


QUANTILES = [0.025, 0.975]


@dataclass(frozen=True)
class LrRatio:
    """The ratio of two arms' optimal LRs, and why it may not count."""

    estimate: float
    draws: np.ndarray
    text: str
    problems: list[str]

    @property
    def interval(self) -> tuple[float, float]:
        """95% bootstrap interval."""
        low, high = np.quantile(self.draws, QUANTILES).tolist()
        return low, high

    @property
    def short(self) -> str:
        return f"{self.estimate:.2f} {interval_text(*self.interval, 2)}"


def lr_ratio(comparison: Comparison, arm: Arm, other: Arm) -> LrRatio:
    """Optimal LR of an arm over that of another."""
    arms = [arm, other]
    optima = [comparison.optima[arm_label(one)] for one in arms]
    draws = [comparison.draws[arm_label(one)] for one in arms]
    problems = noise_problems(*comparison.sigma("validation")) + comparison.edge_problems(arms)
    problems += [
        f"{arm_label(found)}: optimum not resolved by its grid"
        for found in optima
        if not problems and not found["resolved"]
    ]
    ratio = LrRatio(float(optima[0]["lr_opt"] / optima[1]["lr_opt"]), draws[0] / draws[1], "", problems)
    text = (
        f"optimal LR {arm_label(arm)} / {arm_label(other)} = {ratio.short} "
        f"({optima[0]['lr_opt']:.2g} / {optima[1]['lr_opt']:.2g})"
    )
    return replace(ratio, text=text)


def judge_ratio(
    comparison: Comparison,
    arm: Arm,
    other: Arm,
    band: tuple[float, float],
    expected: float,
    signed: bool = False,
) -> Finding:
    """Whether the ratio of two optimal LRs lies in a band; `signed` where only a larger ratio strains the claim."""
    ratio = lr_ratio(comparison, arm, other)
    strain = math.log(ratio.estimate / expected) if ratio.estimate > 0 else math.nan
    return finding(
        comparison.of([arm, other])["run_id"],
        ratio.text,
        within(*ratio.interval, band),
        ratio.problems,
        ratio.estimate,
        ratio.interval,
        strain if signed else abs(strain),
    )
