"""SFT datasets: deterministic, distinct, disjoint."""

from __future__ import annotations

import pytest

from lorabench.config import ChatDataset
from lorabench.data.reasoning import INSTRUCT_TASKS, PRETRAIN_TASKS
from lorabench.data.sft import check_disjoint, make_dataset, prompt, read_dataset, write_dataset
from lorabench.errors import UserError


def spec(**changes):
    return ChatDataset(**{"kind": "instruct", "train": 40, "validation": 10, "test": 10, "max_chars": 300} | changes)


@pytest.mark.parametrize("kind", ["instruct", "worked"])
def test_splits_are_whole_distinct_and_short(kind):
    rows = make_dataset(spec(kind=kind))
    assert [row["split"] for row in rows] == ["train"] * 40 + ["validation"] * 10 + ["test"] * 10
    assert len({prompt(row["messages"]) for row in rows}) == 60
    assert all(sum(len(m["content"]) for m in row["messages"]) <= 300 for row in rows)
    assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in rows)
    check_disjoint(rows)


def test_same_seed_same_rows_and_another_seed_others():
    assert make_dataset(spec()) == make_dataset(spec())
    assert make_dataset(spec()) != make_dataset(spec(seed=1))


def test_worked_solutions_end_in_their_answer_and_use_odd_templates():
    for row in make_dataset(spec(kind="worked")):
        assert "####" in row["messages"][1]["content"]
        assert int(row["source"].partition("/")[2]) % 2 == 1


def test_fine_tuning_tasks_are_unseen_in_pretraining():
    assert not set(INSTRUCT_TASKS) & set(PRETRAIN_TASKS)


def test_a_shared_example_is_named_whatever_its_spaces():
    rows = make_dataset(spec())
    copy = {**rows[0], "split": "test"}
    copy["messages"] = [{"role": "user", "content": f" {rows[0]['messages'][0]['content']}\n"}, rows[0]["messages"][1]]
    with pytest.raises(UserError, match="splits 'train' and 'test' share the example"):
        check_disjoint([*rows, copy])


def test_a_file_with_a_shared_example_is_refused(tmp_path):
    rows = make_dataset(spec())
    write_dataset([*rows, {**rows[0], "split": "test"}], tmp_path / "bad.parquet")
    with pytest.raises(UserError, match="share the example"):
        read_dataset(tmp_path / "bad.parquet")


def test_round_trip(tmp_path):
    rows = make_dataset(spec())
    write_dataset(rows, tmp_path / "data.parquet")
    assert read_dataset(tmp_path / "data.parquet") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["data.parquet"]


def test_impossible_wishes_are_refused():
    with pytest.raises(UserError, match="found no 40 distinct train examples"):
        make_dataset(spec(max_chars=32))
