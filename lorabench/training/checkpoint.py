"""Checkpoints of a run in progress: trained parameters, Adam's state, and the curve so far.

Safetensors with a JSON header, replaced atomically; no pickle. A run has no other state: the data
order follows from the seed and the step, and models have no dropout.

Of a model that is sharded over processes each writes its part. The first process's file is the checkpoint: its header
says at which step and of how many parts it is, and it takes the old one's place when the other parts are there, so that
parts of two steps never meet. Any number of processes can read it.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.records import atomic_path
from lorabench.training.distributed import ALONE, Processes, local, placed, whole

if TYPE_CHECKING:
    import torch


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    processes: Processes = ALONE,
) -> None:
    """Write parameters, optimizer state and `progress` (plain JSON data with the `step`), whole or not at all."""
    from safetensors.torch import save_file

    tensors = {}
    for name, parameter in trainable(model).items():
        tensors[f"parameter/{name}"] = local(parameter.detach()).contiguous()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = local(value).contiguous()
    count = processes.count if processes.sharded else 1
    parts = _parts(path, progress["step"], count)
    if processes.first:
        with atomic_path(path) as partial:
            save_file(tensors, partial, metadata={"progress": json.dumps(progress), "parts": str(count)})
            processes.wait()
        for old in set(path.parent.glob(f"{path.stem}.*{path.suffix}")).difference(parts):
            old.unlink()
        return
    if processes.sharded:
        with atomic_path(parts[processes.rank]) as partial:
            save_file(tensors, partial)
    processes.wait()


def load_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore parameters and optimizer state in place; returns what was saved as `progress`."""
    import torch
    from safetensors import safe_open

    with ExitStack() as opened, torch.no_grad():
        first = opened.enter_context(safe_open(path, framework="pt"))
        header = first.metadata()
        progress: dict[str, Any] = json.loads(header["progress"])
        others = _parts(path, progress["step"], int(header.get("parts", 1)))[1:]
        files = [first, *(opened.enter_context(safe_open(part, framework="pt")) for part in others)]
        names = set(first.keys())

        def read(name: str, parameter: torch.Tensor) -> torch.Tensor:
            parts: list[torch.Tensor] = [file.get_tensor(name) for file in files]
            if parts[0].ndim == 0:
                # Adam's step count, which is on the CPU unless it is fused on a GPU.
                return parts[0].to(parameter.device)
            return placed(torch.cat(parts), parameter)

        for name, parameter in trainable(model).items():
            parameter.copy_(read(f"parameter/{name}", parameter))
            optimizer.state[parameter] = {
                key: read(f"{key}/{name}", parameter)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}/{name}" in names
            }
    return progress


def whole_weights(model: torch.nn.Module, processes: Processes) -> dict[str, torch.Tensor]:
    """What was trained of a sharded model, put together on the CPU of the first process; empty in the others."""
    gathered = {}
    for name, parameter in trainable(model).items():
        tensor = whole(parameter.detach())
        if processes.first:
            gathered[name] = tensor.cpu()
    return gathered


def _parts(path: Path, step: int, count: int) -> list[Path]:
    """The files of a checkpoint, the first process's first."""
    others = [path.with_name(f"{path.stem}.{step}.{rank}-of-{count}{path.suffix}") for rank in range(1, count)]
    return [path, *others]
