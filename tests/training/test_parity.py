"""The SFT loop has the losses of PEFT in a plain PyTorch loop, in fp32."""

from __future__ import annotations

import numpy as np
import pytest

from lorabench.config.experiments import Protocol
from lorabench.config.models import TinyModel
from lorabench.training.batches import data_order

from .conftest import condition_of, train
from .lanes import base_of, plain_loop, run_of, series

STEPS, BATCH, LR, SEED = 20, 4, 3e-3, 1


def test_losses_at_rank_1_equal_those_of_a_plain_loop(data, tmp_path):
    run = run_of("lora", LR, SEED, STEPS, BATCH, rank=1)
    outcome, _ = train(run.condition, data, tmp_path, lr=LR, seed=SEED)
    ours = series(outcome, "nll")
    losses, norms = plain_loop(base_of("llama-128"), run, data)
    np.testing.assert_allclose(ours, losses, rtol=1e-5)
    np.testing.assert_allclose(series(outcome, "grad_norm"), norms, rtol=1e-4)
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


@pytest.mark.parametrize(
    ("method", "rank", "base", "precision"), [("fullft", None, "llama-128", "fp32"), ("lora", 4, "moe-128", "bf16")]
)
def test_recomputed_activations_give_the_same_numbers(method, rank, base, precision, data, tmp_path):
    condition = condition_of(method, rank, steps=4, batch_size=4)
    changes = {"spec": TinyModel(kind="tiny", name=base), "protocol": Protocol(precision=precision)}
    kept, model = train(condition, data, tmp_path / "a", lr=LR, **changes)
    again, recomputing = train(condition, data, tmp_path / "b", lr=LR, recompute=True, **changes)
    assert not any(getattr(layer, "gradient_checkpointing", False) for layer in model.modules())
    assert any(getattr(layer, "gradient_checkpointing", False) for layer in recomputing.modules())
    assert again.curve == kept.curve
    assert again.final_test_nll == kept.final_test_nll
