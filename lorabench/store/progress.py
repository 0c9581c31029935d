"""The progress of a preset's work: a progress file for each sweep in training, and a summary of all files on disk.

The time of a progress file shows when its job last gave a sign of life.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabench.planning.plan import Plan
from lorabench.runs import Run, Sweep
from lorabench.store.layout import Layout
from lorabench.store.run_folder import RunFolder
from lorabench.utils.exhaustion import NoSpaceError
from lorabench.utils.files import write_json

INTERVAL = float(os.environ.get("LORABENCH_PROGRESS_SECONDS", "2"))
"""Seconds between two updates of a progress file; the profile of a cluster asks for fewer."""


class Progress:
    """The progress file of one sweep, which the job removes when all runs of the sweep are finished."""

    def __init__(self, path: Path, sweep: Sweep) -> None:
        self.path, self.sweep, self.last_written = path, sweep, -INTERVAL

    def tick(self, number: int, run: Run, step: int) -> None:
        """Record that the run of this number in the sweep, from 1, has done `step` steps.

        The file is written at most every `INTERVAL` seconds.
        """
        now = time.monotonic()
        if now - self.last_written < INTERVAL:
            return
        self.last_written, condition = now, run.condition
        state = {"label": condition.label, "run": number, "runs": max(number, self.sweep.n_runs)}
        state |= {"lr": run.lr, "seed": run.seed, "step": step, "steps": condition.steps}
        # A full disk must end the job where it loses something, not here.
        with suppress(NoSpaceError):
            write_json(state, self.path)


@dataclass(frozen=True)
class Status:
    """The state of a preset's work."""

    runs_done: int
    runs_planned: int
    jobs_done: int
    jobs_planned: int
    at_work: list[dict[str, Any]]
    """The contents of the progress files, each with `age_s`: the seconds since the job last wrote it. A job that was
    killed leaves its file."""
    report: Path | None


def status(plan: Plan, layout: Layout) -> Status:
    """Read the state of a preset's work from the files on disk."""
    finished = [job for job in plan.jobs if layout.job(job).exists()]
    trained = {job: job.n_runs for job in finished}
    for job in finished:
        # A sweep that finds its LRs has another number of runs than expected.
        if any(sweep.lattice is not None for sweep in job.sweeps):
            # Imported only here, because `lorabench status` shall answer at once.
            import pyarrow.parquet as pq

            trained[job] = int(pq.read_metadata(layout.job(job)).num_rows)
    done, at_work = sum(trained.values()), []
    # The folder is listed once: a job calls this after every run, and most of its runs have no folder yet.
    run_folders = set(os.listdir(layout.runs)) if layout.runs.exists() else set()
    for sweep in (sweep for job in plan.jobs if job not in finished for sweep in job.sweeps):
        done += sum(RunFolder(layout.runs, run_id).done() for run_id in run_folders & sweep.run_ids)
        path = layout.progress(sweep)
        if path.exists():
            # The clocks of nodes may differ by hours; without the right to write here this process's own has to do.
            now = time.time()
            with suppress(OSError), tempfile.TemporaryFile(dir=path.parent) as probe:
                now = os.fstat(probe.fileno()).st_mtime
            at_work.append({**json.loads(path.read_text()), "age_s": now - path.stat().st_mtime})
    return Status(
        runs_done=done,
        runs_planned=sum(trained.get(job, job.n_runs) for job in plan.jobs),
        jobs_done=len(finished),
        jobs_planned=len(plan.jobs),
        at_work=at_work,
        report=layout.report if layout.report.exists() else None,
    )
