"""Numbers as people read them, against known answers."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pandas as pd
import pytest

from lorabench.utils import formats


def test_examples_of_the_docstrings():
    assert doctest.testmod(formats).failed == 0


@pytest.mark.parametrize(
    ("value", "written"),
    [(0, "0"), (3, "3"), (2.9182, "2.92"), (2.8, "2.80"), (0.00714, "0.00714"), (-0.0105, "-0.0105"), (72.68, "72.7"),
     (123456.7, "123,457"), (1.5e-7, "1.50e-7"), (10.0, "10"), (3.2e9, "3.20e9"), (math.inf, "inf")],
)  # fmt: skip
def test_number(value: float, written: str):
    assert formats.number(value) == written


@pytest.mark.parametrize(
    ("value", "written"), [(0.034, "0.034"), (8.34, "8.3"), (9.0, "9"), (12.34, "12"), (1234.5, "1,234")]
)
def test_two_digits(value: float, written: str):
    assert formats.number(value, 2) == written


@pytest.mark.parametrize(("value", "written"), [(3e-4, "3e-4"), (1e-3, "1e-3"), (2.204e-3, "2.20e-3"), (1.0, "1e0")])
def test_lr(value: float, written: str):
    assert formats.lr(value) == written


@pytest.mark.parametrize(
    ("value", "written"),
    # The first four are the paper's table of LoRA on Llama-3.1-8B: MLP, attention and all at rank 256, MLP at rank 128.
    [(486_866_944, "0.49B"), (251_985_920, "0.25B"), (704_970_752, "0.70B"), (243_433_472, "0.24B"),
     (8_030_261_248, "8.03B"), (2_753_792, "2.75M"), (834_000, "0.83M"), (88_000, "88.0K"), (8_192, "8.2K")],
)  # fmt: skip
def test_parameters(value: float, written: str):
    assert formats.parameters(value) == written


WRITERS = [
    formats.number,
    formats.signed,
    formats.nll,
    formats.lr,
    formats.count,
    formats.amount,
    formats.parameters,
    formats.duration,
    formats.when,
]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("null", [None, math.nan, np.float64("nan"), np.float32("nan"), pd.NA, pd.NaT])
def test_null_is_a_dash(write, null):
    assert write(null) == formats.DASH


@pytest.mark.parametrize("value", [0, 0.0, "", [], np.array([1.0, math.nan]), np.int64(0), True, math.inf])
def test_other_values_are_not_missing(value):
    assert not formats.missing(value)


def test_signed():
    assert [formats.signed(value) for value in (0.0041, -0.5, 0.0)] == ["+0.0041", "-0.5000", "+0.0000"]


def test_intervals_need_both_ends():
    assert formats.interval(1.5, 2.25) == "[1.50, 2.25]"
    assert formats.lr_interval(1e-3, 2e-3) == "[1e-3, 2e-3]"
    assert formats.interval(None, 2.0) == formats.DASH
    assert formats.fixed_interval(1.5, 2.25, 1) == "[1.5, 2.2]"
    assert formats.fixed_interval(math.nan, 2.0, 1) == "(no interval)"


def test_units():
    assert formats.amount(1.06e14, "FLOP") == "106 TFLOP"
    assert formats.amount(240_000) == "240 k"
    assert formats.amount(12) == "12"
    assert [formats.duration(s) for s in (41.5, 150, 9000, 200_000)] == ["41.5 s", "2.50 min", "2.50 h", "2.31 d"]
    assert formats.when("2026-01-02T03:04:05+00:00") == "2026-01-02 03:04 UTC"
    assert [formats.percent(share) for share in (0, 0.125, 1)] == ["0%", "12%", "100%"]
