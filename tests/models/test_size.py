"""FLOPs per token by arithmetic, compared with those that torch counts."""

from __future__ import annotations

import pytest

from lorabench.config.experiments import Protocol
from lorabench.config.models import TinyModel
from lorabench.models.base import load_model
from lorabench.models.counts import base_parameters, train_flops_per_token
from lorabench.models.lora import add_lora
from lorabench.training.step_cost import measure_compute

BATCH, LENGTH = 2, 16


@pytest.mark.parametrize("name", ["llama-64", "qwen-64"])
def test_flops_of_a_token_are_those_counted(name):
    spec = TinyModel(kind="tiny", name=name)
    rows = measure_compute(name, spec, [1, 16], "all", BATCH, LENGTH, repeats=1, threads=1, protocol=Protocol())
    counted = {row["rank"]: row["linear_flops"] / (BATCH * LENGTH) for row in rows}
    assert train_flops_per_token(load_model(spec)) == counted[None]
    for rank in (1, 16):
        assert train_flops_per_token(add_lora(load_model(spec), rank, "all", 32.0, True, seed=0)) == counted[rank]


def test_only_active_experts_count():
    model = load_model(TinyModel(kind="tiny", name="moe-128"))
    experts = 3 * 8 * 3 * 128 * 128
    dense = 3 * 4 * 128 * 128 + 1024 * 128
    assert train_flops_per_token(model) == 6 * (dense + experts * 2 // 8)
    parameters = base_parameters(model)
    lora = add_lora(model, 4, "mlp", 32.0, False, seed=0)
    # Each expert has two LoRAs: of gate and up as one matrix, and of down.
    adapters = 3 * 8 * 2 * ((128 + 256) + (128 + 128))
    assert train_flops_per_token(lora) == 4 * (dense + experts * 2 // 8) + 6 * adapters * 2 // 8
    assert base_parameters(lora) == parameters
