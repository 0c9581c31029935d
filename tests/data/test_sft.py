"""SFT datasets: deterministic, distinct, disjoint."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from lorabench.config.inputs import ChatDataset
from lorabench.data import sft
from lorabench.data.chat import prompt
from lorabench.data.reasoning import INSTRUCT_TASKS, PRETRAIN_TASKS
from lorabench.data.sft import checked_disjoint, make_dataset, read_dataset, write_dataset
from lorabench.errors import UserError


def made(**changes):
    sizes = {"train": 40, "validation": 10, "test": 10}
    return list(make_dataset(ChatDataset(**{"kind": "instruct", "max_chars": 300} | sizes | changes)))


def test_splits_are_whole_distinct_and_short():
    for kind in ["instruct", "worked"]:
        rows = made(kind=kind)
        assert [row["split"] for row in rows] == ["train"] * 40 + ["validation"] * 10 + ["test"] * 10
        assert len({prompt(row["messages"]) for row in rows}) == 60
        assert all(sum(len(m["content"]) for m in row["messages"]) <= 300 for row in rows)
        assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in rows)
        assert list(checked_disjoint(rows)) == rows


def test_same_seed_same_rows_and_another_seed_others():
    assert made() == made()
    assert made() != made(seed=1)


def test_worked_solutions_end_in_their_answer_and_use_odd_templates():
    for row in made(kind="worked"):
        assert "####" in row["messages"][1]["content"]
        assert int(row["source"].partition("/")[2]) % 2 == 1


def test_fine_tuning_tasks_are_unseen_in_pretraining():
    assert not set(INSTRUCT_TASKS) & set(PRETRAIN_TASKS)


def test_a_shared_example_is_named_whatever_its_spaces():
    rows = made()
    copy = {**rows[0], "split": "test"}
    copy["messages"] = [{"role": "user", "content": f" {rows[0]['messages'][0]['content']}\n"}, rows[0]["messages"][1]]
    with pytest.raises(UserError, match="splits 'train' and 'test' share the example"):
        list(checked_disjoint([*rows, copy]))


def test_many_row_groups_hold_the_same_rows(tmp_path, monkeypatch):
    rows = made()
    monkeypatch.setattr(sft, "_GROUP_ROWS", 7)
    write_dataset(iter(rows), tmp_path / "rows.parquet")
    monkeypatch.setattr(sft, "_GROUP_CHARS", 300)
    write_dataset(iter(rows), tmp_path / "chars.parquet")
    counts = [pq.ParquetFile(tmp_path / f"{name}.parquet").num_row_groups for name in ("rows", "chars")]
    assert counts[0] == 9
    assert counts[1] > counts[0]
    assert list(read_dataset(tmp_path / "rows.parquet")) == list(read_dataset(tmp_path / "chars.parquet")) == rows


def test_impossible_wishes_are_refused():
    message = (
        r"found \d+ distinct train examples of at most 32 characters in a dataset of kind 'instruct'; 40 are needed"
    )
    with pytest.raises(UserError, match=message):
        made(max_chars=32)
