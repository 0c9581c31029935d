"""Findings: the verdict on a claim with its numbers, its reason and the runs behind it (docs/verdicts.md).

With its verdict a finding carries those of N_AGAIN replicates, new runs of the same design on other seeds and test
examples. The truth is off the estimate by a draw of the error, weighted by what was likely before the runs (`again`),
and a new estimate is off the truth by another draw, so a replicate is the estimate shifted by their sum. Its error is
measured anew (`again`). A replicate has the same number in all comparisons, so that what their errors share stays
shared. The share of replicates with the verdict of the finding is `p_again`. Reasons against a verdict stay as they
are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtri, polygamma

from lorabench.analysis import rules
from lorabench.analysis.estimate import Estimate
from lorabench.analysis.rules import DECIDED, LEVEL, Problem, Remedy, Rule, Verdict
from lorabench.analysis.sequential import LOOK, level
from lorabench.utils.formats import with_interval

MIN_SEEDS = 3
"""The number of seeds that a verdict on a difference needs."""

N_AGAIN = 1024
"""The number of replicates; the standard error of a share of 80% is then 1.3%."""

WIDTHS = 0.35
"""The standard deviation of ln of the half width of an interval over half the band of its rule, before the runs."""

OF_ITS_ERROR, OF_SWEEPS = 1.5, 0.2
"""By how much ln of the half width differs between two sweeps of one design: a multiple of the error that it has by its
own fit, and a standard deviation that the fit does not see. These and WIDTHS fit 3,900 pairs of made-up sweeps, with
the noise of `laptop` and of SmolLM2, with all assumptions broken and with none (docs/estimates.md)."""

_SHARES = (np.arange(N_AGAIN) + 0.5) / N_AGAIN
_NORMAL = np.random.default_rng(0).permutation(ndtri(_SHARES))

BORDERLINE = 0.8
"""A decided verdict that comes out again with a smaller probability is borderline."""

SEVERITY: tuple[Verdict, ...] = (
    "not tested",
    "setting not met",
    "confirmed",
    "right sign, below the margin",
    "inconclusive",
    "not seen here",
    "contradicted",
)
"""The verdicts by their rank: of several, the last decides. The sign is right in all comparisons only if none is
open."""

_CONFIRMED, _RIGHT_SIGN, _OPEN, _CONTRADICTED = map(
    SEVERITY.index, ("confirmed", "right sign, below the margin", "inconclusive", "contradicted")
)


class Outcomes(NamedTuple):
    """What intervals decide: as they are, and in each replicate; of one number only, in all replicates the same."""

    verdicts: np.ndarray
    """Places in SEVERITY, (1,) or (1 + N_AGAIN,)."""
    against: np.ndarray
    """See `Finding.against`; of the same shape."""


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
    n_parts: int | None = None
    """The number of comparisons that have a verdict; None if the finding is one of them itself."""
    n_hold: int = 0
    """The number of comparisons that are confirmed."""
    part_low: float = math.nan
    """The lowest of their estimates."""
    part_high: float = math.nan
    replicates: Outcomes | None = field(default=None, repr=False, compare=False)
    """The outcomes of new runs, (N_AGAIN,); None if no interval decides anything."""

    @property
    def outcomes(self) -> Outcomes:
        """The outcome of the finding, followed by those of the replicates, if there are any."""
        own = Outcomes(np.array([SEVERITY.index(self.verdict)], np.int8), np.array([self.against]))
        if self.replicates is None:
            return own
        return Outcomes(*(np.concatenate(pair) for pair in zip(own, self.replicates, strict=True)))

    @property
    def p_again(self) -> float | None:
        """The probability that a new run decides the same; None without an interval or a decision."""
        if self.replicates is None or self.verdict not in DECIDED:
            return None
        return float(np.mean(self.replicates.verdicts == SEVERITY.index(self.verdict)))

    @property
    def borderline(self) -> bool:
        """Whether a new run decides the same with a probability below BORDERLINE."""
        return self.p_again is not None and self.p_again < BORDERLINE

    def with_outcomes(self, outcomes: Outcomes) -> Finding:
        """Return the finding with other outcomes, of the shape of `outcomes`."""
        verdicts, against = outcomes
        replicates = Outcomes(verdicts[1:], against[1:]) if len(verdicts) > 1 else None
        return replace(self, verdict=SEVERITY[verdicts[0]], against=float(against[0]), replicates=replicates)


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
    bound: rules.Bound | None = None,
) -> Finding:
    """Apply a rule to an estimate with its text, the runs behind it, reasons against a verdict, and the rule that gives
    the margin, as text; if its error is not known, or with any problem, the finding is inconclusive. If in spite of the
    problems the estimate is a `bound` of the number, this may decide."""
    run_ids, look = tuple(run_ids), LOOK.get()
    if look is not None:
        estimate = look.guarded(estimate, run_ids)
    problems, known = list(problems), estimate.known
    if not known and not problems:
        problems.append(Problem("the error of the estimate is not known", Remedy(f"{MIN_SEEDS} seeds", MIN_SEEDS)))
    # Of several looks, the intervals of all hold together.
    both_sides = 1 - 2 * level(LEVEL / 2, estimate.looks)
    low, high = estimate.interval(both_sides) if known else (math.nan, math.nan)
    judged = replace(
        finding(run_ids, text, "inconclusive", problems, estimate.value, (low, high), rule.strain(estimate)),
        margin_low=rule.margins[0],
        margin_high=rule.margins[1],
        margin_rule=margin_rule,
        detectable=estimate.detectable if known else math.nan,
        against=float(rule.answers(estimate, bound=bound).against[0]) if known else 1.0,
    )
    if problems and (bound is None or not known):
        return judged

    runs = rules.AS_IT_IS
    # Of seeds that agree but for a few, a 95% interval may be a point where a wider one is none.
    if high > low and np.ptp(estimate.interval()) > 0:
        new = again(estimate, rule)
        runs = rules.NewRuns(*(np.concatenate(both) for both in zip(rules.AS_IT_IS, new, strict=True)))
    confirmed, against, right_sign = rule.answers(estimate, runs, bound)
    failed = np.where(right_sign, _RIGHT_SIGN, _CONTRADICTED)
    verdicts = np.where(confirmed, _CONFIRMED, np.where(against <= LEVEL, failed, _OPEN)).astype(np.int8)
    if bound is not None:
        if verdicts[0] == _OPEN:
            return judged
        side = "at most" if bound == "above" else "at least"
        judged = replace(judged, reason=f"{judged.reason}, so that it is {side} this", remedy=None)
        return judged.with_outcomes(Outcomes(verdicts, against))
    judged = judged.with_outcomes(Outcomes(verdicts, against))
    # A claim that fails in one comparison may be open as one of several (see `worst`).
    return judged if judged.verdict == "confirmed" else replace(judged, remedy=rules.cheapest(rule, estimate))


def again(estimate: Estimate, rule: Rule) -> rules.NewRuns:
    """Return the replicates of an estimate. A number that decides a rule was lucky, too, so that the truth is taken to
    have, before the runs, a Cauchy distribution of half a margin around the middle of the margins; and the half width
    of an interval, to have a log-normal one around half the band between them."""
    # The draws lie in a random order, so that different ones are independent.
    errors = estimate.draws[: 2 * N_AGAIN] - estimate.value
    ends = [end for end in rule.margins if math.isfinite(end)]
    half_band = (ends[-1] - ends[0]) / 2 or abs(ends[0])
    error, narrow, kept = estimate.width_error, 0.0, 1.0
    if math.isnan(error):
        # That of ln of the square root of a chi-squared number.
        error = math.sqrt(polygamma(1, rules.student_shape(estimate.ordered)[1] / 2)) / 2
    error = math.hypot(OF_ITS_ERROR * error, OF_SWEEPS)
    if half_band > 0:
        ordered = errors[order := np.argsort(errors[:N_AGAIN])]
        shares = np.cumsum(1 / (1 + ((estimate.value + ordered - sum(ends) / 2) / (half_band / 2)) ** 2))
        errors[order] = ordered[np.searchsorted(shares / shares[-1], _SHARES)]
        kept = WIDTHS**2 / (WIDTHS**2 + error**2)
        narrow = math.log(2 * half_band / float(np.ptp(estimate.interval())))
    widths = np.exp((1 - kept) * narrow + error * math.sqrt(1 + kept) * _NORMAL)
    return rules.NewRuns(errors[:N_AGAIN] + errors[N_AGAIN:], widths)


def finding(
    run_ids: Iterable[str],
    text: str,
    verdict: Verdict,
    problems: Sequence[Problem] = (),
    estimate: float = math.nan,
    interval: tuple[float, float] = (math.nan, math.nan),
    strain: float = -math.inf,
) -> Finding:
    """Build a finding whose verdict does not follow from an `Estimate`; see `decide`. The interval is the 95% one."""
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
    """Return the finding that decides over several: by the rank of its verdict (see SEVERITY), then by strain. With k
    findings that have a verdict, a claim fails in one of them at the k-th part of the level only."""
    # The first of the highest rank decides, so that the most strained one comes first.
    ordered = sorted(findings, key=lambda judged: -judged.strain)
    outcomes = [judged.outcomes for judged in ordered]
    verdicts = np.array(np.broadcast_arrays(*(each.verdicts for each in outcomes)))
    against = np.array(np.broadcast_arrays(*(each.against for each in outcomes)))
    tested = np.maximum(1, (verdicts >= _CONFIRMED).sum(axis=0))
    fails = (verdicts == _CONTRADICTED) | (verdicts == _RIGHT_SIGN)
    verdicts[fails & (against > LEVEL / tested)] = _OPEN
    decisive = verdicts.argmax(axis=0)
    # A finding may be one of several in turn, so that the corrections multiply.
    corrected = np.minimum(1.0, np.take_along_axis(against, decisive[None], 0)[0] * tested)
    judged = ordered[int(decisive[0])].with_outcomes(Outcomes(verdicts.max(axis=0), corrected))
    if judged.remedy is None or judged.remedy.plan is None:
        return judged
    # The remedy is the number of seeds, or of examples, that decides all.
    plans, (low, high) = [judged.remedy.plan], judged.remedy.plan.rule.margins
    if low <= plans[0].value <= high:  # The finding nearest to failing holds: a confirmation of all is ahead.
        opened = [ordered[at].remedy for at in np.flatnonzero(verdicts[:, 0] == _OPEN).tolist()]
        plans = [remedy.plan for remedy in opened if remedy is not None and remedy.plan is not None]
    still_open = sum(plan.open for plan in plans)
    remedies = [replace(plan, tests=plan.tests * int(tested[0]), open=still_open).remedy() for plan in plans]

    def size(remedy: Remedy) -> tuple[bool, int, int]:
        # A larger remedy decides what a smaller one does.
        return not (remedy.seeds or remedy.test_examples), remedy.test_examples or 0, remedy.seeds or 0

    return replace(judged, remedy=max(remedies, key=size, default=judged.remedy))


def without(judged: Finding, *verdicts: Verdict) -> Finding:
    """Return a finding in which some verdicts are inconclusive instead; what is no evidence for `contradicted` is none
    for `right sign, below the margin`, since both rest on one test."""
    opened = {*verdicts, *(["right sign, below the margin"] if "contradicted" in verdicts else [])}
    before, against = judged.outcomes
    places = [SEVERITY.index(verdict) for verdict in opened]
    return judged.with_outcomes(Outcomes(np.where(np.isin(before, places), _OPEN, before).astype(np.int8), against))


def with_parts(judged: Finding, parts: Sequence[Finding]) -> Finding:
    """Return the finding on several comparisons with their number, how many hold, and the range of their estimates."""
    tested = [part for part in parts if SEVERITY.index(part.verdict) >= _CONFIRMED]
    estimates = [part.estimate for part in tested if not math.isnan(part.estimate)]
    return replace(
        judged,
        n_parts=len(tested),
        n_hold=sum(part.verdict == "confirmed" for part in tested),
        part_low=min(estimates, default=math.nan),
        part_high=max(estimates, default=math.nan),
    )


def together(findings: Sequence[Finding]) -> Finding:
    """Return the finding that decides over several, with the reasons and the runs of all."""
    decisive = worst(findings)
    reasons = [decisive.reason, *(judged.reason for judged in findings if judged.reason != decisive.reason)]
    run_ids = tuple(sorted({run_id for judged in findings for run_id in judged.run_ids}))
    return replace(decisive, reason="; ".join(reasons), run_ids=run_ids)


def nats(estimate: Estimate) -> str:
    """Format a difference of losses, in nats per token."""
    return with_interval(estimate.value, *estimate.interval(), 4, unit=" nats")


def in_unit(judged: Finding, unit: Callable[[float], float]) -> Finding:
    """Return a finding with its estimate, interval and margin in another unit, a monotonic function of theirs; if it
    decreases, ends are exchanged. The detectable effect is unchanged, as for a shift."""
    ends: dict[str, Any] = {}
    for name in ("ci", "margin", "part"):
        low, high = f"{name}_low", f"{name}_high"
        ends[low], ends[high] = sorted((unit(getattr(judged, low)), unit(getattr(judged, high))))
    return replace(judged, estimate=unit(judged.estimate), **ends)


def exponential(logarithm: float) -> float:
    """Return e to a power, or infinity where it is too large for a float."""
    return math.exp(logarithm) if not logarithm >= 700 else math.inf
