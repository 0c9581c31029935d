"""Hub datasets in the forms of Tulu3 and OpenThoughts3, read from local files of the same form."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from lorabench.config import HubDataset
from lorabench.data.hub import to_messages
from lorabench.data.sft import make_dataset
from lorabench.errors import UserError


def tulu(number):
    turns = [("user", f"question {number}"), ("assistant", f"answer {number}")]
    if number % 3 == 0:
        turns = [("system", "be brief"), *turns, ("user", "and more?"), ("assistant", "no")]
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"id": f"row{number}", "messages": messages, "source": f"part{number % 2}"}


def thoughts(number):
    chat = [{"from": "human", "value": f"riddle {number}"}, {"from": "gpt", "value": f"<think>\u2028</think> {number}"}]
    return {"difficulty": 7, "source": "maths", "domain": "math", "conversations": chat}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Writes rows where the datasets library looks before it asks the hub; returns their spec."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(rows, **changes):
        folder = Path("owner/name")
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        spec = {"kind": "hub", "id": "owner/name", "train": 40, "validation": 8, "test": 8, "max_chars": 100}
        return HubDataset(**(spec | {"mean_tokens": 50} | changes))

    return write


@pytest.mark.parametrize("form", [tulu, thoughts])
def test_both_forms_become_chats(form, hub):
    rows = make_dataset(hub([form(number) for number in range(100)]))
    assert Counter(row["split"] for row in rows) == {"train": 40, "validation": 8, "test": 8}
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert set(roles) <= {"system", "user", "assistant"}
        assert roles[-1] == "assistant"
    questions = {row["messages"][-2]["content"] for row in rows}
    assert questions <= {
        form(number)[key][position][field]
        for number in range(100)
        for key, field in [("messages", "content") if form is tulu else ("conversations", "value")]
        for position in (0, 2 if form is tulu and number % 3 == 0 else 0, -2)
    }


def test_the_choice_is_spread_over_the_dataset_and_follows_from_the_seed(hub):
    spec = hub([tulu(number) for number in range(1000)])
    chosen = [row["messages"][0]["content"] for row in make_dataset(spec)]
    assert chosen == [row["messages"][0]["content"] for row in make_dataset(spec)]
    numbers = [int(text.split()[-1]) for text in chosen if text.startswith("question")]
    assert max(numbers) > 700
    assert min(numbers) < 300


def test_repeated_long_and_unanswered_chats_are_left_out(hub):
    answered = [tulu(number) for number in range(1, 100)]
    unanswered = [{**tulu(500), "messages": [{"role": "user", "content": f"alone {n}"}]} for n in range(20)]
    long = [
        {**tulu(n), "messages": [{"role": "user", "content": f"{n} " * 60}, tulu(1)["messages"][1]]} for n in range(9)
    ]
    rows = make_dataset(hub([*answered, *answered, *unanswered, *long]))
    prompts = [json.dumps(row["messages"][:-1]) for row in rows]
    assert len(set(prompts)) == len(prompts) == 56
    assert not any("alone" in text or len(text) > 300 for text in prompts)


def test_too_few_examples_are_named(hub):
    with pytest.raises(UserError, match="found no 8 distinct validation examples of at most 100 characters"):
        make_dataset(hub([tulu(number) for number in range(45)]))


def test_other_columns_are_named(hub):
    with pytest.raises(UserError, match="owner/name has the columns question, answer; messages or conversations"):
        make_dataset(hub([{"question": "1+1", "answer": "2"}]))


def test_a_dataset_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    spec = HubDataset(kind="hub", id="no/where", train=1, validation=1, test=1, max_chars=99, mean_tokens=9)
    with pytest.raises(UserError, match="dataset no/where can't be loaded: "):
        make_dataset(spec)


@pytest.mark.parametrize(
    ("turn", "message"),
    [({"role": "tool", "content": "x"}, "role 'tool'"), ({"role": "user", "content": None}, "user without text")],
)
def test_turns_that_can_not_be_told(turn, message):
    with pytest.raises(UserError, match=message):
        to_messages({"messages": [turn]}, "owner/name")
