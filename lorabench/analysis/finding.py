"""Findings: the verdict on a claim with its numbers, its reason and the runs behind it.

The verdicts are:

- `confirmed`: The claim holds, beyond the error of its estimate, in every comparison that it is about.
- `contradicted`: The claim fails, beyond the error of its estimate, in some comparison.
- `inconclusive`: Neither holds, because of much noise, few seeds, a missing arm, or an optimum at the edge of its grid.
- `setting not met`: The runs lack a condition of the claim, such as a length of run or a range of batch sizes.
- `not tested`: The tables hold no runs or counts that the claim is about.

A verdict is borderline if it would be another one with the ends of all intervals moved by a tenth of their margins, all
to the side of the claim or all away from it. The margin is the `size` of the rule, in logarithms for ratios; where that
is 0, half of the 95% interval stands for it. The numbers alone move: reasons against a verdict stay as they are.
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
    """What an interval decides."""

    verdict: Verdict
    against: float
    """See `Finding`."""


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
    favoured: Outcome | None = None
    """The outcome if all ends were moved to the side of the claim; None if they decide nothing."""
    hindered: Outcome | None = None
    """The same if they were moved away from it."""

    @property
    def outcome(self) -> Outcome:
        """The verdict, as the ends are."""
        return Outcome(self.verdict, self.against)

    @property
    def outcomes(self) -> tuple[Outcome, Outcome, Outcome]:
        """The outcomes with the ends as they are, moved to the side of the claim, and moved away from it."""
        return self.outcome, self.favoured or self.outcome, self.hindered or self.outcome

    @property
    def borderline(self) -> bool:
        """Whether the verdict would be another if the ends were moved."""
        return any(moved.verdict != self.verdict for moved in self.outcomes)


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
    outcome, favoured, hindered = _outcome(rule, estimate, 0.0), None, None
    if high > low:
        slack = MOVED * (rule.size or (high - low) / 2)
        favoured, hindered = _outcome(rule, estimate, slack), _outcome(rule, estimate, -slack)
    # A contradiction may turn inconclusive as one of several (see `worst`).
    remedy = None if outcome.verdict == "confirmed" else cheapest(rule, estimate)
    return replace(judged, **outcome._asdict(), remedy=remedy, favoured=favoured, hindered=hindered)


def _outcome(rule: Rule, estimate: Estimate, slack: float) -> Outcome:
    against = rule.against(estimate, slack)
    if rule.confirmed(estimate, slack):
        return Outcome("confirmed", against)
    return Outcome("contradicted" if against <= LEVEL else "inconclusive", against)


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

    Args:
        run_ids: see `decide`, also for `text` and `problems`.
        text: the numbers as text.
        verdict: the verdict if there is no problem.
        problems: reasons against a verdict.
        estimate: the number that was judged.
        interval: its 95% interval.
        strain: see `Finding`.
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
    strains = [judged.strain for judged in findings]
    (decisive, outcome), (_, favoured), (_, hindered) = (
        _worst(outcomes, strains) for outcomes in zip(*(judged.outcomes for judged in findings), strict=True)
    )
    return replace(findings[decisive], **outcome._asdict(), favoured=favoured, hindered=hindered)


def _worst(outcomes: Sequence[Outcome], strains: Sequence[float]) -> tuple[int, Outcome]:
    """Return the number of the outcome that decides over several, and that outcome as corrected for their number."""
    tested = sum(outcome.verdict in ("confirmed", "inconclusive", "contradicted") for outcome in outcomes)
    verdicts: list[Verdict] = [
        "inconclusive" if outcome.verdict == "contradicted" and outcome.against > LEVEL / tested else outcome.verdict
        for outcome in outcomes
    ]
    decisive = max(range(len(outcomes)), key=lambda number: (SEVERITY.index(verdicts[number]), strains[number]))
    # A finding may be one of several in turn, so that the corrections multiply.
    return decisive, Outcome(verdicts[decisive], min(1.0, outcomes[decisive].against * max(1, tested)))


def without(judged: Finding, *verdicts: Verdict) -> Finding:
    """Return a finding in which some verdicts are inconclusive instead."""
    outcome, favoured, hindered = (
        Outcome("inconclusive" if verdict in verdicts else verdict, against) for verdict, against in judged.outcomes
    )
    return replace(judged, verdict=outcome.verdict, favoured=favoured, hindered=hindered)


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
