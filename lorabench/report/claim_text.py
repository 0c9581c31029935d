"""How judged claims are written: the numbers of a claim, what is missing for a verdict, and the count of all verdicts.

Several claims may state one fact, such as the ratio of optimal LRs in long runs and on several models. A headline that
counted claims would count such a fact several times, so facts are counted. The page lists every claim with its own
verdict. Claims that runs can refute, derivations and counts are counted apart.
"""

from __future__ import annotations

import math
import re
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
    "can only be illustrated by runs, and a count follows from numbers of parameters, bits or operations, mostly those "
    "of the paper's models."
)
"""What the kinds of claims are, for the reader of their verdicts."""

_EXACT = 1e-12
"""An effect below this is the rounding of an exact number."""

# What a verdict says that is decided.
_FOUND = {
    "confirmed": "It holds",
    "right sign, below the margin": "The sign is right, but the effect is too small",
    "contradicted": "It does not hold",
    "not seen here": "It does not hold for models this small",
}

_SHORT_UNITS = {"nats per token": "nats", "ratio": ""}

# The units of differences that are written in hundredths, and how.
_IN_HUNDREDTHS = {
    "error rate": " points of error rate",
    "accuracy": " points of accuracy",
    "train reward": " points of train reward",
    "share of accuracy": "% of the accuracy",
}

# How a 0 of these units is written.
_EXACT_COUNTS = {
    "parameters": "no difference from the counts",
    "relative difference from the formula": "no difference from the formula",
    "gradient norm": "a gradient of 0",
}


def margin(claim: Claim) -> str:
    """Return the values that confirm a claim, such as `±0.012 nats`, `at least 0.012 nats` or `6.25 to 16`."""
    band = _band(claim)
    return _with_unit(band, claim) if band else formats.DASH


def _band(claim: Claim) -> str:
    """Return the values that confirm a claim without their unit, empty if there are none."""
    low, high = claim["margin_low"], claim["margin_high"]
    if formats.missing(low) or formats.missing(high) or (math.isinf(low) and math.isinf(high)):
        return ""
    if math.isinf(high):
        return f"at least {_short(low, claim)}"
    # A ratio is above 0 anyway.
    if math.isinf(low) or (low == 0 and _unit(claim) == "ratio"):
        return f"at most {_short(high, claim)}"
    if math.isclose(low, high, abs_tol=_EXACT):
        return f"exactly {_short(low, claim)}"
    return f"±{_short(high, claim)}" if math.isclose(low, -high) else f"{_short(low, claim)} to {_short(high, claim)}"


def estimate(claim: Claim) -> str:
    """Return the estimate of a claim with its unit."""
    value, unit = claim["estimate"], _unit(claim)
    if formats.missing(value):
        return formats.DASH
    if value == 0 and unit in _EXACT_COUNTS:
        return _EXACT_COUNTS[unit]
    return _with_unit(f"{100 * value:+.1f}" if unit in _IN_HUNDREDTHS else formats.number(value), claim)


def spread(claim: Claim) -> str:
    """Return the 95% interval of a claim, empty if it has none or the number is exact."""
    low, high = claim["ci_low"], claim["ci_high"]
    if formats.missing(low) or formats.missing(high) or low == high:
        return ""
    hundredths = _unit(claim) in _IN_HUNDREDTHS
    return formats.fixed_interval(100 * low, 100 * high, 1) if hundredths else formats.interval(low, high)


def measured(claim: Claim) -> str:
    """Return the estimate of a claim with its unit and its 95% interval."""
    return f"{estimate(claim)} {spread(claim)}".strip()


def verdict(claim: Claim) -> str:
    """Return the verdict, and whether it is borderline, as far as its probability to come out again is known."""
    again: Any = claim.get("p_again")
    borderline = not formats.missing(again) and again < BORDERLINE
    return f"{claim['verdict']}, borderline" if borderline else str(claim["verdict"])


def verdict_again(claim: Claim) -> str:
    """Return the verdict, and of a borderline one the probability that it comes out again."""
    named = verdict(claim)
    return named if named == claim["verdict"] else f"{claim['verdict']}, {claim['p_again']:.0%} again"


def remark(claim: Claim) -> str:
    """Return what the runs lack for a verdict, or what would decide an inconclusive claim; empty if not known."""
    if claim["verdict"] == "setting not met" and not formats.missing(claim["missing"]):
        return f"needs {claim['missing']}"
    if claim["verdict"] == "inconclusive" and not formats.missing(claim["would_decide"]):
        return f"to decide: {claim['would_decide']}"
    return ""


def sentence(claim: Claim) -> str:
    """Return what the verdict on a claim says, in plain words: what was measured, and what would have confirmed it."""
    if claim["verdict"] == "not tested":
        return "This preset has no runs about it."
    if claim["verdict"] in ("setting not met", "inconclusive"):
        if not remark(claim):
            return "These runs cannot say."
        if claim["verdict"] == "inconclusive":
            return f"These runs cannot say. To decide: {claim['would_decide']}."
        # Which presets meet the setting is said where the claim is opened.
        return f"These runs cannot say: the claim is about {re.sub(r'; the presets? [^;)]*', '', claim['missing'])}."
    found, band, value = _FOUND[claim["verdict"]], _band(claim), estimate(claim)
    if value == formats.DASH:
        return f"{found}."
    value = f"a ratio of {value}" if _unit(claim) == "ratio" else value
    if not band:
        return f"{found}: {value} was measured."
    if band.startswith("±"):
        return f"{found}: the difference is {value}, and up to {band[1:]} counts as none."
    return f"{found}: {value} was measured, and {band} was asked for."


def details(claim: Claim) -> dict[str, str]:
    """Return what else is known of how a claim was judged, by its name on the page.

    Its power is the smallest effect that would have been seen with a probability of 80%; that of a ratio is a factor,
    as its error is that of its logarithm, and a number without an error, such as a count, has none.
    """
    known = {name: value for name, value in claim.items() if not formats.missing(value)}
    rule = f" ({known['margin_rule']})" if "margin_rule" in known else ""
    # Where the test split is named, no learning rate was picked by it: the results are themselves fitted minima.
    fitted = "optima of all arms are fitted alike, to their results on the"
    picked = "the best learning rates are those of the"
    split = known.get("lr_chosen_on")
    chosen = f"; {fitted if split == 'test' else picked} {split} split" if split else ""
    seen, again = known.get("detectable", 0.0), known.get("p_again")
    factor = str(claim["unit"]).startswith("ratio") and seen >= 1
    effect = f"a factor of {_short(seen, claim)}" if factor else _with_unit(_short(seen, claim), claim)
    expected = f"a new run decides the same, in all parts of the criterion, with a probability of {again or 0:.0%}"
    rows = {
        "Needs": known.get("missing") if claim["verdict"] == "setting not met" else "",
        "Margin": f"{margin(claim)}{rule}" if _band(claim) else "",
        "Power": f"{effect} would have been seen with a probability of 80%" if _EXACT <= seen < math.inf else "",
        "Measured on": known.get("scope"),
        "Seeds": f"at most {known['n_seeds']:.0f} of an arm{chosen}" if "n_seeds" in known else "",
        "Again": "" if again is None else expected,
        "Published": known.get("published"),
        "Kind": claim["kind"],
    }
    return {name: str(text) for name, text in rows.items() if text}


def _with_unit(text: str, claim: Claim) -> str:
    unit = _unit(claim)
    return text + _IN_HUNDREDTHS[unit] if unit in _IN_HUNDREDTHS else f"{text} {_SHORT_UNITS.get(unit, unit)}".strip()


def _unit(claim: Claim) -> str:
    # Published tables of earlier rules give the train rewards of this claim the unit accuracy.
    if claim["claim_id"] == "F3":
        return "train reward"
    return "" if formats.missing(claim["unit"]) else str(claim["unit"])


def _short(value: float, claim: Claim) -> str:
    """Write a number to three digits, without zeros at its end, or in hundredths."""
    if _unit(claim) in _IN_HUNDREDTHS:
        return f"{100 * value:.1f}"
    text = formats.number(value)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def facts(claims: pd.DataFrame) -> pd.DataFrame:
    """Return the facts that claims state, in the order of their first claims.

    Columns are `group` (what the headline counts apart), `fact`, `verdict` (the worst of its claims by SEVERITY) and
    `claim_ids`, a tuple.
    """
    stated = _grouped(claims).groupby(["group", "fact"], sort=False, as_index=False)
    return stated.agg(verdict=("verdict", partial(max, key=SEVERITY.index)), claim_ids=("claim_id", tuple))


def _grouped(claims: pd.DataFrame) -> pd.DataFrame:
    group_of = {kind: group for group, kinds in _GROUPS.items() for kind in kinds}
    return claims.assign(group=claims["kind"].map(group_of).fillna("empirical claim"))


def tally(claims: pd.DataFrame) -> dict[str, dict[str, list[tuple[str, ...]]]]:
    """Return, by verdict and then by group, the ids of the claims with this verdict, those of one fact together."""
    stated = _grouped(claims).groupby(["verdict", "group", "fact"], sort=False)["claim_id"].agg(tuple)
    ids = stated.groupby(level=["verdict", "group"]).agg(list).to_dict()
    return {
        verdict: {group: ids[verdict, group] for group in _GROUPS if (verdict, group) in ids}
        for verdict in VERDICTS
        if verdict in set(claims["verdict"])
    }


def headline(claims: pd.DataFrame) -> str:
    """Return the verdicts on all facts in a sentence without a full stop, such as `3 empirical claims: 3 confirmed`."""
    parts, stated = [], facts(claims)
    for group in _GROUPS:
        its = stated[stated["group"] == group]
        n_facts, n_claims = len(its), sum(map(len, its["claim_ids"]))
        subject = f"{n_claims} {group}{'' if n_claims == 1 else 's'}"
        subject += f" about {n_facts} fact{'' if n_facts == 1 else 's'}" if n_claims > n_facts else ""
        counts = {verdict: (its["verdict"] == verdict).sum() for verdict in VERDICTS}
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
        parts += [f"{subject}: {verdicts}"] if n_facts else []
    return "; ".join(parts)


def in_order(claims: pd.DataFrame) -> pd.DataFrame:
    """Return the claims with those of one fact next to each other, at the place of the first of them."""
    place = {claim_id: number for number, ids in enumerate(facts(claims)["claim_ids"]) for claim_id in ids}
    return claims.sort_values("claim_id", key=lambda ids: ids.map(place), kind="stable").reset_index(drop=True)
