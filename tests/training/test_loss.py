"""Logits computed in pieces give the same losses and gradients, and are never all in memory."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from lorabench.training import loss
from lorabench.training.batches import IGNORED, Batch
from lorabench.training.loss import MAX_LOGITS, add_gradient, nll_sums
from lorabench.custom.finetune import nll_sum
from lorabench.training.step_cost import _NewStorages

from .lanes import run_of, stack_of

VOCABULARY = 96
# Method, whether embedding and unembedding are tied, number of lanes.
KINDS = [("lora", False, 1), ("lora", True, 1), ("lora", False, 3), ("lora", True, 2), ("fullft", False, 1)]
KINDS += [("fullft", True, 1), ("fullft", False, 3), ("fullft", True, 2)]


def tiny(tied, vocabulary=VOCABULARY):
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).train()


@cache
def stack(method, tied, lanes, vocabulary=VOCABULARY):
    """Return a stack whose B is not zero, so that LoRA on the unembedding has an effect."""
    stacked = stack_of(tiny(tied, vocabulary), [run_of(method, 1e-3, seed) for seed in range(lanes)])
    if stacked.shelf is not None:
        with torch.no_grad():
            stacked.shelf.values.add_(0.05 * torch.randn_like(stacked.shelf.values))
    return stacked


def batch_of(lanes, rows, width, share, seed=0, vocabulary=VOCABULARY):
    """Return random tokens, of which about `share` are scored, at least one of each lane."""
    generator = torch.Generator().manual_seed(seed)
    shape = lanes * rows, width
    inputs, targets = (torch.randint(vocabulary, shape, generator=generator) for _ in range(2))
    ignored = torch.rand(shape, generator=generator) > share
    ignored[::rows, seed % width] = False
    return Batch(inputs, targets.masked_fill(ignored, IGNORED), None)


def gradients(stacked, batch, max_logits, autocast=None):
    """Return the losses of the lanes, and the gradient of each weight of each lane."""
    lanes = len(stacked.lanes)
    losses = add_gradient(stacked.model, batch, stacked.rows, batch.scored_by(lanes).tolist(), autocast, max_logits)
    of_lanes = []
    for lane in stacked.lanes.values():
        of_lanes.append({name: place.of(place.parameter.grad).clone() for name, place in lane.places.items()})
        lane.zero_grad()
    return losses, of_lanes


def assert_close(actual, expected, rtol):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (actual[name] - gradient).norm() <= rtol * gradient.norm(), name


@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(deadline=None, max_examples=20)
@given(
    rows=st.integers(1, 3),
    width=st.integers(2, 12),
    share=st.floats(0, 1),
    at_once=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_pieces_of_any_size_add_up(kind, rows, width, share, at_once, seed):
    stacked = stack(*kind)
    batch = batch_of(kind[2], rows, width, share, seed)
    whole, of_whole = gradients(stacked, batch, None)
    pieces, of_pieces = gradients(stacked, batch, at_once * VOCABULARY)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=0)
    for actual, expected in zip(of_pieces, of_whole, strict=True):
        # A first token attends to itself only, so its queries and keys have no gradient except rounding errors.
        assert actual.keys() == expected.keys()
        scale = max(gradient.norm() for gradient in expected.values())
        for name, gradient in expected.items():
            assert (actual[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6 * scale, name


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("max_logits", [1, 7 * VOCABULARY])
def test_every_weight_gets_the_same_gradient_from_pieces(kind, max_logits):
    stacked = stack(*kind)
    batch = batch_of(kind[2], 3, 20, 0.6)
    whole, of_whole = gradients(stacked, batch, None)
    pieces, of_pieces = gradients(stacked, batch, max_logits)
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=0)
    for actual, expected in zip(of_pieces, of_whole, strict=True):
        assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_in_bf16_pieces_are_the_whole_up_to_rounding(kind):
    stacked = stack(*kind)
    batch = batch_of(kind[2], 3, 20, 0.6)
    whole, of_whole = gradients(stacked, batch, None, torch.bfloat16)
    pieces, of_pieces = gradients(stacked, batch, 7 * VOCABULARY, torch.bfloat16)
    torch.testing.assert_close(pieces, whole, rtol=1e-3, atol=0)
    for actual, expected in zip(of_pieces, of_whole, strict=True):
        assert_close(actual, expected, 0.03)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[0] == "lora" and kind[2] > 1], ids=str)
@pytest.mark.parametrize("max_logits", [None, 7 * VOCABULARY])
def test_each_lane_has_the_gradient_of_its_rows_alone(kind, max_logits):
    """The reference is the model of transformers with PEFT's adapter and the same weights."""
    stacked, lanes = stack(*kind), kind[2]
    batch = batch_of(lanes, 2, 15, 0.5)
    scored = batch.scored_by(lanes)
    assert len(set(scored.tolist())) > 1
    losses, of_lanes = gradients(stacked, batch, max_logits)
    for lane in range(lanes):
        alone = stack_of(tiny(kind[1]), [run_of("lora", 1e-3, 0)])
        with torch.no_grad():
            alone.shelf.values.copy_(stacked.shelf.values[lane : lane + 1])
        # Restore PEFT's own forward pass.
        ours = [module for module in alone.model.modules() if "forward" in vars(module)]
        assert len(ours) == 8
        for module in ours:
            del module.forward
        own = Batch(*(tensor.view(lanes, 2, -1)[lane] for tensor in batch[:2]), None)
        nll = nll_sum(alone.model, *own) / int(scored[lane])
        nll.backward()
        assert losses[lane].item() == pytest.approx(nll.item(), rel=1e-6)
        expected = {
            n.replace(run_of("lora", 1e-3, 0).run_id, "default"): p.grad
            for n, p in alone.model.named_parameters()
            if ".lora_" in n
        }
        assert_close(of_lanes[lane], expected, 1e-5)


@pytest.mark.parametrize(
    "kind", [("lora", False, 1), ("lora", True, 4), ("fullft", True, 1), ("fullft", False, 2)], ids=str
)
def test_logits_of_all_tokens_are_never_held(kind, monkeypatch):
    vocabulary, at_once = 8192, 32
    stacked, lanes = stack(*kind, vocabulary), kind[2]
    batch = batch_of(lanes, 512 // lanes // 32, 32, 1.0, vocabulary=vocabulary)
    logits = 4 * batch.scored * vocabulary
    divisors = batch.scored_by(lanes).tolist()
    # The first pass allocates the gradients.
    add_gradient(stacked.model, batch, stacked.rows, divisors, None, None)

    def peak(max_logits):
        with _NewStorages() as new:
            add_gradient(stacked.model, batch, stacked.rows, divisors, None, max_logits)
        return new.peak

    assert peak(None) > 2 * logits
    # With 16 pieces a few times the logits of one piece (with gradient, in fp32) and the decoder's activations remain.
    assert peak(at_once * vocabulary) < logits / 2
    for lane in stacked.lanes.values():
        lane.zero_grad()
    monkeypatch.setitem(loss.MAX_LOGITS, "cpu", at_once * vocabulary)
    with torch.no_grad(), _NewStorages() as new:
        nll_sums(stacked.model, batch, stacked.rows)
    assert new.peak < logits / 2


def test_pieces_cover_every_scored_token_once():
    counts = [3, 0, 5, 4]
    pieces = list(loss._pieces(counts, 5))
    assert [own for _, own in pieces] == [[3, 0, 2, 0], [0, 0, 3, 2], [0, 0, 0, 2]]
    assert [(piece.start, piece.stop) for piece, _ in pieces] == [(0, 5), (5, 10), (10, 12)]
    assert [own for _, own in loss._pieces([0, 0], 5)] == [[0, 0]]


def test_the_limit_on_a_cpu_is_of_64_mebibytes():
    limit = MAX_LOGITS["cpu"]
    assert 4 * limit == 64 * 2**20
    assert loss._tokens_at_once(tiny(False), limit) == limit // VOCABULARY
    assert loss._tokens_at_once(tiny(False), 1) == 1
