"""The shipped tiny bases are those of their recipes, which a script of the workflow follows."""

import json
from dataclasses import asdict, replace

import pytest

import tiny_bases
from lorabench.config.inputs import TinyModel
from lorabench.models.base import load_model, load_tokenizer, weights_sha256
from lorabench.models.specs import dimensions, shipped_folder

RECIPES = tiny_bases.RECIPES

TYPES = {"llama": "llama", "qwen": "qwen3", "moe": "qwen3_moe"}


def spec(name):
    return TinyModel(kind="tiny", name=name)


def record(name):
    return json.loads((shipped_folder(name) / "recipe.json").read_text())


def test_every_base_of_the_presets_is_there_with_a_lossless_tokenizer_that_splits_digits():
    allowed = TinyModel.model_json_schema()["properties"]["name"]["enum"]
    assert set(allowed) == set(RECIPES) == {path.name for path in shipped_folder("llama-128").parent.iterdir()}
    tokenizer = load_tokenizer(spec("llama-128"))
    text = "Calculate 1234 + 5.6 → «naïve» 日本\n\tx"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert list(tokenizer.tokenize("1234")) == ["1", "2", "3", "4"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_base_is_that_of_its_recipe(name):
    assert weights_sha256(spec(name)) == {"model.safetensors": record(name)["weights_sha256"]}
    assert record(name)["recipe"] == json.loads(json.dumps(asdict(RECIPES[name])))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (shipped_folder(name) / file).read_bytes() == (shipped_folder("llama-128") / file).read_bytes()
    model = load_model(spec(name))
    family, width = name.split("-")[:2]
    assert (model.config.model_type, model.config.hidden_size) == (TYPES[family], int(width))
    assert not model.config.tie_word_embeddings
    believed = dimensions(spec(name))
    assert (believed.parameters, believed.hidden) == (model.num_parameters(), model.config.hidden_size)
    assert record(name)["parameters"] == model.num_parameters()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-64", "qwen-64", pytest.param("moe-128", marks=pytest.mark.long)])
def test_heldout_loss_is_as_recorded(name):
    nll = tiny_bases.heldout_nll(load_model(spec(name)), load_tokenizer(spec(name)), RECIPES[name])
    assert nll == pytest.approx(record(name)["heldout_nll_nats_per_token"], abs=2e-3)


@pytest.mark.parametrize("name", ["llama-64-sums", pytest.param("moe-128", marks=pytest.mark.slow)])
def test_the_recipe_rebuilds(name, tmp_path):
    few = {"train_tokens": 6_000, "tokenizer_documents": 300, "batch": 4, "block": 64}
    small = replace(RECIPES[name], **few, heldout_tokens=500, warmup_steps=5)
    first, second = tiny_bases.build(tmp_path / "a", small), tiny_bases.build(tmp_path / "b", small)
    assert first["weights_sha256"] == second["weights_sha256"]
    assert first["heldout_nll_nats_per_token"] < 6.5  # ln(1024) is 6.93
