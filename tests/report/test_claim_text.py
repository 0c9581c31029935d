"""How the numbers of a judged claim are written, and other texts of the page."""

from __future__ import annotations

import math

import pandas as pd

from lorabench.report import claim_text, page
from lorabench.utils.formats import DASH

from ..handmade import make_claim


def test_margin():
    written = {
        (-0.012, 0.012, "nats per token"): "±0.012 nats",
        (0.012, math.inf, "error rate"): "at least 0.012 error rate",
        (-math.inf, 0.012, "nats per token"): "at most 0.012 nats",
        (6.25, 16.0, "ratio"): "6.25 to 16",
        (0.0, 0.0, "parameters"): "exactly 0 parameters",
        (-math.inf, math.inf, "slope"): DASH,
        (None, None, "slope"): DASH,
    }
    for (low, high, unit), text in written.items():
        assert claim_text.margin(make_claim("B1", margin_low=low, margin_high=high, unit=unit)) == text


def test_power():
    # The margin of a ratio near 1 is a difference, and so is its power.
    written = {
        (0.0085, "nats per token"): "0.0085 nats",
        (1.21, "ratio"): "a factor of 1.21",
        (0.012, "ratio"): "0.012",
    }
    written |= {(5e-17, "share of layers"): DASH, (math.inf, "ratio"): DASH, (math.nan, "ratio"): DASH}
    for (value, unit), text in written.items():
        assert claim_text.power(make_claim("B1", detectable=value, unit=unit)) == text


def test_only_verdicts_that_lack_something_have_a_remark():
    assert claim_text.remark(make_claim("B1", would_decide="x", missing="y")) == ""
    assert claim_text.remark(make_claim("B1", "inconclusive")) == "to decide: 6 seeds (now 3)"
    assert claim_text.remark(make_claim("B1", "inconclusive", would_decide=None)) == ""
    assert claim_text.remark(make_claim("B1", "setting not met", missing="natural text")) == "needs natural text"


def test_a_borderline_verdict_is_said_to_be():
    assert claim_text.verdict(make_claim("B1", borderline=True)) == "confirmed, borderline"
    # A claim of an older table is not known to be borderline.
    others = [make_claim("B1"), *(make_claim("B1", borderline=value) for value in (False, None, pd.NA))]
    assert {claim_text.verdict(claim) for claim in others} == {"confirmed"}


def test_texts_of_the_page():
    assert [page.text(null) for null in (None, math.nan, pd.NA, pd.NaT, "", [])] == [DASH] * 6
    assert page.text([0.9, 0.95]) == "0.9, 0.95"
    assert page.text(True) == "yes"
    assert [page.in_paper(figure) for figure in ("1, 2", "text", None)] == ["fig. 1, 2", "text", DASH]
