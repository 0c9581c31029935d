"""Findings: the verdict on a claim with its numbers, its reason and the runs behind it.

docs/verdicts.md explains the five verdicts. A verdict is borderline if it would be another one with the ends of all
intervals moved by a tenth of their margins, all to the side of the claim or all away from it. The margin is the `size`
of the rule, in logarithms for ratios; where that is 0, half of the 95% interval stands for it. The numbers alone move:
reasons against a verdict stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lorabench.analysis.estimate import Estimate
from lorabench.analysis.rules import LEVEL, Problem, Remedy, Rule, Verdict, cheapest
from lorabench.utils.formats import fixed_interval

MIN_SEEDS = 3
"""The number of seeds that a verdict on a difference needs."""

MOVED = 0.1
"""The share of a margin by which the ends of intervals move to tell whether a verdict is borderline."""

SEVERITY: tuple[Verdict, ...] = ("not tested", "setting not met", "confirmed", "inconclusive", "contradicted")


class Outcome(NamedTuple):
    """What an interval decides; see `Finding`."""

    verdict: Verdict
    against: float


@dataclass(frozen=True)
class Finding:
    """The verdict of one comparison, or of several together, on a claim."""

    verdict: Verdict
    reason: str
    estimate: float = math.nan
    ci_low: float = math.nan
    """Lower end of the 95% interval."""
    ci_high: float = math.nan
    strain: float = -math.inf
    """How near the claim is to failing (larger is nearer); of findings with the same verdict it picks the one shown."""
    run_ids: tuple[str, ...] = ()
    margin_low: float = math.nan
    """Lower end of the band that confirms, or the smallest difference that does."""
    margin_high: float = math.nan
    margin_rule: str = ""
    """The rule that gives the margin, as text."""
    detectable: float = math.nan
    """The smallest effect that would have been seen with a probability of 80%."""
    against: float = 0.0
    """The smallest level at which the numbers contradict the claim, corrected for the number of comparisons; 0 for a
    finding without an interval."""
    remedy: Remedy | None = None
    """What would decide an inconclusive claim."""
    moved: tuple[Outcome, ...] = ()
    """The outcomes if all ends were moved to the side of the claim, and away from it; empty if they decide nothing."""

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """The outcomes with the ends as they are, moved to the side of the claim, and moved away from it."""
        as_they_are = Outcome(self.verdict, self.against)
        return as_they_are, *(self.moved or (as_they_are, as_they_are))

    @property
    def borderline(self) -> bool:
        """Whether the verdict would be another if the ends were moved."""
        return any(outcome.verdict != self.verdict for outcome in self.outcomes)

    def with_outcomes(self, outcomes: Iterable[Outcome]) -> Finding:
        """Return the finding with other outcomes, in the order of `outcomes`."""
        as_they_are, *moved = outcomes
        return replace(self, **as_they_are._asdict(), moved=tuple(moved))


class UnjudgedError(Exception):
    """A claim can't be judged; the exception carries the finding that says why."""

    def __init__(self, verdict: Verdict, reason: str, remedy: Remedy | None = None) -> None:
        super().__init__(reason)
        self.finding = Finding(verdict, reason, remedy=remedy)


def decide(
    rule: Rule,
    estimate: Estimate,
    text: str,
    run_ids: Iterable[str],
    problems: Sequence[Problem] = (),
    margin_rule: str = "",
) -> Finding:
    """Apply a rule to an estimate.

    Args:
        rule: what the claim says about the number.
        estimate: the number with its error; if the error is not known, the finding is inconclusive.
        text: the numbers as text.
        run_ids: ids of the runs behind it, in any order; ids may repeat.
        problems: reasons against a verdict; with any, the finding is inconclusive.
        margin_rule: the rule that gives the margin, as text.
    """
    problems, known = list(problems), estimate.known
    if not known and not problems:
        problems.append(Problem("the error of the estimate is not known", Remedy(f"{MIN_SEEDS} seeds", MIN_SEEDS)))
    low, high = estimate.interval() if known else (math.nan, math.nan)
    judged = replace(
        finding(run_ids, text, "inconclusive", problems, estimate.value, (low, high), rule.strain(estimate)),
        margin_low=rule.margins[0],
        margin_high=rule.margins[1],
        margin_rule=margin_rule,
        detectable=estimate.detectable if known else math.nan,
        against=rule.against(estimate) if known else 1.0,
    )
    if problems:
        return judged

    def outcome(slack: float) -> Outcome:
        against = rule.against(estimate, slack)
        if rule.confirmed(estimate, slack):
            return Outcome("confirmed", against)
        return Outcome("contradicted" if against <= LEVEL else "inconclusive", against)

    slack = MOVED * (rule.size or (high - low) / 2) if high > low else 0.0
    judged = judged.with_outcomes([outcome(0.0), outcome(slack), outcome(-slack)])
    # A contradiction may turn inconclusive as one of several (see `worst`).
    return judged if judged.verdict == "confirmed" else replace(judged, remedy=cheapest(rule, estimate))


def finding(
    run_ids: Iterable[str],
    text: str,
    verdict: Verdict,
    problems: Sequence[Problem] = (),
    estimate: float = math.nan,
    interval: tuple[float, float] = (math.nan, math.nan),
    strain: float = -math.inf,
) -> Finding:
    """Build a finding whose verdict does not follow from an `Estimate`; with any problem it is inconclusive.

    See `decide` for the arguments; `interval` is the 95% interval of the number that was judged.
    """
    return Finding(
        verdict="inconclusive" if problems else verdict,
        reason="; ".join([text, *(problem.text for problem in problems)]),
        estimate=estimate,
        ci_low=interval[0],
        ci_high=interval[1],
        strain=-math.inf if math.isnan(strain) else strain,
        run_ids=tuple(sorted(set(run_ids))),
        remedy=next((problem.remedy for problem in problems if problem.remedy), None),
    )


def worst(findings: Sequence[Finding]) -> Finding:
    """Return the finding that decides over several: contradicted before inconclusive before confirmed, then by strain.

    `setting not met` and `not tested` decide only if no finding has another verdict. With k findings that have a
    verdict, one contradicts at the k-th part of the level only (see `rules`).
    """
    ways = [_worst(outcomes, findings) for outcomes in zip(*(judged.outcomes for judged in findings), strict=True)]
    return findings[ways[0][0]].with_outcomes(outcome for _, outcome in ways)


def _worst(outcomes: Sequence[Outcome], findings: Sequence[Finding]) -> tuple[int, Outcome]:
    """Return the number of the outcome that decides over several, and that outcome as corrected for their number."""
    tested = sum(outcome.verdict in ("confirmed", "inconclusive", "contradicted") for outcome in outcomes)
    verdicts: list[Verdict] = [
        "inconclusive" if outcome.verdict == "contradicted" and outcome.against > LEVEL / tested else outcome.verdict
        for outcome in outcomes
    ]
    decisive = max(range(len(outcomes)), key=lambda at: (SEVERITY.index(verdicts[at]), findings[at].strain))
    # A finding may be one of several in turn, so that the corrections multiply.
    return decisive, Outcome(verdicts[decisive], min(1.0, outcomes[decisive].against * max(1, tested)))


def without(judged: Finding, *verdicts: Verdict) -> Finding:
    """Return a finding in which some verdicts are inconclusive instead."""
    return judged.with_outcomes(
        Outcome("inconclusive" if verdict in verdicts else verdict, against) for verdict, against in judged.outcomes
    )


def together(findings: Sequence[Finding]) -> Finding:
    """Return the finding that decides over several, with the reasons and the runs of all."""
    decisive = worst(findings)
    reasons = [decisive.reason, *(judged.reason for judged in findings if judged.reason != decisive.reason)]
    run_ids = tuple(sorted({run_id for judged in findings for run_id in judged.run_ids}))
    return replace(decisive, reason="; ".join(reasons), run_ids=run_ids)


def nats(estimate: Estimate) -> str:
    """Format a difference of losses, in nats per token."""
    return f"{estimate.value:.4f} nats {fixed_interval(*estimate.interval(), 4)}"


def error_rate(estimate: Estimate) -> str:
    """Format a difference of error rates."""
    return f"{estimate.value:+.4f} in error rate {fixed_interval(*estimate.interval(), 4)}"


Unit = Callable[[float], float]
"""A monotonic function from the unit of a rule to that of the reader."""


def in_unit(judged: Finding, unit: Unit, unit_of_difference: Unit | None = None) -> Finding:
    """Return a finding with its numbers in another unit.

    Args:
        judged: the finding in the unit of its rule.
        unit: gives the estimate, its interval and the margin in the other unit; if it decreases, ends are exchanged.
        unit_of_difference: gives the detectable effect in the other unit; by default it is unchanged, as for a shift.
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
        detectable=unit_of_difference(judged.detectable) if unit_of_difference else judged.detectable,
    )


def exponential(logarithm: float) -> float:
    """Return e to a power, or infinity where it is too large for a float."""
    return math.exp(logarithm) if not logarithm >= 700 else math.inf
