"""Token caches: the mask of scored tokens by hand, other templates, and stale files refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from lorabench.config import ChatDataset, TinyModel
from lorabench.data.sft import make_dataset, write_dataset
from lorabench.data.tokens import cache_key, encode_chat, read_tokens, write_tokens
from lorabench.errors import UserError
from lorabench.models.base import load_tokenizer

TWO_TURNS = [
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3+3"},
    {"role": "assistant", "content": "6"},
]
CHATML = (
    "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|assistant|>' }}{{ m['content'] }}"
    "{{ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TinyModel(kind="tiny"))


def scored_text(tokenizer, messages):
    ids, scored = encode_chat(tokenizer, messages)
    return tokenizer.convert_ids_to_tokens(ids), tokenizer.convert_ids_to_tokens(
        [i for i, is_scored in zip(ids, scored, strict=True) if is_scored]
    )


def test_assistant_turns_and_their_end_are_scored_and_nothing_else(tokenizer):
    tokens, scored = scored_text(tokenizer, TWO_TURNS)
    assert tokens == [
        *("<|user|>", "2", "+", "2", "<|assistant|>", "4", "<|end|>"),
        *("<|user|>", "3", "+", "3", "<|assistant|>", "6", "<|end|>"),
    ]
    assert scored == ["4", "<|end|>", "6", "<|end|>"]


def test_what_a_template_puts_after_the_end_is_not_scored(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = CHATML
    tokens, scored = scored_text(other, TWO_TURNS)
    assert tokens.count("Ċ") == 4
    assert scored == ["4", "<|end|>", "6", "<|end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages | length }}" + CHATML
    with pytest.raises(UserError, match="rewrites earlier turns"):
        encode_chat(other, TWO_TURNS)


@pytest.fixture
def dataset(tmp_path):
    spec = ChatDataset(kind="instruct", train=12, validation=4, test=4, max_chars=200)
    rows = make_dataset(spec)
    write_dataset(rows, tmp_path / "data.parquet")
    return rows, tmp_path / "data.parquet"


def test_cache_round_trip(tokenizer, dataset, tmp_path):
    rows, path = dataset
    write_tokens(rows, tokenizer, path, tmp_path / "cache", max_length=512)
    splits = read_tokens(tmp_path / "cache", cache_key(tokenizer, path))
    assert {name: len(split) for name, split in splits.items()} == {"train": 12, "validation": 4, "test": 4}
    for index in range(12):
        ids, scored = splits["train"].example(index)
        expected = encode_chat(tokenizer, rows[index]["messages"])
        assert (ids.tolist(), scored.tolist()) == expected
    assert np.array_equal(splits["test"].lengths(), [len(splits["test"].example(i)[0]) for i in range(4)])


@pytest.mark.parametrize("part", ["dataset", "tokenizer", "template"])
def test_a_cache_of_something_else_is_refused(part, tokenizer, dataset, tmp_path):
    rows, path = dataset
    write_tokens(rows, tokenizer, path, tmp_path / "cache", max_length=512)
    with pytest.raises(UserError, match=f"made with another {part}; delete it"):
        read_tokens(tmp_path / "cache", cache_key(tokenizer, path) | {part: "other"})


def test_the_key_follows_the_template(tokenizer, dataset):
    other = copy.deepcopy(tokenizer)
    other.chat_template = CHATML
    assert cache_key(tokenizer, dataset[1]) != cache_key(other, dataset[1])


def test_too_long_and_unscored_examples_are_refused(tokenizer, dataset, tmp_path):
    rows, path = dataset
    with pytest.raises(UserError, match=r"has \d+ tokens; the model takes 8"):
        write_tokens(rows, tokenizer, path, tmp_path / "cache", max_length=8)
    silent = [{**rows[0], "messages": [{"role": "user", "content": "hello"}]}, *rows]
    with pytest.raises(UserError, match="has no assistant token"):
        write_tokens(silent, tokenizer, path, tmp_path / "cache", max_length=512)
    assert not (tmp_path / "cache").exists()


def test_no_template_is_refused(tokenizer, dataset, tmp_path):
    other = copy.deepcopy(tokenizer)
    other.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        write_tokens(dataset[0], other, dataset[1], tmp_path / "cache", max_length=512)
