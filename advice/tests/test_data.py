"""Data files: what counts as an example, and what is said of the rest."""

import json

import pytest
from lora_advice.data import examples, read_data
from lora_advice.errors import UserError

CHAT = [{"from": "system", "value": ""}, {"from": "human", "value": "2+2"}, {"from": "gpt", "value": "4"}]


def test_rows_that_are_no_examples_are_counted_by_their_reason(tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = [CHAT, CHAT, [*CHAT, CHAT[1]], [{"from": "tool", "value": "x"}], "text", [{"from": "human"}]]
    lines = [json.dumps({"conversations": row}) for row in rows] + ["{", "5", ""]
    path.write_text("\ufeff" + "\n".join(lines))
    data = read_data(path)
    assert (data.form, data.usable, data.one_answer) == ("conversations", 1, True)
    assert data.tokens == pytest.approx(1 / 3)
    assert dict(data.unusable) == {
        "repeated prompt": 1,
        "does not end with a turn of the assistant": 1,
        "a turn of unknown role (known: user, human, assistant, gpt, system)": 1,
        "not a list of turns": 1,
        "no text": 1,
        "not JSON": 1,
        "not an object": 1,
    }
    [messages] = examples(path, "conversations")
    assert messages == [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]


def test_an_array_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": "add", "input": "2+2", "output": 4}]))
    [messages] = examples(path, read_data(path).form)
    assert [turn["content"] for turn in messages] == ["add\n\n2+2", "4"]
    with pytest.raises(UserError, match="format 'alpaca': allowed: messages, conversations, "):
        read_data(path, "alpaca")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "must end in .jsonl or .json"),
        ("a.json", "[1", "can't be read: "),
        ("a.jsonl", '{"x": 1}', "has the columns 'x'; needed are those of one format: messages, "),
        ("a.jsonl", "", "has the columns none"),
        ("a.jsonl", '{"prompt": "a", "completion": "b", "response": "c"}', "may be read as prompt/completion or "),
        ("a.jsonl", '{"text": " "}', "none of its rows can be used as text: 1 no text"),
    ],
)
def test_a_file_without_examples_is_one_sentence(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_data(path)
