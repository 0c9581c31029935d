"""The progress of a preset's work: a progress file for each sweep in training, and a summary of all files on disk.

The heartbeat of a sweep's lock (`lorabench.utils.lock`) shows whether its job is alive.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabench.planning.plan import Plan
from lorabench.runs import Job, Run, Sweep
from lorabench.store.layout import Layout
from lorabench.store.run_folder import RunFolder
from lorabench.utils.exhaustion import NoSpaceError
from lorabench.utils.files import write_json
from lorabench.utils.lock import heartbeat_age, is_alive

INTERVAL = float(os.environ.get("LORABENCH_PROGRESS_SECONDS", "2"))
"""Seconds between two updates of a progress file; the profile of a cluster asks for fewer."""


class Progress:
    """The progress file of one sweep, which is removed when all runs of the sweep are finished."""

    def __init__(self, path: Path, sweep: Sweep) -> None:
        self.path, self.sweep, self.last_written = path, sweep, -INTERVAL

    def tick(self, number: int, run: Run, step: int) -> None:
        """Record that a run has done `step` steps; the file is written at most every `INTERVAL` seconds.

        Args:
            number: the run's number in the sweep, from 1.
        """
        now = time.monotonic()
        if now - self.last_written >= INTERVAL:
            self.last_written = now
            state = {
                "label": self.sweep.condition.label,
                "run": number,
                "runs": max(number, self.sweep.n_runs),
                "lr": run.lr,
                "seed": run.seed,
                "step": step,
                "steps": run.condition.steps,
            }
            # A full disk must end the job where it loses something, not here.
            with suppress(NoSpaceError):
                write_json(state, self.path)

    def close(self) -> None:
        """Remove the file, when all runs of the sweep are finished."""
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Status:
    """The state of a preset's work.

    `running` and `silent` hold the contents of the progress files: of sweeps whose lock has a heartbeat, and of other
    sweeps. Each has `silent_s`, the seconds since its last heartbeat; null if nobody holds the lock.
    """

    runs_done: int
    runs_planned: int
    jobs_done: int
    jobs_planned: int
    running: list[dict[str, Any]]
    silent: list[dict[str, Any]]
    report: Path | None


def status(plan: Plan, layout: Layout) -> Status:
    """Read the state of a preset's work from the files on disk."""
    running: list[dict[str, Any]] = []
    silent: list[dict[str, Any]] = []
    finished = [job for job in plan.jobs if layout.job(job).exists()]
    # A sweep that finds its LRs has another number of runs than expected.
    trained = {job: _trained(job, layout) for job in finished}
    done = sum(trained.values())
    # The folder is listed once: a job calls this after every run, and most of its runs have no folder yet.
    run_folders = set(os.listdir(layout.runs)) if layout.runs.exists() else set()
    for sweep in (sweep for job in plan.jobs if job not in finished for sweep in job.sweeps):
        done += sum(RunFolder(layout.runs, run_id).done() for run_id in run_folders & sweep.run_ids)
        try:
            state = json.loads(layout.progress(sweep).read_text())
        except FileNotFoundError:
            continue
        age = heartbeat_age(layout.lock(sweep))
        (running if is_alive(age) else silent).append(state | {"silent_s": age})
    return Status(
        runs_done=done,
        runs_planned=sum(trained.get(job, job.n_runs) for job in plan.jobs),
        jobs_done=len(finished),
        jobs_planned=len(plan.jobs),
        running=running,
        silent=silent,
        report=layout.report if layout.report.exists() else None,
    )


def _trained(job: Job, layout: Layout) -> int:
    """Return the number of runs of a finished job."""
    if all(sweep.lattice is None for sweep in job.sweeps):
        return job.n_runs
    # Imported only here, because `lorabench status` shall answer at once.
    import pyarrow.parquet as pq

    return int(pq.read_metadata(layout.job(job)).num_rows)
