"""The checkpoint file of a run in progress: trained parameters, Adam's state, and the curve so far.

A checkpoint is a safetensors file with a checksum, replaced atomically. The curve is JSON in one of its tensors, since
safetensors allows no header above 100 MB. A run has no other state: the data order follows from the seed and the step,
and models have no dropout.

If a model is sharded over processes, each process writes and reads its part, so as many processes go on as wrote it.
The file of the first process is the checkpoint: its header has the step, and it replaces the old checkpoint when all
other parts are written, so that parts of two steps are never mixed.

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

    def _part(self, step: str) -> Path:
        """Return this process's file of a checkpoint."""
        path, processes = self._path, self._processes
        if processes.first:
            return path
        return path.with_name(f"{path.stem}.{step}.{processes.rank}-of-{processes.count}{path.suffix}")

    def save(
        self, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, progress: dict[str, Any]
    ) -> None:
        """Write weights, optimizer state and `progress` (JSON data with the key `step`); Stopped after a signal."""
        started, path, processes, step = time.perf_counter(), self._path, self._processes, str(progress["step"])
        tensors = {}
        for name, parameter in parameters.items():
            for key, value in {"parameter": parameter.detach(), **optimizer.state[parameter]}.items():
                tensors[f"{key}/{name}"] = local_part(value)
        if processes.first:
            tensors["progress"] = torch.frombuffer(bytearray(json.dumps(progress), "ascii"), dtype=torch.uint8)
        with atomic_path(self._part(step)) as partial:
            write_tensors(partial, tensors, {**self._owner, "step": step})
            if processes.first:
                # The file of the first process replaces the old one last.
                processes.wait()
        if processes.first:
            for part in path.parent.glob(f"{path.stem}.*{path.suffix}"):
                if not part.name.startswith(f"{path.stem}.{step}."):
                    part.unlink()
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
        usable, reason = False, f"{path} can't be used by another process"
        with ExitStack() as opened:
            try:
                part = self._part(read_header(path).get("step", ""))
                about = verify_tensors(part)
                if not about.items() >= self._owner.items():
                    owner = f"run {about.get('run_id')}, protocol {about.get('protocol_version')}"
                    raise DamagedTensorsError(f"{part} is of {owner}")
                file = opened.enter_context(open_tensors(part))
                saved = set(file.keys())
                shapes = {key: file.get_slice(key).get_shape() for key in saved if key.startswith("parameter/")}
                if shapes != {f"parameter/{name}": list(local_part(p).shape) for name, p in parameters.items()}:
                    raise DamagedTensorsError(
                        f"{part} is of a model with other parameters, or of another number of processes"
                    )
                usable = True
            except DamagedTensorsError as error:
                reason = str(error)
            if processes.any(not usable):
                if processes.first:
                    logging.warning("run %s starts again from step 1: checkpoint %s", self._run_id, reason)
                return None
            with torch.no_grad():
                for name, parameter in parameters.items():
                    local_part(parameter).copy_(file.get_tensor(f"parameter/{name}"))
                    for key in ("exp_avg", "exp_avg_sq"):
                        if f"{key}/{name}" in saved:
                            moment = torch.empty_like(parameter)
                            local_part(moment).copy_(file.get_tensor(f"{key}/{name}"))
                            optimizer.state[parameter][key] = moment
                    if f"step/{name}" in saved:
                        # Adam counts its steps on the CPU unless it is fused on a GPU.
                        optimizer.state[parameter]["step"] = file.get_tensor(f"step/{name}").to(parameter.device)
            first = opened.enter_context(open_tensors(path))
            progress: dict[str, Any] = json.loads(first.get_tensor("progress").numpy().tobytes())
        if processes.first:
            logging.info("run %s goes on after step %d", self._run_id, progress["step"])
        return progress
