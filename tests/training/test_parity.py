"""The loop against PEFT and a plain PyTorch loop written here: same losses in fp32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lorabench.config import Protocol, TinyModel
from lorabench.models.tiny import shipped
from lorabench.training.batches import data_order

from .conftest import condition_of, train

STEPS, BATCH, LR, SEED = 20, 4, 3e-3, 1


def plain_loop(data, method, rank):
    """What a careful user would write: padded batches, attention mask, labels, Adam."""
    model = AutoModelForCausalLM.from_pretrained(shipped("llama-128"), dtype=torch.float32)
    if method == "lora":
        torch.manual_seed(SEED)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=32, target_modules=targets))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LR, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for indices in data_order(len(data["train"]), STEPS, BATCH, SEED):
        examples = [data["train"].example(int(index)) for index in indices]
        width = max(len(ids) for ids, _ in examples)
        ids = torch.zeros(BATCH, width, dtype=torch.long)
        mask = torch.zeros(BATCH, width, dtype=torch.long)
        labels = torch.full((BATCH, width), -100)
        for row, (tokens, scored) in enumerate(examples):
            ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
            mask[row, : len(tokens)] = 1
            labels[row, : len(tokens)] = torch.from_numpy(np.where(scored, tokens, -100).astype(np.int64))
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("method", "rank"), [("fullft", None), ("lora", 1), ("lora", 8)])
def test_losses_equal_those_of_a_plain_loop(method, rank, data, tmp_path):
    condition = condition_of(method, rank, steps=STEPS, batch_size=BATCH)
    outcome, _ = train(condition, data, tmp_path, lr=LR, seed=SEED)
    ours = [point.value for point in outcome.curve if point.split == "train" and point.metric == "nll"]
    np.testing.assert_allclose(ours, plain_loop(data, method, rank), rtol=1e-5)
    # The loop learns; a frozen model would agree with itself too.
    assert np.mean(ours[-5:]) < np.mean(ours[:5]) - 0.1


def test_small_micro_batches_give_the_same_losses(data, tmp_path):
    condition = condition_of("lora", 4, steps=10, batch_size=8)
    whole, _ = train(condition, data, tmp_path / "a", lr=LR)
    parts, _ = train(condition, data, tmp_path / "b", lr=LR, max_batch_tokens=150)
    values = [[p.value for p in outcome.curve if p.metric == "nll"] for outcome in (whole, parts)]
    np.testing.assert_allclose(*values, rtol=1e-5)


def test_arms_of_one_seed_see_the_same_batches_and_seeds_differ():
    order = data_order(64, 16, 4, seed=0)
    assert np.array_equal(order, data_order(64, 16, 4, seed=0))
    assert not np.array_equal(order, data_order(64, 16, 4, seed=1))
    assert sorted(order.flatten()) == list(range(64))
    two_epochs = data_order(64, 32, 4, seed=0)
    assert np.array_equal(two_epochs[:16], order)
    assert sorted(two_epochs[16:].flatten()) == list(range(64))


@pytest.mark.parametrize(("method", "rank", "base"), [("fullft", None, "llama-128"), ("lora", 4, "moe-128")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_activations_give_the_same_numbers(method, rank, base, precision, data, tmp_path):
    condition = condition_of(method, rank, steps=6, batch_size=4)
    changes = {"spec": TinyModel(kind="tiny", name=base), "protocol": Protocol(precision=precision)}
    kept, model = train(condition, data, tmp_path / "a", lr=LR, **changes)
    again, recomputing = train(condition, data, tmp_path / "b", lr=LR, recompute=True, **changes)
    assert not model.is_activation_checkpointing
    assert recomputing.is_activation_checkpointing
    assert again.curve == kept.curve
    assert again.final_test_nll == kept.final_test_nll
