"""How far the work is: a heartbeat per sweep job, and the whole picture from the files on disk."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.records import write_json

if TYPE_CHECKING:
    from lorabench.layout import Layout
    from lorabench.plan import Plan, Run, Sweep

# Seconds between heartbeats, and after how many of silence a job counts as gone.
HEARTBEAT, SILENT = 2.0, 60.0


class Progress:
    """The heartbeat file of one sweep job; removed when the job ends well."""

    def __init__(self, path: Path, sweep: Sweep) -> None:
        self.path, self.sweep, self.last = path, sweep, 0.0

    def tick(self, number: int, run: Run, step: int) -> None:
        """Say that a run has done `step` steps; written at most every `HEARTBEAT` seconds."""
        now = time.time()
        if now - self.last >= HEARTBEAT:
            self.last = now
            state = {
                "time": now,
                "label": self.sweep.condition.label,
                "run": number,
                "runs": self.sweep.n_runs,
                "lr": run.lr,
                "seed": run.seed,
                "step": step,
                "steps": run.condition.steps,
            }
            write_json(state, self.path)

    def close(self) -> None:
        """The job has ended well."""
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Status:
    """State of a preset's work. `running` holds the heartbeats of jobs that are alive, `silent` the others."""

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
        heartbeat = layout.progress(sweep)
        if heartbeat.exists():
            state = json.loads(heartbeat.read_text())
            (running if time.time() - state["time"] < SILENT else silent).append(state)
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
