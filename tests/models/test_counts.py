"""Counts against the paper's table, the published sizes, and the FLOPs that torch counts."""

from __future__ import annotations

import pytest
import torch

from lorabench.config.inputs import TinyModel
from lorabench.models.base import load_model
from lorabench.models.counts import base_parameters, counts_table, train_flops_per_token
from lorabench.models.lora import add_lora
from lorabench.training.loss import Batch
from lorabench.training.step_cost import count_flops


@pytest.fixture(scope="module")
def table():
    return counts_table()


def test_llama_8b_has_the_papers_counts_and_whole_models_their_published_sizes(table):
    key = ["placement", "rank", "include_unembedding"]
    assert not table.duplicated(["architecture", *key, "part"]).any()
    rows = table[table["architecture"] == "llama-3.1-8b"]
    assert rows.set_index(key)["trainable_params"].to_dict() == {
        ("mlp", 256, True): 486_866_944,
        ("attn", 256, True): 251_985_920,
        ("all", 256, True): 704_970_752,
        ("mlp", 128, True): 243_433_472,
        ("all", 1, True): 2_753_792,
        ("all", 1, False): 2_621_440,
    }
    sizes = table[table["part"] == "all"].groupby("architecture")["base_params"].unique().map(list).to_dict()
    assert sizes == {
        "llama-3.1-8b": [8_030_261_248],
        # Tied: the unembedding counts once.
        "llama-3.2-1b": [1_235_814_400],
        "qwen3-8b": [8_190_735_360],
        "qwen3-30b-a3b": [30_532_122_624],
    }


@pytest.mark.parametrize("rank", [8, 64])
def test_parts_of_the_mixture_of_experts(table, rank):
    rows = table[(table["architecture"] == "qwen3-30b-a3b") & (table["rank"] == rank)].set_index("part")
    hidden, expert, experts, layers = 2048, 768, 128, 48
    # Gate and up share an A.
    per_expert = (hidden + 2 * expert) + (expert + hidden)
    attention = (hidden + 4096) + 2 * (hidden + 512) + (4096 + hidden)
    assert rows["trainable_params"].drop("all").to_dict() == {
        "experts": layers * experts * per_expert * rank // 8,
        "attention": layers * attention * rank,
        "unembedding": (hidden + 151_936) * rank,
    }
    assert rows["base_params"].drop("all").to_dict() == {
        "experts": layers * experts * 3 * hidden * expert,
        "attention": layers * (2 * hidden * 4096 + 2 * hidden * 512),
        "unembedding": hidden * 151_936,
    }
    assert rows["trainable_params"].drop("all").sum() == rows["trainable_params"]["all"]


@pytest.mark.parametrize("name", ["llama-64", "qwen-64"])
def test_flops_of_a_token_are_those_counted(name):
    spec = TinyModel(kind="tiny", name=name)
    for rank in (None, 1, 16):
        model = load_model(spec)
        if rank is not None:
            model = add_lora(model, rank, "all", 32.0, True, seed=0)
        tokens = torch.zeros(2, 16, dtype=torch.long)
        assert train_flops_per_token(model) == count_flops(model, Batch(tokens, tokens), bf16=False)[0] / tokens.numel()


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
