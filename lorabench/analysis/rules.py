"""Decision rules: from an estimate and a margin that was written down before the runs to a verdict, or to a remedy.

docs/verdicts.md explains the two rules, `Within` and `Above`. A rule also judges with a slack, by which all of its
limits lie further out, or further in if it is negative. That is the verdict if the ends of the interval lay that much
further inside or outside, and tells whether a verdict is borderline (see `finding`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lorabench.analysis.estimate import Estimate

Verdict = Literal["confirmed", "contradicted", "inconclusive", "setting not met", "not tested"]

LEVEL = 0.05
"""The largest probability of a wrong decision."""

# Quantiles of the normal distribution: a one-sided test at 5%, a two-sided test at 5%, and a power of 80%.
_ONE_SIDED, _TWO_SIDED, _POWER = 1.645, 1.960, 0.842


@dataclass(frozen=True)
class Within:
    """The claim that a number lies in a band, such as that two losses are equal; an end may be infinite.

    It is confirmed by two one-sided tests, that is if the 90% interval lies inside the band, and contradicted if the
    95% interval lies wholly outside.
    """

    low: float
    high: float

    @classmethod
    def margin(cls, margin: float, better_too: bool = False) -> Within:
        """Return the claim that a difference is 0 within a margin, or also lower if `better_too`."""
        return cls(-math.inf if better_too else -margin, margin)

    @property
    def margins(self) -> tuple[float, float]:
        """The ends of the band that confirms, or the margin and infinity."""
        return self.low, self.high

    def confirmed(self, estimate: Estimate, slack: float = 0.0) -> bool:
        """Return whether the estimate confirms the claim."""
        low, high = estimate.interval(1 - 2 * LEVEL)
        return self.low - slack <= low and high <= self.high + slack

    def against(self, estimate: Estimate, slack: float = 0.0) -> float:
        """Return the smallest level at which the estimate contradicts the claim (a p-value)."""
        draws = estimate.draws
        below, above = np.mean(draws <= self.high + slack), np.mean(draws >= self.low - slack)
        return min(1.0, 2 * float(min(below, above)))

    @property
    def size(self) -> float:
        """The margin as a length: half of a band with two ends, the distance of a single limit from 0."""
        return (self.high - self.low) / 2 if len(self._ends) == 2 else sum(map(abs, self._ends))

    @property
    def _ends(self) -> list[float]:
        return [end for end in (self.low, self.high) if math.isfinite(end)]

    def strain(self, estimate: Estimate) -> float:
        """Return how near the claim is to failing, as a share of the margin; larger is nearer."""
        ends = self._ends
        if not ends:
            return math.nan
        middle, half = float(np.mean(ends)), (max(ends) - min(ends)) / 2
        if half > 0:
            return abs(estimate.value - middle) / half
        return (estimate.value if ends == [self.high] else -estimate.value) / max(abs(middle), 1e-12)

    def deciding_error(self, estimate: Estimate) -> float:
        """Return the standard error at which there is a verdict with a power of 80%, if the estimate is the truth."""
        room = min(self.high - estimate.value, estimate.value - self.low)
        return room / (_ONE_SIDED + _POWER) if room > 0 else -room / (_TWO_SIDED + _POWER)


@dataclass(frozen=True)
class Above:
    """The claim that a number is above 0 by at least a margin; its methods are those of `Within`.

    It is confirmed if the 95% interval is above 0 and the estimate is at or above the margin. It is contradicted if the
    one-sided 95% interval lies below the margin, so that there is no effect of the least size that matters, or with a
    margin of 0 the two-sided one.
    """

    margin: float

    @property
    def margins(self) -> tuple[float, float]:
        return self.margin, math.inf

    def confirmed(self, estimate: Estimate, slack: float = 0.0) -> bool:
        return estimate.interval(1 - LEVEL)[0] > -slack and estimate.value >= self.margin - slack

    def against(self, estimate: Estimate, slack: float = 0.0) -> float:
        sides = 1 if self.margin > 0 else 2
        return min(1.0, sides * float(np.mean(estimate.draws >= self.margin - slack)))

    @property
    def size(self) -> float:
        return self.margin

    def strain(self, estimate: Estimate) -> float:
        return -estimate.value / self.margin if self.margin > 0 else -estimate.value

    def deciding_error(self, estimate: Estimate) -> float:
        if estimate.value >= self.margin:
            return estimate.value / (_TWO_SIDED + _POWER)
        return (self.margin - estimate.value) / ((_ONE_SIDED if self.margin > 0 else _TWO_SIDED) + _POWER)


Rule = Within | Above
"""The statement of a claim about a number."""


@dataclass(frozen=True)
class Margin:
    """The smallest difference that matters, and the rule that gives it."""

    value: float
    rule: str
    problem: str | None = None
    """Why the rule can't be applied; the value is then NaN."""


def gain_margin(share: float, gain: float, tuned_arm: str, rewarded: bool = False) -> Margin:
    """Return a margin that is a share, which the preset gives, of the gain from the base to a tuned arm.

    The gain is in nats per token, or in RL (`rewarded`) in accuracy; NaN if it is not known.
    """
    quantity, unit = (" in accuracy", "") if rewarded else ("", " nats")
    rule = f"{100 * share:.3g}% of the gain{quantity} from the base to {tuned_arm} ({gain:.3f}{unit})"
    if not gain > 0:
        return Margin(math.nan, rule, f"{tuned_arm} is no better than the base, so there is no gain to compare with")
    return Margin(share * gain, rule)


MANY_SEEDS = 200
"""A number of seeds above which a remedy says that seeds won't decide a claim."""


@dataclass(frozen=True)
class Remedy:
    """The cheapest thing that would decide an inconclusive claim, as far as it can be planned."""

    text: str
    seeds: int | None = None
    """The number of seeds, including those that there are."""
    around: bool = False
    """Whether the seeds are needed at the three LRs around an optimum, and not only at the best LR."""
    test_examples: int | None = None
    lrs: tuple[tuple[str, float], ...] = ()
    """LRs to add, each after the label of its arm."""


@dataclass(frozen=True)
class Problem:
    """A reason against a verdict, and what would remove it."""

    text: str
    remedy: Remedy | None = None


def cheapest(rule: Rule, estimate: Estimate) -> Remedy | None:
    """Return the least number of seeds, or else of test examples, that would decide, if the estimate is the truth."""
    if not estimate.known or estimate.n_seeds < 1:
        return None
    target = rule.deciding_error(estimate)
    if target <= 0:
        return Remedy("no number of seeds decides it: the estimate lies at the margin")
    # More seeds are enough as long as the error from test examples alone leaves room for a decision; otherwise both
    # errors get half of the variance.
    seeds_alone = estimate.example_error < target
    room = target**2 - estimate.example_error**2 if seeds_alone else target**2 / 2
    seeds = math.ceil(estimate.n_seeds * estimate.seed_error**2 / room)
    if seeds > MANY_SEEDS:
        return Remedy(f"more than {MANY_SEEDS} seeds (now {estimate.n_seeds}): the estimate lies near the margin")
    if seeds_alone:
        seeds = max(seeds, estimate.n_seeds + 1)
        return Remedy(f"{seeds} seeds (now {estimate.n_seeds})", seeds=seeds)
    examples = math.ceil(estimate.n_examples * estimate.example_error**2 / room)
    text = f"{examples} test examples (now {estimate.n_examples})"
    if seeds > estimate.n_seeds:
        return Remedy(f"{text} and {seeds} seeds (now {estimate.n_seeds})", seeds=seeds, test_examples=examples)
    return Remedy(text, test_examples=examples)
