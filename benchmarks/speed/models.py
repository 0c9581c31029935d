"""The models that are measured, and the number formats they are trained in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from lorabench.config.inputs import GgufModel, ModelSpec, TinyModel
from lorabench.config.loading import load_preset
from lorabench.models.base import converted_folder, load_model

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

SMOLLM2, ONE_B = "smollm2-135m", "llama-1b"
# The sizes of Llama-3.2-1B. The weights are random: a step takes as long, and nothing has to be downloaded.
_ONE_B = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


def spec_of(model: str) -> ModelSpec:
    """Return the specification of a model by its name: that of the preset `smollm2`, or of a tiny base."""
    if model == SMOLLM2:
        return load_preset("smollm2").models[model]
    return TinyModel.model_validate({"kind": "tiny", "name": model})


def is_there(model: str) -> bool:
    """Return whether a model's files are on this machine."""
    if model == ONE_B:
        return True
    spec = spec_of(model)
    return not isinstance(spec, GgufModel) or (converted_folder(spec) / "model.safetensors").is_file()


def loaded(model: str, device: torch.device) -> Any:
    """Load a model by its name, with fp32 weights."""
    if model != ONE_B:
        return load_model(spec_of(model)).to(device)
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**_ONE_B)).train()


def preset_entry(model: str) -> dict[str, Any]:
    """Return the entry of a model for a preset that is used in another folder.

    Raises:
        SystemExit: its files are not on this machine.
    """
    spec = spec_of(model)
    if not isinstance(spec, GgufModel):
        return spec.model_dump()
    if not is_there(model):
        raise SystemExit(f"{model} is not here; `lorabench step convert {model}` gets it")
    folder = str(Path(converted_folder(spec)).resolve())
    return {"kind": "path", "path": folder, "parameters": spec.parameters, "hidden_size": spec.hidden_size}


def done(device: torch.device) -> None:
    """Wait until a device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
