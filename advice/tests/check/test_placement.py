"""What `lorabench check MODEL` says that LoRA would train, against what it does train."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorabench.check.placement import coverage
from lorabench.cli.commands import app
from lorabench.custom.model import find_model
from lorabench.models.base import load_model
from lorabench.models.lora import add_lora
from lorabench.models.passes import trained_parameters
from lorabench.models.specs import shipped_folder


@pytest.mark.parametrize(("name", "placement"), [("llama-64", "mlp"), ("moe-128", "all"), ("moe-128", "attn")])
def test_counts_are_those_of_the_model_that_is_trained(name, placement):
    model = find_model(name)
    covered = coverage(model, placement, 6, "H100-80GB")
    trained = trained_parameters(add_lora(load_model(model.spec), 6, placement, 32.0, True, 0))
    assert covered.lora_parameters == sum(parameter.numel() for parameter in trained.values())
    assert sum(kind.parameters for kind in covered.kinds) == model.parameters
    # A GGUF file has no names, and the counts follow from the dimensions.
    assert covered.lora_parameters == model.sizes.lora(placement, 6, include_unembedding=True)[0]
    assert {kind.kind for kind in covered.kinds if kind.with_lora < kind.weights} == {
        kind.kind for kind in covered.kinds if kind.note
    }
    codes = {finding.code for finding in covered.findings}
    assert codes == ({"fused-experts"} if (name, placement) == ("moe-128", "all") else set())


def test_a_model_of_the_hub_is_described_without_its_weights():
    covered = coverage(find_model("meta-llama/Llama-3.2-1B"), "all", 16, "H100-80GB")
    kinds = {kind.kind: kind for kind in covered.kinds}
    assert (kinds["attention"].weights, kinds["MLP"].with_lora) == (64, 48)
    assert kinds["unembedding"].parameters == 0
    assert [finding.code for finding in covered.findings] == ["tied"]
    assert covered.memory["lora"].gigabytes < covered.memory["fullft"].gigabytes


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64}
HYBRID = {"num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
HYBRID |= {"num_experts": 4, "shared_expert_intermediate_size": 24, "linear_num_value_heads": 4}
HYBRID |= {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "model_type": "qwen3_next"}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 99, "hidden_size": 64}


@pytest.mark.parametrize(
    ("config", "placement", "message"),
    [
        (GPT2, "all", "GPT2LMHeadModel has no layer for placement 'all'"),
        (SIZES | {"model_type": "phi"}, "attn", "no LoRA, since placement 'attn' does not know their names: dense"),
        # PEFT takes the names of the shared experts for those of the fused ones.
        (SIZES | HYBRID, "all", "PEFT did not put LoRA on the requested layers of Qwen3NextForCausalLM"),
        (SIZES | HYBRID, "attn", None),
    ],
)
def test_a_model_that_training_refuses_is_an_error(config, placement, message, tmp_path: Path):
    shutil.copytree(shipped_folder("llama-64"), tmp_path / "model")
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(app, ["check", str(tmp_path / "model"), "--placement", placement, "--json"])
    assert result.exit_code == (1 if message else 0)
    found = json.loads(result.stdout)["findings"]
    errors = [(finding["code"], finding["message"]) for finding in found if finding["level"] == "error"]
    if message is None:
        assert errors == []
        return
    assert [code for code, _ in errors] == ["placement"]
    assert message in errors[0][1]
    if config is GPT2:
        assert "(c_attn, c_fc, c_proj, lm_head)" in found[1]["message"]


def test_transformers_may_not_know_a_model(tmp_path: Path):
    shutil.copytree(shipped_folder("llama-64"), tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "unheard"}))
    covered = coverage(find_model(str(tmp_path / "model")), "all", 4, "H100-80GB")
    assert covered.names_from.startswith("the dimensions, since transformers can't build it")
    assert covered.lora_parameters == find_model("llama-64").lora_parameters(4)


def test_many_layers_are_counted_by_their_dimensions(tmp_path: Path):
    shutil.copytree(shipped_folder("llama-64"), tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1000}))
    covered = coverage(find_model(str(tmp_path / "model")), "all", 4, "H100-80GB")
    assert covered.names_from == "the dimensions, since it has more than 256 layers"
