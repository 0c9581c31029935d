"""Packed examples have the loss and gradients of padded ones, and none attends to another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config, Qwen3MoeConfig

from lorabench.config.models import TinyModel
from lorabench.data.tokens import TokenizedSplit
from lorabench.errors import UserError
from lorabench.models.base import load_model
from lorabench.models.lora import add_lora
from lorabench.models.passes import recompute_activations
from lorabench.training.batches import IGNORED, collate, micro_batches, packed_rows
from lorabench.training.loss import check_packing, mean_nll
from lorabench.custom.finetune import nll_sum

from .conftest import TINY, trained

CPU = torch.device("cpu")
FAMILIES = {
    "llama": (LlamaConfig, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 2}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"num_key_value_heads": 2, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "mistral, sliding window": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": 8}),
}


def split_of(lengths, seed=0):
    """Return random examples of these lengths; about half of their tokens are scored, the last one always."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 64, sum(lengths)).astype(np.int32)
    offsets = np.cumsum([0, *lengths])
    scored = rng.random(len(ids)) < 0.5
    scored[offsets[1:] - 1] = True
    return TokenizedSplit(ids, scored, offsets)


def model_of(family, lora=True):
    torch.manual_seed(0)
    config_of, changes = FAMILIES[family]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(config_of(**sizes, head_dim=8, vocab_size=64, **changes))
    if not lora:
        return model
    model = add_lora(model, 4, "all", 32.0, True, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                # With larger weights the gradients in fp32 have rounding errors of 3e-5.
                parameter.normal_(std=0.02)
    return model


def loss_and_gradient(model, split, packing, autocast=False, device="cpu"):
    model.zero_grad()
    total = torch.zeros((), device=device)
    for (part,) in micro_batches([split.lengths()], 64, 0, packing):
        batch = collate(split, part)
        with torch.autocast(device, torch.bfloat16, enabled=autocast or device == "cuda"):
            loss = nll_sum(model, *batch.to(device))
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@given(st.lists(st.integers(1, 60), min_size=1, max_size=50))
def test_rows_hold_each_example_once_and_are_as_long_as_the_longest(lengths):
    rows = packed_rows(np.array(lengths))
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    assert max(sum(lengths[place] for place in row) for row in rows) == max(lengths)
    # First fit leaves at most one row less than half full.
    assert sum(2 * sum(lengths[place] for place in row) <= max(lengths) for row in rows) <= 1


def test_two_examples_in_a_row_by_hand():
    split = TokenizedSplit(
        ids=np.array([5, 6, 7, 8, 9, 3, 1, 2, 4], np.int32),
        scored=np.array([False, False, True, True, False, True, True, True, False]),
        offsets=np.array([0, 4, 6, 9]),
    )
    inputs, targets, positions = collate(split, [np.array([0, 1]), np.array([2])])
    assert inputs.tolist() == [[5, 6, 7, 9], [1, 2, 0, 0]]
    assert targets.tolist() == [[IGNORED, 7, 8, 3], [2, IGNORED, IGNORED, IGNORED]]
    assert positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [True, False])
def test_loss_and_gradients_are_those_of_padded_examples(family, lora):
    model, split = model_of(family, lora), split_of([20, 3, 9, 14, 2, 6, 11, 5])
    padded, of_padded = loss_and_gradient(model, split, packing=False)
    packed, of_packed = loss_and_gradient(model, split, packing=True)
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)
    assert of_packed.keys() == of_padded.keys()
    for name, gradient in of_padded.items():
        assert (of_packed[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3_moe"])
def test_in_double_precision_each_gradient_is_the_same(family):
    """The differences in fp32 are therefore rounding. Experts cannot be computed in fp64."""
    model, split = model_of(family).double(), split_of([20, 3, 9, 14, 2, 6, 11, 5])
    _, padded = loss_and_gradient(model, split, packing=False)
    _, packed = loss_and_gradient(model, split, packing=True)
    for name, gradient in padded.items():
        assert (packed[name] - gradient).norm() <= 1e-12 * gradient.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_the_loss_is_that_of_padded_examples_up_to_its_rounding(family):
    model, split = model_of(family), split_of([20, 3, 9, 14, 2, 6, 11, 5])
    packed, _ = loss_and_gradient(model, split, packing=True, autocast=True)
    padded, _ = loss_and_gradient(model, split, packing=False, autocast=True)
    torch.testing.assert_close(packed, padded, rtol=3e-3, atol=0.0)


def test_with_activation_checkpointing_gradients_are_the_same():
    model, split = model_of("llama"), split_of([20, 3, 9, 14, 2, 6, 11, 5])
    _, plain = loss_and_gradient(model, split, packing=True)
    recompute_activations(model.get_base_model())
    model.train()
    _, again = loss_and_gradient(model, split, packing=True)
    for name, gradient in plain.items():
        assert torch.equal(again[name], gradient), name


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3_moe"])
def test_an_example_does_not_see_the_one_before_it(family):
    """The second example's loss does not change by a bit with the first example."""
    model = model_of(family)
    losses = set()
    for change in range(3):
        split = split_of([9, 12])
        split.ids[:9] = (split.ids[:9] + 7 * change) % 64
        split.scored[:9] = False
        losses.add(nll_sum(model, *collate(split, [np.array([0, 1])])).item())
    assert len(losses) == 1


def test_experts_do_not_mix_examples():
    """The loss may change by rounding, since the tokens of an expert decide the order of its sums."""
    model = model_of("qwen3_moe")
    losses = []
    for change in range(3):
        split = split_of([9, 12])
        split.ids[:9] = (split.ids[:9] + 7 * change) % 64
        split.scored[:9] = False
        losses.append(nll_sum(model, *collate(split, [np.array([0, 1])])).item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("name", ["llama-128", "qwen-128", "moe-128"])
def test_the_shipped_bases_keep_packed_examples_apart(name):
    check_packing(load_model(TinyModel(kind="tiny", name=name)))


def test_a_model_that_lets_examples_see_each_other_is_refused():
    model = load_model(TINY)
    decoder = model.get_decoder()
    forward = decoder.forward
    # A custom attention may ignore that positions restart.
    decoder.forward = lambda position_ids=None, **rest: forward(**rest)
    with pytest.raises(UserError, match="LlamaForCausalLM lets packed examples see each other"):
        check_packing(model)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_in_bf16_gradients_are_those_of_padded_examples(family):
    model, split = model_of(family).cuda(), split_of([20, 3, 9, 14, 2, 6, 11, 5])
    check_packing(model.get_base_model())
    _, padded = loss_and_gradient(model, split, packing=False, device="cuda")
    _, packed = loss_and_gradient(model, split, packing=True, device="cuda")
    for name, gradient in padded.items():
        assert (packed[name] - gradient).norm() <= 0.05 * gradient.norm(), name


def test_the_mean_over_a_split_is_the_same(data):
    model = load_model(TINY)
    packed = mean_nll(model, data["test"], 512, CPU, None, packing=True)
    assert packed == pytest.approx(mean_nll(model, data["test"], 512, CPU, None), rel=1e-5)


@pytest.mark.slow
def test_a_packed_run_learns_what_a_padded_one_does(ready):
    curves = []
    for packing in (False, True):
        plan, layout = ready(f"packing-{packing}", execution={"packing": packing, "max_batch_tokens": 256})
        rows, _ = trained(plan, layout, "lora")
        curves.append([point["value"] for point in rows.curve[0] if point["metric"] == "nll"])
    assert curves[0] != curves[1]
    assert curves[1] == pytest.approx(curves[0], rel=2e-4)
