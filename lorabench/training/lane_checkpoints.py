"""Checkpoints of runs that are trained together as lanes: all are of the same step, also after a crash.

The last bits of a run's numbers depend on the runs computed beside it, so lanes must resume at a common step. All lanes
save after the same step, each to a `.next` file beside its checkpoint; when all have saved, these files replace the
checkpoints. If a job dies during these renames, the next job completes them. Runs whose checkpoints are of different
steps, because one is damaged or they were grouped differently before, are trained separately.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorabench.models.lanes.shelf import Lane
from lorabench.training.checkpoint import (
    START,
    Position,
    checkpoint_position,
    load_checkpoint,
    save_checkpoint,
    usable_position,
)
from lorabench.training.distributed import SINGLE_PROCESS, Processes
from lorabench.utils import signals

_SHARE = 0.02
"""The largest share of the time that saving takes; where it takes long, it is done less often."""


def groups_at_same_position(paths: Mapping[str, Path], processes: Processes = SINGLE_PROCESS) -> list[list[str]]:
    """Group runs by the position of their checkpoints; the runs of a group can go on together.

    Renames that a killed job left unfinished are completed first, and stale `.next` files are deleted.

    Args:
        paths: the checkpoint of each run by its run_id.

    Returns:
        The run_ids of each group. Runs without a usable checkpoint are at step 0.
    """
    if processes.first:
        newest = max(checkpoint_position(path) for path in paths.values())
        for path in paths.values():
            if checkpoint_position(path) < newest == checkpoint_position(_next(path)):
                os.replace(_next(path), path)
            _next(path).unlink(missing_ok=True)
    processes.wait()
    groups: dict[Position, list[str]] = {}
    for run_id, path in paths.items():
        groups.setdefault(usable_position(path, run_id, processes), []).append(run_id)
    return list(groups.values())


class LaneCheckpoints:
    """Decides when the lanes of a job save, and writes and reads their checkpoints.

    Attributes:
        stopping: whether the lanes must end when they have saved.
    """

    def __init__(self, paths: Mapping[str, Path], seconds: float, processes: Processes = SINGLE_PROCESS) -> None:
        """
        Args:
            paths: the checkpoint of each run by its run_id.
            seconds: least time between two checkpoints; with 0 the lanes save after every step, whatever it costs.
            processes: the processes that train the lanes together.
        """
        self._paths, self._seconds, self._saved = dict(paths), seconds, time.perf_counter()
        self._processes, self._cost = processes, 0.0
        self._decided, self._due, self.stopping = START, False, False

    def due(self, step: int, last: bool) -> bool:
        """Return whether the lanes save after this step; the first lane's call decides for all lanes.

        Several lanes save after the `last` step too: some may be finished before the job dies and others not.
        """
        if self._decides(Position(step, True)):
            self.stopping = self._processes.any(signals.requested()) and not last
            interval = max(self._seconds, self._cost / _SHARE) if self._seconds else 0.0
            waited = self._processes.any(time.perf_counter() - self._saved >= interval)
            self._due = len(self._paths) > 1 if last else waited or self.stopping
            if self._due:
                self._begin()
        return self._due

    def before_evaluation(self, step: int) -> None:
        """Prepare for the checkpoint that the lanes save after this step, before they are evaluated."""
        if self._decides(Position(step, False)):
            self.stopping = self._processes.any(signals.requested())
            self._begin()

    def _begin(self) -> None:
        """Note that the lanes save now."""
        self._saved, self._cost = time.perf_counter(), 0.0

    def _decides(self, position: Position) -> bool:
        """Return whether this is the first lane's call at a position."""
        first, self._decided = position != self._decided, position
        return first

    def save(self, run_id: str, lane: Lane, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
        """Save the state of a lane; see `save_checkpoint`."""
        path, started = self._paths[run_id], time.perf_counter()
        if len(self._paths) > 1:
            path = _next(path)
        save_checkpoint(path, run_id, lane, optimizer, progress, self._processes)
        self._commit()
        self._cost += time.perf_counter() - started

    def load(self, run_id: str, lane: Lane, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Restore the state of a lane; see `load_checkpoint`."""
        return load_checkpoint(self._paths[run_id], run_id, lane, optimizer, self._processes)

    def ended(self, run_id: str) -> None:
        """Forget a finished lane, and commit if all remaining lanes have saved."""
        del self._paths[run_id]
        self._commit()

    def _commit(self) -> None:
        """Replace the checkpoints by the `.next` files once every lane has one."""
        if self._processes.first and all(_next(path).exists() for path in self._paths.values()):
            for path in self._paths.values():
                os.replace(_next(path), path)


def _next(path: Path) -> Path:
    return path.with_suffix(".next")
