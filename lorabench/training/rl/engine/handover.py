"""The files by which a policy is handed over to vLLM: an adapter in PEFT's format, or all weights of a model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lorabench.models.lanes.shelf import Lane
from lorabench.training.distributed import full_tensor

_PREFIX = "base_model.model."
UNEMBEDDING = "lm_head.weight"
"""Name of the unembedding in all models that this project trains."""


def adapter_tensors(lane: Lane) -> dict[str, torch.Tensor]:
    """Return A and B of each layer of a lane, on the CPU, by PEFT's names. Every process must call this."""
    return {
        name.replace(".default.", "."): full_tensor(place.of(place.parameter).detach()).cpu().contiguous()
        for name, place in lane.places.items()
    }


def write_adapter(tensors: dict[str, torch.Tensor], rank: int, alpha: float, folder: Path) -> None:
    """Write a lane's adapter into a new folder."""
    modules = {name.removeprefix(_PREFIX).rsplit(".", 2)[0].rsplit(".", 1)[-1] for name in tensors}
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(modules),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


def model_tensors(model: torch.nn.Module, dtype: torch.dtype, keep: bool = True) -> dict[str, torch.Tensor]:
    """Return all weights of a model on the CPU, in the type in which its products are computed.

    Training computes with weights in this type too, so none is rounded that training does not round. A tied unembedding
    becomes a weight of its own, since vLLM does not renew tied ones. Every process must call this.

    Args:
        keep: whether to return the weights; a process that does not need them only helps to gather sharded ones.
    """
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    tensors = {}
    for name, parameter in (*model.named_parameters(), (UNEMBEDDING, output.weight)):
        whole = full_tensor(parameter.detach())
        if keep:
            tensors[name] = whole.to("cpu", dtype, copy=True).contiguous()
    return tensors


def write_model(tensors: dict[str, torch.Tensor], config: Any, folder: Path) -> None:
    """Write a model's folder, or renew the weights of one that is there."""
    folder.mkdir(exist_ok=True)
    untied = config.to_dict() | {"tie_word_embeddings": False, "architectures": config.architectures}
    (folder / "config.json").write_text(json.dumps(untied, default=str))
    new = folder / "model.safetensors.new"
    save_file(tensors, new, {"format": "pt"})
    os.replace(new, folder / "model.safetensors")
