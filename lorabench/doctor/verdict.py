"""The verdict on a measured number: within a limit, near a planned value, or merely measured."""

from __future__ import annotations

import math

from lorabench.doctor.record import Check, Status


def at_most(name: str, value: float, limit: float, unit: str, sentence: str) -> Check:
    """Return a check that passes if the value is finite and no larger than the limit."""
    return _check(name, "pass" if value <= limit else "fail", value, limit, unit, sentence)


def at_least(name: str, value: float, limit: float, unit: str, sentence: str) -> Check:
    """Return a check that passes if the value is finite and no smaller than the limit."""
    return _check(name, "pass" if limit <= value < math.inf else "fail", value, limit, unit, sentence)


def near(name: str, value: float, planned: float, share: float, unit: str, sentence: str) -> Check:
    """Return a check that passes if the value differs from the planned one by at most a share of that."""
    close = abs(value - planned) <= share * planned
    return _check(name, "pass" if close else "fail", value, planned, unit, sentence)


def measured(name: str, value: float, unit: str, sentence: str, planned: float | None = None) -> Check:
    """Return a check of a number that has no limit; a number that is not finite fails."""
    return _check(name, "measured" if math.isfinite(value) else "fail", value, planned, unit, sentence)


def decided(name: str, passed: bool, sentence: str) -> Check:
    """Return a check without a number."""
    return Check(name=name, status="pass" if passed else "fail", sentence=sentence)


def skipped(name: str, reason: str) -> Check:
    """Return a check that can't be made."""
    return Check(name=name, status="skipped", sentence=reason)


def _check(name: str, status: Status, value: float, planned: float | None, unit: str, sentence: str) -> Check:
    if not math.isfinite(value):
        return Check(
            name=name, status="fail", sentence=f"{sentence}, and the number is {value}", planned=planned, unit=unit
        )
    return Check(name=name, status=status, sentence=sentence, value=value, planned=planned, unit=unit)
