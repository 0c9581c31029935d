"""The facts that claims state, their verdicts, and the sentence that counts them.

Several claims may state one fact, such as the ratio of optimal LRs in long runs and on several models. A headline that
counted claims would count such a fact several times, so facts are counted. Claims that runs can refute, derivations and
counts are counted apart.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import get_args

import pandas as pd

from lorabench.analysis.rules import Verdict

VERDICTS: tuple[str, ...] = get_args(Verdict)
"""All verdicts in the order in which they are shown."""

_WORST_FIRST = ("contradicted", "inconclusive", "confirmed", "setting not met", "not tested")

KINDS = {
    "empirical claim": ("empirical", "opinion", "prediction"),
    "derivation": ("derivation",),
    "count": ("count",),
    "own prediction": ("own prediction",),
}
"""What the headline counts apart, each with the kinds of claims that belong to it."""

COUNTING = (
    "Empirical claims are those that runs can refute, among them the authors' opinions and predictions. A derivation "
    "can only be illustrated by runs, and a count follows from numbers of parameters, bits or operations. Claims that "
    "state one fact count once, with the worst of their verdicts."
)
"""How the headline counts, for its reader."""


@dataclass(frozen=True)
class Fact:
    """A fact that one or several claims state."""

    group: str
    """A key of KINDS."""
    text: str
    verdict: str
    """The worst verdict of its claims: contradicted, inconclusive, confirmed, setting not met, not tested."""
    claim_ids: tuple[str, ...]


def facts(claims: pd.DataFrame) -> list[Fact]:
    """Return the facts that claims state, in the order of their first claims.

    Args:
        claims: columns claim_id, kind, fact, verdict.
    """
    group_of = {kind: group for group, kinds in KINDS.items() for kind in kinds}
    groups = claims["kind"].map(lambda kind: group_of.get(kind, "empirical claim"))
    stated = []
    for (group, text), stating in claims.groupby([groups, "fact"], sort=False):
        verdict = min(stating["verdict"], key=_WORST_FIRST.index)
        stated.append(Fact(str(group), str(text), verdict, tuple(stating["claim_id"])))
    return stated


def headline(claims: pd.DataFrame) -> str:
    """Return the verdicts on all facts in a sentence without a full stop, such as `3 empirical claims: 3 confirmed`."""
    stated = facts(claims)
    parts = []
    for group in KINDS:
        grouped = [fact for fact in stated if fact.group == group]
        if not grouped:
            continue
        counts = Counter(fact.verdict for fact in grouped)
        number = sum(len(fact.claim_ids) for fact in grouped)
        subject = _counted(number, group)
        if number > len(grouped):
            subject += f" about {_counted(len(grouped), 'fact')}"
        verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
        parts.append(f"{subject}: {verdicts}")
    return "; ".join(parts)


def in_order(claims: pd.DataFrame) -> pd.DataFrame:
    """Return the claims with those of one fact next to each other, at the place of the first of them."""
    place = {claim_id: number for number, fact in enumerate(facts(claims)) for claim_id in fact.claim_ids}
    return claims.sort_values("claim_id", key=lambda ids: ids.map(place), kind="stable").reset_index(drop=True)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
