"""By real Snakemake: runs as jobs of their own give the tables of whole jobs, and what is damaged is made again."""

import json
import os
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lorabench.planning.plan import make_plan
from lorabench.runs import best_lr, finished_losses, validation_loss
from lorabench.store.layout import Layout

from .checkout import fresh_clone, snakemake, started

pytestmark = pytest.mark.slow

TABLES = ("runs", "curves", "test_losses")
# What a run's numbers do not depend on: the machine, the time and the process that trained it.
MEASURED = {"wall_s", "peak_mem_bytes", "started", "host", "git_sha", "git_dirty_patch"}


PRESET = """
description: a preset for tests
models: {tiny: {kind: tiny}}
datasets: {instruct: {kind: instruct, train: 32, validation: 8, test: 8, max_chars: 240}}
experiments:
  rank:
  - models: [tiny]
    datasets: [instruct]
    ranks: {all: [4]}
    batch_sizes: [4]
    lrs: {fullft: [1.0e-3, 3.0e-3], lora: {start: 1.0e-3, most: 4}}
    seeds: {best: 3, around: 2}
margins: {loss: 0.02, reward: 0.1, lr_factor: 1.6}
execution:
  gflops: 20.0
  checkpoint_minutes: 0.0
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A clone with a preset of a fixed grid and a walk, whose jobs are whole (`whole`) or divided (`split`)."""
    checkout = fresh_clone(tmp_path_factory.mktemp("checkout"))
    for name, hours in (("whole", "24.0"), ("split", "1.0e-6")):
        (checkout / f"{name}.yaml").write_text(f"{PRESET}  job_hours: {hours}\n")
    return checkout


def make_tables(checkout, name: str, *options: str) -> str:
    targets = [f"results/{name}/tables/{table}.parquet" for table in TABLES]
    return snakemake(checkout, *targets, *options, "--config", f"preset={name}.yaml")


def contents(checkout, name: str) -> list[list[dict]]:
    """Return the rows of the tables, in their order, without what was measured of machines."""
    tables = []
    for table in TABLES:
        rows = pq.read_table(checkout / f"results/{name}/tables/{table}.parquet").to_pylist()
        rows = [row for row in rows if not str(row.get("metric", "")).endswith("per_s")]
        tables.append([{key: value for key, value in row.items() if key not in MEASURED} for row in rows])
    return tables


def records(checkout, layout: Layout) -> list[Path]:
    """Return the records of finished runs; one that is being finished is in a folder with a suffix."""
    return [path for path in (checkout / layout.runs).glob("*/record.json") if not path.parent.suffix]


def kill_in_the_middle(checkout, layout: Layout) -> None:
    """Start the workflow, and kill it with its jobs when some runs are finished and one is at work."""
    process = started(checkout, f"{layout.tables()}/runs.parquet", "--config", "preset=split.yaml")
    runs, deadline = checkout / layout.runs, time.monotonic() + 600
    try:
        while len(records(checkout, layout)) < 2 or not list(runs.glob("*.partial/checkpoint.safetensors")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_runs_as_jobs_give_the_tables_of_whole_jobs_although_they_were_killed(checkout):
    make_tables(checkout, "whole")
    layout = Layout.of(str(checkout / "split.yaml"))
    plan = make_plan(layout.preset)
    assert [plan.is_split(job) for job in plan.jobs] == [True, True]
    kill_in_the_middle(checkout, layout)
    finished = {path: path.stat().st_mtime_ns for path in records(checkout, layout)}
    assert len(finished) >= 2
    snakemake(checkout, "--unlock", "--config", "preset=split.yaml")
    output = make_tables(checkout, "split", "--rerun-incomplete")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert contents(checkout, "split") == contents(checkout, "whole")
    logs = "".join(path.read_text() for path in (checkout / layout.root / "logs").glob("*.log"))
    assert "goes on after step" in logs

    def loss(run):
        return validation_loss(json.loads((checkout / layout.runs / run.run_id / "record.json").read_text()))

    # Each run was a job, in the wave of which it is a part, and none was trained twice.
    kept = {run.parent.name for run in (checkout / layout.runs).glob("*/weights")}
    for sweep in plan.sweeps:
        losses, waves = finished_losses(sweep, loss), (checkout / layout.wave(sweep.sweep_id, 2)).parent
        assert sum(path.suffix != ".json" for path in waves.iterdir()) == len(losses)
        best = {run.run_id for run in sweep.possible_runs() if run.lr == best_lr(sweep, losses)}
        assert kept & sweep.run_ids == best & kept
        assert len(kept & best) == sweep.seeds.best
    assert "rule train_run:" in output
    for folder in ("locks", "progress"):
        assert not list((checkout / layout.root / folder).iterdir())
    assert "Nothing to be done" in make_tables(checkout, "split")
