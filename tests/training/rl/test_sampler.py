"""Sampling has the right distribution and log-probabilities, and gives the same responses in any batch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorabench.training.rl import sampler
from lorabench.training.rl.sampler import Request, draw

from .conftest import drawn, same_tokens


def keyed(prompts, samples=3):
    return [Request(prompt, (0, 5, number, s)) for number, prompt in enumerate(prompts) for s in range(samples)]


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


@pytest.mark.parametrize(("cache", "shared", "seats"), [(200, 128, 4), (100_000, 16, 2)])
def test_a_response_depends_neither_on_its_batch_nor_on_those_in_its_row(
    base, tokenizer, prompts, monkeypatch, cache, shared, seats
):
    tables, rows = [], sampler._Rows
    monkeypatch.setattr(sampler, "_Rows", lambda *given: tables.append(rows(*given)) or tables[-1])
    monkeypatch.setattr(sampler, "_SHARED_TOKENS", shared)
    requests = keyed(prompts[:8], samples=5)
    together = drawn(base, tokenizer, requests, cache=cache)
    assert max(table.seats.max() for table in tables) == seats
    by_itself = [drawn(base, tokenizer, [request])[0] for request in requests]
    assert same_tokens(together, by_itself)
    assert len({tuple(response.tokens) for response in together}) > 5
    # Some responses end early, so that rows are dropped and others have empty seats.
    assert len({len(response.tokens) for response in together}) > 1
    for response, alone in zip(together, by_itself, strict=True):
        assert response.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_texts_are_found_where_they_are_in_the_decoded_text(tokenizer):
    ids = tokenizer("cab café at the\n\nlake ab cd the", add_special_tokens=False)["input_ids"]
    heads = [ids[:count] for count in range(1, len(ids) + 1)]
    for text in ("é", "ab c", " ", "\n\n", "the"):
        ended = [bool(sampler.ended_by_text(tokenizer, (text,), torch.tensor([head]))[0]) for head in heads]
        assert ended.index(True) == [text in tokenizer.decode(head) for head in heads].index(True), text


def test_a_text_ends_a_response_and_a_limit_cuts_it(base, tokenizer, prompts):
    requests = keyed(prompts[:10])
    whole = drawn(base, tokenizer, requests)
    for cut, long in zip(drawn(base, tokenizer, requests, 2), whole, strict=True):
        assert np.array_equal(cut.tokens, long.tokens[:2])
        assert cut.truncated == (len(long.tokens) > 2)
        assert long.truncated == (tokenizer.eos_token_id not in long.tokens)
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
