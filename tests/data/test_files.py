"""A user's own data files: formats with known answers, bad rows counted, hostile contents refused in a sentence."""

import json
from collections import Counter
from itertools import cycle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from lorabench.config.inputs import FileDataset, FileProblems, HubDataset
from lorabench.data.chat import Chat
from lorabench.data.files import (
    NO_ANSWER,
    NO_CHAT,
    NO_NUMBER,
    NO_TEXT,
    NOT_UNICODE,
    NOT_UTF8,
    REPEATED,
    TOO_LONG,
    Tally,
    chosen_format,
    file_problems,
    file_rows,
    usable_chats,
)
from lorabench.data.identity import dataset_id, has_groups
from lorabench.data.problems import make_problems, write_problems
from lorabench.data.sft import build_dataset, make_dataset
from lorabench.data.tokens import groups_of_tests
from lorabench.errors import UserError
from lorabench.utils.checked_tensors import write_tensors

from ..hub.repositories import copies

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
PAIR = [("user", "q"), ("assistant", "a")]


def write(folder: Path, rows, name="own.jsonl") -> Path:
    path = folder / name
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".csv":
            csv.write_csv(pa.Table.from_pylist(rows), path)
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def spec(path: Path, **changes) -> FileDataset:
    sizes = {"train": 4, "validation": 2, "test": 2, "max_chars": 1000, "mean_tokens": 10}
    return FileDataset(**({"kind": "file", "path": str(path)} | sizes | changes))


def pairs(count):
    return [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(count)]


def read(path: Path) -> tuple[list[Chat], Tally]:
    tally = Tally(chosen_format(path))
    return [chat for _, chat in usable_chats(file_rows(path), path.name, tally, max_chars=1000)], tally


FORMATS = [
    ({"messages": [USER, ASSISTANT]}, PAIR),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, PAIR),
    ({"prompt": "q", "completion": "a"}, PAIR),
    ({"prompt": [USER], "completion": [ASSISTANT]}, PAIR),
    ({"question": "q", "answer": 42}, [("user", "q"), ("assistant", "42")]),
    ({"instruction": "do", "input": "q", "output": "a"}, [("user", "do\n\nq"), ("assistant", "a")]),
    ({"instruction": "q", "input": "", "output": "a"}, PAIR),
    ({"text": "all of it"}, [("text", "all of it")]),
    ({"text": "rendered", "prompt": "x", "completion": "y", "messages": [USER, ASSISTANT]}, PAIR),
    ({"text": "rendered", "prompt": "q", "completion": "a"}, PAIR),
    ({"messages": [{"role": "system", "content": ""}, USER, ASSISTANT]}, [("system", ""), *PAIR]),
]


def test_a_row_becomes_turns(tmp_path):
    for (row, turns), suffix in zip(FORMATS, cycle((".jsonl", ".json", ".parquet")), strict=False):
        [chat], _ = read(write(tmp_path, [row], f"own{suffix}"))
        assert [(turn["role"], turn["content"]) for turn in chat.messages] == turns, (row, suffix)


def test_csv_keeps_line_ends_commas_and_what_looks_like_a_formula_and_bad_rows_are_counted(tmp_path):
    cells = ["two\nlines", 'a "quoted", comma', "=HYPERLINK(1)", "x" * 200_000]
    path = write(tmp_path, [{"question": cell, "answer": cell[:100]} for cell in cells], "own.csv")
    chats, tally = read(path)
    assert [chat.messages[0]["content"] for chat in chats] == cells[:3]
    assert tally.bad == {TOO_LONG: (1, 4)}
    path.write_bytes(b"\xef\xbb\xbfquestion,answer\nq,a\n\xff,a\nq2\nq3,a,b\nnul\0,a\nq4,\n")
    chats, tally = read(path)
    assert [chat.messages[0]["content"] for chat in chats] == ["q", "nul\0"]
    assert tally.bad == {NOT_UNICODE: (1, 2), "not the 2 fields of the header": (2, 3), NO_TEXT: (1, 6)}


BAD = {
    '{"messages": [': "not JSON",
    "[1, 2]": "not a JSON object",
    "[" * 100_000: "not JSON",
    '{"messages": "hello"}': NO_CHAT,
    '{"other": 1}': NO_TEXT,
    '{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "a"}]}': NO_TEXT,
    '{"messages": [{"role": "assistant", "content": "a"}]}': NO_ANSWER,
    '{"messages": [{"role": ["user"], "content": "q"}]}': "a turn of unknown role",
    '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]}': NOT_UNICODE,
    json.dumps({"messages": [USER, ASSISTANT]}): REPEATED,
    json.dumps({"messages": [USER, {"role": "assistant", "content": "x" * 2000}]}): TOO_LONG,
    "\udcff\udcfe": NOT_UTF8,
}


def test_a_bad_row_is_counted_by_its_reason(tmp_path):
    path = tmp_path / "own.jsonl"
    good = json.dumps({"messages": [USER, ASSISTANT]})
    for line, reason in BAD.items():
        path.write_bytes(f"{good}\n\n{line}\n".encode(errors="surrogateescape"))
        chats, tally = read(path)
        assert len(chats) == tally.usable == 1
        [(counted, (count, first))] = tally.bad.items()
        assert (tally.rows, counted.startswith(reason), count, first) == (2, True, 1, 2), (line[:40], counted)
    # Lines end at line feeds only.
    path.write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
    assert [chat.messages[0]["content"] for chat in read(path)[0]] == ["a\u2028b"]


WHOLE = (
    ("own.jsonl", b"\n\n \n", "has no rows"),
    ("own.jsonl", bytes(range(128, 255)) + b"\n\0\0\n", "0 of 2 rows can be used as one of the formats messages, "),
    ("own.parquet", b"\0" * 100, "can't be read as parquet: "),
    ("own.json", b"[" * 200_000, "is not JSON: maximum recursion depth exceeded"),
    ("own.jsonl", b'{"a": 1, "b": 2}\n', "left out: 1 without the columns of a format (first: row 1)"),
    ("own.txt", b"text", "must end in one of .jsonl, .json, .csv, .parquet"),
    (
        "own.jsonl",
        b'{"prompt":1,"completion":1,"question":1,"answer":1}\n',
        "prompt/completion or question/answer; set",
    ),
)


def test_a_file_that_is_no_use_is_one_sentence(tmp_path):
    for name, content, message in WHOLE:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            read(path)
        assert str(path) in str(error.value)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match="can't be read: Is a directory"):
        chosen_format(tmp_path / "folder.jsonl")
    path = write(tmp_path, [*pairs(6), {"prompt": "q"}, {"prompt": "q"}])
    with pytest.raises(UserError, match=r"6 of 8 rows can be used as prompt/completion; left out: 2 no text") as error:
        list(make_dataset(spec(path)))
    assert str(error.value).endswith("; 8 are needed for train, validation and test")


def test_splits_are_disjoint_whole_and_drawn_by_the_seed_from_a_content_that_is_the_identity(tmp_path):
    path = write(tmp_path, pairs(40))
    sizes = {"train": 20, "validation": 10, "test": 10}
    rows = list(make_dataset(spec(path, **sizes)))
    assert Counter(row["split"] for row in rows) == sizes
    prompts = [row["messages"][0]["content"] for row in rows]
    assert sorted(prompts) == sorted(row["prompt"] for row in pairs(40))
    # The order is not that of the file, which may be sorted by topic.
    assert {int(text.split()[1]) for text in prompts[:20]} != set(range(20))
    assert rows == list(make_dataset(spec(path, **sizes))) != list(make_dataset(spec(path, **sizes, seed=1)))
    copy, other = write(tmp_path, pairs(40), "copy.jsonl"), write(tmp_path, pairs(9), "other.jsonl")
    same = spec(path), spec(copy), spec(path, mean_tokens=99), spec(path, curve_examples=1)
    assert len(set(map(dataset_id, same))) == 1
    before = dataset_id(spec(path))
    assert len({before, dataset_id(spec(other)), dataset_id(spec(path, seed=1))}) == 3
    write(tmp_path, pairs(10))
    assert dataset_id(spec(path)) != before


def problems(path: Path, grader: str, **changes) -> FileProblems:
    sizes = {"train": 2, "validation": 1, "test": 1, "grader": grader}
    return FileProblems(**({"kind": "file", "path": str(path)} | sizes | changes))


def test_problems_of_a_file(tmp_path):
    rows = [
        {"question": "1+1?", "answer": 2},
        {"question": "2+2?", "answer": "so 2 and 2 #### 4"},
        {"question": "10*150?", "answer": "it is \\boxed{1,500}"},
        {"question": "1/4?", "answer": "0.25"},
        {"question": "why?", "answer": "because"},
        {"question": " 1+1? ", "answer": "3"},
        {"question": "?", "answer": None},
    ]
    path = write(tmp_path, rows)
    answers = {row["question"]: row["answer"] for row in make_problems(problems(path, "number"))}
    assert answers == {"1+1?": "2", "2+2?": "4", "10*150?": "1,500", "1/4?": "0.25"}
    assert file_problems(problems(path, "number"))[1].bad == {NO_NUMBER: (1, 5), REPEATED: (1, 6), NO_TEXT: (1, 7)}
    boxed = make_problems(problems(path, "boxed", train=3))
    assert {row["answer"] for row in boxed} == {"2", "4", "1,500", "0.25", "because"}
    assert all(row["question"].endswith(r" Write your answer in \boxed{} format.") for row in boxed)


SIZES = {"train": 8, "validation": 4, "test": 12}


@pytest.mark.parametrize("is_problems", [False, True])
def test_a_column_of_a_file_names_the_groups_and_changes_no_example(tmp_path, is_problems):
    rows = [{"question": f"{n}+1?", "answer": str(n + 1), "page": f"page {n % 3}"} for n in range(24)]
    data, made = write(tmp_path, rows), tmp_path / "made.parquet"

    def examples(group):
        if is_problems:
            own = problems(data, "number", **SIZES, group=group)
            write_problems(make_problems(own), made)
        else:
            own = spec(data, **SIZES, group=group)
            build_dataset(own, made)
        assert has_groups(own) == (group is not None)
        return pq.read_table(made).to_pylist(), dataset_id(own)

    (plain, plain_id), (grouped, grouped_id) = examples(None), examples("page")
    assert {row["source"] for row in plain} == {"own.jsonl"}
    assert [row | {"source": ""} for row in grouped] == [row | {"source": ""} for row in plain]
    for row in grouped:
        question = row["question"] if is_problems else row["messages"][0]["content"]
        assert row["source"] == f"own.jsonl/page {int(question.split('+')[0]) % 3}"
    assert groups_of_tests(made, None) == [row["source"] for row in grouped if row["split"] == "test"]
    assert plain_id != grouped_id
    data = write(tmp_path, [*rows[1:], {"question": "q", "answer": "a"}])
    with pytest.raises(UserError, match="23 of 24 rows can be used .*; left out: 1 no 'page', which names its group"):
        build_dataset(spec(data, **SIZES, group="page"), made)


def test_a_column_of_the_hub_names_the_groups(tmp_path):
    folder, made = tmp_path / "owner" / "name", tmp_path / "made.parquet"
    folder.mkdir(parents=True)
    chats = [[USER | {"content": f"q{n}"}, ASSISTANT] for n in range(24)]
    write(folder, [{"messages": chat, "page": n % 2} for n, chat in enumerate(chats)], "train.jsonl")
    fields = {"kind": "hub", "id": "owner/name", "max_chars": 100, "mean_tokens": 5} | SIZES
    build_dataset(HubDataset(**fields, group="page"), made, copies(tmp_path))
    groups = groups_of_tests(made, None)
    assert set(groups) == {"owner/name/0", "owner/name/1"}
    with pytest.raises(UserError, match="page|other"):
        build_dataset(HubDataset(**fields, group="other"), made, copies(tmp_path))
    # Examples over the limit of tokens have no losses.
    write_tensors(tmp_path / "tokens", {}, {"left_out_of_test": "[0, 3]"})
    assert groups_of_tests(made, tmp_path / "tokens") == [*groups[1:3], *groups[4:]]
    with pytest.raises(UserError, match="missing.parquet is missing"):
        groups_of_tests(tmp_path / "missing.parquet", None)
