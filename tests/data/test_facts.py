"""Random facts: uniform answers, the same facts in every split, entropy as computed."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from scipy import stats

from lorabench.config.inputs import FactsDataset
from lorabench.data.chat import prompt
from lorabench.data.sft import build_dataset, make_dataset, read_dataset

SPEC = FactsDataset(kind="facts", facts=300, digits=6)


def answers(rows, split="train"):
    return {prompt(row["messages"]): row["messages"][-1]["content"] for row in rows if row["split"] == split}


def test_what_is_measured_is_what_was_trained(tmp_path):
    rows = list(make_dataset(SPEC))
    assert answers(rows, "train") == answers(rows, "validation") == answers(rows, "test")
    assert len(answers(rows)) == SPEC.facts == SPEC.train == SPEC.validation == SPEC.test
    build_dataset(SPEC, tmp_path / "facts.parquet")
    assert list(read_dataset(tmp_path / "facts.parquet")) == rows


def test_answers_hold_the_entropy_that_is_claimed():
    numbers = answers(make_dataset(SPEC)).values()
    assert {len(number) for number in numbers} == {6}
    digits = Counter("".join(numbers))
    assert stats.chisquare([digits[digit] for digit in "0123456789"]).pvalue > 1e-4
    assert SPEC.entropy_bits == pytest.approx(300 * 6 * math.log2(10))
