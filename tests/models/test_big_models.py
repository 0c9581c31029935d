"""Real architectures: counts against the paper and the published sizes, layers with LoRA, sizes for the estimates."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lorabench.config.inputs import HubModel, PathModel, TinyModel
from lorabench.models.base import load_model
from lorabench.models.counts import base_parameters, counts_table, train_flops_per_token
from lorabench.models.lora import add_lora, in_expert
from lorabench.models.passes import trained_parameters
from lorabench.models.specs import ARCHITECTURES, architectures, dimensions, dimensions_of_config

SIZES = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-30b-a3b": 30_532_122_624,
    "smollm2-135m": 134_515_008,
}
# One of each family; the embedding of the first is tied.
BIG = ("llama-3.2-1b", "qwen3-8b", "qwen3-30b-a3b")


def config(name):
    return json.loads((ARCHITECTURES / f"{name}.json").read_text())


def on_meta(name):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config(name)))


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_the_model_and_as_published(name):
    model, sizes = on_meta(name), dimensions_of_config(architectures()[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == sizes.parameters == SIZES[name]
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    fused = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 3 and in_expert(n))
    assert linear + fused == sum(m.parameters for m in sizes.matrices if m.part != "router")
    # A model of unknown sizes is guessed.
    size = {"parameters": sizes.parameters, "hidden_size": sizes.hidden}
    guess = dimensions(HubModel(kind="hub", id="somebody/new", **size))
    assert 0.7 < guess.parameters / sizes.parameters < 1.4
    assert guess.hidden == sizes.hidden


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-30b-a3b"])
@pytest.mark.parametrize(("placement", "head"), [("attn", False), ("mlp", True)])
def test_lora_is_on_the_layers_of_its_placement_and_the_unembedding(name, placement, head):
    model = on_meta(name)
    with torch.device("meta"):
        trained = trained_parameters(add_lora(model, 16, placement, 32.0, head, seed=0))
    parts = {"attn": {"self_attn"}, "mlp": {"mlp"}}[placement] | ({"lm_head"} if head else set())
    assert {part for part in ("self_attn", "mlp", "lm_head") if any(part in path for path in trained)} == parts
    sizes = dimensions_of_config(architectures()[name])
    assert sum(parameter.numel() for parameter in trained.values()) == sizes.lora(placement, 16, head)[0]


def test_a_known_model_is_known_by_its_name_and_size_or_by_its_own_configuration(tmp_path):
    def hub(name, parameters):
        return dimensions(HubModel(kind="hub", id=name, parameters=parameters, hidden_size=4096))

    llama = dimensions_of_config(architectures()["llama-3.1-8b"])
    for name in ("meta-llama/Llama-3.1-8B-Instruct", "somebody/llama-3.1-8b-tuned"):
        assert hub(name, 8_030_261_248) == llama
    # A different model whose name starts alike.
    assert hub("somebody/Llama-3.1-8B-pruned", 5_000_000_000) != llama
    (tmp_path / "config.json").write_text(json.dumps(config("qwen3-4b")))
    spec = PathModel(kind="path", path=str(tmp_path), parameters=4_022_468_096, hidden_size=2560)
    assert dimensions(spec) == dimensions_of_config(architectures()["qwen3-4b"])


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
    # In a tied model the unembedding counts once.
    assert sizes == {name: [SIZES[name]] for name in ("llama-3.1-8b", *BIG)}


def test_parts_of_the_mixture_of_experts(table):
    rank = 64
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
