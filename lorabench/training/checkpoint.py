"""Checkpoints of a run in progress: trained parameters, Adam's state, and the curve so far.

Safetensors with a checksum and a JSON header, replaced atomically; no pickle. A run has no other state: the data
order follows from the seed and the step, and models have no dropout.

A checkpoint that is damaged or another run's is worth nothing, and no reason to fail: the run starts anew.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.plan import PROTOCOL_VERSION
from lorabench.tensors import DamagedError, read_tensors, write_tensors

if TYPE_CHECKING:
    import torch


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(
    path: Path, run_id: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> None:
    """Write parameters, optimizer state and `progress` (plain JSON data), whole or not at all."""
    tensors = {}
    for name, parameter in trainable(model).items():
        tensors[f"parameter/{name}"] = parameter.detach().contiguous()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = value.contiguous()
    write_tensors(path, tensors, {**_owner(run_id), "progress": json.dumps(progress)})


def load_checkpoint(
    path: Path, run_id: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Restore parameters and optimizer state in place; returns what was saved as `progress`.

    None, with nothing touched, if there is no checkpoint, or none that can be used: then the log says why.
    """
    import torch

    if not path.exists():
        return None
    parameters = trainable(model)
    try:
        tensors, about = read_tensors(path, "pt")
        if {key: about.get(key) for key in _owner(run_id)} != _owner(run_id):
            raise DamagedError(f"{path} is of run {about.get('run_id')}, protocol {about.get('protocol_version')}")
        there = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("parameter/")}
        if there != {f"parameter/{name}": parameter.shape for name, parameter in parameters.items()}:
            raise DamagedError(f"{path} is of a model with other parameters")
    except DamagedError as error:
        logging.warning("run %s starts anew: checkpoint %s", run_id, error)
        return None
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            optimizer.state[parameter] = {
                # Adam keeps its step count on the CPU unless it is fused on a GPU.
                key: tensors[f"{key}/{name}"].to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}/{name}" in tensors
            }
    progress: dict[str, Any] = json.loads(about["progress"])
    logging.info("run %s goes on after step %d", run_id, progress["step"])
    return progress


def _owner(run_id: str) -> dict[str, str]:
    """Whose checkpoint it is."""
    return {"run_id": run_id, "protocol_version": str(PROTOCOL_VERSION)}
