"""The figure of all verdicts from claims made by hand."""

import math

import pandas as pd
import pytest

from lorabench.claims.judge import CLAIMS
from lorabench.figures.verdicts import END, FAMILIES, LOOKS, SHORT_NAMES, in_margins
from lorabench.store.tables import Tables

from ..handmade import claims_table, make_claim
from .layout import draw

MEASURED = ["x", "x_low", "x_high", "holds_from", "holds_to"]


def scaled(**changes) -> list[float]:
    [row] = in_margins(claims_table([make_claim("B1", **changes)])).to_dict("records")
    return [row[name] for name in MEASURED]


def test_numbers_are_in_units_of_the_margin():
    assert scaled() == pytest.approx([0.2, -0.4, 0.8, -1, 1])
    assert scaled(margin_low=0.004, margin_high=math.inf) == pytest.approx([0.5, -1, 2, 1, math.inf])
    assert scaled(margin_low=-math.inf, margin_high=0.004) == pytest.approx([0.5, -1, 2, -math.inf, 1])
    # No worse than by a margin: better lies on the right.
    assert scaled(margin_low=-0.004, margin_high=math.inf) == pytest.approx([0.5, -1, 2, -1, math.inf])
    # Ratios are measured by their logarithms.
    ratio = {"unit": "ratio", "estimate": 10.0, "ci_low": 2.5, "ci_high": 160.0}
    band = {"margin_low": 5.0, "margin_high": 20.0}
    assert scaled(**ratio, **band) == pytest.approx([0, -2, 4, -1, 1])
    assert scaled(**ratio, margin_low=10.0, margin_high=math.inf)[0] == pytest.approx(1)
    lower = scaled(**ratio, margin_low=-math.inf, margin_high=0.1)
    assert [lower[0], *lower[3:]] == pytest.approx([1, -math.inf, -1])


def every_verdict() -> pd.DataFrame:
    rows = [make_claim(f"B{place}", verdict) for place, verdict in enumerate(LOOKS, start=1)]
    return claims_table([*rows, make_claim("A1", estimate=9.0, ci_low=-9.0, ci_high=9.5), make_claim("$x^$")])


def test_every_claim_is_drawn_or_named_once_below_its_family():
    figure, plotted = draw("verdicts", Tables(pd.DataFrame(), pd.DataFrame(), claims=every_verdict()))
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert [text for text in texts if text in FAMILIES.values()] == [FAMILIES["B"], FAMILIES["A"]]
    named = [text.get_text() for text in figure.texts]
    assert sorted(plotted["claim_id"]) == sorted(text for text in texts + named if text in set(plotted["claim_id"]))
    assert [text for text in named if text in set(plotted["claim_id"])] == [f"B{len(LOOKS)}"]
    # What lies beyond the axis is drawn within it; the table has the numbers.
    assert plotted.loc[plotted["claim_id"] == "A1", "x"].item() == 900
    for line in figure.axes[0].get_lines():
        assert all(abs(float(x)) <= END for x in line.get_xdata())


def test_each_claim_and_family_has_a_short_name():
    assert set(SHORT_NAMES) == {claim.id for claim in CLAIMS}
    assert set(FAMILIES) == {claim.id[0] for claim in CLAIMS}
