"""Numbers as people read them, against known answers."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from lorabench.utils import formats


def test_numbers_and_spans():
    assert [formats.number(value) for value in (2.8, 12, 123456.7, 1.5e-7)] == ["2.80", "12", "123,457", "1.50e-7"]
    assert [formats.lr(value) for value in (3e-4, 2.266e-3, 1.0)] == ["3e-4", "2.27e-3", "1e0"]
    assert [formats.duration(value) for value in (41.5, 150, 200_000)] == ["41.5 s", "2.50 min", "2.31 d"]
    # The paper's table of LoRA on Llama-3.1-8B: all layers at rank 256.
    assert [formats.parameters(value) for value in (704_970_752, 2_753_792, 8_192)] == ["0.70B", "2.75M", "8.2K"]
    assert [formats.amount(*value) for value in ((1.24e6,), (3.5e12, "FLOP"), (12,))] == ["1.24 M", "3.50 TFLOP", "12"]
    assert (formats.count(12345.6), formats.nll(1.23456), formats.signed(0.0041)) == ("12,346", "1.2346", "+0.0041")
    assert formats.when("2026-01-02T03:04:05+00:00") == "2026-01-02 03:04 UTC"
    assert formats.with_interval(0.5, 0.25, 0.75, 2, "+", " nats") == "+0.50 nats [0.25, 0.75]"
    assert formats.with_interval(0.5, math.nan, 0.75, 2) == "0.50 (no interval)"
    assert formats.with_interval(math.nan, math.nan, math.nan, 2) == "unknown"


def test_null_is_a_dash_and_nothing_else_is_null():
    writers = [formats.number, formats.signed, formats.nll, formats.lr, formats.count, formats.amount]
    for write in [*writers, formats.parameters, formats.duration, formats.when]:
        for null in (None, math.nan, np.float32("nan"), pd.NA, pd.NaT):
            assert write(null) == formats.DASH, write.__name__
    for value in (0, 0.0, "", [], np.array([1.0, math.nan]), np.int64(0), True, math.inf):
        assert not formats.missing(value)


def test_foreign_text_keeps_to_its_line_and_its_letters():
    # An escape sequence of a terminal, a line that GitHub would obey, a byte that is no UTF-8, a mark that turns text.
    name = "Größe 模型\x1b[31m\n::error::\udce9\u202e"
    assert formats.printable(name) == r"Größe 模型\x1b[31m\n::error::\udce9\u202e"
