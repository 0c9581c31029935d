"""The number of finished runs is right whatever comes and goes, and costs little however often it is asked for."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from lorabench.errors import UserError
from lorabench.planning.plan import make_plan
from lorabench.store import progress
from lorabench.store.layout import Layout
from lorabench.store.progress import FinishedRuns, finished_runs, status
from lorabench.store.run_folder import RunFolder


def finish(layout, *run_ids):
    """Write the records of runs as a training job does."""
    for run_id in run_ids:
        with RunFolder(layout.runs, run_id).finishing({}):
            pass


@pytest.fixture
def many(tmp_path, monkeypatch):
    """A plan of 500 runs, 20 in each sweep, on a machine so slow that each sweep is a job; and its layout."""
    monkeypatch.chdir(tmp_path)
    block = {
        "models": ["tiny"],
        "datasets": ["instruct"],
        "ranks": {"all": list(range(1, 26))},
        "batch_sizes": [1],
        "lrs": {"fullft": [], "lora": [1e-4 * 1.2**place for place in range(20)]},
        "seeds": 1,
    }
    raw = {
        "description": "many runs",
        "models": {"tiny": {"kind": "tiny"}},
        "datasets": {"instruct": {"kind": "instruct", "train": 64, "validation": 8, "test": 8, "max_chars": 240}},
        "experiments": {"rank": [block]},
        "margins": {"loss": 0.02, "reward": 0.1, "lr_factor": 1.6},
        "execution": {"gflops": 0.001},
    }
    Path("many.yaml").write_text(yaml.safe_dump(raw))
    layout = Layout.of("many.yaml")
    return make_plan(layout.preset), layout


def test_runs_are_counted_as_they_come_and_go(many):
    plan, layout = many
    first, second = ([run.run_id for run in job.sweeps[0].grid()] for job in plan.jobs[:2])
    assert finished_runs(plan, layout) == (0, 500, 0)
    (layout.runs / f"{first[0]}.partial").mkdir(parents=True)
    (layout.runs / first[1]).mkdir()
    (layout.runs / "another").mkdir()
    # A run in progress, a folder without a record, and a run of another plan are none of its finished runs.
    assert finished_runs(plan, layout) == (0, 500, 0)
    finish(layout, *first, *second[:3])
    assert finished_runs(plan, layout) == (23, 500, 0)
    # The clocks of machines that write differ.
    for number, run_id in enumerate(second[3:6]):
        finish(layout, run_id)
        os.utime(layout.runs, (10**9 * number,) * 2)
    assert finished_runs(plan, layout) == (26, 500, 0)
    layout.jobs.mkdir()
    layout.job(plan.jobs[0]).touch()
    assert finished_runs(plan, layout) == (26, 500, 1)
    # Runs of a finished job may be deleted, others are then trained again.
    shutil.rmtree(layout.runs / first[0])
    shutil.rmtree(layout.runs / second[0])
    RunFolder(layout.runs, second[1]).discard()
    assert finished_runs(plan, layout) == (24, 500, 1)
    finish(layout, second[1])
    layout.job(plan.jobs[0]).unlink()
    assert finished_runs(plan, layout) == (24, 500, 0)
    shutil.rmtree(layout.root)
    assert finished_runs(plan, layout) == (0, 500, 0)


def test_a_job_that_finds_its_lrs_has_the_runs_that_its_file_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout = Layout.of("laptop")
    plan = make_plan(layout.preset)
    done, expected, _ = finished_runs(plan, layout)
    job = next(job for job in plan.jobs if job.sweeps[0].lattice)
    layout.jobs.mkdir(parents=True)
    rows = job.n_runs + 3
    pq.write_table(pa.table({"run_id": ["a"] * rows}), layout.job(job))
    assert finished_runs(plan, layout) == (done + rows, expected + 3, 1)
    assert (status(plan, layout).runs_done, status(plan, layout).jobs_done) == (rows, 1)


def work(jobs) -> None:
    """Finish all runs of some jobs of the plan in the working directory."""
    layout = Layout.of("many.yaml")
    plan = make_plan(layout.preset)
    for job in plan.jobs[jobs]:
        finish(layout, *(run.run_id for sweep in job.sweeps for run in sweep.grid()))
        layout.jobs.mkdir(exist_ok=True)
        layout.job(job).touch()


@pytest.mark.slow
def test_counting_while_several_jobs_write(many):
    plan, layout = many
    processes = [
        multiprocessing.get_context("spawn").Process(target=work, args=(slice(start, None, 2),)) for start in (0, 1)
    ]
    for process in processes:
        process.start()
    seen = []
    while any(process.is_alive() for process in processes):
        seen.append(finished_runs(plan, layout))
    assert [process.exitcode for process in processes] == [0, 0]
    assert seen == sorted(seen)
    assert finished_runs(plan, layout) == (500, 500, 25)


def test_counting_again_and_again_takes_a_hundredth_of_the_time(many, monkeypatch):
    plan, layout = many
    # The first count takes two seconds.
    clock = iter([1000.0, 1002.0, 1199.0, 1200.0, 1202.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    finished = FinishedRuns(plan, layout)
    assert finished.count() == (0, 500, 0)
    finish(layout, plan.jobs[-1].sweeps[0].grid()[0].run_id)
    assert finished.count() == (0, 500, 0)
    assert finished.count() == (1, 500, 0)


STATE = {"label": "a", "run": 1, "runs": 3, "lr": 0.01, "seed": 0, "step": 5, "steps": 9, "sweep": "b"}
BROKEN = ["", "{", "[]", "null", "{}", json.dumps(STATE | {"step": None}), json.dumps(STATE | {"lr": "0.01"})]


@pytest.mark.parametrize("text", BROKEN)
def test_a_damaged_progress_file_is_named(many, text):
    plan, layout = many
    path = layout.root / "progress" / "abc.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(STATE))
    assert status(plan, layout).at_work == []
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{path} is damaged .*; delete it; a run in training writes it again"):
        status(plan, layout)


def test_a_damaged_job_counts_with_the_runs_that_were_expected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout = Layout.of("laptop")
    plan = make_plan(layout.preset)
    job = next(job for job in plan.jobs if job.sweeps[0].lattice)
    layout.jobs.mkdir(parents=True)
    layout.job(job).write_bytes(b"PAR1")
    assert finished_runs(plan, layout) == (job.n_runs, sum(job.n_runs for job in plan.jobs), 1)
