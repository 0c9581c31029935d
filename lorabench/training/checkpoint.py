"""Checkpoints of a run in progress: trained parameters, Adam's state, and the curve so far.

Safetensors with a JSON header, replaced atomically; no pickle. A run has no other state: the data
order follows from the seed and the step, and models have no dropout.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.records import atomic_path

if TYPE_CHECKING:
    import torch


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> None:
    """Write parameters, optimizer state and `progress` (plain JSON data), whole or not at all."""
    from safetensors.torch import save_file

    tensors = {}
    for name, parameter in trainable(model).items():
        tensors[f"parameter/{name}"] = parameter.detach().contiguous()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = value.contiguous()
    with atomic_path(path) as partial:
        save_file(tensors, partial, metadata={"progress": json.dumps(progress)})


def load_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore parameters and optimizer state in place; returns what was saved as `progress`."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file, torch.no_grad():
        progress: dict[str, Any] = json.loads(file.metadata()["progress"])
        names = set(file.keys())
        for name, parameter in trainable(model).items():
            parameter.copy_(file.get_tensor(f"parameter/{name}"))
            optimizer.state[parameter] = {
                # Adam keeps its step count on the CPU unless it is fused on a GPU.
                key: file.get_tensor(f"{key}/{name}").to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}/{name}" in names
            }
    return progress
