"""Test examples of one package or one value of a column are a group, from the data to the table `test_losses`."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from lorabench.config.inputs import FileDataset, FileProblems, HubDataset
from lorabench.data.identity import dataset_id, groups_of_tests, has_groups
from lorabench.data.problems import make_problems, write_problems
from lorabench.data.sft import build_dataset
from lorabench.errors import UserError
from lorabench.utils.checked_tensors import write_tensors

SIZES = {"train": 8, "validation": 4, "test": 12}


def rows(**columns):
    return [{"question": f"{n}+1?", "answer": str(n + 1), "page": f"page {n % 3}"} | columns for n in range(24)]


def write(path, content):
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def own(path, kind=FileDataset, **changes):
    fields = {"grader": "number"} if kind is FileProblems else {"max_chars": 100, "mean_tokens": 10}
    return kind(**{"kind": "file", "path": str(path)} | SIZES | fields | changes)


@pytest.mark.parametrize("kind", [FileDataset, FileProblems])
def test_a_column_of_a_file_names_the_groups_and_changes_no_example(tmp_path, kind):
    data, made = write(tmp_path / "data.jsonl", rows()), tmp_path / "made.parquet"

    def examples(spec):
        if kind is FileProblems:
            write_problems(make_problems(spec), made)
        else:
            build_dataset(spec, made)
        return pq.read_table(made).to_pylist()

    plain, grouped = examples(own(data, kind)), examples(own(data, kind, group="page"))
    assert {row["source"] for row in plain} == {"data.jsonl"}
    assert [row | {"source": ""} for row in grouped] == [row | {"source": ""} for row in plain]
    number = {f"data.jsonl/page {n}": n for n in range(3)}
    for row in grouped:
        question = row["question"] if kind is FileProblems else row["messages"][0]["content"]
        assert int(question.split("+")[0]) % 3 == number[row["source"]]
    assert groups_of_tests(made, None) == [row["source"] for row in grouped if row["split"] == "test"]
    assert (has_groups(own(data, kind)), has_groups(own(data, kind, group="page"))) == (False, True)
    assert dataset_id(own(data, kind)) != dataset_id(own(data, kind, group="page"))


def test_a_row_without_its_group_is_counted_and_left_out(tmp_path):
    data = write(tmp_path / "data.jsonl", [*rows()[1:], {"question": "q", "answer": "a"}])
    with pytest.raises(UserError, match="23 of its 24 rows can be used .1 no 'page', which names its group"):
        build_dataset(own(data, group="page"), tmp_path / "made.parquet")


def test_a_column_of_the_hub_names_the_groups(tmp_path):
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    turns = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}] for n in range(24)]
    write(folder / "train.jsonl", [{"messages": chat, "page": n % 2} for n, chat in enumerate(turns)])
    fields = {"kind": "hub", "id": "owner/name", "path": str(tmp_path), "max_chars": 100, "mean_tokens": 5}
    build_dataset(HubDataset(**fields | SIZES, group="page"), tmp_path / "made.parquet")
    groups = groups_of_tests(tmp_path / "made.parquet", None)
    assert set(groups) == {"owner/name/0", "owner/name/1"}
    with pytest.raises(UserError, match="page|other"):
        build_dataset(HubDataset(**fields | SIZES, group="other"), tmp_path / "made.parquet")
    # Examples over the limit of tokens have no losses.
    write_tensors(tmp_path / "tokens", {}, {"left_out_of_test": "[0, 3]"})
    assert groups_of_tests(tmp_path / "made.parquet", tmp_path / "tokens") == [*groups[1:3], *groups[4:]]
    with pytest.raises(UserError, match="missing.parquet is missing"):
        groups_of_tests(tmp_path / "missing.parquet", None)
