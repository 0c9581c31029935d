"""The ratio of two arms' optimal learning rates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison
from lorabench.analysis.finding import Finding, finding, noise_problems, within
from lorabench.utils.formats import fixed_interval

PAPER_RATIO = 10.0
"""The ratio of optimal LRs, LoRA over FullFT, that the paper gives."""

RATIO_BAND = (6.0, 16.0)
"""The LR ratios that count as PAPER_RATIO: all within a factor of 1.6 of it."""

QUANTILES = [0.025, 0.975]
"""The ends of a 95% interval."""


@dataclass(frozen=True)
class LrRatio:
    """The ratio of the optimal LRs of two arms, and the reasons why it does not count."""

    estimate: float
    draws: np.ndarray
    """Bootstrap draws of the ratio."""
    text: str
    """The ratio and both LRs in words."""
    problems: list[str]
    """Why the ratio does not count; empty if both optima are resolved."""

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% bootstrap interval."""
        low, high = np.quantile(self.draws, QUANTILES).tolist()
        return low, high

    @property
    def short(self) -> str:
        """The ratio with its interval."""
        return f"{self.estimate:.2f} {fixed_interval(*self.interval, 2)}"


def lr_ratio(comparison: Comparison, arm: Arm, other: Arm) -> LrRatio:
    """Compute the ratio of the optimal LR of an arm to that of another."""
    arms = [arm, other]
    labels = [arm_label(arm), arm_label(other)]
    optima = [comparison.optima[label] for label in labels]
    draws = [comparison.draws[label] for label in labels]
    problems = noise_problems(*comparison.sigma("validation")) + comparison.edge_problems(arms)
    problems += [
        f"{arm_label(optimum)}: optimum not resolved by its grid"
        for optimum in optima
        if not problems and not optimum["resolved"]
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
    """Judge whether the ratio of the optimal LR of an arm to that of another lies in a band.

    Args:
        comparison: holds both arms.
        arm: the arm of the numerator.
        other: the arm of the denominator.
        band: the ratios that confirm.
        expected: the ratio from which the strain on the claim is measured.
        signed: whether only a larger ratio than `expected` strains the claim.
    """
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
