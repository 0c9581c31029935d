"""SFT datasets that need no download are deterministic, distinct and disjoint: generated, of docstrings, of facts."""

from __future__ import annotations

import math
from collections import Counter

import pyarrow.parquet as pq
import pytest
from scipy import stats

from lorabench.config.inputs import ChatDataset, DocstringsDataset, FactsDataset
from lorabench.config.loading import load_preset
from lorabench.data import sft
from lorabench.data.chat import prompt
from lorabench.data.identity import dataset_id
from lorabench.data.reasoning import INSTRUCT_TASKS, PRETRAIN_TASKS
from lorabench.data.sft import about, build_dataset, choose_docstrings, make_dataset, read_dataset, write_dataset
from lorabench.errors import UserError


def made(**changes):
    sizes = {"train": 40, "validation": 10, "test": 10}
    return list(make_dataset(ChatDataset(**{"kind": "instruct", "max_chars": 300} | sizes | changes)))


def test_splits_are_whole_distinct_and_short_and_follow_from_the_seed():
    for kind in ["instruct", "worked"]:
        rows = made(kind=kind)
        assert [row["split"] for row in rows] == ["train"] * 40 + ["validation"] * 10 + ["test"] * 10
        assert len({prompt(row["messages"]) for row in rows}) == 60
        assert all(sum(len(m["content"]) for m in row["messages"]) <= 300 for row in rows)
        assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in rows)
        assert rows == made(kind=kind)
        assert rows != made(kind=kind, seed=1)
    for row in rows:
        assert "####" in row["messages"][1]["content"]
        assert int(row["source"].partition("/")[2]) % 2 == 1, "worked solutions are of odd templates"
    assert not set(INSTRUCT_TASKS) & set(PRETRAIN_TASKS), "fine-tuning tasks are unseen in pretraining"
    message = "distinct train examples of at most 32 characters in a dataset of kind 'instruct'; 40 are needed"
    with pytest.raises(UserError, match=rf"found \d+ {message}"):
        made(max_chars=32)


def test_other_test_examples_are_new_and_the_other_splits_stay():
    for kind in ["instruct", "worked"]:
        rows, others = made(kind=kind), made(kind=kind, test_seed=100)
        assert others[:50] == rows[:50]
        assert [row["split"] for row in others[50:]] == ["test"] * 10
        assert len({prompt(row["messages"]) for row in rows + others[50:]}) == 70
        assert others == made(kind=kind, test_seed=100) != made(kind=kind, test_seed=101)
    spec = ChatDataset(kind="worked", train=40, validation=10, test=10)
    # The ids of runs that are stored hang on the id of data without other test examples.
    assert dataset_id(spec) == "a719ecea"
    assert dataset_id(spec) != dataset_id(spec.model_copy(update={"test_seed": 100}))


def test_many_row_groups_hold_the_same_rows_and_a_shared_example_is_named_whatever_its_spaces(tmp_path, monkeypatch):
    rows = made()
    monkeypatch.setattr(sft, "_GROUP_ROWS", 7)
    write_dataset(iter(rows), tmp_path / "rows.parquet")
    monkeypatch.setattr(sft, "_GROUP_CHARS", 300)
    write_dataset(iter(rows), tmp_path / "chars.parquet")
    counts = [pq.ParquetFile(tmp_path / f"{name}.parquet").num_row_groups for name in ("rows", "chars")]
    assert counts[0] == 9
    assert counts[1] > counts[0]
    assert list(read_dataset(tmp_path / "rows.parquet")) == list(read_dataset(tmp_path / "chars.parquet")) == rows
    question, answer = rows[0]["messages"]
    spaced = question | {"content": f" {question['content']}\n"}
    write_dataset([*rows, rows[0] | {"split": "test", "messages": [spaced, answer]}], tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="splits 'train' and 'test' share the example"):
        list(read_dataset(tmp_path / "rows.parquet"))


def test_facts_are_the_same_in_every_split_and_uniform(tmp_path):
    spec = FactsDataset(kind="facts", facts=300, digits=6)
    build_dataset(spec, tmp_path / "facts.parquet")
    answers = {split: {} for split in ("train", "validation", "test")}
    for row in read_dataset(tmp_path / "facts.parquet"):
        answers[row["split"]][prompt(row["messages"])] = row["messages"][-1]["content"]
    assert answers["train"] == answers["validation"] == answers["test"]
    assert len(answers["train"]) == spec.facts == spec.train == spec.validation == spec.test
    assert {len(number) for number in answers["train"].values()} == {6}
    digits = Counter("".join(answers["train"].values()))
    assert stats.chisquare([digits[digit] for digit in "0123456789"]).pvalue > 1e-4
    assert spec.entropy_bits == pytest.approx(300 * 6 * math.log2(10))


def docstrings(**changes) -> DocstringsDataset:
    return DocstringsDataset(**{"kind": "docstrings", "train": 40, "validation": 8, "test": 8} | changes)


def test_the_docstrings_of_overnight_keep_their_identity_and_their_examples(tmp_path):
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


def test_docstrings_are_short_distinct_and_of_other_packages_in_each_split(tmp_path, monkeypatch):
    chosen, note = choose_docstrings(docstrings(train=2000, max_chars=600))
    chats = list(chosen)
    assert len({chat.messages[1]["content"] for _, chat in chats}) == len(chats) == 2016
    assert all(chat.chars() <= 600 for _, chat in chats)
    sources = [{chat.source for name, chat in chats if name == split} for split in ("train", "validation", "test")]
    assert not sources[0] & sources[1] | sources[0] & sources[2] | sources[1] & sources[2]
    few = list(choose_docstrings(docstrings())[0])
    assert few != list(choose_docstrings(docstrings(seed=1))[0])
    assert dataset_id(docstrings(seed=1)) != dataset_id(docstrings())
    fewer = choose_docstrings(docstrings(train=1, max_chars=600, min_words=30))[1]
    assert fewer["usable"] < note["usable"]
    assert fewer["rows"] == note["rows"]
    with pytest.raises(UserError, match="test examples of at most 800 characters and at least 14 words in the docstr"):
        choose_docstrings(docstrings(test=9000))
    monkeypatch.setattr(sft, "DOCSTRINGS_FILE", tmp_path / "file")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="file was changed after it was installed; install the package again"):
        choose_docstrings(docstrings())
