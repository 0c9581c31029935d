"""The checkpoint file of a run in progress: trained parameters, Adam's state, and the curve so far.

A checkpoint is a safetensors file with a checksum and a JSON header, replaced atomically; nothing is pickled. A run has
no other state: the data order follows from the seed and the step, and models have no dropout.

If a model is sharded over processes, each process writes its part. The file of the first process is the checkpoint: its
header has the step and the number of parts, and it replaces the old checkpoint when all other parts are written, so
that parts of two steps are never mixed. Any number of processes can read it; as many as wrote it read their own parts
only. Tensors are written and read one by one, so that the host's memory never holds a whole model with Adam's state.

A checkpoint that is damaged or belongs to another run is ignored with a warning: the run starts again from step 1.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorabench.models.lanes.shelf import Lane, trained_parameters
from lorabench.runs import PROTOCOL_VERSION
from lorabench.training.distributed import SINGLE_PROCESS, Processes, full_tensor, local_part, sharded_like
from lorabench.utils.checked_tensors import (
    DamagedTensorsError,
    open_tensors,
    read_header,
    verify_tensors,
    write_tensors,
)
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
            tensors[f"{key}/{name}"] = value if value.ndim == 0 else place.of(local_part(value))
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

    if not processes.any(path.exists()):
        return None
    verified, reason = _verify(path, run_id, processes)
    with ExitStack() as opened:
        files = [opened.enter_context(open_tensors(part, "pt")) for part in verified.parts] if verified else []
        if verified and _shapes(files) != {name: tuple(place.shape) for name, place in lane.places.items()}:
            verified, reason = None, f"{path} is of a model with other parameters"
        if verified is None:
            if processes.first:
                logging.warning("run %s starts again from step 1: checkpoint %s", run_id, reason)
            return None
        present = set(files[0].keys())
        with torch.no_grad():
            for name, place in lane.places.items():
                parameter = place.parameter
                weight = place.of(parameter.detach())
                weight.copy_(_tensor(files, f"parameter/{name}", weight, processes))
                state = optimizer.state[parameter]
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{key}/{name}" not in present:
                        continue
                    tensor = _tensor(files, f"{key}/{name}", weight, processes)
                    if tensor.ndim == 0 or place.start is None:
                        state[key] = tensor
                    else:
                        place.of(state.setdefault(key, torch.zeros_like(parameter))).copy_(tensor)
    if processes.first:
        logging.info("run %s goes on after step %d", run_id, verified.progress["step"])
    return verified.progress


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


def usable_position(path: Path, run_id: str, processes: Processes = SINGLE_PROCESS) -> Position:
    """Return the position of a run's checkpoint after verifying all of it; that of the start if it cannot be used."""
    verified, _ = _verify(path, run_id, processes)
    return START if verified is None else Position.of(verified.progress)


@dataclass(frozen=True)
class _Verified:
    """A checkpoint that can be used: its files, and its progress."""

    parts: list[Path]
    progress: dict[str, Any]


def _verify(path: Path, run_id: str, processes: Processes) -> tuple[_Verified | None, str]:
    """Verify the parts of a checkpoint, each by one process. If it cannot be used, the text says why.

    Every process must call this, and all return a checkpoint or none does.
    """
    verified, reason = None, f"{path} can't be used by another process"
    try:
        about = read_header(path)
        if not about.items() >= _owner(run_id).items():
            owner = f"run {about.get('run_id')}, protocol {about.get('protocol_version')}"
            raise DamagedTensorsError(f"{path} is of {owner}")
        progress: dict[str, Any] = json.loads(about["progress"])
        parts = _parts(path, progress["step"], int(about["parts"]))
        for part in parts[processes.rank :: processes.count]:
            if not verify_tensors(part).items() >= _owner(run_id).items():
                raise DamagedTensorsError(f"{part} is of another run")
        verified = _Verified(parts, progress)
    except (DamagedTensorsError, KeyError, ValueError) as error:
        reason = str(error) if isinstance(error, DamagedTensorsError) else f"{path} is damaged (its header)"
    return (None if processes.any(verified is None) else verified), reason


def _shapes(files: list[Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter, whose rows are spread over the files."""
    shapes = {}
    for key in files[0].keys():  # noqa: SIM118
        kind, _, name = key.partition("/")
        if kind == "parameter":
            parts = [file.get_slice(key).get_shape() for file in files]
            whole = parts[0] if len(parts) == 1 else [sum(part[0] for part in parts), *parts[0][1:]]
            shapes[name] = tuple(whole)
    return shapes


def _tensor(files: list[Any], key: str, like: torch.Tensor, processes: Processes) -> torch.Tensor:
    """Return a saved tensor, on the device of `like` and sharded as it is; numbers are not sharded."""
    import torch

    if not files[0].get_slice(key).get_shape():
        # This is Adam's step count, which is on the CPU unless Adam is fused on a GPU.
        number: torch.Tensor = files[0].get_tensor(key)
        return number.to(like.device)
    if processes.sharded and len(files) == processes.count:
        own = files[processes.rank].get_tensor(key)
        if own.shape == local_part(like).shape:
            result = torch.empty_like(like)
            local_part(result).copy_(own)
            return result
    return sharded_like(torch.cat([file.get_tensor(key) for file in files]), like)


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
