"""Numbers as people read them, against known answers."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pandas as pd

from lorabench.utils import formats


def test_examples_of_the_docstrings():
    assert doctest.testmod(formats).failed == 0


def test_numbers():
    known = {0: "0", 2.9182: "2.92", 2.8: "2.80", 0.00714: "0.00714", -0.0105: "-0.0105", 123456.7: "123,457",
             1.5e-7: "1.50e-7", 3.2e9: "3.20e9", math.inf: "inf"}  # fmt: skip
    assert [formats.number(value) for value in known] == list(known.values())
    assert [formats.number(value, 2) for value in (0.034, 8.34, 9.0, 1234.5)] == ["0.034", "8.3", "9", "1,234"]
    assert [formats.lr(value) for value in (1e-3, 2.204e-3)] == ["1e-3", "2.20e-3"]
    assert [formats.signed(value) for value in (0.0041, -0.5, 0.0)] == ["+0.0041", "-0.5000", "+0.0000"]
    assert [formats.amount(1.06e14, "FLOP"), formats.amount(240_000)] == ["106 TFLOP", "240 k"]


def test_parameters_are_written_as_in_the_paper():
    # The first four are the paper's table of LoRA on Llama-3.1-8B: MLP, attention and all at rank 256, MLP at rank 128.
    known = {486_866_944: "0.49B", 251_985_920: "0.25B", 704_970_752: "0.70B", 243_433_472: "0.24B",
             2_753_792: "2.75M", 834_000: "0.83M", 8_192: "8.2K"}  # fmt: skip
    assert [formats.parameters(value) for value in known] == list(known.values())


def test_null_is_a_dash_and_nothing_else_is_null():
    writers = [formats.number, formats.signed, formats.nll, formats.lr, formats.count, formats.amount]
    for write in [*writers, formats.parameters, formats.duration, formats.when]:
        for null in (None, math.nan, np.float32("nan"), pd.NA, pd.NaT):
            assert write(null) == formats.DASH, write.__name__
    for value in (0, 0.0, "", [], np.array([1.0, math.nan]), np.int64(0), True, math.inf):
        assert not formats.missing(value)


def test_intervals_need_both_ends():
    assert formats.interval(1.5, 2.25) == "[1.50, 2.25]"
    assert formats.lr_interval(1e-3, 2e-3) == "[1e-3, 2e-3]"
    assert formats.interval(None, 2.0) == formats.DASH
    assert formats.fixed_interval(1.5, 2.25, 1) == "[1.5, 2.2]"
    assert formats.fixed_interval(math.nan, 2.0, 1) == "(no interval)"


def test_foreign_text_keeps_to_its_line_and_its_letters():
    # An escape sequence of a terminal, a line that GitHub would obey, a byte that is no UTF-8, a mark that turns text.
    name = "Größe 模型\x1b[31m\n::error::\udce9\u202e"
    assert formats.printable(name) == r"Größe 模型\x1b[31m\n::error::\udce9\u202e"
