"""Texts of the report's page; its formats of numbers are tested in tests/utils/test_formats.py."""

from __future__ import annotations

import math

import pandas as pd

from lorabench.report import text
from lorabench.utils.formats import DASH


def test_null_is_a_dash():
    assert [text.text(null) for null in (None, math.nan, pd.NA, pd.NaT, "", [])] == [DASH] * 6


def test_text_of_lists_and_flags():
    assert text.text([0.9, 0.95]) == "0.9, 0.95"
    assert text.text(True) == "yes"


def test_place_in_the_paper():
    assert [text.in_paper(figure) for figure in ("1, 2", "text", None)] == ["fig. 1, 2", "text", DASH]
