"""Sampling has the right distribution and log-probabilities, and gives the same responses in any batch."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorabench.errors import UserError
from lorabench.models.lora import add_lora, use_fast_products
from lorabench.training.rl import sampler
from lorabench.training.rl.objective import ResponseGroup, backward
from lorabench.training.rl.sampler import Request, draw

from ..conftest import base_of
from .conftest import drawn, learned, machine, same_tokens


def keyed(prompts, samples=3):
    return [Request(prompt, (0, 5, number, s)) for number, prompt in enumerate(prompts) for s in range(samples)]


def assert_log_probabilities_of(model, requests, responses):
    """Compare recorded log-probabilities with those that the model gives the same tokens."""
    for request, response in zip(requests, responses, strict=True):
        assert response.logprobs == pytest.approx(learned(model, request, response), abs=1e-4)


def test_draws_follow_the_distribution():
    logprobs = torch.log(torch.tensor([[0.1, 0.0, 0.6, 0.3]]))
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens = draw(logprobs, grid, torch.zeros(1000, dtype=torch.long))
    assert tokens.bincount(minlength=4).tolist() == [100, 0, 600, 300]


@given(st.lists(st.floats(-60, 5), min_size=2, max_size=50), st.floats(0, 1, exclude_max=True), st.integers(0, 49))
def test_what_has_no_probability_is_never_drawn(scores, uniform, masked):
    scores = torch.tensor([scores], dtype=torch.float32)
    scores[0, masked % (scores.shape[1] - 1)] = -torch.inf
    logprobs = scores.log_softmax(-1)
    token = draw(logprobs, torch.tensor([uniform], dtype=torch.float64), torch.tensor([0])).item()
    assert logprobs[0, token] > -torch.inf


def test_log_probabilities_are_those_of_the_model(base, tokenizer, prompts):
    requests = keyed(prompts[:6])
    # The reference is PEFT's own forward pass.
    model = add_lora(base, 4, "all", 32.0, True, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)
    plain = deepcopy(model)
    use_fast_products(model)
    assert_log_probabilities_of(plain, requests, drawn(model, tokenizer, requests))


@pytest.fixture
def row_tables(monkeypatch):
    """The tables of rows that were drawn in."""
    tables, rows = [], sampler._Rows
    monkeypatch.setattr(sampler, "_Rows", lambda *given: tables.append(rows(*given)) or tables[-1])
    return tables


@pytest.mark.parametrize(("short", "shared"), [(12, True), (30, False)])
def test_a_sliding_window_is_kept_and_nothing_is_learned_beyond_it(tokenizer, row_tables, short, shared):
    """Responses share a row only if the window covers prompt and response."""
    model = base_of("mistral").eval()
    assert sampler.window(model) == 24
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger weights make attention less uniform.
            parameter.mul_(8 if parameter.ndim == 2 else 1)
    rng = np.random.default_rng(0)
    requests = keyed([tuple(rng.integers(5, 900, short).tolist()) for _ in range(3)])
    responses = drawn(model, tokenizer, requests, 8)
    assert row_tables[0].shared == shared
    assert_log_probabilities_of(model, requests, responses)
    if not shared:
        group = ResponseGroup.of(requests[0].prompt, responses[:3], np.array([0.0, 1.0, 1.0]))
        with pytest.raises(UserError, match=r"sliding attention over 24 tokens, .* has 3[1-8]; in RL both must be"):
            backward(model, [group], machine())


@pytest.mark.parametrize(("cache", "shared", "seats"), [(200, 128, 4), (100_000, 1, 1), (100_000, 16, 2)])
def test_a_response_depends_neither_on_its_batch_nor_on_those_in_its_row(
    base, tokenizer, prompts, monkeypatch, row_tables, cache, shared, seats
):
    monkeypatch.setattr(sampler, "_SHARED_TOKENS", shared)
    requests = keyed(prompts[:8], samples=5)
    together = drawn(base, tokenizer, requests, cache=cache)
    assert max(table.seats.max() for table in row_tables) == seats
    by_itself = [drawn(base, tokenizer, [request])[0] for request in requests]
    assert same_tokens(together, by_itself)
    assert len({tuple(response.tokens) for response in together}) > 5
    # Some responses end early, so that rows are dropped and others have empty seats.
    assert len({len(response.tokens) for response in together}) > 2
    for response, alone in zip(together, by_itself, strict=True):
        assert response.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_a_length_limit_only_cuts(base, tokenizer, prompts):
    requests = keyed(prompts[:10])
    short, long = (drawn(base, tokenizer, requests, limit) for limit in (2, 8))
    for cut, whole in zip(short, long, strict=True):
        assert np.array_equal(cut.tokens, whole.tokens[:2])
        assert cut.truncated == (len(whole.tokens) > 2)
        assert whole.truncated == (tokenizer.eos_token_id not in whole.tokens)


@pytest.mark.parametrize("text", ["é", "ab c", " ", "\n\n", "the"])
def test_texts_are_found_where_they_are_in_the_decoded_text(text, tokenizer):
    sentence = "cab café at the\n\nlake ab cd the"
    ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
    heads = [ids[:count] for count in range(1, len(ids) + 1)]
    ended = [bool(sampler.ended_by_text(tokenizer, (text,), torch.tensor([head]))[0]) for head in heads]
    assert ended.index(True) == [text in tokenizer.decode(head) for head in heads].index(True)


def test_a_text_ends_a_response(base, tokenizer, prompts):
    requests = keyed(prompts[:10])
    whole = drawn(base, tokenizer, requests)
    texts = tuple("123456789")
    ended = drawn(base, tokenizer, requests, texts=texts)
    assert any(len(a.tokens) < len(b.tokens) for a, b in zip(ended, whole, strict=True))
    for short, long in zip(ended, whole, strict=True):
        assert np.array_equal(short.tokens, long.tokens[: len(short.tokens)])
        said = [tokenizer.decode(short.tokens[:n]) for n in range(1, len(short.tokens) + 1)]
        assert not any(text in part for part in said[:-1] for text in texts)
        if len(short.tokens) < len(long.tokens):
            assert any(text in said[-1] for text in texts)
            assert not short.truncated


def test_greedy_is_that_of_transformers(base, tokenizer, prompts):
    longest = 12
    responses = drawn(base, tokenizer, [Request(prompt, None) for prompt in prompts[:4]], longest)
    for prompt, response in zip(prompts, responses, strict=False):
        ids = torch.tensor([prompt])
        text = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, do_sample=False)
        assert response.tokens.tolist() == text[0, len(prompt) :].tolist()
