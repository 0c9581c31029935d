"""Small adapters in the files that PEFT writes: made of arrays, which tests change, and of shipped bases."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

Write = Callable[..., Path]
LAYER = "base_model.model.model.layers"
SHIPPED = Path(__file__).parents[3] / "lorabench/models/shipped"


def factors(d_in: int = 12, d_out: int = 10, rank: int = 4) -> dict[str, np.ndarray]:
    """Return A and B of q_proj and v_proj in two layers."""
    rng, tensors = np.random.default_rng(0), {}
    for layer in (0, 1):
        for name in ("q_proj", "v_proj"):
            stem = f"{LAYER}.{layer}.self_attn.{name}"
            a = rng.uniform(-1, 1, (rank, d_in)) / np.sqrt(d_in)
            tensors[f"{stem}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = rng.normal(size=(d_out, rank)).astype(np.float32)
    return tensors


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes an adapter and returns its folder."""

    def write(tensors: dict[str, np.ndarray], **changes: Any) -> Path:
        config = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 4, "lora_alpha": 8}
        config |= {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": True} | changes
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        return tmp_path

    return write


def load(name: str) -> Any:
    """Return a model of a folder or of a shipped base, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(SHIPPED / name, dtype=torch.float32).eval()


def save_adapter(model: Any, folder: Path, std: float = 0.02) -> Path:
    """Put LoRA with random B on a model, save it as PEFT does, and return its folder; the model stays as it was."""
    import torch
    from peft import LoraConfig, get_peft_model

    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if "Moe" in type(model).__name__ else None
    names = [name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    config = LoraConfig(r=8, lora_alpha=32, target_modules=sorted({*names} - {"gate"}), target_parameters=stacks)
    torch.manual_seed(0)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=std)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    adapted.unload()
    return folder


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that returns the folder of an adapter of a shipped base."""

    @cache
    def make(name: str, std: float = 0.02) -> Path:
        return save_adapter(load(name), tmp_path_factory.mktemp(name), std)

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short text to compare on."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text("Question: What is 12 + 30?\nAnswer: 12 + 30 is 42, since 2 + 0 is 2 and 1 + 3 is 4.\n" * 2)
    return path
