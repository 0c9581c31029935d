"""Micro-batches hold each example once at the least cost; inputs and targets by hand; the loss of transformers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from lorabench.config.experiments import Protocol
from lorabench.data.tokens import TokenizedSplit
from lorabench.errors import UserError
from lorabench.models.base import load_model
from lorabench.models.lanes.shelf import RowCounts
from lorabench.models.lora import add_lora
from lorabench.training.batches import IGNORED, collate, micro_batches
from lorabench.training.loss import check_plain_head, example_nlls, mean_nll
from lorabench.custom.finetune import nll_sum
from lorabench.training.sft import curve_steps

from .conftest import TINY

CPU = torch.device("cpu")


@given(
    lengths=st.lists(st.lists(st.integers(2, 60), min_size=7, max_size=7), min_size=1, max_size=3),
    share=st.integers(1, 300),
    pass_tokens=st.integers(0, 200),
)
def test_micro_batches_are_the_batch_and_cost_least(lengths, share, pass_tokens):
    lanes, examples = len(lengths), len(lengths[0])
    max_tokens = lanes * share
    parts = list(micro_batches([np.array(own) for own in lengths], max_tokens, pass_tokens))
    for lane in range(lanes):
        assert sorted(np.concatenate([part[lane] for part in parts])) == list(range(examples))
    longest = np.max([np.sort(own) for own in lengths], axis=0)

    def cost(ends):
        """Return the cost of the parts with these ends, infinite if one does not fit."""
        sizes = np.diff([0, *ends])
        tokens = lanes * sizes * longest[np.array(ends) - 1]
        return np.where((tokens > max_tokens) & (sizes > 1), np.inf, tokens + pass_tokens).sum()

    chosen = cost(np.cumsum([len(part[0]) for part in parts]))
    inner = itertools.chain.from_iterable(itertools.combinations(range(1, examples), n) for n in range(examples))
    least = min(cost([*ends, examples]) for ends in inner)
    assert chosen == pytest.approx(least)
    assert np.isfinite(chosen)


def test_a_batch_of_equal_lengths_is_one_part_and_of_unequal_ones_two():
    [[alike]] = micro_batches([np.full(8, 70)], 2048, 64)
    assert sorted(alike) == list(range(8))
    apart = [part.tolist() for (part,) in micro_batches([np.array([90, 20, 95, 22, 21])], 2048, 64)]
    assert apart == [[1, 4, 3], [0, 2]]
    assert list(micro_batches([np.zeros(0, np.int64)], 2048, 64)) == []


def test_collate_by_hand():
    split = TokenizedSplit(
        ids=np.array([5, 6, 7, 8, 9, 3], np.int32),
        scored=np.array([False, False, True, True, False, True]),
        offsets=np.array([0, 4, 6]),
    )
    inputs, targets, positions = collate(split, np.array([1, 0]))
    assert positions is None
    assert inputs.tolist() == [[9, 0, 0], [5, 6, 7]]
    assert targets.tolist() == [[3, IGNORED, IGNORED], [IGNORED, 7, 8]]


def test_nll_is_token_weighted_and_equals_transformers(data):
    model = load_model(TINY)
    split = data["test"]
    total = count = 0.0
    nats = []
    for index in range(len(split)):
        ids, scored = split.example(index)
        labels = torch.from_numpy(np.where(scored, ids, -100).astype(np.int64))[None]
        with torch.no_grad():
            loss = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None], labels=labels).loss.item()
        total, count = total + loss * scored.sum(), count + scored.sum()
        nats.append(loss * scored.sum())
    assert mean_nll(model, split, 16_384, CPU, None) == pytest.approx(total / count, rel=1e-5)
    assert mean_nll(model, split, 64, CPU, None) == pytest.approx(total / count, rel=1e-5)
    for packing in (False, True):
        [by_example] = example_nlls(model, RowCounts(1), split, 512, CPU, None, packing=packing)
        assert by_example == pytest.approx(nats, rel=1e-4)


@pytest.mark.parametrize("family", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_of_other_families_with_lora_equals_transformers(family, tied):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = family(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=64, tie_word_embeddings=tied)
    model = add_lora(AutoModelForCausalLM.from_config(config), 4, "all", 32.0, True, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    ids = torch.randint(0, 64, (3, 12))
    labels = torch.where(torch.rand(3, 12) < 0.5, ids, -100)
    labels[:, 0] = -100
    expected = model(input_ids=ids, labels=labels).loss * (labels != -100).sum()
    ours = nll_sum(model, ids[:, :-1], labels[:, 1:])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_models_that_change_their_logits_are_refused():
    model = load_model(TINY)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(UserError, match="final_logit_softcapping"):
        check_plain_head(model)


@given(steps=st.integers(1, 5000), points=st.integers(2, 40))
def test_curve_steps_are_log_spaced_with_both_ends(steps, points):
    chosen = sorted(curve_steps(steps, Protocol(curve_points=points)))
    assert chosen[0] == 1
    assert chosen[-1] == steps
    assert len(chosen) <= points


def test_curve_steps_by_hand():
    assert curve_steps(1000, Protocol(curve_points=4)) == {1, 10, 100, 1000}
    named = Protocol(curve_points=4, validate_at=[50, 100, 2000])
    assert curve_steps(1000, named) == {1, 10, 50, 100, 1000}


def test_protocol_defaults_are_the_papers():
    protocol = Protocol()
    assert (protocol.alpha, protocol.include_unembedding) == (32.0, True)
    assert (protocol.betas, protocol.eps, protocol.weight_decay, protocol.clip_norm) == ([0.9, 0.95], 1e-8, 0.0, None)
