"""Numbers as people read them, against known answers."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pandas as pd

from lorabench.utils import formats


def test_examples_of_the_docstrings():
    assert doctest.testmod(formats).failed == 0


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


def test_foreign_text_keeps_to_its_line_and_its_letters():
    # An escape sequence of a terminal, a line that GitHub would obey, a byte that is no UTF-8, a mark that turns text.
    name = "Größe 模型\x1b[31m\n::error::\udce9\u202e"
    assert formats.printable(name) == r"Größe 模型\x1b[31m\n::error::\udce9\u202e"
