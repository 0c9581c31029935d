"""Findings decide together with corrections, tell what is borderline, and may change their unit."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabench.analysis.estimate import exact, student, unknown
from lorabench.analysis.finding import decide, exponential, finding, in_unit, together, without, worst
from lorabench.analysis.rules import Above, Problem, Within

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


def marked(rule, value, error=0.001, name="a"):
    """Return the verdict on a number with a normal error, and whether it is borderline."""
    decided = decide(rule, student(value, error, 1e6, name, 6), "text", ["run"])
    return decided.verdict, decided.borderline


@given(inside=st.sampled_from([0.05, 0.2, -0.05, -0.2]), sign=st.sampled_from([-1, 1]))
def test_an_equality_is_borderline_by_the_end_that_is_nearer_to_the_margin(inside, sign):
    # With an error of 0.001 the ends of the 90% interval lie 0.001645 away, and those of the 95% interval 0.00196.
    verdict = "confirmed" if inside > 0 else "inconclusive"
    assert marked(RULE, sign * (0.01 * (1 - inside) - 0.001645)) == (verdict, abs(inside) < 0.1)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        # The lower end of the 95% interval lies above 0 by 5% and by 20% of the margin, and the estimate beyond it.
        (0.0012 + 0.05 * 0.0011, ("confirmed", True)),
        (0.00196 + 0.2 * 0.0011, ("confirmed", False)),
        # The upper end of the one-sided interval lies below the margin by 5% and by 20% of it.
        (0.95 * 0.0011 - 0.001645, ("contradicted", True)),
        (0.8 * 0.0011 - 0.001645, ("contradicted", False)),
    ],
)
def test_a_difference_is_borderline_by_its_margin_and_by_0(value, expected):
    error = 0.001 if value != 0.0012 + 0.05 * 0.0011 else 0.0012 / 1.96
    assert marked(Above(0.0011), value, error) == expected


@pytest.mark.parametrize(("share", "expected"), [(0.05, True), (0.2, False)])
def test_without_a_margin_half_of_the_interval_stands_for_it(share, expected):
    assert marked(Above(0.0), 0.00196 * (1 + share)) == ("confirmed", expected)
    assert marked(Above(0.0), -0.00196 * (1 + share)) == ("contradicted", expected)
    # A band with one end has a margin.
    assert marked(Within(-float("inf"), 0.005), 0.005 * (1 - share) - 0.001645) == ("confirmed", expected)


def test_nothing_but_an_interval_is_borderline():
    flagged = decide(RULE, student(0.0099, 0.001, 20, "a", 6), "a flag", [], [Problem("at the edge")])
    numbers = [decide(RULE, exact(0.00999), "a count", []), decide(RULE, unknown(0.0), "no error", []), flagged]
    assert not any(judged.borderline for judged in [*numbers, finding([], "a count", "confirmed")])


def test_one_comparison_makes_the_verdict_on_several_borderline():
    near, far = judged(0.01 * 0.95 - 0.001725), judged(0.0, name="b")
    assert (near.verdict, near.borderline, far.borderline) == ("confirmed", True, False)
    assert together([near, far]).borderline
    assert together([together([far, far]), together([near, far])]).borderline
    assert not together([far, far]).borderline
    # A comparison that is open for certain leaves nothing to turn.
    open_one = judged(0.01, name="c")
    assert (open_one.verdict, open_one.borderline) == ("inconclusive", False)
    assert not together([near, open_one]).borderline


def test_a_contradiction_is_borderline_by_its_corrected_level():
    # Alone, the lower end of its 95% interval lies 15% of the margin outside; as one of eight, that of the interval at
    # the eighth part of the level does by 5%.
    strong = judged(0.01 * 1.15 + 0.00209)
    assert (strong.verdict, strong.borderline) == ("contradicted", False)
    fine = [judged(0.0, name=name) for name in "bcdefgh"]
    several = together([strong, *fine])
    assert (several.verdict, several.borderline) == ("contradicted", True)


def test_what_speaks_against_a_verdict_speaks_against_it_with_moved_ends_too():
    near = judged(0.01 * 1.05 - 0.001725)
    assert (near.verdict, near.borderline) == ("inconclusive", True)
    assert not without(near, "confirmed").borderline
    assert without(judged(0.0), "confirmed").verdict == "inconclusive"


def test_a_finding_may_change_its_unit():
    judged = decide(Within(-math.log(2), math.log(2)), student(math.log(1.5), 0.1, 10, "ratio"), "", [])
    ratio = in_unit(judged, exponential, exponential)
    assert (ratio.verdict, ratio.estimate) == ("confirmed", pytest.approx(1.5))
    assert (ratio.margin_low, ratio.margin_high) == pytest.approx((0.5, 2))
    assert (ratio.ci_low, ratio.detectable) == pytest.approx((math.exp(judged.ci_low), math.exp(judged.detectable)))
    assert exponential(1e6) == math.inf
    # A decreasing unit exchanges the ends.
    judged = decide(Above(0.3), student(0.8, 0.1, 10, "distance"), "", [])
    turned = in_unit(judged, lambda value: 1 - value)
    assert (turned.verdict, turned.estimate) == ("confirmed", pytest.approx(0.2))
    assert (turned.ci_low, turned.ci_high) == pytest.approx((1 - judged.ci_high, 1 - judged.ci_low))
    assert (turned.margin_low, turned.margin_high) == (-math.inf, pytest.approx(0.7))
    assert turned.detectable == judged.detectable
