"""Checkpoints of a run in progress: trained parameters, Adam's state, and the curve so far.

Safetensors with a checksum and a JSON header, replaced atomically; no pickle. A run has no other state: the data
order follows from the seed and the step, and models have no dropout.

Of a model that is sharded over processes each writes its part. The first process's file is the checkpoint: its header
says at which step and of how many parts it is, and it takes the old one's place when the other parts are there, so that
parts of two steps never meet. Any number of processes can read it.

A checkpoint that is damaged or another run's is worth nothing, and no reason to fail: the run starts anew.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.models.lanes import Lane, trained_parameters
from lorabench.plan import PROTOCOL_VERSION
from lorabench.records import atomic_path
from lorabench.tensors import DamagedError, read_header, read_tensors, write_tensors
from lorabench.training.distributed import ALONE, Processes, local, placed, whole

if TYPE_CHECKING:
    import torch


def save_checkpoint(
    path: Path,
    run_id: str,
    lane: Lane,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    processes: Processes = ALONE,
) -> None:
    """Write weights, optimizer state and `progress` (plain JSON data with the `step`), whole or not at all."""
    tensors = {}
    for name, place in lane.places.items():
        state = {"parameter": place.parameter.detach(), **optimizer.state[place.parameter]}
        for key, value in state.items():
            # Adam's step count is one number for all that is stepped at once.
            part = value if value.ndim == 0 else place.of(local(value))
            # On a shelf many weights are one tensor, which is not what safetensors writes.
            tensors[f"{key}/{name}"] = local(part).contiguous() if place.start is None else part.clone()
    count = processes.count if processes.sharded else 1
    parts = _parts(path, progress["step"], count)
    about = _owner(run_id)
    if processes.first:
        about |= {"progress": json.dumps(progress), "parts": str(count)}
        with atomic_path(path) as partial:
            write_tensors(partial, tensors, about)
            processes.wait()
        for old in set(path.parent.glob(f"{path.stem}.*{path.suffix}")).difference(parts):
            old.unlink()
        return
    if processes.sharded:
        with atomic_path(parts[processes.rank]) as partial:
            write_tensors(partial, tensors, about)
    processes.wait()


def load_checkpoint(
    path: Path,
    run_id: str,
    lane: Lane,
    optimizer: torch.optim.Optimizer,
    processes: Processes = ALONE,
) -> dict[str, Any] | None:
    """Restore weights and optimizer state in place; returns what was saved as `progress`.

    None, with nothing touched, if there is no checkpoint, or none that can be used: then the log says why.
    """
    import torch

    if not path.exists():
        return None
    try:
        parts, progress = _read(path, run_id)
        there = {name: _shape(parts, name) for name in parts[0] if name.startswith("parameter/")}
        if there != {f"parameter/{name}": tuple(place.shape) for name, place in lane.places.items()}:
            raise DamagedError(f"{path} is of a model with other parameters")
    except DamagedError as error:
        if processes.first:
            logging.warning("run %s starts anew: checkpoint %s", run_id, error)
        return None

    def read(name: str, like: torch.Tensor) -> torch.Tensor:
        tensors: list[torch.Tensor] = [part[name] for part in parts]
        if tensors[0].ndim == 0:
            # Adam's step count, which is on the CPU unless it is fused on a GPU.
            return tensors[0].to(like.device)
        return placed(torch.cat(tensors), like)

    with torch.no_grad():
        for name, place in lane.places.items():
            parameter = place.parameter
            weight = place.of(parameter.detach())
            weight.copy_(read(f"parameter/{name}", weight))
            state = optimizer.state[parameter]
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{key}/{name}" not in parts[0]:
                    continue
                tensor = read(f"{key}/{name}", weight)
                if tensor.ndim == 0 or place.start is None:
                    state[key] = tensor
                else:
                    place.of(state.setdefault(key, torch.zeros_like(parameter))).copy_(tensor)
    if processes.first:
        logging.info("run %s goes on after step %d", run_id, progress["step"])
    return progress


def checkpoint_step(path: Path) -> int:
    """The step that a checkpoint says it is of; 0 if there is none that can be read."""
    try:
        about = read_header(path)
    except DamagedError:
        return 0
    return int(json.loads(about.get("progress", '{"step": 0}'))["step"])


def usable_step(path: Path, run_id: str) -> int:
    """The step of a run's checkpoint, which is read to its end; 0 if there is none that can be used."""
    try:
        return int(_read(path, run_id)[1]["step"])
    except DamagedError:
        return 0


def _read(path: Path, run_id: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The tensors of each part of a checkpoint, and its progress.

    Raises:
        DamagedError: a part is missing, is not as it was written, or is another run's.
    """
    tensors, about = _read_part(path, run_id)
    progress: dict[str, Any] = json.loads(about["progress"])
    others = _parts(path, progress["step"], int(about["parts"]))[1:]
    return [tensors, *(_read_part(part, run_id)[0] for part in others)], progress


def _read_part(path: Path, run_id: str) -> tuple[dict[str, Any], dict[str, str]]:
    tensors, about = read_tensors(path, "pt")
    if not about.items() >= _owner(run_id).items():
        raise DamagedError(f"{path} is of run {about.get('run_id')}, protocol {about.get('protocol_version')}")
    return tensors, about


def _shape(parts: list[dict[str, Any]], name: str) -> tuple[int, ...]:
    """Shape of a parameter whose rows are spread over parts."""
    if len(parts) == 1:
        return tuple(parts[0][name].shape)
    return (sum(part[name].shape[0] for part in parts), *parts[0][name].shape[1:])


def whole_weights(model: torch.nn.Module, processes: Processes) -> dict[str, torch.Tensor]:
    """What was trained of a sharded model, put together on the CPU of the first process; empty in the others."""
    gathered = {}
    for name, parameter in trained_parameters(model).items():
        tensor = whole(parameter.detach())
        if processes.first:
            gathered[name] = tensor.cpu()
    return gathered


def _parts(path: Path, step: int, count: int) -> list[Path]:
    """The files of a checkpoint, the first process's first."""
    others = [path.with_name(f"{path.stem}.{step}.{rank}-of-{count}{path.suffix}") for rank in range(1, count)]
    return [path, *others]


def _owner(run_id: str) -> dict[str, str]:
    """Whose checkpoint it is."""
    return {"run_id": run_id, "protocol_version": str(PROTOCOL_VERSION)}
