"""How far the work is: what each sweep job is at, and the whole picture from the files on disk.

Whether a job is alive says the heartbeat of its lock (lock.py).
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.exhausted import NoSpaceError
from lorabench.lock import alive, silence
from lorabench.records import write_json

if TYPE_CHECKING:
    from lorabench.layout import Layout
    from lorabench.plan import Plan, Run, Sweep

# Seconds between two notes of how far a job is.
EVERY = 2.0


class Progress:
    """The file that says how far one sweep job is; removed when the job ends well."""

    def __init__(self, path: Path, sweep: Sweep) -> None:
        self.path, self.sweep, self.last = path, sweep, -EVERY

    def tick(self, number: int, run: Run, step: int) -> None:
        """Say that a run has done `step` steps; written at most every `EVERY` seconds."""
        now = time.monotonic()
        if now - self.last >= EVERY:
            self.last = now
            state = {
                "label": self.sweep.condition.label,
                "run": number,
                "runs": self.sweep.n_runs,
                "lr": run.lr,
                "seed": run.seed,
                "step": step,
                "steps": run.condition.steps,
            }
            # A full disk ends a job where it costs something.
            with suppress(NoSpaceError):
                write_json(state, self.path)

    def close(self) -> None:
        """The job has ended well."""
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Status:
    """State of a preset's work. `running` holds what jobs that are alive are at, `silent` what the others were at.

    A silent job has `silent_s`, the seconds since its last sign of life; null if it has let go of its runs.
    """

    runs_done: int
    runs_planned: int
    sweeps_done: int
    sweeps_planned: int
    running: list[dict[str, Any]]
    silent: list[dict[str, Any]]
    report: Path | None


def status(plan: Plan, layout: Layout) -> Status:
    """Read the state of a preset's work off the disk."""
    running: list[dict[str, Any]] = []
    silent: list[dict[str, Any]] = []
    done = sweeps_done = 0
    for sweep in plan.sweeps:
        if layout.sweep(sweep).exists():
            sweeps_done += 1
            done += sweep.n_runs
            continue
        done += _finished_runs(sweep, layout)
        try:
            state = json.loads(layout.progress(sweep).read_text())
        except FileNotFoundError:
            continue
        age = silence(layout.lock(sweep))
        (running if alive(age) else silent).append(state | {"silent_s": age})
    return Status(
        runs_done=done,
        runs_planned=sum(sweep.n_runs for sweep in plan.sweeps),
        sweeps_done=sweeps_done,
        sweeps_planned=len(plan.sweeps),
        running=running,
        silent=silent,
        report=layout.report if layout.report.exists() else None,
    )


def _finished_runs(sweep: Sweep, layout: Layout) -> int:
    """Finished runs of a sweep in progress; which LR the repeats have is not known here, so any counts."""
    candidates = [*sweep.grid(), *(run for lr in sweep.lrs for run in sweep.repeats(lr))]
    return sum((layout.runs / run.run_id / "record.json").exists() for run in candidates)
