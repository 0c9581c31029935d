"""What is found about a claim: a verdict with its numbers, its reason and the runs behind it.

confirmed      the criterion holds, with its whole interval, on every comparison that the claim is about
contradicted   on some comparison it fails, with its whole interval
inconclusive   neither: too noisy, too few seeds, an arm missing, an optimum at the edge of its grid
not tested     the tables hold nothing that the claim is about
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Verdict = Literal["confirmed", "contradicted", "inconclusive", "not tested"]


MIN_SEEDS = 3
"""Seeds that a verdict on a difference needs (science rule 5)."""


MAX_NOISE = 0.05
"""Two sigma above this share of the loss is too noisy to call two losses equal: the margin would grow with sigma."""


MAX_ERROR_MARGIN = 0.1
"""The same for two accuracies: a margin that grows with noise is no ground for equality above this difference."""


@dataclass(frozen=True)
class Finding:
    """What one comparison, or all together, say about a claim."""

    verdict: Verdict
    reason: str
    estimate: float = math.nan
    ci_low: float = math.nan
    ci_high: float = math.nan
    strain: float = -math.inf
    """How near to failing, the larger the nearer: which of several findings with the same verdict to show."""
    run_ids: tuple[str, ...] = ()


class UnjudgedError(Exception):
    """A claim can't be judged; carries the verdict that says so."""

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
    """A finding with its numbers in words; with any problem it is inconclusive, and says why."""
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
    """The finding that decides over several: contradicted before inconclusive before confirmed, then by strain.

    `not tested` counts only if all are.
    """
    order = ["not tested", "confirmed", "inconclusive", "contradicted"]
    return max(findings, key=lambda one: (order.index(one.verdict), one.strain))


def together(findings: Sequence[Finding]) -> Finding:
    """The finding that decides, with the reasons and the runs of all."""
    decisive = worst(findings)
    reasons = [decisive.reason, *(one.reason for one in findings if one is not decisive)]
    run_ids = tuple(sorted({run_id for one in findings for run_id in one.run_ids}))
    return replace(decisive, reason="; ".join(reasons), run_ids=run_ids)


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict on a criterion with several parts, all of which must hold."""
    if "contradicted" in verdicts:
        return "contradicted"
    return "confirmed" if set(verdicts) == {"confirmed"} else "inconclusive"


def within(low: float, high: float, band: tuple[float, float]) -> Verdict:
    """Confirmed if the interval lies inside the band, contradicted if wholly outside. NaN is inconclusive."""
    if band[0] <= low and high <= band[1]:
        return "confirmed"
    return "contradicted" if high < band[0] or low > band[1] else "inconclusive"


def exceeds(estimate: float, low: float, high: float, margin: float) -> Verdict:
    """Confirmed if above the margin with the interval above 0, contradicted if wholly below the margin."""
    if estimate > margin and low > 0:
        return "confirmed"
    return "contradicted" if high < margin else "inconclusive"


def nats(estimate: float, low: float, high: float) -> str:
    """A difference of losses in words."""
    return f"{estimate:.4f} nats {interval_text(low, high, 4)}"


def error_rate(estimate: float, low: float, high: float) -> str:
    """A difference of error rates in words."""
    return f"{estimate:+.4f} in error rate {interval_text(low, high, 4)}"


def interval_text(low: float, high: float, digits: int) -> str:
    """An interval in words."""
    return "(no interval)" if math.isnan(low + high) else f"[{low:.{digits}f}, {high:.{digits}f}]"


def sigma_text(sigma: float) -> str:
    """Seed noise in words."""
    return "sigma not measured" if math.isnan(sigma) else f"sigma {sigma:.4f}"


def noise_problems(sigma: float, dof: int) -> list[str]:
    """Why the seed noise does not carry a verdict."""
    if sigma == 0 and dof >= MIN_SEEDS - 1:
        return ["all seeds alike: no seed noise to judge by"]
    return [] if sigma > 0 and dof >= MIN_SEEDS - 1 else ["seed noise not measured"]


def equality_problems(verdict: Verdict, sigma: float, loss: float) -> list[str]:
    """Why two losses, found equal within a margin that grows with sigma, may not be. Noise undoes no difference."""
    if verdict == "contradicted" or not 2 * sigma > MAX_NOISE * loss:
        return []
    return [f"2 sigma is more than {MAX_NOISE:.0%} of the loss"]


def error_equality_problems(verdict: Verdict, margin: float) -> list[str]:
    """As `equality_problems` for error rates, which may be near 0: the margin itself is held against a limit."""
    if verdict == "contradicted" or not margin > MAX_ERROR_MARGIN:
        return []
    return [f"the margin of {margin:.2f} is above {MAX_ERROR_MARGIN:g}"]
