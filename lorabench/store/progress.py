"""The progress of a preset's work: a progress file for each run in training, and a summary of all files on disk.

The time of a progress file shows when its job last gave a sign of life.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from typing import Any

from lorabench.errors import UserError
from lorabench.planning.plan import Plan
from lorabench.runs import Run, Sweep
from lorabench.store.layout import Layout
from lorabench.utils.files import atomic_path, write_json

COUNTED_EVERY = 10.0
"""Seconds for which all jobs of a preset take one count of its finished runs."""

INTERVAL = float(os.environ.get("LORABENCH_PROGRESS_SECONDS", "2"))
"""Seconds between two updates of a progress file; the profile of a cluster asks for fewer."""


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
        state = {
            "label": condition.label,
            "run": number,
            "runs": max(number, self._sweep.n_runs),
            "lr": run.lr,
            "seed": run.seed,
            "step": step,
            "steps": condition.steps,
            "sweep": self._sweep.sweep_id,
        }
        # A full disk must end the job where it loses something, not here.
        with suppress(UserError):
            write_json(state, self._layout.progress(run))


def finished_runs(plan: Plan, layout: Layout) -> tuple[int, int, int]:
    """Return the numbers of finished runs, of planned runs and of finished jobs.

    A run's folder and a job's file have their names only when they are whole, so two lists of names tell what is
    finished. A finished job counts with the runs that were expected, whose folders may be deleted.
    """
    files, folders = ({path.name for path in folder.glob("*")} for folder in (layout.jobs, layout.runs))
    ended = [layout.job(job).name in files for job in plan.jobs]
    done = sum(
        job.n_runs if has_ended else sum(len(sweep.run_ids & folders) for sweep in job.sweeps)
        for job, has_ended in zip(plan.jobs, ended, strict=True)
    )
    return done, sum(job.n_runs for job in plan.jobs), sum(ended)


def recently_finished(plan: Plan, layout: Layout) -> str:
    """Return the numbers of finished and of planned runs, such as 3/10, as a job of the preset has counted them.

    A count takes time that grows with the number of runs, so that jobs share one for `COUNTED_EVERY` seconds.
    """
    # The clocks of nodes may differ.
    with suppress(OSError):
        if 0 <= time.time() - layout.count.stat().st_mtime < COUNTED_EVERY:
            return layout.count.read_text()
    count = "{}/{}".format(*finished_runs(plan, layout))
    with suppress(UserError), atomic_path(layout.count) as partial:
        partial.write_text(count)
    return count


def runs_at_work(plan: Plan, layout: Layout) -> list[dict[str, Any]]:
    """Return the contents of the runs' progress files, each with `age_s`: the seconds since the job last wrote it.

    A job that was killed leaves its file.
    """
    at_work: list[dict[str, Any]] = []
    unfinished = {sweep.sweep_id for job in plan.jobs if not layout.job(job).exists() for sweep in job.sweeps}
    for path in sorted((layout.root / "progress").glob("*.json")):
        # A job removes the file at the end of a run, which may be now; a damaged file says nothing.
        with suppress(FileNotFoundError, ValueError):
            state = json.loads(path.read_text())
            if state["sweep"] in unfinished:
                at_work.append({**state, "age_s": time.time() - path.stat().st_mtime})
    return sorted(at_work, key=lambda run: (run["label"], run["run"]))
