"""Whether PEFT trains the experts that the audit says it trains, on models without weights."""

import json
import warnings

import pytest
from lora_advice.audit.config import TrainingConfig
from lora_advice.audit.structure import adapted, check_layers, trained_parameters
from lora_advice.models import facts

pytestmark = pytest.mark.slow

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
SIZES = dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4)
SIZES |= dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_experts_per_tok"), 2)
SIZES |= dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "bos_token_id", "eos_token_id"), 1)
SIZES |= dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 24)
SIZES |= {"hidden_size": 32, "head_dim": 16, "vocab_size": 64, "pad_token_id": 0}


def said(run, folder):
    """Return the levels of the findings about experts, and the number of parameters that are counted, if they are."""
    model = facts(run.model, folder)
    levels = [finding.level for finding in check_layers(run, model) if finding.code == "experts"]
    counted = trained_parameters(run, model, adapted(run, model))
    return levels, None if counted is None else sum(counted.values())


def trained(family: str, folder, **lora: object) -> dict[str, int]:
    """Return by name the number of trained parameters of a tiny model, whose configuration is written to the folder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[family]()
    config = CONFIG_MAPPING[family](**{name: size for name, size in SIZES.items() if hasattr(config, name)})
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=2, **lora))
    return {name: weight.numel() for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("qwen3_moe", (*ATTENTION, *MLP)),
        ("qwen3_moe", ATTENTION),
        ("qwen3_moe", ("all-linear",)),
        ("mixtral", (*ATTENTION, "w1", "w2", "w3")),
        ("mixtral", (*ATTENTION, *MLP)),
        ("gpt_oss", ("all-linear",)),
        ("qwen2_moe", (*ATTENTION, *MLP)),
    ],
)
def test_experts_are_trained_as_is_said(family, targets, tmp_path):
    asked = "all-linear" if "all-linear" in targets else list(targets)
    run = TrainingConfig(str(tmp_path / "a.yaml"), "trl", method="lora", rank=2, targets=targets)
    weights = trained(family, tmp_path, target_modules=asked)
    reached = any(".experts." in name for name in weights)
    levels, counted = said(run, tmp_path)
    assert (levels == []) == reached
    if counted is not None and asked != "all-linear":
        assert counted == sum(weights.values())


def test_half_of_a_fused_parameter_is_refused(tmp_path):
    targets = (*ATTENTION, "gate_proj")
    with pytest.raises(ValueError, match="Cannot convert PEFT target"):
        trained("qwen3_moe", tmp_path, target_modules=list(targets))
    run = TrainingConfig(str(tmp_path / "a.yaml"), "trl", method="lora", rank=2, targets=targets)
    assert said(run, tmp_path)[0] == ["error"]
