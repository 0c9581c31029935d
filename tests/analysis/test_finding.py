"""Findings decide together with corrections, tell how likely they come out again, and may change their unit."""

import math

import numpy as np
import pytest
from scipy.stats import cauchy, lognorm, norm

from lorabench.analysis.estimate import N_DRAWS, Estimate, student
from lorabench.analysis.finding import N_AGAIN, Finding, decide, exponential, in_unit, together, with_parts, without
from lorabench.analysis.optima import as_ratio
from lorabench.analysis.rules import Above, Within

RULE = Within.margin(0.01)


def judged(value, error=0.001, name="a"):
    return decide(RULE, student(value, error, 20, name, 6), name, [name])


@pytest.mark.parametrize(
    ("rule", "value", "verdict", "low", "high"),
    [
        # A new estimate of an equality must lie in the band by 1.645 errors, and beyond it by 1.96 to contradict.
        (RULE, 0.0075, "confirmed", [(-0.01, 1.645)], [(0.01, -1.645)]),
        (RULE, -0.0125, "contradicted", [], [(-0.01, -1.96)]),
        # That of a difference must reach the margin, and half of it by 1.645 errors. It is below the margin by 1.645.
        (Above(0.004), 0.005, "confirmed", [(0.004, 0), (0.002, 1.645)], []),
        (Above(0.004), -0.0003, "contradicted", [], [(0, 1.96), (0.004, -1.645)]),
        (Above(0.006), 0.0025, "right sign, below the margin", [(0, 1.96)], [(0.006, -1.645)]),
    ],
)
def test_the_probability_of_the_same_verdict_is_that_of_a_new_estimate_of_a_truth_that_is_near_the_margins(
    rule, value, verdict, low, high
):
    judged = decide(rule, student(value, 0.001, 1e6, "a", 6), "", [])
    assert judged.verdict == verdict
    ends = [end for end in rule.margins if math.isfinite(end)]
    prior = cauchy(sum(ends) / 2, abs(ends[0]) / 2)  # an equality's is half of its margin wide, as it has two ends
    truths = np.linspace(value - 0.006, value + 0.006, 2001)
    # The error is measured anew: ln of its factor is known to 0.2 from this run, and to 0.35 before the runs.
    kept = 0.35**2 / (0.35**2 + 0.2**2)
    factor = lognorm(0.2 * math.sqrt(1 + kept), scale=(abs(ends[0]) / (1.96 * 0.001)) ** (1 - kept))
    expected = 0.0
    for error in 0.001 * factor.ppf((np.arange(200) + 0.5) / 200):
        start = max((end + by * error for end, by in low), default=-math.inf)
        stop = min((end + by * error for end, by in high), default=math.inf)
        new, weights = norm(truths, 0.001), prior.pdf(truths) * norm.pdf(truths, value, 0.001)
        held = np.maximum(new.cdf(stop) - new.cdf(start), 0)
        expected += float(np.average(held, weights=weights)) / 200
    assert judged.p_again == pytest.approx(expected, abs=3 * math.sqrt(expected * (1 - expected) / N_AGAIN))
    assert judged.borderline == (expected < 0.8)


def test_an_interval_may_be_a_point_where_that_of_several_looks_is_not():
    error = np.zeros(N_DRAWS)
    error[: N_DRAWS // 100], error[-N_DRAWS // 100 :] = -0.1, 0.1
    estimate = Estimate(0.5, error, n_seeds=24, looks=3)
    low, high = estimate.interval()
    assert low == high
    assert decide(Above(0.1), estimate, "", []).verdict == "confirmed"


def test_the_sign_is_right_in_all_comparisons_only_if_none_is_open_or_contradicts():
    rule = Above(0.01)
    small, large, open_one, none = (
        decide(rule, student(value, 0.001, 20, name, 6), name, [name])
        for value, name in ((0.004, "small"), (0.02, "large"), (0.0095, "open"), (0.0, "none"))
    )
    sign = "right sign, below the margin"
    assert together([small, large]).verdict == sign
    assert together([small, open_one, large]).verdict == "inconclusive"
    assert together([small, none, open_one]).verdict == "contradicted"
    # It is one of several tests, like a contradiction.
    weak = decide(rule, student(0.01 - 0.0019, 0.001, 20, "weak", 6), "", [])
    assert (weak.verdict, together([weak, large]).verdict) == (sign, "inconclusive")
    assert without(small, "contradicted").verdict == "inconclusive"


def test_a_finding_on_several_comparisons_says_how_many_hold():
    parts = [judged(0.0), judged(0.0125), judged(0.01), Finding("not tested", "")]
    several = with_parts(together(parts), parts)
    assert (several.n_hold, several.n_parts, several.part_low, several.part_high) == (1, 3, 0.0, 0.0125)
    in_percent = in_unit(several, lambda value: -100 * value)
    assert (in_percent.part_low, in_percent.part_high) == (-1.25, 0.0)


def test_a_finding_may_change_its_unit():
    judged = decide(Within(-math.log(2), math.log(2)), student(math.log(1.5), 0.1, 10, "ratio"), "", [])
    ratio = as_ratio(judged)
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
