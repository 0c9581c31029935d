"""Hub datasets in the form of Tulu3, read from local copies of the same form."""

from collections import Counter

import numpy as np
import pytest

from lorabench.config.inputs import HubDataset
from lorabench.data.chat import prompt
from lorabench.data.files import NO_ANSWER, NO_TEXT, TOO_LONG
from lorabench.data.sft import about, build_dataset, read_dataset
from lorabench.errors import UserError

from ..hub.repositories import copies, tulu3_row, write_tulu3

SIZES = {"train": 40, "validation": 8, "test": 8}


def make(folder, **changes):
    """Make a dataset from the copy in a folder, and return its rows."""
    root, fields = folder.parents[1], {"max_chars": 100, "mean_tokens": 50} | SIZES | changes
    spec = HubDataset(kind="hub", id=folder.relative_to(root).as_posix(), **fields)
    build_dataset(spec, root / "made.parquet", copies(root))
    return list(read_dataset(root / "made.parquet"))


def prompts(rows, split=None):
    return [prompt(row["messages"]) for row in rows if split in (None, row["split"])]


def test_the_choice_is_spread_over_tulu3_follows_from_the_seed_and_holds_out_the_same_examples(tmp_path):
    folder = write_tulu3(tmp_path, map(tulu3_row, range(1000)))
    few, many = make(folder), make(folder, train=150)
    assert Counter(row["split"] for row in few) == SIZES
    assert {row["source"] for row in few} == {"ai2-adapt-dev/part0", "ai2-adapt-dev/part1"}
    originals = [tulu3_row(number)["messages"] for number in range(1000)]
    # With a uniform choice the mean is 500, with a standard error of about 40.
    assert 300 < np.mean([originals.index(row["messages"]) for row in few]) < 700
    assert make(folder) == few
    assert prompts(make(folder, seed=1)) != prompts(few)
    # What is held out does not depend on how much is trained on.
    for split in ("validation", "test"):
        assert prompts(few, split) == prompts(many, split)
    assert set(prompts(few, "train")) < set(prompts(many, "train"))


def test_what_is_left_out_is_counted_and_noted_and_too_few_examples_are_one_sentence(tmp_path):
    rows = [*map(tulu3_row, range(45)), tulu3_row(1), tulu3_row(46, question="x" * 101)]
    left_out = r"left out: 1 too long \(first: row 24\), 1 with the prompt of another \(first: row 47\)"
    with pytest.raises(UserError, match=f"45 of 47 rows can be used as chats; {left_out}; 56 are needed"):
        make(write_tulu3(tmp_path, rows))
    rows = [tulu3_row(number) for number in range(100)]
    rows += [tulu3_row(number, answer="another") for number in range(1, 100, 3)]
    # This prompt differs only in its spaces.
    rows += [tulu3_row(1, question="question  1 ")]
    rows += [{**tulu3_row(500), "messages": [{"role": "user", "content": f"alone {n}"}]} for n in range(20)]
    rows += [tulu3_row(601, answer="  "), {**tulu3_row(602), "messages": []}]
    rows += [tulu3_row(number, question=f"{number} " * 60) for number in range(700, 709)]
    chosen = make(write_tulu3(tmp_path, rows))
    assert len(set(prompts(chosen))) == len(chosen) == 56
    assert not any("alone" in text or len(text) > 300 for text in prompts(chosen))
    assert about(tmp_path / "made.parquet") == {
        "id": "allenai/tulu-3-sft-mixture",
        "commit": "0" * 40,
        "rows": 165,
        "usable": 100,
        "left_out": {NO_ANSWER: 21, NO_TEXT: 1, TOO_LONG: 9, "with the prompt of another": 34},
    }
