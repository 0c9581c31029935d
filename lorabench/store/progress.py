"""The progress of a preset's work: a progress file for each run in training, and a summary of all files on disk.

The time of a progress file shows when its job last gave a sign of life.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabench.planning.plan import Plan
from lorabench.runs import Run, Sweep
from lorabench.store.layout import Layout
from lorabench.store.run_folder import RECORD
from lorabench.utils.exhaustion import NoSpaceError
from lorabench.utils.files import read_json, write_json

INTERVAL = float(os.environ.get("LORABENCH_PROGRESS_SECONDS", "2"))
"""Seconds between two updates of a progress file; the profile of a cluster asks for fewer."""


_STATE = dict.fromkeys(("run", "runs", "seed", "step", "steps"), int) | {"label": str, "sweep": str, "lr": int | float}
"""The entries of a progress file."""


class Progress:
    """Writes the progress file of each run of a sweep that this process trains."""

    def __init__(self, layout: Layout, sweep: Sweep) -> None:
        self._layout, self._sweep = layout, sweep
        self._last: tuple[Run | None, float] = None, 0.0
        """The run whose file was written last, and the time."""

    def tick(self, number: int, run: Run, step: int) -> None:
        """Record that the run of this number in the sweep, from 1, has done `step` steps.

        A run's file is written at its first step, and then at most every `INTERVAL` seconds.
        """
        now = time.monotonic()
        if run == self._last[0] and now - self._last[1] < INTERVAL:
            return
        self._last, condition = (run, now), run.condition
        state = {"label": condition.label, "run": number, "runs": max(number, self._sweep.n_runs)}
        state |= {"lr": run.lr, "seed": run.seed, "step": step, "steps": condition.steps}
        # A full disk must end the job where it loses something, not here.
        with suppress(NoSpaceError):
            write_json(state | {"sweep": self._sweep.sweep_id}, self._layout.progress(run))


@dataclass(frozen=True)
class Status:
    """The state of a preset's work."""

    runs_done: int
    runs_planned: int
    jobs_done: int
    jobs_planned: int
    at_work: list[dict[str, Any]]
    """The contents of the runs' progress files, each with `age_s`: the seconds since the job last wrote it. A job that
    was killed leaves its file."""
    report: Path | None


class FinishedRuns:
    """Counts the finished runs of a plan; each count after the first looks only at what has come or gone since.

    A run's folder and a job's file have their names only when they are whole, so two lists of names tell what is
    finished, whichever job wrote it and whatever its clock says. Nothing but the files themselves is relied on.
    """

    def __init__(self, plan: Plan, layout: Layout) -> None:
        self._layout = layout
        self._jobs = {layout.job(job).name: job for job in plan.jobs}
        self._expected = {name: job.n_runs for name, job in self._jobs.items()}
        self._runs_of_job: dict[str, int] = {}
        """The number of runs of each finished job, by the name of its file."""
        self._jobs_of_run: dict[str, list[str]] = {}
        """The names of the files of the unfinished jobs that a run belongs to, by run_id."""
        self._done: set[str] = set()
        """The ids of the finished runs of unfinished jobs."""
        self._done_of_job: Counter[str] = Counter()

    def count(self) -> tuple[int, int, int]:
        """Return the numbers of finished runs, of planned runs (as far as they are known) and of finished jobs."""
        files, folders = _names(self._layout.jobs), _names(self._layout.runs)
        for name in self._runs_of_job.keys() - files:
            # The job is made again.
            del self._runs_of_job[name]
            self._jobs_of_run, self._done, self._done_of_job = {}, set(), Counter()
        for name in files & self._jobs.keys() - self._runs_of_job.keys():
            self._runs_of_job[name] = self._finished(name)
        if not self._jobs_of_run:
            for name in self._jobs.keys() - self._runs_of_job.keys():
                for run_id in (run_id for sweep in self._jobs[name].sweeps for run_id in sweep.run_ids):
                    self._jobs_of_run.setdefault(run_id, []).append(name)
        for run_id in self._done - folders:
            self._done.remove(run_id)
            self._done_of_job.subtract(self._jobs_of_run[run_id])
        for run_id in folders - self._done:
            if run_id in self._jobs_of_run and os.path.isfile(f"{self._layout.runs}/{run_id}/{RECORD}"):
                self._done.add(run_id)
                self._done_of_job.update(self._jobs_of_run[run_id])
        unfinished = self._jobs.keys() - self._runs_of_job.keys()
        trained = sum(self._runs_of_job.values())
        done = trained + sum(self._done_of_job[name] for name in unfinished)
        return done, trained + sum(self._expected[name] for name in unfinished), len(self._runs_of_job)

    def _finished(self, name: str) -> int:
        """Return the number of runs of a finished job."""
        job = self._jobs[name]
        # A sweep that finds its LRs has another number of runs than expected.
        if any(sweep.lattice is not None for sweep in job.sweeps):
            # Imported only here, because `lorabench status` shall answer at once.
            import pyarrow as pa
            import pyarrow.parquet as pq

            # A damaged file counts as expected; the step that reads it names it.
            with suppress(pa.ArrowException, OSError):
                return int(pq.read_metadata(self._layout.job(job)).num_rows)
        return self._expected[name]


def _names(folder: Path) -> set[str]:
    """Return the names in a folder, none if there is no such folder."""
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()


def status(plan: Plan, layout: Layout) -> Status:
    """Read the state of a preset's work from the files on disk."""
    runs_done, runs_planned, jobs_done = FinishedRuns(plan, layout).count()
    at_work: list[dict[str, Any]] = []
    unfinished = {sweep.sweep_id for job in plan.jobs if not layout.job(job).exists() for sweep in job.sweeps}
    for path in sorted((layout.root / "progress").glob("*.json")):
        # A job removes the file at the end of a run, which may be now.
        with suppress(FileNotFoundError):
            state, written = (
                read_json(path, _STATE, "delete it; a run in training writes it again"),
                path.stat().st_mtime,
            )
            # The clocks of nodes may differ by hours; without the right to write here this process's own has to do.
            now = time.time()
            with suppress(OSError), tempfile.TemporaryFile(dir=path.parent) as probe:
                now = os.fstat(probe.fileno()).st_mtime
            if state["sweep"] in unfinished:
                at_work.append({**state, "age_s": now - written})
    at_work.sort(key=lambda run: (run["label"], run["run"]))
    return Status(
        runs_done=runs_done,
        runs_planned=runs_planned,
        jobs_done=jobs_done,
        jobs_planned=len(plan.jobs),
        at_work=at_work,
        report=layout.report if layout.report.exists() else None,
    )
