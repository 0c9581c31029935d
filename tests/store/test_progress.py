"""The number of finished runs is right whatever comes and goes."""

from __future__ import annotations

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout
from lorabench.store.progress import finished_runs
from lorabench.store.run_folder import RunFolder


@pytest.fixture
def planned(request, tmp_path, monkeypatch):
    """The plan of a preset with fixed LRs, or of the one that a test names, and its layout in an empty folder."""
    monkeypatch.chdir(tmp_path)
    layout = Layout.of(getattr(request, "param", "lr_noise"))
    return make_plan(layout.preset), layout


def finish(layout, *runs):
    """Write the records of runs as a training job does."""
    for run in runs:
        with RunFolder(layout.runs, run.run_id).finishing({}):
            pass


def test_runs_are_counted_as_they_come_and_go(planned):
    plan, layout = planned
    number = sum(job.n_runs for job in plan.jobs)
    first, second = ([run for sweep in job.sweeps for run in sweep.grid()] for job in plan.jobs[:2])
    assert finished_runs(plan, layout) == (0, number, 0)
    (layout.runs / f"{first[0].run_id}.partial").mkdir(parents=True)
    (layout.runs / first[1].run_id).mkdir()
    (layout.runs / "another").mkdir()
    # A run in progress, a folder without a record, and a run of another plan are none of its finished runs.
    assert finished_runs(plan, layout) == (0, number, 0)
    finish(layout, *first, *second[:3])
    assert finished_runs(plan, layout) == (len(first) + 3, number, 0)
    layout.jobs.mkdir()
    layout.job(plan.jobs[0]).touch()
    assert finished_runs(plan, layout) == (plan.jobs[0].n_runs + 3, number, 1)
    # Runs of a finished job may be deleted, others are then trained again.
    shutil.rmtree(layout.runs / first[0].run_id)
    RunFolder(layout.runs, second[1].run_id).discard()
    assert finished_runs(plan, layout) == (plan.jobs[0].n_runs + 2, number, 1)


@pytest.mark.parametrize("planned", ["laptop"], indirect=True)
def test_a_job_that_finds_its_lrs_has_the_runs_that_its_file_has(planned):
    plan, layout = planned
    done, expected, _ = finished_runs(plan, layout)
    job = next(job for job in plan.jobs if job.sweeps[0].lattice)
    layout.jobs.mkdir(parents=True)
    rows = job.n_runs + 3
    pq.write_table(pa.table({"run_id": ["a"] * rows}), layout.job(job))
    assert finished_runs(plan, layout) == (done + rows, expected + 3, 1)
    # A damaged file counts with the runs that were expected.
    layout.job(job).write_bytes(b"PAR1")
    assert finished_runs(plan, layout) == (job.n_runs, expected, 1)
