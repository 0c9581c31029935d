"""Decision rules: from an estimate and a margin that was written down before the runs to a verdict, or to a remedy
(docs/verdicts.md). A rule judges an estimate as it is, or as new runs of the same design give it (see `finding`)."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

from lorabench.analysis.estimate import N_DRAWS, POWER, Estimate
from lorabench.analysis.sequential import level, overall

Verdict = Literal[
    "confirmed",
    "right sign, below the margin",
    "contradicted",
    "not seen here",
    "inconclusive",
    "setting not met",
    "not tested",
]

DECIDED: tuple[Verdict, ...] = ("confirmed", "right sign, below the margin", "contradicted", "not seen here")
"""The verdicts that decide something."""

LEVEL = 0.05
"""The largest probability of a wrong decision, after all batches of runs together (`Estimate.looks`)."""

Bound = Literal["above", "below"]
"""From where an estimate bounds a number that is not known itself: it is an upper or a lower bound."""


class NewRuns(NamedTuple):
    """Other runs, whose estimates follow from one that is known: `shifts` are added to it, and `widths` are the errors
    over its own, (runs,) each."""

    shifts: np.ndarray
    widths: np.ndarray

    def interval(self, estimate: Estimate, level: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the lower and the upper ends of their intervals of a level, (runs,) each."""
        low, high = (self.widths * (end - estimate.value) for end in estimate.interval(level))
        return estimate.value + self.shifts + low, estimate.value + self.shifts + high

    def share_below(self, estimate: Estimate, limit: float, side: Literal["left", "right"]) -> np.ndarray:
        """Return the shares of their draws below a limit (`left`), or at most at it (`right`), (runs,)."""
        limits = estimate.value + (limit - estimate.value - self.shifts) / self.widths
        return np.asarray(np.searchsorted(estimate.ordered, limits, side=side) / N_DRAWS)


AS_IT_IS = NewRuns(np.zeros(1), np.ones(1))
"""The runs that gave the estimate."""


class Answers(NamedTuple):
    """What a rule says of a claim by the numbers of runs, (runs,) each."""

    confirmed: np.ndarray
    against: np.ndarray
    """The smallest levels, of all looks together, at which the runs contradict the claim (p-values)."""
    right_sign: np.ndarray
    """Which runs have the claimed sign if they contradict."""


@dataclass(frozen=True)
class Within:
    """The claim that a number lies in a band, such as that two losses are equal; an end may be infinite. An equality
    claims no sign (docs/verdicts.md)."""

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

    def answers(self, estimate: Estimate, runs: NewRuns = AS_IT_IS, bound: Bound | None = None) -> Answers:
        """Return what the numbers of runs say of the claim; with `bound`, they are bounds of the number from there."""
        low, high = runs.interval(estimate, 1 - 2 * level(LEVEL, estimate.looks))
        below = runs.share_below(estimate, self.high, "right")
        above = 1 - runs.share_below(estimate, self.low, "left")
        if bound == "above":
            low, below = np.full_like(low, -math.inf), np.ones_like(below)
        elif bound == "below":
            high, above = np.full_like(high, math.inf), np.ones_like(above)
        against = np.minimum(1.0, 2 * overall(np.minimum(below, above), estimate.looks))
        return Answers((self.low <= low) & (high <= self.high), against, np.zeros(len(runs.shifts), bool))

    def strain(self, estimate: Estimate) -> float:
        """Return how near the claim is to failing, as a share of the margin; larger is nearer."""
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2
        if 0 < half < math.inf:
            return abs(estimate.value - middle) / half
        if half > 0 and math.isfinite(self.high):
            return estimate.value / max(abs(self.high), 1e-12)
        return -estimate.value / max(abs(self.low), 1e-12)

    def power(self, truth: float, error: float, dof: float, tests: int, looks: int = 0) -> tuple[float, float]:
        """Return the probabilities of a confirmation and of a contradiction by an estimate of the truth with a standard
        error and its degrees of freedom, where several tests share the level of a contradiction, at the last look."""
        to_high, to_low = (self.high - truth) / error, (truth - self.low) / error
        one_sided, two_sided = (stdtrit(dof, 1 - level(alpha, looks)) for alpha in (LEVEL, LEVEL / 2 / tests))
        confirmed = stdtr(dof, to_high - one_sided) + stdtr(dof, to_low - one_sided) - 1
        contradicted = stdtr(dof, -to_high - two_sided) + stdtr(dof, -to_low - two_sided)
        return max(0.0, float(confirmed)), float(contradicted)


@dataclass(frozen=True)
class Above:
    """The claim that a number is above 0 by at least a margin (docs/verdicts.md); its methods are those of `Within`."""

    margin: float

    @property
    def margins(self) -> tuple[float, float]:
        return self.margin, math.inf

    def answers(self, estimate: Estimate, runs: NewRuns = AS_IT_IS, bound: Bound | None = None) -> Answers:
        # With few degrees of freedom the two-sided interval is the stricter one where the estimate is large.
        low, two_sided = (runs.interval(estimate, 1 - 2 * level(LEVEL / n, estimate.looks))[0] for n in (1, 2))
        positive = two_sided > 0
        above_half = (low >= self.margin / 2) | (self.margin <= 0)
        confirmed = (estimate.value + runs.shifts >= self.margin) & above_half & positive
        above = overall(1 - runs.share_below(estimate, self.margin, "left"), estimate.looks)
        if bound == "above":
            confirmed, positive = np.zeros_like(confirmed), np.zeros_like(positive)
        elif bound == "below":
            above = np.ones_like(above)
        return Answers(confirmed, np.minimum(1.0, above if self.margin > 0 else 2 * above), positive)

    def strain(self, estimate: Estimate) -> float:
        return -estimate.value / self.margin if self.margin > 0 else -estimate.value

    def power(self, truth: float, error: float, dof: float, tests: int, looks: int = 0) -> tuple[float, float]:
        shares = 1, 2, (1 if self.margin > 0 else 2) * tests
        levels = np.array([level(LEVEL / share, looks) for share in shares])
        one_sided, two_sided, contradicts = stdtrit(dof, 1 - levels).tolist()
        above_half = self.margin / 2 + one_sided * error if self.margin > 0 else 0.0
        least = max(self.margin, above_half, two_sided * error)
        contradicted = stdtr(dof, (self.margin - truth) / error - contradicts)
        return float(stdtr(dof, (truth - least) / error)), float(contradicted)


Rule = Within | Above
"""The statement of a claim about a number."""


@dataclass(frozen=True)
class Margin:
    """The smallest difference that matters, and the rule that gives it."""

    value: float
    rule: str
    problem: str | None = None
    """Why the margin decides nothing, if so."""

    @property
    def problems(self) -> list[Problem]:
        """Why the margin decides nothing, if so."""
        if self.problem or not math.isfinite(self.value):
            return [Problem(self.problem or "the margin is not known")]
        return []


MANY_SEEDS = 200
"""A number of seeds above which a remedy says that seeds won't decide a claim; below, of further batches."""

MANY_BATCHES = 30


@dataclass(frozen=True)
class Plan:
    """What a number of seeds would decide, if an estimate is the truth."""

    rule: Rule
    value: float
    seed_error: float
    """The standard error from the seeds that there are, and its degrees of freedom below."""
    dof: float
    example_error: float
    n_seeds: int
    n_examples: int
    n_groups: int
    tests: int = 1
    """The number of comparisons that share the level of a contradiction."""
    open: int = 1
    """The number of comparisons that need more seeds; a confirmation needs all of them."""
    looks: int = 0
    """The number of batches that the seeds come from, after each of which there is a test, and below whether a further
    batch has other test examples."""
    renewed: bool = False

    def decides(self, n_seeds: float, more_examples: float = 1.0) -> bool:
        """Return whether a number of seeds, and so many times as many examples, decide with a probability of POWER."""
        seeds, examples = self.seed_error**2 * self.n_seeds / n_seeds, self.example_error**2 / more_examples
        error = max(math.sqrt(seeds + examples), 1e-12)
        # More seeds and more groups have as many more degrees of freedom (Welch, Satterthwaite).
        dofs = self.dof * (n_seeds - 1) / max(self.n_seeds - 1, 1), max(self.n_groups * more_examples - 1, 1)
        dof = error**4 / max(seeds**2 / dofs[0] + examples**2 / dofs[1], 1e-48)
        looks = math.ceil(self.looks * min(n_seeds / self.n_seeds, MANY_SEEDS)) if self.looks else 0
        confirmed, contradicted = self.rule.power(self.value, error, min(dof, 1e9), self.tests, looks)
        return confirmed >= POWER ** (1 / self.open) or contradicted >= POWER

    def remedy(self) -> Remedy:
        """Return the least number of seeds, or else of test examples, that decides; of batches, their number."""
        if self.looks:
            for further in range(1, MANY_BATCHES + 1):
                factor = (self.looks + further) / self.looks
                if self.decides(self.n_seeds * factor, factor if self.renewed else 1.0):
                    return Remedy(f"about {further} more batches", seeds=math.ceil(self.n_seeds * factor), plan=self)
            return Remedy(f"more than {MANY_BATCHES} further batches at this error", plan=self)

        def least_seeds(more_examples: float) -> int | None:
            numbers = range(self.n_seeds + 1, MANY_SEEDS + 1)
            at = bisect_left(numbers, True, key=lambda n_seeds: self.decides(n_seeds, more_examples))
            return numbers[at] if at < len(numbers) else None

        if not self.decides(1e12, 1e24):
            return Remedy("no number of seeds decides it: the estimate lies at the margin", plan=self)
        now, seeds = f"(now {self.n_seeds})", least_seeds(1.0)
        if seeds is not None:
            return Remedy(f"{seeds} seeds {now}", seeds=seeds, plan=self)
        if not self.decides(MANY_SEEDS, 1e24):
            return Remedy(f"more than {MANY_SEEDS} seeds {now}: the estimate lies near the margin", plan=self)
        # The error from test examples alone is too large. Both errors get half of the variance that decides, or the
        # error from examples what most seeds leave.
        factors = 1.02 ** np.arange(2500)
        more = float(factors[bisect_left(factors, True, key=lambda more: self.decides(1e12, more))]) * 2
        if not self.decides(MANY_SEEDS, more):
            more = float(factors[bisect_left(factors, True, key=lambda more: self.decides(MANY_SEEDS, more))])
        examples = math.ceil(self.n_examples * more)
        text = f"{examples} test examples (now {self.n_examples})"
        if self.n_groups < self.n_examples:
            text = f"{math.ceil(self.n_groups * more)} groups of test examples (now {self.n_groups})"
        seeds = least_seeds(more)
        if self.decides(self.n_seeds, more) or seeds is None:
            return Remedy(text, test_examples=examples, plan=self)
        return Remedy(f"{text} and {seeds} seeds {now}", seeds=seeds, test_examples=examples, plan=self)


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
    plan: Plan | None = None
    """What the number of seeds or examples follows from, so that other comparisons can be added."""


@dataclass(frozen=True)
class Problem:
    """A reason against a verdict, and what would remove it."""

    text: str
    remedy: Remedy | None = None
    bound: Bound | None = None
    """From where the estimate bounds the number in spite of it, if so."""

    def of_subtracted(self) -> Problem:
        """Return the problem of a difference from which the number is subtracted."""
        return replace(self, bound={"above": "below", "below": "above", None: None}[self.bound])


def cheapest(rule: Rule, estimate: Estimate) -> Remedy | None:
    """Return the least number of seeds, or else of test examples, that would decide, if the estimate is the truth."""
    if not estimate.known or estimate.n_seeds < 1:
        return None
    numbers = estimate.n_seeds, estimate.n_examples, estimate.n_groups or estimate.n_examples
    shape = student_shape(estimate.seed_part)
    looks, renewed = estimate.looks, estimate.renewed
    return Plan(rule, estimate.value, *shape, estimate.example_error, *numbers, looks=looks, renewed=renewed).remedy()


_DOFS = np.geomspace(1, 1000, 200)
_TAILS = stdtrit(_DOFS, 0.975) / stdtrit(_DOFS, 0.8413)


def student_shape(draws: np.ndarray) -> tuple[float, float]:
    """Return the standard error and degrees of freedom, at most 1000, of the t distribution with the width of the
    central 68% and 95% of draws."""
    low, central_low, central_high, high = np.quantile(draws, [0.025, 0.1587, 0.8413, 0.975]).tolist()
    if not central_high > central_low:
        return 0.0, float(_DOFS[-1])
    tail = (high - low) / (central_high - central_low)
    # The wider the tails, the fewer degrees of freedom.
    dof = float(np.interp(-tail, -_TAILS, _DOFS))
    return (central_high - central_low) / 2 / float(stdtrit(dof, 0.8413)), dof
