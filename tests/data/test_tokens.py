"""Token caches: the mask of scored tokens by hand, other templates, and stale files refused."""

import copy
import json

import numpy as np
import pytest
from safetensors import safe_open

from lorabench.config.inputs import ChatDataset, TinyModel
from lorabench.data import tokens
from lorabench.data.sft import build_dataset, make_dataset, write_dataset
from lorabench.data.tokens import cache_key, count_left_out, encode_chat, read_tokens, write_tokens
from lorabench.errors import UserError
from lorabench.models.base import load_tokenizer
from lorabench.utils.checked_tensors import read_header

TURNS = (("user", "2+2"), ("assistant", "4"), ("user", "3+3"), ("assistant", "6"))
TWO_TURNS = [{"role": role, "content": content} for role, content in TURNS]
CHATML = (
    "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|assistant|>' }}{{ m['content'] }}"
    "{{ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TinyModel(kind="tiny"))


def with_template(tokenizer, template):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def scored_text(tokenizer, messages):
    ids, scored = encode_chat(tokenizer, messages)
    texts = tokenizer.convert_ids_to_tokens(ids)
    return texts, [text for text, is_scored in zip(texts, scored, strict=True) if is_scored]


def test_assistant_turns_and_their_end_are_scored_and_nothing_else(tokenizer):
    tokens, scored = scored_text(tokenizer, TWO_TURNS)
    assert " ".join(tokens) == "<|user|> 2 + 2 <|assistant|> 4 <|end|> <|user|> 3 + 3 <|assistant|> 6 <|end|>"
    assert scored == ["4", "<|end|>", "6", "<|end|>"]
    # What a template puts after the end is not scored.
    tokens, scored = scored_text(with_template(tokenizer, CHATML), TWO_TURNS)
    assert tokens.count("\u010a") == 4
    assert scored == ["4", "<|end|>", "6", "<|end|>"]
    # All of a plain text is scored, and no template touches it.
    tokens, scored = scored_text(with_template(tokenizer, None), [{"role": "text", "content": "2+2"}])
    assert tokens == scored == ["2", "+", "2", "<|end|>"]
    with pytest.raises(UserError, match="rewrites earlier turns"):
        encode_chat(with_template(tokenizer, "{{ messages | length }}" + CHATML), TWO_TURNS)


@pytest.fixture
def dataset(tmp_path):
    spec = ChatDataset(kind="instruct", train=12, validation=4, test=4, max_chars=200)
    build_dataset(spec, tmp_path / "data.parquet")
    return list(make_dataset(spec)), tmp_path / "data.parquet"


def test_a_cache_is_what_safetensors_would_write_and_of_something_else_it_is_refused(tokenizer, dataset, tmp_path):
    rows, path = dataset
    key = cache_key(tokenizer, path)
    write_tokens(path, tokenizer, tmp_path / "cache", 512)
    splits = read_tokens(tmp_path / "cache", key)
    with safe_open(tmp_path / "cache", framework="numpy") as file:
        assert file.metadata() == key | {"sha256": file.metadata()["sha256"]}
        for split in ("train", "validation", "test"):
            encoded = [encode_chat(tokenizer, row["messages"]) for row in rows if row["split"] == split]
            ids, scored, offsets = (file.get_tensor(f"{split}.{name}") for name in ("ids", "scored", "offsets"))
            assert (ids.dtype, scored.dtype, offsets.dtype) == (np.int32, np.bool_, np.int64)
            assert ids.tolist() == [token for tokens, _ in encoded for token in tokens]
            assert scored.tolist() == [flag for _, flags in encoded for flag in flags]
            assert offsets.tolist() == np.cumsum([0, *(len(tokens) for tokens, _ in encoded)]).tolist()
            assert len(splits[split]) == len(encoded)
            for index, expected in enumerate(encoded):
                assert tuple(part.tolist() for part in splits[split].example(index)) == expected
    for part in ["dataset", "tokenizer", "template"]:
        with pytest.raises(UserError, match=f"made with another {part}; delete it"):
            read_tokens(tmp_path / "cache", key | {part: "other"})
    assert cache_key(with_template(tokenizer, CHATML), path) != key


def test_too_long_and_unscored_examples_and_a_model_without_a_template_are_refused(tokenizer, dataset, tmp_path):
    rows, path = dataset
    with pytest.raises(UserError, match="has no chat template"):
        write_tokens(path, with_template(tokenizer, None), tmp_path / "cache", 512)
    with pytest.raises(UserError, match=r"has \d+ tokens; the model takes 8"):
        write_tokens(path, tokenizer, tmp_path / "cache", 8)
    write_dataset([{**rows[0], "messages": [{"role": "user", "content": "hello"}]}, *rows], path)
    with pytest.raises(UserError, match="has no assistant token"):
        write_tokens(path, tokenizer, tmp_path / "cache", 512)
    assert not (tmp_path / "cache").exists()


def test_examples_over_the_datasets_limit_are_left_out_whole_and_counted(tokenizer, dataset, tmp_path, monkeypatch):
    rows, path = dataset
    lengths = {"train": [], "validation": [], "test": []}
    for row in rows:
        lengths[row["split"]].append(len(encode_chat(tokenizer, row["messages"])[0]))
    limit = sorted(lengths["test"])[1]
    monkeypatch.setattr(tokens, "_MOST_LEFT_OUT", 1.0)
    write_tokens(path, tokenizer, tmp_path / "cache", 512, limit)
    kept = read_tokens(tmp_path / "cache", cache_key(tokenizer, path))
    for split, counts in lengths.items():
        assert kept[split].lengths().tolist() == [length for length in counts if length <= limit]
    left_out = {split: sum(length > limit for length in counts) for split, counts in lengths.items()}
    assert count_left_out(tmp_path / "cache") == left_out
    named = json.loads(read_header(tmp_path / "cache")["left_out_of_test"])
    assert named == [number for number, length in enumerate(lengths["test"]) if length > limit] != []
    monkeypatch.undo()
    limit = sorted(lengths["train"])[6]
    with pytest.raises(UserError, match=f"of 12 examples of split 'train' have more than max_tokens = {limit}"):
        write_tokens(path, tokenizer, tmp_path / "other", 512, limit)
    with pytest.raises(UserError, match="max_tokens = 513 is more than the 512 tokens that the model takes"):
        write_tokens(path, tokenizer, tmp_path / "other", 512, 513)
    write_tokens(path, tokenizer, tmp_path / "all", 512)
    assert count_left_out(tmp_path / "all") == {}
