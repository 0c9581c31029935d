"""Descriptions of functions from a shipped file: the dataset of preset overnight, other sizes, and a changed file."""

from __future__ import annotations

import pytest

from lorabench.config.inputs import DocstringsDataset
from lorabench.config.loading import load_preset
from lorabench.data import sft
from lorabench.data.identity import dataset_id
from lorabench.data.sft import about, build_dataset, read_dataset
from lorabench.errors import UserError


def spec(**changes) -> DocstringsDataset:
    return DocstringsDataset(**{"kind": "docstrings", "train": 40, "validation": 8, "test": 8} | changes)


def test_the_dataset_of_overnight_keeps_its_identity_and_its_examples(tmp_path):
    overnight = load_preset("overnight").datasets["docstrings"]
    assert dataset_id(overnight) == "1c3665b2"
    build_dataset(overnight, tmp_path / "made.parquet")
    note = about(tmp_path / "made.parquet")
    assert (note["rows"], note["usable"], note["left_out"]["too long"]) == (31334, 2745, 3315)
    assert note["id"].startswith("docstrings of accelerate 1.15.0, more-itertools 11.2.1, ")
    assert note["licences"]["rich"] == "MIT License"
    first = next(read_dataset(tmp_path / "made.parquet"))
    asked, answered = (turn["content"] for turn in first["messages"])
    assert asked.startswith("What does this Python function do?\n\ndef ")
    assert answered.endswith(".")


def test_examples_are_short_distinct_and_of_other_packages_in_each_split(tmp_path):
    build_dataset(spec(train=2000, max_chars=600), tmp_path / "made.parquet")
    rows = list(read_dataset(tmp_path / "made.parquet"))
    assert len({row["messages"][1]["content"] for row in rows}) == len(rows) == 2016
    assert all(sum(len(turn["content"]) for turn in row["messages"]) <= 600 for row in rows)
    sources = [{row["source"] for row in rows if row["split"] == split} for split in ("train", "validation", "test")]
    assert not sources[0] & sources[1] | sources[0] & sources[2] | sources[1] & sources[2]


def test_the_seed_decides_the_choice_and_more_words_leave_out_more():
    chosen, note = sft.choose_docstrings(spec())
    assert list(sft.choose_docstrings(spec(seed=1))[0]) != list(chosen)
    assert dataset_id(spec(seed=1)) != dataset_id(spec())
    fewer = sft.choose_docstrings(spec(min_words=30))[1]
    assert fewer["usable"] < note["usable"]
    assert fewer["rows"] == note["rows"]


def test_what_is_wrong_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="test examples of at most 800 characters and at least 14 words in the docstr"):
        sft.choose_docstrings(spec(test=9000))
    monkeypatch.setattr(sft, "DOCSTRINGS_FILE", tmp_path / "file")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="file was changed after it was installed; install the package again"):
        sft.choose_docstrings(spec())
