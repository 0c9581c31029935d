"""Small adapters in the files that PEFT writes: made of arrays, which tests change, and of shipped bases."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from lorabench.config.fields import Placement
from lorabench.custom.model import find_model
from lorabench.models.base import load_model
from lorabench.models.lora import add_lora
from lorabench.models.passes import trained_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Write = Callable[..., Path]
LAYER = "base_model.model.model.layers"


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


def save_adapter(model: PreTrainedModel, folder: Path, std: float = 0.02, placement: Placement = "all") -> Path:
    """Put LoRA with random B on a base, save it as PEFT does, and return its folder; the base stays as it was."""
    adapted = add_lora(model, 8, placement, 32.0, True, seed=0)
    with torch.no_grad():
        for name, parameter in trained_parameters(adapted).items():
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
        folder = tmp_path_factory.mktemp(name)
        return save_adapter(load_model(find_model(name).spec), folder, std)

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short text to compare on."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text("Question: What is 12 + 30?\nAnswer: 12 + 30 is 42, since 2 + 0 is 2 and 1 + 3 is 4.\n" * 2)
    return path
