"""Checkpoints of runs that are trained together: all of one step, whatever happens.

What is computed beside a run decides about the last bits of its numbers. So lanes that go on must be at the same step
as when they were together. All save after the same step, into a file beside the checkpoint; when all have, those files
take the checkpoints' places. A job that dies between the first and the last of these renames is finished here.
Runs whose checkpoints are not of one step, since one is damaged or others were together before, are trained apart.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorabench.models.lanes import Lane
from lorabench.training import stop
from lorabench.training.checkpoint import checkpoint_step, load_checkpoint, save_checkpoint, usable_step
from lorabench.training.distributed import ALONE, Processes


def in_step(paths: Mapping[str, Path], processes: Processes = ALONE) -> list[list[str]]:
    """Those of some runs that can go on together, since their checkpoints are of the same step.

    Args:
        paths: checkpoint of each run, by its run_id.
    """
    if processes.first:
        newest = max(checkpoint_step(path) for path in paths.values())
        for path in paths.values():
            if checkpoint_step(path) < newest == checkpoint_step(_next(path)):
                os.replace(_next(path), path)
            _next(path).unlink(missing_ok=True)
    processes.wait()
    groups: dict[int, list[str]] = {}
    for run_id, path in paths.items():
        groups.setdefault(usable_step(path, run_id), []).append(run_id)
    return list(groups.values())


class Checkpoints:
    """When lanes save, and where.

    Attributes:
        stopping: whether the lanes shall end when they have saved.
    """

    def __init__(self, paths: Mapping[str, Path], seconds: float, processes: Processes = ALONE) -> None:
        """
        Args:
            paths: checkpoint of each run, by its run_id.
            seconds: time between two checkpoints.
            processes: those that train the lanes together; the first one writes.
        """
        self._paths, self._seconds, self._saved = dict(paths), seconds, time.perf_counter()
        self._processes = processes
        self._step, self._due, self.stopping = 0, False, False

    def due(self, step: int, last: bool) -> bool:
        """Whether to save after a step; the first lane to ask decides for all.

        Lanes save after the `last` step too: one may be finished, and gone, before the job dies.
        """
        if step != self._step:
            self._step, self.stopping = step, self._processes.any(stop.requested()) and not last
            waited = self._processes.any(time.perf_counter() - self._saved >= self._seconds)
            self._due = len(self._paths) > 1 if last else waited or self.stopping
            if self._due:
                self._saved = time.perf_counter()
        return self._due

    def save(self, run_id: str, lane: Lane, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
        """Save a lane's state; see `save_checkpoint`."""
        path = self._paths[run_id]
        if len(self._paths) > 1:
            path = _next(path)
        save_checkpoint(path, run_id, lane, optimizer, progress, self._processes)
        self._commit()

    def load(self, run_id: str, lane: Lane, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Restore a lane's state; see `load_checkpoint`."""
        return load_checkpoint(self._paths[run_id], run_id, lane, optimizer, self._processes)

    def ended(self, run_id: str) -> None:
        """A lane is finished; it may have ended before the others saved."""
        del self._paths[run_id]
        self._commit()

    def _commit(self) -> None:
        """Where all lanes have saved, what they saved is their checkpoint."""
        if self._processes.first and all(_next(path).exists() for path in self._paths.values()):
            for path in self._paths.values():
                os.replace(_next(path), path)


def _next(path: Path) -> Path:
    return path.with_suffix(".next")
