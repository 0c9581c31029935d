"""The checkpoint file of a run in progress: trained parameters, Adam's state, and the curve so far.

A checkpoint is a safetensors file with a checksum and a JSON header, replaced atomically; nothing is pickled. A run has
no other state: the data order follows from the seed and the step, and models have no dropout.

If a model is sharded over processes, each process writes its part. The file of the first process is the checkpoint: its
header has the step and the number of parts, and it replaces the old checkpoint when all other parts are written, so
that parts of two steps are never mixed. Any number of processes can read it.

A checkpoint that is damaged or belongs to another run is ignored with a warning: the run starts again from step 1.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorabench.models.lanes.shelf import Lane, trained_parameters
from lorabench.runs import PROTOCOL_VERSION
from lorabench.training.distributed import SINGLE_PROCESS, Processes, full_tensor, local_part, sharded_like
from lorabench.utils.checked_tensors import DamagedTensorsError, read_header, read_tensors, write_tensors
from lorabench.utils.files import atomic_path

if TYPE_CHECKING:
    import torch


def save_checkpoint(
    path: Path,
    run_id: str,
    lane: Lane,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    processes: Processes = SINGLE_PROCESS,
) -> None:
    """Write weights, optimizer state and `progress` (JSON data with the keys of a `Position`) atomically."""
    tensors = {}
    for name, place in lane.places.items():
        state = {"parameter": place.parameter.detach(), **optimizer.state[place.parameter]}
        for key, value in state.items():
            # Adam's step count is one number for a whole parameter.
            part = value if value.ndim == 0 else place.of(local_part(value))
            # On a shelf many weights are views of one tensor; safetensors refuses tensors that share memory.
            tensors[f"{key}/{name}"] = local_part(part).contiguous() if place.start is None else part.clone()
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
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, Any] | None:
    """Restore weights and optimizer state in place and return the saved `progress`.

    Returns None and changes nothing if there is no checkpoint, or none that can be used; a warning then names the
    reason.
    """
    import torch

    if not path.exists():
        return None
    try:
        parts, progress = _read(path, run_id)
        saved_shapes = {name: _shape(parts, name) for name in parts[0] if name.startswith("parameter/")}
        if saved_shapes != {f"parameter/{name}": tuple(place.shape) for name, place in lane.places.items()}:
            raise DamagedTensorsError(f"{path} is of a model with other parameters")
    except DamagedTensorsError as error:
        if processes.first:
            logging.warning("run %s starts again from step 1: checkpoint %s", run_id, error)
        return None

    def read(name: str, like: torch.Tensor) -> torch.Tensor:
        tensors: list[torch.Tensor] = [part[name] for part in parts]
        if tensors[0].ndim == 0:
            # This is Adam's step count, which is on the CPU unless Adam is fused on a GPU.
            return tensors[0].to(like.device)
        return sharded_like(torch.cat(tensors), like)

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


class Position(NamedTuple):
    """How far a checkpoint's run had come: its finished steps, and whether the evaluation after the last is done."""

    step: int
    evaluated: bool

    @classmethod
    def of(cls, progress: Mapping[str, Any]) -> Position:
        """Return the position in a checkpoint's progress."""
        return cls(int(progress["step"]), bool(progress.get("evaluated", True)))


START = Position(0, True)
"""The position of a run without a usable checkpoint."""


def checkpoint_position(path: Path) -> Position:
    """Return the position in a checkpoint's header; that of the start if the header cannot be read."""
    try:
        about = read_header(path)
    except DamagedTensorsError:
        return START
    return Position.of(json.loads(about["progress"])) if "progress" in about else START


def usable_position(path: Path, run_id: str) -> Position:
    """Return the position of a run's checkpoint after reading and verifying all of it; that of the start if it cannot
    be used."""
    try:
        return Position.of(_read(path, run_id)[1])
    except DamagedTensorsError:
        return START


def _read(path: Path, run_id: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Read the tensors of each part of a checkpoint, and its progress.

    Raises:
        DamagedTensorsError: a part is missing, damaged, or belongs to another run.
    """
    tensors, about = _read_part(path, run_id)
    progress: dict[str, Any] = json.loads(about["progress"])
    others = _parts(path, progress["step"], int(about["parts"]))[1:]
    return [tensors, *(_read_part(part, run_id)[0] for part in others)], progress


def _read_part(path: Path, run_id: str) -> tuple[dict[str, Any], dict[str, str]]:
    tensors, about = read_tensors(path, "pt")
    if not about.items() >= _owner(run_id).items():
        raise DamagedTensorsError(f"{path} is of run {about.get('run_id')}, protocol {about.get('protocol_version')}")
    return tensors, about


def _shape(parts: list[dict[str, Any]], name: str) -> tuple[int, ...]:
    """Return the shape of a parameter whose rows are spread over the parts."""
    if len(parts) == 1:
        return tuple(parts[0][name].shape)
    return (sum(part[name].shape[0] for part in parts), *parts[0][name].shape[1:])


def whole_weights(model: torch.nn.Module, processes: Processes) -> dict[str, torch.Tensor]:
    """Gather a sharded model's trained parameters on the CPU of the first process; other processes return nothing."""
    gathered = {}
    for name, parameter in trained_parameters(model).items():
        tensor = full_tensor(parameter.detach())
        if processes.first:
            gathered[name] = tensor.cpu()
    return gathered


def _parts(path: Path, step: int, count: int) -> list[Path]:
    """Return the files of a checkpoint, that of the first process first."""
    others = [path.with_name(f"{path.stem}.{step}.{rank}-of-{count}{path.suffix}") for rank in range(1, count)]
    return [path, *others]


def _owner(run_id: str) -> dict[str, str]:
    """Return the header fields that identify the run of a checkpoint."""
    return {"run_id": run_id, "protocol_version": str(PROTOCOL_VERSION)}
