"""LoRA in the paper's parametrization, in every family, and adapters that PEFT can load."""

import math
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PhiConfig,
    PhiForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lorabench.config.inputs import TinyModel
from lorabench.errors import UserError
from lorabench.models.base import config_of, load_model
from lorabench.models.lora import adapter_pairs, add_lora, lora_layers, targets
from lorabench.models.passes import trained_parameters
from lorabench.models.specs import dimensions


def base(name):
    return load_model(TinyModel(kind="tiny", name=name))


def copies(parameters):
    return {name: p.detach().clone() for name, p in parameters.items()}


@pytest.fixture(scope="session")
def text():
    return torch.randint(3, 1000, (4, 193), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("placement", "attention", "rank", "expert_rank"),
    [("all", 3 * 4 * 256, 1, 1), ("mlp", 0, 5, 2), ("attn", 3 * 4 * 256, 5, 2)],
)
def test_each_expert_has_the_rank_over_the_active_experts(placement, attention, rank, expert_rank):
    """2 of 8 experts of width 128 are active; gate and up share an A; the router carries none."""
    model = add_lora(base("moe-128"), rank, placement, 32.0, True, seed=0)
    experts = 3 * 8 * ((128 + 256) + (128 + 128)) if placement != "attn" else 0
    trained = trained_parameters(model)
    assert sum(p.numel() for p in trained.values()) == rank * (attention + 128 + 1024) + expert_rank * experts
    assert not any(".gate." in name for name in trained)
    for name, layer in lora_layers(model):
        expected = expert_rank if ".experts." in name else rank
        assert (layer.r["default"], layer.scaling["default"]) == (expected, 32 / expected), name


@pytest.mark.parametrize(("name", "rank", "init_a"), [("llama-128", 2, 1.0), ("moe-128", 64, 0.25)])
def test_initialization_and_scale(name, rank, init_a):
    # The experts' width differs from the model's, so that gate and down differ in d_in.
    model, *others = (add_lora(small(name), rank, "all", 32.0, True, seed, init_a) for seed in (0, 0, 1))
    hidden = model.config.hidden_size
    d_ins = set()
    for (layer_name, layer), (_, same), (_, other) in zip(*map(lora_layers, (model, *others)), strict=True):
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        d_in = 40 if "down_proj" in layer_name else hidden
        d_ins.add(d_in)
        bound = init_a / math.sqrt(d_in)
        assert a.shape[1] == d_in, layer_name
        assert a.abs().max() <= bound
        # Uniform on +-bound has a standard deviation of bound / sqrt(3).
        assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.25), layer_name
        assert not b.any()
        assert torch.equal(a, same.lora_A["default"].weight)
        assert not torch.equal(a, other.lora_A["default"].weight)
    assert len(d_ins) == 2


@pytest.mark.parametrize("name", ["qwen-64", "moe-128"])
def test_an_adapter_trains_alone_is_a_peft_checkpoint_and_leaves_the_base_as_it_was(name, text, tmp_path):
    model = base(name)
    linear = {n: module for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    untrained = copies(dict(model.named_parameters()))
    with torch.no_grad():
        logits = model(input_ids=text).logits
    # It is done twice, as a sweep trains several runs on the same base.
    for seed in range(2):
        adapted = add_lora(model, 8, "all", 32.0, True, seed)
        before, trained, pairs = copies(dict(adapted.named_parameters())), trained_parameters(adapted), {}
        for layer, (a, b, scaling) in adapter_pairs(adapted).items():
            d_out, d_in = linear[layer].weight.shape
            assert (a.shape, b.shape, scaling) == ((8, d_in), (d_out, 8), 4.0)
            pairs[layer] = {id(a), id(b)}
        assert pairs.keys() == linear.keys()
        assert set.union(*pairs.values()) <= set(map(id, trained.values()))
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
        for _ in range(2):
            optimizer.zero_grad()
            # Of each token the probability that it comes again.
            nll = torch.nn.functional.cross_entropy(adapted(input_ids=text).logits.flatten(0, 1), text.flatten())
            nll.backward()
            optimizer.step()
        for parameter, p in adapted.named_parameters():
            assert (parameter in trained) != torch.equal(p, before[parameter]), parameter
            assert parameter not in trained or p.grad.abs().max() > 0, parameter
        adapted.save_pretrained(tmp_path, save_embedding_layers=False)
        loaded = PeftModel.from_pretrained(base(name), tmp_path)
        with torch.no_grad():
            expected, actual = adapted(input_ids=text).logits, loaded(input_ids=text).logits
            assert (logits - expected).abs().max() > 0.1
        torch.testing.assert_close(actual, expected)
        model = adapted.unload().requires_grad_(True)
        after = dict(model.named_parameters())
        assert list(after) == list(untrained)
        assert all(torch.equal(after[parameter], untrained[parameter]) for parameter in untrained)
        with torch.no_grad():
            assert torch.equal(model(input_ids=text).logits, logits)


def small(name):
    """Return a base with random weights and an MLP, or experts, of width 40."""
    torch.manual_seed(0)
    sizes = replace(dimensions(TinyModel(kind="tiny", name=name)), intermediate=40)
    return AutoModelForCausalLM.from_config(config_of(sizes, 512, padding=1))


def test_lora_of_an_expert_is_scaling_times_b_a(text):
    """The model with LoRA gives what the base gives with W + (alpha/r) B A in place of W."""
    changed, model = small("moe-128"), add_lora(small("moe-128"), 6, "all", 32.0, False, seed=0)
    weights = dict(changed.named_parameters())
    with torch.no_grad():
        before = changed(input_ids=text).logits
        for name, layer in lora_layers(model):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            torch.nn.init.normal_(b, std=0.02)
            if ".experts." in name:
                # PEFT's layout of a stack of 8 experts. Columns of A meet the inputs: as many as the layer takes in.
                a, b = a.unflatten(0, (8, -1)), b.unflatten(1, (-1, 8)).permute(2, 0, 1)
                assert a.shape == (8, 3, 40 if "down_proj" in name else changed.config.hidden_size)
                weights[name].add_(32.0 / 3 * (b @ a))
            else:
                weights[f"{name}.weight"].add_(32.0 / 6 * b @ a)
        expected, actual = changed(input_ids=text).logits, model(input_ids=text).logits
        assert (before - expected).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64, "pad_token_id": None}


def test_layers_that_are_unknown_or_not_the_requested_ones_are_refused():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    with pytest.raises(UserError, match="GPT2LMHeadModel has no layer for placement 'all'; known names: q_proj"):
        targets(model, "all", True)
    model = PhiForCausalLM(PhiConfig(**SMALL, num_hidden_layers=1))
    for placement, names in (("attn", "dense"), ("all", "dense, fc1, fc2")):
        message = f"placement '{placement}' does not know: {names}$"
        with pytest.raises(UserError, match=f"^PhiForCausalLM has layers that {message}"):
            targets(model, placement, True)
    # Where a model has dense MLPs and fused experts, PEFT mistakes the names of the former for those of the latter.
    sizes = {"hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24, "num_hidden_layers": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 64}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, **heads))
    others = "PEFT did not put LoRA on the requested layers of Qwen3MoeForCausalLM: see model.layers.0"
    with pytest.raises(UserError, match=others):
        add_lora(model, 8, "all", 32.0, True, seed=0)
