"""How judged claims are written: the numbers of a claim, what is missing for a verdict, and the count of all verdicts.

Several claims may state one fact, such as the ratio of optimal LRs in long runs and on several models. A headline that
counted claims would count such a fact several times, so facts are counted. Claims that runs can refute, derivations and
counts are counted apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, get_args

import pandas as pd

from lorabench.analysis.finding import BORDERLINE, SEVERITY
from lorabench.analysis.rules import Verdict
from lorabench.utils import formats

Claim = Mapping[Any, Any]
"""A row of the table `claims`."""

VERDICTS: tuple[str, ...] = get_args(Verdict)
"""All verdicts in the order in which they are shown."""

_GROUPS = {
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

_EXACT = 1e-12
"""An effect below this is the rounding of an exact number."""

_SHORT_UNITS = {"nats per token": "nats", "ratio": ""}


def margin(claim: Claim) -> str:
    """Return the values that confirm a claim, such as `±0.012 nats`, `at least 0.012 nats` or `6.25 to 16`."""
    low, high = claim["margin_low"], claim["margin_high"]
    if formats.missing(low) or formats.missing(high) or (math.isinf(low) and math.isinf(high)):
        return formats.DASH
    if math.isinf(high):
        band = f"at least {_short(low)}"
    elif math.isinf(low):
        band = f"at most {_short(high)}"
    elif math.isclose(low, high, abs_tol=_EXACT):
        band = f"exactly {_short(low)}"
    elif math.isclose(low, -high):
        band = f"±{_short(high)}"
    else:
        band = f"{_short(low)} to {_short(high)}"
    return _with_unit(band, claim)


def estimate(claim: Claim) -> str:
    """Return the estimate of a claim with its unit."""
    value = claim["estimate"]
    return formats.DASH if formats.missing(value) else _with_unit(formats.number(value), claim)


def measured(claim: Claim) -> str:
    """Return the estimate of a claim with its unit and its 95% interval."""
    if formats.missing(claim["ci_low"]) or formats.missing(claim["ci_high"]):
        return estimate(claim)
    return f"{estimate(claim)} {formats.interval(claim['ci_low'], claim['ci_high'])}"


def power(claim: Claim) -> str:
    """Return the smallest effect that would have been seen with a probability of 80%.

    That of a ratio is a factor, as its error is that of its logarithm. A number without an error, such as a count, has
    none.
    """
    value = claim["detectable"]
    if formats.missing(value) or math.isinf(value) or value < _EXACT:
        return formats.DASH
    if str(claim["unit"]).startswith("ratio") and value >= 1:
        return f"a factor of {_short(value)}"
    return _with_unit(_short(value), claim)


def verdict(claim: Claim) -> str:
    """Return the verdict, and whether it is borderline."""
    return f"{claim['verdict']}, borderline" if borderline(claim) else str(claim["verdict"])


def borderline(claim: Claim) -> bool:
    """Return whether a verdict is borderline; one whose probability to come out again is not known is not."""
    return not formats.missing(claim.get("p_again")) and bool(claim["p_again"] < BORDERLINE)


def remark(claim: Claim) -> str:
    """Return what the runs lack for a verdict, or what would decide an inconclusive claim; empty if not known."""
    if claim["verdict"] == "setting not met" and not formats.missing(claim["missing"]):
        return f"needs {claim['missing']}"
    if claim["verdict"] == "inconclusive" and not formats.missing(claim["would_decide"]):
        return f"to decide: {claim['would_decide']}"
    return ""


def _with_unit(text: str, claim: Claim) -> str:
    unit = "" if formats.missing(claim["unit"]) else str(claim["unit"])
    return f"{text} {_SHORT_UNITS.get(unit, unit)}".strip()


def _short(value: float) -> str:
    """Write a number to three digits, without zeros at its end."""
    text = formats.number(value)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def facts(claims: pd.DataFrame) -> pd.DataFrame:
    """Return the facts that claims state, in the order of their first claims.

    Args:
        claims: columns claim_id, kind, fact, verdict.

    Returns:
        `group` (what the headline counts apart), `fact`, `verdict` (the worst of its claims by SEVERITY) and
        `claim_ids`, a tuple.
    """
    group_of = {kind: group for group, kinds in _GROUPS.items() for kind in kinds}
    grouped = claims.assign(group=claims["kind"].map(group_of).fillna("empirical claim"))
    stated = grouped.groupby(["group", "fact"], sort=False, as_index=False)
    return stated.agg(verdict=("verdict", partial(max, key=SEVERITY.index)), claim_ids=("claim_id", tuple))


def tally(claims: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """Return, for each group of facts that occurs, its verdicts: `verdict`, and `facts`, each the ids of its claims."""
    stated = facts(claims)
    ids = stated.groupby(["group", "verdict"])["claim_ids"].agg(list).to_dict()
    return {
        group: [{"verdict": verdict, "facts": ids.get((group, verdict), [])} for verdict in VERDICTS]
        for group in _GROUPS
        if group in set(stated["group"])
    }


def headline(claims: pd.DataFrame) -> str:
    """Return the verdicts on all facts in a sentence without a full stop, such as `3 empirical claims: 3 confirmed`."""
    parts = []
    for group, verdicts in tally(claims).items():
        n_facts = sum(len(row["facts"]) for row in verdicts)
        n_claims = sum(len(ids) for row in verdicts for ids in row["facts"])
        subject = _counted(n_claims, group)
        if n_claims > n_facts:
            subject += f" about {_counted(n_facts, 'fact')}"
        counts = ", ".join(f"{len(row['facts'])} {row['verdict']}" for row in verdicts if row["facts"])
        parts.append(f"{subject}: {counts}")
    return "; ".join(parts)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def in_order(claims: pd.DataFrame) -> pd.DataFrame:
    """Return the claims with those of one fact next to each other, at the place of the first of them."""
    place = {claim_id: number for number, ids in enumerate(facts(claims)["claim_ids"]) for claim_id in ids}
    return claims.sort_values("claim_id", key=lambda ids: ids.map(place), kind="stable").reset_index(drop=True)
