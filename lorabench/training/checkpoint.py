"""The checkpoint file of a run in progress: trained parameters, Adam's state, and the curve so far.

A checkpoint is a safetensors file with a checksum, replaced atomically. The curve is JSON in one of its tensors, since
safetensors allows no header above 100 MB. A run has no other state: the data order follows from the seed and the step,
and models have no dropout.

If a model is sharded over processes, each process writes its part. The file of the first process is the checkpoint: its
header has the step and the number of parts, and it replaces the old checkpoint when all other parts are written, so
that parts of two steps are never mixed. Any number of processes can read it, one tensor at a time; as many as wrote it
read their own parts only.

A checkpoint that is damaged or belongs to another run is ignored with a warning: the run starts again from step 1.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from lorabench.runs import PROTOCOL_VERSION
from lorabench.training.distributed import SINGLE_PROCESS, Processes, local_part
from lorabench.utils import signals
from lorabench.utils.checked_tensors import (
    DamagedTensorsError,
    open_tensors,
    read_header,
    verify_tensors,
    write_tensors,
)
from lorabench.utils.files import atomic_path


class Checkpoint:
    """The checkpoint of one run: decides when the run saves, and writes and reads the file.

    With 0 `seconds`, the least time between two checkpoints, the run saves after every step, whatever it costs.
    """

    def __init__(self, path: Path, run_id: str, seconds: float, processes: Processes = SINGLE_PROCESS) -> None:
        self._path, self._run_id, self._seconds, self._processes = path, run_id, seconds, processes
        self._owner = {"run_id": run_id, "protocol_version": str(PROTOCOL_VERSION)}
        self._saved, self._cost = time.perf_counter(), 0.0

    def due(self) -> bool:
        """Return whether the run saves now: after some time, or because a signal has asked the job to end."""
        # Saving takes 2% of the time at most.
        interval = max(self._seconds, 50 * self._cost) if self._seconds else 0.0
        return self._processes.any(signals.requested() or time.perf_counter() - self._saved >= interval)

    def save(
        self, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, progress: dict[str, Any]
    ) -> None:
        """Write weights, optimizer state and `progress` (JSON data with the key `step`); Stopped after a signal."""
        started, path, processes = time.perf_counter(), self._path, self._processes
        tensors = {}
        for name, parameter in parameters.items():
            for key, value in {"parameter": parameter.detach(), **optimizer.state[parameter]}.items():
                tensors[f"{key}/{name}"] = local_part(value)
        parts = _parts(path, progress["step"], processes.count)
        about = {"step": str(progress["step"]), "parts": str(processes.count)} if processes.first else {}
        if processes.first:
            tensors["progress"] = torch.frombuffer(bytearray(json.dumps(progress), "ascii"), dtype=torch.uint8)
        with atomic_path(parts[processes.rank]) as partial:
            write_tensors(partial, tensors, self._owner | about)
            if processes.first:
                # The file of the first process replaces the old one last.
                processes.wait()
        if processes.first:
            for old in set(path.parent.glob(f"{path.stem}.*{path.suffix}")).difference(parts):
                old.unlink()
        else:
            processes.wait()
        self._saved = time.perf_counter()
        self._cost = self._saved - started
        if processes.any(signals.requested()):
            signals.raise_stopped()

    def load(
        self, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> dict[str, Any] | None:
        """Restore weights and optimizer state in place and return the saved `progress`, in all processes together.

        It changes nothing and returns None if there is no checkpoint, or none that can be used, with a warning.
        """
        path, processes = self._path, self._processes
        if not processes.any(path.exists()):
            return None
        progress: dict[str, Any] | None = None
        reason = f"{path} can't be used by another process"
        try:
            about = read_header(path)
            if not about.items() >= self._owner.items():
                owner = f"run {about.get('run_id')}, protocol {about.get('protocol_version')}"
                raise DamagedTensorsError(f"{path} is of {owner}")
            parts = _parts(path, int(about["step"]), int(about["parts"]))
            # Each part is verified by one process.
            for part in parts[processes.rank :: processes.count]:
                if not verify_tensors(part).items() >= self._owner.items():
                    raise DamagedTensorsError(f"{part} is of another run")
            with open_tensors(path, "numpy") as file:
                progress = json.loads(file.get_tensor("progress").tobytes())
        except (DamagedTensorsError, KeyError, ValueError) as error:
            reason = str(error) if isinstance(error, DamagedTensorsError) else f"{path} is damaged (its header)"
        with ExitStack() as opened:
            if processes.any(progress is None):
                progress = None
            else:
                files = [opened.enter_context(open_tensors(part)) for part in parts]
                saved, shapes = set(files[0].keys()), {}
                for key in saved:
                    kind, _, name = key.partition("/")
                    if kind == "parameter":
                        # Its rows are spread over the files.
                        rows = [file.get_slice(key).get_shape() for file in files]
                        shapes[name] = (
                            tuple(rows[0]) if len(rows) == 1 else (sum(part[0] for part in rows), *rows[0][1:])
                        )
                if shapes != {name: tuple(parameter.shape) for name, parameter in parameters.items()}:
                    progress, reason = None, f"{path} is of a model with other parameters"
            if progress is None:
                if processes.first:
                    logging.warning("run %s starts again from step 1: checkpoint %s", self._run_id, reason)
                return None
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(_tensor(files, f"parameter/{name}", parameter, processes))
                    for key in ("step", "exp_avg", "exp_avg_sq"):
                        if f"{key}/{name}" in saved:
                            optimizer.state[parameter][key] = _tensor(files, f"{key}/{name}", parameter, processes)
        if processes.first:
            logging.info("run %s goes on after step %d", self._run_id, progress["step"])
        return progress


def _tensor(files: list[Any], key: str, like: torch.Tensor, processes: Processes) -> torch.Tensor:
    """Return a saved tensor, on the device of `like` and sharded as it is; numbers are not sharded."""
    if not files[0].get_slice(key).get_shape():
        # This is Adam's step count, which is on the CPU unless Adam is fused on a GPU.
        number: torch.Tensor = files[0].get_tensor(key)
        return number.to(like.device)
    if processes.count > 1 and len(files) == processes.count:
        own = files[processes.rank].get_tensor(key)
        if own.shape == local_part(like).shape:
            result = torch.empty_like(like)
            local_part(result).copy_(own)
            return result
    whole = torch.cat([file.get_tensor(key) for file in files]).to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return whole


def _parts(path: Path, step: int, count: int) -> list[Path]:
    """Return the files of a checkpoint, that of the first process first."""
    others = [path.with_name(f"{path.stem}.{step}.{rank}-of-{count}{path.suffix}") for rank in range(1, count)]
    return [path, *others]
