"""What the audit knows of a base model from a configuration file, the catalogue, the table of models, or a name."""

import json
import math
import sys
from pathlib import Path

import pytest
from lora_advice.errors import UserError
from lora_advice.models import facts, look_up, public_models


def test_counted_parameters_are_the_published_ones() -> None:
    sized = [model for _, model in public_models() if model.sizes]
    assert len(sized) > 50
    for model in sized:
        assert model.sizes.parameters == pytest.approx(model.parameters, rel=0.03), model


@pytest.mark.parametrize(
    ("name", "family", "width", "billions", "experts"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama", 4096, 8.03, 0),
        ("torchtune.models.llama3_1.lora_llama3_1_8b", "llama", 4096, 8.03, 0),
        ("torchtune.models.qwen2_5.lora_qwen2_5_0_5b", "qwen2", 896, 0.494, 0),
        ("$HOME/models/deepseek-llm-7b-chat", "llama", 4096, 6.91, 0),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral", 4096, 46.7, 8),
        ("Qwen/Qwen3-30B-A3B", "qwen3_moe", 2048, 30.5, 128),
    ],
)
def test_names_of_popular_models(name: str, family: str, width: int, billions: float, experts: int) -> None:
    model = facts(name)
    assert model is not None
    assert (model.family, model.width, model.experts, model.width_error) == (family, width, experts, 0)
    assert model.parameters == pytest.approx(billions * 1e9, rel=0.01)


def test_a_name_with_a_size_gives_an_estimate() -> None:
    model = facts("someone/My-Llama-v7-9B-chat")
    assert (model.family, model.parameters, model.sizes) == ("llama", 9_000_000_000, None)
    assert abs(math.log(model.width / 4096)) < 2 * model.width_error
    assert 0.05 < model.width_error < 0.35
    mixture = facts("someone/Thing-100B-A10B")
    assert (mixture.mixture, mixture.fused_experts, mixture.experts) == (True, True, None)
    assert mixture.width < facts("someone/Thing-100B").width
    # A size that contradicts a known name counts.
    tiny = facts("axolotl-ai-co/DeepSeek-V3-11M")
    assert (tiny.family, tiny.parameters, tiny.source) == ("", 11_000_000, "the size in its name")


@pytest.mark.parametrize("name", ["./outputs/my-model", "x/model-4bit", "", f"x-{'9' * 5000}x7b", "x\0y"])
def test_a_name_without_a_size_gives_nothing(name: str) -> None:
    assert facts(name) is None


def test_a_configuration_file_comes_first(tmp_path: Path) -> None:
    config = {"model_type": "qwen3_moe", "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    config |= {"num_hidden_layers": 2, "vocab_size": 512, "num_experts": 4, "num_experts_per_tok": 2}
    folder = tmp_path / "Qwen3-8B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 32}))
    for model in (facts("Qwen3-8B", tmp_path), facts(str(folder)), facts(None, folder)):
        assert (model.family, model.width, model.experts, model.tied) == ("qwen3_moe", 64, 4, False)
        assert model.linear["gate_up_proj"] == ("experts", 64, 64, 8)
        assert model.source == "its config.json"


def test_the_hub_is_asked_only_if_the_user_allows_it(monkeypatch, tmp_path) -> None:
    config = {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    requests = []

    def download(name, file, etag_timeout):
        requests.append(name)
        if name == "x/other-7b":
            raise OSError("404 is what\nthe server said")
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert facts("x/own-7b").width_error > 0
    assert requests == []
    asked = facts("x/own-7b", hub=True)
    assert (asked.width, asked.width_error, asked.source) == (96, 0.0, "its config.json on the hub")
    assert facts("x/other-7b", hub=True).width_error > 0
    # The table knows this one.
    assert facts("Qwen/Qwen3-8B", hub=True).width == 4096
    assert requests == ["x/own-7b", "x/other-7b"]
    with pytest.raises(UserError, match=r"^model x/other-7b can't be fetched from \S+: 404 is what$"):
        look_up("x/other-7b", "config.json")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"needs the hub: pip install 'lora-advice\[hub\]'"):
        look_up("x/own-7b", "config.json")
