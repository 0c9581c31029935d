"""LoRA in the paper's parametrisation, and adapters that anyone can load."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel

from lorabench.config import TinyModel
from lorabench.errors import UserError
from lorabench.models.base import load_model
from lorabench.models.lora import add_lora, target_modules

TINY = TinyModel(kind="tiny")
# Per unit of rank: in + out of each linear layer of the tiny base (hidden 128, MLP 320, 3 layers, vocabulary 1024).
ATTENTION, MLP, UNEMBEDDING = 3 * 4 * 256, 3 * 3 * 448, 128 + 1024


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("placement", "head", "per_rank"),
    [
        ("attn", True, ATTENTION + UNEMBEDDING),
        ("mlp", True, MLP + UNEMBEDDING),
        ("all", True, ATTENTION + MLP + UNEMBEDDING),
        ("all", False, ATTENTION + MLP),
    ],
)
@pytest.mark.parametrize("rank", [1, 8])
def test_parameter_counts(placement, head, per_rank, rank):
    assert trainable(add_lora(load_model(TINY), rank, placement, 32.0, head, seed=0)) == rank * per_rank


@pytest.mark.parametrize("rank", [1, 64])
def test_initialisation_and_scale(rank):
    model = add_lora(load_model(TINY), rank, "all", 32.0, True, seed=0)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "scaling"):
            a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
            bound = 1 / math.sqrt(a.shape[1])
            assert module.scaling["default"] == 32 / rank, name
            assert a.abs().max() <= bound
            # Uniform on +-bound has a standard deviation of bound / sqrt(3).
            assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.25), name
            assert not b.any()


def test_the_seed_decides_the_initialisation():
    def first(seed):
        model = add_lora(load_model(TINY), 4, "all", 32.0, True, seed)
        return next(p for p in model.parameters() if p.requires_grad).clone()

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


def test_the_base_is_as_before_when_lora_is_taken_off():
    base = load_model(TINY)
    before = {name: p.clone() for name, p in base.named_parameters()}
    model = add_lora(base, 4, "all", 32.0, True, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)
    after = dict(model.unload().named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_adapter_is_a_peft_checkpoint(tmp_path):
    model = add_lora(load_model(TINY), 4, "all", 32.0, True, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.01)
    ids = torch.arange(5, 25)[None]
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(load_model(TINY), tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected)


def test_a_model_of_unknown_layers_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    with pytest.raises(UserError, match="GPT2LMHeadModel has no layer for placement 'all'; known names: q_proj"):
        target_modules(model, "all", True)
