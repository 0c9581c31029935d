"""A small adapter in the files that PEFT writes, which tests change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

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
