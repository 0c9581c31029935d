"""Remedies: the cheapest thing that would decide an inconclusive claim."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorabench.analysis.estimate import Estimate
from lorabench.analysis.rules import Rule

MANY_SEEDS = 200
"""A number of seeds above which a remedy says that seeds won't decide a claim."""


@dataclass(frozen=True)
class Remedy:
    """What would decide a claim, as far as it can be planned; an empty remedy has only its text."""

    text: str
    seeds: int | None = None
    """The number of seeds, those that there are included."""
    around: bool = False
    """Whether the seeds are needed at the three LRs around an optimum, and not only at the best LR."""
    test_examples: int | None = None
    """The number of test examples."""
    lrs: tuple[tuple[str, float], ...] = ()
    """LRs to add, each after the label of its arm."""


@dataclass(frozen=True)
class Problem:
    """What speaks against a verdict, and what would mend it."""

    text: str
    remedy: Remedy | None = None


def cheapest(rule: Rule, estimate: Estimate) -> Remedy | None:
    """Return the least number of seeds, or else of test examples, that would decide, if the estimate is the truth.

    More seeds are enough as long as the error from test examples alone leaves room for a decision.
    """
    if not estimate.known or estimate.n_seeds < 1:
        return None
    target = rule.deciding_error(estimate)
    of_seeds, of_examples = estimate.seed_error, estimate.example_error
    if target <= 0:
        return Remedy("no number of seeds decides it: the estimate lies at the margin")
    if of_examples < target:
        seeds = math.ceil(estimate.n_seeds * of_seeds**2 / (target**2 - of_examples**2))
        if seeds <= MANY_SEEDS:
            seeds = max(seeds, estimate.n_seeds + 1)
            return Remedy(f"{seeds} seeds (now {estimate.n_seeds})", seeds=seeds)
        return Remedy(f"more than {MANY_SEEDS} seeds (now {estimate.n_seeds}): the estimate lies near the margin")
    # Both errors get half of the variance.
    examples = math.ceil(estimate.n_examples * of_examples**2 / (target**2 / 2))
    seeds = math.ceil(estimate.n_seeds * of_seeds**2 / (target**2 / 2))
    if seeds > MANY_SEEDS:
        return Remedy(f"more than {MANY_SEEDS} seeds (now {estimate.n_seeds}): the estimate lies near the margin")
    text = f"{examples} test examples (now {estimate.n_examples})"
    if seeds > estimate.n_seeds:
        return Remedy(f"{text} and {seeds} seeds (now {estimate.n_seeds})", seeds=seeds, test_examples=examples)
    return Remedy(text, test_examples=examples)
