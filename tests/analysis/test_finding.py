"""Corrections for several comparisons: how findings decide together."""

from __future__ import annotations

import pytest

from lorabench.analysis.estimate import student
from lorabench.analysis.finding import decide, together, worst
from lorabench.analysis.rules import Within

RULE = Within.margin(0.01)


def judged(value, error=0.001, name="a"):
    return decide(RULE, student(value, error, 20, name, 6), name, [name])


def test_corrections_multiply_where_findings_are_nested():
    # Alone it contradicts at a level of about 0.02, so one of two comparisons does too, and one of four does not.
    against = judged(0.0125)
    assert against.verdict == "contradicted"
    assert 0.0125 < against.against < 0.025
    fine = judged(0.0, name="b")
    pair = together([against, fine])
    assert pair.verdict == "contradicted"
    assert pair.against == pytest.approx(2 * against.against)
    assert together([pair, together([fine, fine])]).verdict == "inconclusive"
    assert worst([fine, fine]).verdict == "confirmed"


def test_a_contradiction_that_the_correction_takes_away_has_a_remedy():
    findings = [judged(0.0125), *(judged(0.0, name=name) for name in "bcd")]
    decided = worst(findings)
    assert decided.verdict == "inconclusive"
    assert decided.remedy.seeds > 6
