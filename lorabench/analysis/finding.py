"""Findings: the verdict on a claim with its numbers, its reason and the runs behind it.

The verdicts are:

- `confirmed`: The criterion holds with its whole interval on every comparison that the claim is about.
- `contradicted`: The criterion fails with its whole interval on some comparison.
- `inconclusive`: Neither holds, because of much noise, few seeds, a missing arm, or an optimum at the edge of its grid.
- `not tested`: The tables hold no runs or counts that the claim is about.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lorabench.utils.formats import fixed_interval

Verdict = Literal["confirmed", "contradicted", "inconclusive", "not tested"]

MIN_SEEDS = 3
"""The number of seeds that a verdict on a difference needs."""

SIGMAS = 2
"""The number of seed standard deviations (sigma) that separates two losses."""

MAX_NOISE = 0.05
"""The largest margin of SIGMAS sigma, as a share of the loss, within which two losses can be called equal."""

MAX_ERROR_MARGIN = 0.1
"""The largest margin within which two error rates, or two accuracies, can be called equal."""


@dataclass(frozen=True)
class Finding:
    """The verdict of one comparison, or of several together, on a claim."""

    verdict: Verdict
    reason: str
    estimate: float = math.nan
    ci_low: float = math.nan
    ci_high: float = math.nan
    strain: float = -math.inf
    """How near the claim is to failing (larger is nearer); of findings with the same verdict it picks the one shown."""
    run_ids: tuple[str, ...] = ()


class UnjudgedError(Exception):
    """A claim can't be judged; the exception carries the finding that says why."""

    def __init__(self, verdict: Verdict, reason: str) -> None:
        super().__init__(reason)
        self.finding = Finding(verdict, reason)


def finding(
    run_ids: Iterable[str],
    text: str,
    verdict: Verdict,
    problems: Sequence[str],
    estimate: float = math.nan,
    interval: tuple[float, float] = (math.nan, math.nan),
    strain: float = -math.inf,
) -> Finding:
    """Build a finding; with any problem it is inconclusive, and its reason names the problems.

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
        reason=f"{text}; {', '.join(problems)}" if problems else text,
        estimate=estimate,
        ci_low=interval[0],
        ci_high=interval[1],
        strain=-math.inf if math.isnan(strain) else strain,
        run_ids=tuple(sorted(set(run_ids))),
    )


def worst(findings: Sequence[Finding]) -> Finding:
    """Return the finding that decides over several: contradicted before inconclusive before confirmed, then by strain.

    `not tested` decides only if all findings have this verdict.
    """
    order = ["not tested", "confirmed", "inconclusive", "contradicted"]
    return max(findings, key=lambda judged: (order.index(judged.verdict), judged.strain))


def together(findings: Sequence[Finding]) -> Finding:
    """Return the finding that decides over several, with the reasons and the runs of all."""
    decisive = worst(findings)
    reasons = [decisive.reason, *(judged.reason for judged in findings if judged is not decisive)]
    run_ids = tuple(sorted({run_id for judged in findings for run_id in judged.run_ids}))
    return replace(decisive, reason="; ".join(reasons), run_ids=run_ids)


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict on a criterion whose parts must all hold, from the verdicts on the parts."""
    if "contradicted" in verdicts:
        return "contradicted"
    return "confirmed" if set(verdicts) == {"confirmed"} else "inconclusive"


def within(low: float, high: float, band: tuple[float, float]) -> Verdict:
    """Return confirmed if an interval lies inside a band, contradicted if wholly outside; NaN is inconclusive."""
    if band[0] <= low and high <= band[1]:
        return "confirmed"
    return "contradicted" if high < band[0] or low > band[1] else "inconclusive"


def exceeds(estimate: float, low: float, high: float, margin: float) -> Verdict:
    """Return the verdict on whether a difference exceeds a margin.

    It is confirmed if the estimate is above the margin and the interval above 0, and contradicted if the whole interval
    is below the margin.
    """
    if estimate > margin and low > 0:
        return "confirmed"
    return "contradicted" if high < margin else "inconclusive"


def nats(estimate: float, low: float, high: float) -> str:
    """Format a difference of losses, in nats per token."""
    return f"{estimate:.4f} nats {fixed_interval(low, high, 4)}"


def error_rate(estimate: float, low: float, high: float) -> str:
    """Format a difference of error rates."""
    return f"{estimate:+.4f} in error rate {fixed_interval(low, high, 4)}"


def sigma_text(sigma: float) -> str:
    """Format seed noise."""
    return "sigma not measured" if math.isnan(sigma) else f"sigma {sigma:.4f}"


def noise_problems(sigma: float, dof: int) -> list[str]:
    """Return why seed noise does not support a verdict.

    Args:
        sigma: seed standard deviation.
        dof: its degrees of freedom.
    """
    if sigma == 0 and dof >= MIN_SEEDS - 1:
        return ["all seeds alike: no seed noise to judge by"]
    return [] if sigma > 0 and dof >= MIN_SEEDS - 1 else ["seed noise not measured"]


def equality_problems(verdict: Verdict, sigma: float, loss: float) -> list[str]:
    """Return why two losses can't be called equal: a margin of SIGMAS sigma grows with the noise.

    A verdict of contradicted stands, since noise does not create a difference.
    """
    if verdict == "contradicted" or not SIGMAS * sigma > MAX_NOISE * loss:
        return []
    return [f"{SIGMAS} sigma is more than {MAX_NOISE:.0%} of the loss"]


def error_equality_problems(verdict: Verdict, margin: float) -> list[str]:
    """Return why two error rates can't be called equal.

    Error rates may be near 0, so the margin itself has a limit where `equality_problems` has a share of the loss.
    """
    if verdict == "contradicted" or not margin > MAX_ERROR_MARGIN:
        return []
    return [f"the margin of {margin:.2f} is above {MAX_ERROR_MARGIN:g}"]
