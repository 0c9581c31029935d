"""Numbers as people read them, against known answers."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from lorabench.utils import formats


def test_numbers_and_spans():
    assert [formats.number(value) for value in (2.8, 12, 123456.7, 1.5e-7)] == ["2.80", "12", "123,457", "1.50e-7"]
    assert [formats.duration(value) for value in (41.5, 150, 200_000)] == ["41.5 s", "2.50 min", "2.31 d"]
    # The paper's table of LoRA on Llama-3.1-8B: all layers at rank 256.
    assert [formats.parameters(value) for value in (704_970_752, 2_753_792, 8_192)] == ["0.70B", "2.75M", "8.2K"]
    assert formats.with_interval(0.5, math.nan, 0.75, 2) == "0.50 (no interval)"


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
