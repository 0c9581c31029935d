"""Merging keeps what an adapter computes within rounding, and what does not is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from lora_advice.check.adapter import read_adapter
from lora_advice.check.merging import check_merging, probe
from lora_advice.cli import app
from lora_advice.errors import UserError
from lora_advice.user_model import find_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from .conftest import SHIPPED, load, save_adapter


def merging(name: str, adapter: Path, text: Path, dtypes=("fp32",), own: Path | None = None):
    return check_merging(probe(find_model(str(SHIPPED / name)), adapter, text), dtypes, own)


def levels(result) -> list[tuple[str, str]]:
    return [(finding.code, finding.level) for finding in result.findings]


@pytest.mark.parametrize("name", ["llama-64", "moe-128"])
def test_a_merged_model_differs_by_rounding_alone(name, adapters, text):
    result = merging(name, adapters(name), text, ("fp32", "bf16"))
    exact, rounded = result.merged
    assert result.findings == ()
    assert result.effect.mean > 0.1
    assert exact.difference.largest < 1e-4
    assert exact.difference.mean < 1e-5
    assert exact.kept == pytest.approx(1, abs=1e-5)
    # Logits of the mixture of experts move twice as far as those of its base, merged or not.
    assert 100 * exact.difference.mean < rounded.difference.mean < 2 * rounded.rounding.mean
    assert exact.same
    assert rounded.same
    assert rounded.nll == pytest.approx(result.adapter_nll, abs=0.05)
    assert "within the rounding of bf16" in rounded.verdict


def test_peft_gets_no_regular_expression_that_would_take_years(adapters, text, tmp_path):
    folder = Path(shutil.copytree(adapters("llama-64"), tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"exclude_modules": r"(\w+\.?)+!"}))
    assert read_adapter(folder).findings == ()
    with pytest.raises(UserError, match=r"^the regular expression .* takes longer than 1 s on \d+ names of modules$"):
        probe(find_model(str(SHIPPED / "llama-64")), folder, text)


def test_what_would_take_all_memory_is_refused(adapters, text, tmp_path):
    folder = Path(shutil.copytree(adapters("llama-64"), tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {"embed_tokens": 60_000}}))
    with pytest.raises(UserError, match=r"has rank 60,000; allowed: up to 512, 8 times the width$"):
        probe(find_model(str(SHIPPED / "llama-64")), folder, text)
    model = shutil.copytree(SHIPPED / "llama-64", tmp_path / "model")
    large = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 1000}
    (model / "config.json").write_text(json.dumps(large))
    with pytest.raises(UserError, match=r"has a config.json for [\d,]+ parameters and files with [\d,]+; allowed"):
        probe(find_model(str(model)), adapters("llama-64"), text)
    with pytest.raises(UserError, match="allowed: 16 times"):
        merging("llama-64", adapters("llama-64"), text, (), model)


def test_what_peft_does_not_foresee_is_one_sentence(adapters, text, tmp_path):
    for number, (key, value) in enumerate((("arrow_config", 1), ("task_type", "-1"))):
        folder = Path(shutil.copytree(adapters("llama-64"), tmp_path / str(number)))
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match=r"^adapter .* does not fit the model: [^\n]+$"):
            probe(find_model(str(SHIPPED / "llama-64")), folder, text)


def test_the_numbers_are_those_of_the_definitions(adapters, text):
    probed = probe(find_model(str(SHIPPED / "llama-64")), adapters("llama-64"), text)
    with torch.no_grad():
        model = load("llama-64")
        ids = probed.ids[None]
        base_nll = model(ids, labels=ids).loss
        with_adapter = PeftModel.from_pretrained(model, adapters("llama-64"))(ids, labels=ids)
        result = check_merging(probed, ())
    assert result.base_nll == pytest.approx(base_nll.item(), rel=1e-5)
    assert result.adapter_nll == pytest.approx(with_adapter.loss.item(), rel=1e-5)
    p, q = (torch.distributions.Categorical(logits=part) for part in (probed.base_logits, probed.adapter_logits))
    assert result.effect.kl == pytest.approx(torch.distributions.kl_divergence(p, q).mean().item(), rel=1e-3)
    assert result.effect.largest == pytest.approx((with_adapter.logits[0] - probed.base_logits).abs().max().item())


def test_a_model_that_was_merged_at_half_the_scale_is_caught(adapters, text, tmp_path):
    adapter = adapters("llama-64")
    for name, scale in (("right", 1.0), ("wrong", 0.5)):
        model = PeftModel.from_pretrained(load("llama-64"), adapter)
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", scale)
        model.merge_and_unload().bfloat16().save_pretrained(tmp_path / name)
    [right] = merging("llama-64", adapter, text, (), tmp_path / "right").merged
    wrong = merging("llama-64", adapter, text, (), tmp_path / "wrong")
    assert right.same
    assert right.dtype == "bf16"
    assert levels(wrong) == [("merged", "error")]
    assert "NOT the same" in wrong.findings[0].message
    assert 0.3 < wrong.merged[0].kept < 0.8


def test_an_update_that_bf16_rounds_away_is_caught(adapters, text):
    """The shipped weights are exact in bf16, so that a small update does not reach the next number."""
    result = merging("llama-64", adapters("llama-64", 1e-5), text, ("fp32", "bf16"))
    exact, rounded = result.merged
    assert exact.same
    assert exact.kept == pytest.approx(1, abs=0.05)
    assert abs(rounded.kept - 1) > 0.2
    assert levels(result) == [("merged", "warning")]
    assert "NOT the adapter's effect" in rounded.verdict


def test_keys_that_match_no_module_are_caught(adapters, text, tmp_path):
    folder = shutil.copytree(adapters("llama-64"), tmp_path / "more")
    tensors = load_file(folder / "adapter_model.safetensors")
    extra = {k.replace("layers.2.", "layers.7."): v.clone() for k, v in tensors.items() if "layers.2.mlp.up" in k}
    save_file(tensors | extra, folder / "adapter_model.safetensors")
    result = merging("llama-64", folder, text)
    assert levels(result) == [("ignored", "error")]
    assert "2 weights" in result.findings[0].message
    assert "layers.7.mlp.up_proj.lora_A" in result.findings[0].message

    lacking = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up" not in name}
    save_file(lacking, folder / "adapter_model.safetensors")
    assert levels(merging("llama-64", folder, text)) == [("missing", "error")]


def test_another_models_adapter_is_refused(adapters, text):
    with pytest.raises(UserError, match=r"does not fit the model: .*size mismatch"):
        probe(find_model(str(SHIPPED / "qwen-128")), adapters("llama-64"), text)


def test_a_tied_matrix_that_merging_changes_is_caught(tmp_path, text):
    folder = tmp_path / "tied"
    shutil.copytree(SHIPPED / "llama-64", folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1024, tie_word_embeddings=True, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    adapter = save_adapter(model, tmp_path / "adapter", 0.2)
    result = merging(str(folder), adapter, text)
    assert levels(result) == [("tied", "error"), ("merged", "error")]
    assert "model.embed_tokens.weight" in result.findings[0].message


def trained_by_peft(folder: Path, **settings) -> Path:
    """Save an adapter of llama-64 with settings of PEFT's, each trained weight moved, and return its folder."""
    model = load("llama-64")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": {"embed_tokens": [1, 2]}}, {"use_dora": True}],
    ids=["whole module", "tokens", "DoRA"],
)
def test_what_peft_trains_beside_lora_may_change(tmp_path, text, settings):
    result = merging("llama-64", trained_by_peft(tmp_path, **settings), text)
    assert result.findings == ()
    assert result.merged[0].same
    assert {finding.level for finding in read_adapter(tmp_path).findings} <= {"note"}


def test_an_adapter_that_peft_can_not_merge_is_an_error(tmp_path, text):
    result = merging("llama-64", trained_by_peft(tmp_path, lora_bias=True), text)
    assert levels(result) == [("merged", "error")]
    assert "PEFT can't merge the adapter in fp32: Impossible to merge" in result.findings[0].message


def test_the_command_prints_all_of_it(adapters, text):
    arguments = ["check", str(adapters("llama-64")), "--model", str(SHIPPED / "llama-64"), "--text", str(text)]
    result = CliRunner().invoke(app, [*arguments, "--dtypes", "fp32", "--json"])
    assert result.exit_code == 0, result.output
    assert [row["dtype"] for row in json.loads(result.stdout)["merged"]] == ["fp32"]
    shown = CliRunner().invoke(app, [*arguments, "--dtypes", "fp32,bf16"])
    assert "the merged model in bf16 is the same as the adapter" in shown.stdout
    refused = CliRunner().invoke(app, [*arguments, "--dtypes", "int8"])
    assert refused.exit_code == 2


def test_nothing_is_computed_with_an_adapter_of_nan(adapters, tmp_path):
    folder = shutil.copytree(adapters("llama-64"), tmp_path / "broken")
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, folder / "adapter_model.safetensors")
    result = CliRunner().invoke(app, ["check", str(folder), "--model", str(SHIPPED / "llama-64")])
    assert result.exit_code == 1
    assert "error not-finite: 1 modules have weights that are NaN" in result.stdout
