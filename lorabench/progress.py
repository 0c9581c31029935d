"""How far the work is: what each sweep is at, and the whole picture from the files on disk.

Whether a job is alive says the heartbeat of its lock (lock.py).
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.exhausted import NoSpaceError
from lorabench.lock import alive, silence
from lorabench.records import RunFolder, write_json

if TYPE_CHECKING:
    from lorabench.layout import Layout
    from lorabench.plan import Plan, Run, Sweep

# Seconds between two notes of how far a job is.
EVERY = 2.0


class Progress:
    """The file that says how far one sweep is; removed when it ends well."""

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
        """The sweep has ended well."""
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Status:
    """State of a preset's work. `running` holds what jobs that are alive are at, `silent` what the others were at.

    A silent job has `silent_s`, the seconds since its last sign of life; null if it has let go of its runs.
    """

    runs_done: int
    runs_planned: int
    jobs_done: int
    jobs_planned: int
    running: list[dict[str, Any]]
    silent: list[dict[str, Any]]
    report: Path | None


def status(plan: Plan, layout: Layout) -> Status:
    """Read the state of a preset's work off the disk."""
    running: list[dict[str, Any]] = []
    silent: list[dict[str, Any]] = []
    finished = [job for job in plan.jobs if layout.job(job).exists()]
    done = sum(job.n_runs for job in finished)
    # One look at the folder: a job asks after every run, and most that it may have are not there.
    runs = set(os.listdir(layout.runs)) if layout.runs.exists() else set()
    for sweep in (sweep for job in plan.jobs if job not in finished for sweep in job.sweeps):
        done += sum(RunFolder(layout.runs, run_id).done() for run_id in runs & sweep.run_ids)
        try:
            state = json.loads(layout.progress(sweep).read_text())
        except FileNotFoundError:
            continue
        age = silence(layout.lock(sweep))
        (running if alive(age) else silent).append(state | {"silent_s": age})
    return Status(
        runs_done=done,
        runs_planned=sum(sweep.n_runs for sweep in plan.sweeps),
        jobs_done=len(finished),
        jobs_planned=len(plan.jobs),
        running=running,
        silent=silent,
        report=layout.report if layout.report.exists() else None,
    )
