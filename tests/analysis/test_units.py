from __future__ import annotations

import math

import pytest

from lorabench.analysis.estimate import student
from lorabench.analysis.finding import Finding, decide, exponential, in_unit
from lorabench.analysis.rules import Above, Within


def test_a_ratio_has_its_ends_and_its_margin_as_ratios():
    judged = decide(Within(-math.log(2), math.log(2)), student(math.log(1.5), 0.1, 10, "ratio"), "", [])
    ratio = in_unit(judged, exponential, exponential)
    assert (ratio.verdict, ratio.estimate, ratio.margin_low, ratio.margin_high) == (
        "confirmed",
        pytest.approx(1.5),
        pytest.approx(0.5),
        pytest.approx(2),
    )
    assert ratio.ci_low == pytest.approx(math.exp(judged.ci_low))
    assert ratio.detectable == pytest.approx(math.exp(judged.detectable))
    assert exponential(1e6) == math.inf


def test_a_decreasing_unit_exchanges_the_ends():
    judged = decide(Above(0.3), student(0.8, 0.1, 10, "distance"), "", [])
    turned = in_unit(judged, lambda value: 1 - value)
    assert (turned.verdict, turned.estimate) == ("confirmed", pytest.approx(0.2))
    assert (turned.ci_low, turned.ci_high) == pytest.approx((1 - judged.ci_high, 1 - judged.ci_low))
    assert (turned.margin_low, turned.margin_high) == (-math.inf, pytest.approx(0.7))
    assert turned.detectable == judged.detectable


def test_a_finding_without_numbers_keeps_none():
    assert math.isnan(in_unit(Finding("not tested", "no runs"), exponential, exponential).estimate)
