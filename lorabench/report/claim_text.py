"""How the numbers of a judged claim are written: margin, estimate, power, and what is missing for a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lorabench.utils import formats

Claim = Mapping[Any, Any]
"""A row of the table `claims`."""

_EXACT = 1e-12
"""An effect below this is the rounding of an exact number."""

_SHORT_UNITS = {"nats per token": "nats", "ratio": ""}


def margin(claim: Claim) -> str:
    """Return the values that confirm a claim, such as `±0.012 nats`, `at least 0.012 nats` or `6.25 to 16`."""
    low, high = claim["margin_low"], claim["margin_high"]
    if formats.missing(low) or formats.missing(high) or (math.isinf(low) and math.isinf(high)):
        return formats.DASH
    return _with_unit(_band(low, high), claim)


def _band(low: float, high: float) -> str:
    if math.isinf(high):
        return f"at least {_short(low)}"
    if math.isinf(low):
        return f"at most {_short(high)}"
    if math.isclose(low, high, abs_tol=1e-12):
        return f"exactly {_short(low)}"
    if math.isclose(low, -high):
        return f"±{_short(high)}"
    return f"{_short(low)} to {_short(high)}"


def estimate(claim: Claim) -> str:
    """Return the estimate of a claim with its unit."""
    value = claim["estimate"]
    return formats.DASH if formats.missing(value) else _with_unit(formats.number(value), claim)


def power(claim: Claim) -> str:
    """Return the smallest effect that would have been seen with a probability of 80%.

    That of a ratio is a factor, as its error is that of its logarithm. A number without an error, such as a count, has
    none.
    """
    value = claim["detectable"]
    if formats.missing(value) or math.isinf(value) or value < _EXACT:
        return formats.DASH
    if _unit(claim).startswith("ratio") and value >= 1:
        return f"a factor of {_short(value)}"
    return _with_unit(_short(value), claim)


def verdict(claim: Claim) -> str:
    """Return the verdict, and whether it is borderline."""
    return f"{claim['verdict']}, borderline" if borderline(claim) else str(claim["verdict"])


def borderline(claim: Claim) -> bool:
    """Return whether a verdict is borderline; that of a table without this column is not known to be."""
    return not formats.missing(claim.get("borderline")) and bool(claim["borderline"])


def remark(claim: Claim) -> str:
    """Return what the runs lack for a verdict, or what would decide an inconclusive claim; empty if not known."""
    if claim["verdict"] == "setting not met" and not formats.missing(claim["missing"]):
        return f"needs {claim['missing']}"
    if claim["verdict"] == "inconclusive" and not formats.missing(claim["would_decide"]):
        return f"to decide: {claim['would_decide']}"
    return ""


def _with_unit(text: str, claim: Claim) -> str:
    unit = _unit(claim)
    return f"{text} {_SHORT_UNITS.get(unit, unit)}".strip()


def _unit(claim: Claim) -> str:
    return "" if formats.missing(claim["unit"]) else str(claim["unit"])


def _short(value: float) -> str:
    """Write a number to three digits, without zeros at its end."""
    text = formats.number(value)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text
