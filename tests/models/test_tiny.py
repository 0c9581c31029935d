"""The shipped tiny base is what its recipe says."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import islice

import pytest

from lorabench.config import TinyModel
from lorabench.cost import shape
from lorabench.models.base import load_model, load_tokenizer, weights_sha256
from lorabench.models.tiny import RECIPE, SHIPPED, build, heldout_nll, packed_blocks, train_tokenizer

TINY = TinyModel(kind="tiny")
RECORD = json.loads((SHIPPED / "recipe.json").read_text())


def test_shipped_weights_are_those_of_the_record():
    assert weights_sha256(TINY) == {"model.safetensors": RECORD["weights_sha256"]}
    assert RECORD["recipe"] == asdict(RECIPE)


def test_shape_is_what_the_cost_model_believes():
    model = load_model(TINY)
    assert (model.num_parameters(), model.config.hidden_size) == shape(TINY)
    assert RECORD["parameters"] == model.num_parameters()


def test_heldout_loss_is_as_recorded():
    nll = heldout_nll(load_model(TINY), load_tokenizer(TINY), RECIPE)
    assert nll == pytest.approx(RECORD["heldout_nll_nats_per_token"], abs=2e-3)


def test_it_speaks_the_language_of_its_tasks():
    tokenizer, model = load_tokenizer(TINY), load_model(TINY)
    chat = [{"role": "user", "content": "State the final answer to the following arithmetic problem: 4 + 3 ="}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer[:-1]).strip().isdigit()


def test_tokenizer_is_lossless_and_splits_digits():
    tokenizer = load_tokenizer(TINY)
    text = "Calculate 1234 + 5.6 → «naïve» 日本\n\tx"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert list(tokenizer.tokenize("1234")) == ["1", "2", "3", "4"]


def test_the_recipe_rebuilds(tmp_path):
    """A recipe of a few steps, followed twice, gives the same weights; the loss falls."""
    small = replace(
        RECIPE, train_tokens=12_000, tokenizer_documents=300, batch=4, block=64, heldout_tokens=2_000, warmup_steps=5
    )
    first, second = build(tmp_path / "a", small), build(tmp_path / "b", small)
    assert first["weights_sha256"] == second["weights_sha256"]
    assert first["heldout_nll_nats_per_token"] < 6.5  # ln(1024) is 6.93
    blocks = islice(packed_blocks(small, train_tokenizer(small), small.seed), 2)
    assert [len(block) for block in blocks] == [65, 65]
