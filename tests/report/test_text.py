"""Numbers as the report writes them."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from lorabench.report import text


@pytest.mark.parametrize(
    ("value", "written"),
    [(0, "0"), (3, "3"), (2.9182, "2.92"), (2.8, "2.80"), (0.00714, "0.00714"), (-0.0105, "-0.0105"), (72.68, "72.7"),
     (123456.7, "123,457"), (1.5e-7, "1.50e-7"), (10.0, "10"), (3.2e9, "3.20e9"), (math.inf, "inf")],
)  # fmt: skip
def test_number(value: float, written: str):
    assert text.number(value) == written


@pytest.mark.parametrize(("value", "written"), [(3e-4, "3e-4"), (1e-3, "1e-3"), (2.204e-3, "2.20e-3"), (1.0, "1e0")])
def test_lr(value: float, written: str):
    assert text.lr(value) == written


@pytest.mark.parametrize(
    "write", [text.number, text.signed, text.nll, text.lr, text.count, text.amount, text.duration, text.when]
)
@pytest.mark.parametrize("null", [None, math.nan, pd.NA, pd.NaT])
def test_null_is_a_dash(write, null):
    assert write(null) == text.DASH


def test_signed_and_place_in_the_paper():
    assert [text.signed(value) for value in (0.0041, -0.5, 0.0)] == ["+0.0041", "-0.5000", "+0.0000"]
    assert [text.in_paper(figure) for figure in ("1, 2", "text", None)] == ["fig. 1, 2", "text", text.DASH]


def test_intervals_need_both_ends():
    assert text.interval(1.5, 2.25) == "[1.50, 2.25]"
    assert text.lr_interval(1e-3, 2e-3) == "[1e-3, 2e-3]"
    assert text.interval(None, 2.0) == text.DASH


def test_units():
    assert text.amount(1.06e14, "FLOP") == "106 TFLOP"
    assert text.amount(240_000) == "240 k"
    assert text.amount(12) == "12"
    assert [text.duration(s) for s in (41.5, 150, 9000, 200_000)] == ["41.5 s", "2.50 min", "2.50 h", "2.31 d"]
    assert text.when("2026-01-02T03:04:05+00:00") == "2026-01-02 03:04 UTC"


def test_text_of_lists_and_flags():
    assert text.text([0.9, 0.95]) == "0.9, 0.95"
    assert text.text(True) == "yes"
    assert text.text([]) == text.DASH
