"""Attention in blocks equals the formula, also with a cache; tests/models/test_passes.py compares whole models."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lorabench.config.inputs import TinyModel
from lorabench.models import attention
from lorabench.models.attention import attend_in_blocks, causal_attention
from lorabench.models.base import load_model, skeleton
from lorabench.models.passes import cache_argument
from lorabench.models.specs import MAX_BLOCK_QUERIES

from ..training.conftest import base_of

TINY = TinyModel(kind="tiny")


def draw(rows, heads, groups, length, width, value_width, dtype=torch.float64):
    """Return queries, keys and values in a model's memory layout: the heads of a token are adjacent."""
    generator = torch.Generator().manual_seed(length)
    shapes = (heads, width), (groups, width), (groups, value_width)
    tensors = [torch.randn(rows, length, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.to(dtype).transpose(1, 2).detach().requires_grad_() for tensor in tensors]


def formula(query, key, value, scaling):
    """Return softmax(scaling q k' + mask) v, each head with a copy of its keys."""
    each = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(each, 1) for tensor in (key, value))
    length = query.shape[2]
    unseen = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = (scaling * query @ key.mT).masked_fill(unseen, -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@given(
    rows=st.integers(1, 3),
    groups=st.integers(1, 3),
    each=st.integers(1, 3),
    length=st.integers(1, 2 * MAX_BLOCK_QUERIES + 3),
    width=st.integers(1, 5),
    value_width=st.integers(1, 5),
)
def test_it_is_the_formula_with_its_gradients(rows, groups, each, length, width, value_width):
    given = draw(rows, groups * each, groups, length, width, value_width)
    upstream = torch.randn(rows, length, groups * each, value_width, dtype=torch.float64)
    output = causal_attention(*given, 0.7)
    gradients = torch.autograd.grad(output, given, upstream)
    expected = formula(*given, 0.7)
    assert_close(output, expected)
    for own, other in zip(gradients, torch.autograd.grad(expected, given, upstream), strict=True):
        assert_close(own, other)


@pytest.fixture
def calls(monkeypatch):
    """The lengths of the rows that are computed in blocks."""
    lengths = []
    real = attention.causal_attention
    monkeypatch.setattr(attention, "causal_attention", lambda *given: lengths.append(given[0].shape[2]) or real(*given))
    return lengths


def test_what_is_not_plain_stays_with_pytorch(calls):
    model = base_of("llama-128").requires_grad_(False)
    ids = torch.randint(3, 1000, (2, 190), generator=torch.Generator().manual_seed(0))
    model(ids[:, :128])
    # The masks: two examples in a row, whose positions restart; padding on the left; a sliding window.
    positions = torch.cat([torch.arange(90), torch.arange(100)]).expand(2, -1)
    model(ids, position_ids=positions, use_cache=False)
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    model(ids, attention_mask=padded)
    base_of("mistral").requires_grad_(False)(ids)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(ids)
    assert not calls
    cache = model(ids[:, :150], use_cache=True).past_key_values
    assert calls == [150] * 3
    together = model(ids).logits
    assert calls[3:] == [190] * 3
    # The remaining tokens of the rows follow the cached ones.
    assert_close(model(ids[:, 150:], **{cache_argument(model): cache}).logits, together[:, 150:], rtol=1e-4, atol=1e-4)
    assert len(calls) == 6
    with torch.autocast("cpu", torch.bfloat16):
        model(ids[:, :40])
    assert calls[6:] == [40] * 3


def test_loaded_models_attend_in_blocks_except_those_with_attention_of_their_own(tmp_path, monkeypatch):
    for model in (load_model(TINY), skeleton(TINY)):
        assert model.config._attn_implementation == attention.NAME
    load_model(TINY).save_pretrained(tmp_path)
    assert attention.NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    model = base_of("gemma")
    model.set_attn_implementation("eager")
    attend_in_blocks(model)
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    # This module has replaced the attention functions of transformers.
    monkeypatch.setitem(attention.sys.modules, type(model).__module__, SimpleNamespace(ALL_ATTENTION_FUNCTIONS={}))
    attend_in_blocks(model)
    assert model.config._attn_implementation == "sdpa"
