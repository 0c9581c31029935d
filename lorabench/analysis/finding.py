"""Findings: the verdict on a claim with its numbers, its reason and the runs behind it.

The verdicts are:

- `confirmed`: The claim holds, beyond the error of its estimate, in every comparison that it is about.
- `contradicted`: The claim fails, beyond the error of its estimate, in some comparison.
- `inconclusive`: Neither holds, because of much noise, few seeds, a missing arm, or an optimum at the edge of its grid.
- `setting not met`: The runs lack a condition of the claim, such as a length of run or a range of batch sizes.
- `not tested`: The tables hold no runs or counts that the claim is about.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lorabench.analysis.estimate import Estimate
from lorabench.analysis.remedy import Problem, Remedy, cheapest
from lorabench.analysis.rules import LEVEL, Rule, Verdict
from lorabench.utils.formats import fixed_interval

MIN_SEEDS = 3
"""The number of seeds that a verdict on a difference needs."""

_ORDER: tuple[Verdict, ...] = ("not tested", "setting not met", "confirmed", "inconclusive", "contradicted")


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
    """Where the margin comes from, in words."""
    detectable: float = math.nan
    """The smallest effect that would have been seen with a probability of 80%."""
    against: float = 0.0
    """The smallest level at which the numbers contradict the claim, corrected for the number of comparisons; 0 for a
    finding without an interval."""
    remedy: Remedy | None = None
    """What would decide an inconclusive claim."""


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
        text: the numbers in words.
        run_ids: ids of the runs behind it, in any order; ids may repeat.
        problems: what speaks against a verdict; with any, the finding is inconclusive.
        margin_rule: where the rule's margin comes from, in words.
    """
    problems = list(problems)
    if not estimate.known and not problems:
        problems.append(Problem("the error of the estimate is not known", Remedy(f"{MIN_SEEDS} seeds", MIN_SEEDS)))
    against = rule.against(estimate) if estimate.known else 1.0
    verdict: Verdict = "inconclusive"
    remedy = next((problem.remedy for problem in problems if problem.remedy), None)
    if not problems:
        if rule.confirmed(estimate):
            verdict = "confirmed"
        elif against <= LEVEL:
            verdict = "contradicted"
        if verdict != "confirmed":
            # A contradiction may turn inconclusive as one of several (see `worst`).
            remedy = cheapest(rule, estimate)
    known = estimate.known
    low, high = estimate.interval() if known else (math.nan, math.nan)
    strain = rule.strain(estimate)
    return Finding(
        verdict,
        "; ".join([text, *(problem.text for problem in problems)]),
        estimate.value,
        low,
        high,
        -math.inf if math.isnan(strain) else strain,
        tuple(sorted(set(run_ids))),
        *rule.margins,
        margin_rule,
        estimate.detectable if known else math.nan,
        against,
        remedy,
    )


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
        run_ids: ids of the runs behind it, in any order; ids may repeat.
        text: the numbers in words.
        verdict: the verdict if there is no problem.
        problems: what speaks against a verdict.
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
    tested = sum(judged.verdict in ("confirmed", "inconclusive", "contradicted") for judged in findings)
    corrected = [
        replace(judged, verdict="inconclusive")
        if judged.verdict == "contradicted" and judged.against > LEVEL / tested
        else judged
        for judged in findings
    ]
    decisive = max(corrected, key=lambda judged: (_ORDER.index(judged.verdict), judged.strain))
    # A finding may be one of several in turn, so that the corrections multiply.
    return replace(decisive, against=min(1.0, decisive.against * max(1, tested)))


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
