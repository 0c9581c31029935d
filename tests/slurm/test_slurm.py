"""`snakemake --cores all --profile slurm` on a real Slurm: what jobs request, and what they survive."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from lorabench.planning.costs import job_cost
from lorabench.planning.plan import make_plan
from lorabench.runs import Job, Sweep
from lorabench.store.layout import Layout

from ..workflow.checkout import snakemake
from .cluster import adapted_clone, job_tries, rule_jobs, saved_step, until, workflow

pytestmark = pytest.mark.slurm

PRESET = Path(__file__).parent / "cluster.yaml"
PLAN = make_plan(Layout.of(str(PRESET)).preset)
(STOPPED,) = (job for job in PLAN.jobs if job.sweeps[0].condition.task == "sft")
# The job is cancelled in the middle of its first sweep and killed in the middle of its second.
CANCELLED, KILLED = STOPPED.sweeps

# The columns that a run computes; the other columns say where it ran and how fast.
MEASURED = ["status", "final_valid_nll", "final_test_nll", "final_valid_reward", "final_reward", "train_tokens"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return adapted_clone(tmp_path_factory.mktemp("checkout"), PRESET)


def middle(runs: Path, sweep: Sweep, after: int = 2) -> tuple[str, int] | None:
    """Return a run of the sweep that is half done and its step, once another run has ended; else None."""
    grid = [run.run_id for run in sweep.grid()]
    for run in grid:
        with suppress(FileNotFoundError):  # The run has not begun, or has just ended.
            step = saved_step(runs / f"{run}.partial/checkpoint.safetensors")
            if after < step < sweep.condition.steps and any((runs / other).exists() for other in grid):
                return run, step
    return None


@pytest.fixture(scope="module")
def seen(cluster, checkout):
    """The whole preset, while one job is cancelled, another one is killed, and then the node goes down.

    It has the jobs; the steps of runs' checkpoints when they were stopped; and time and content of the records of runs
    that had ended before a disturbance.
    """
    runs = checkout / "results/cluster/runs"
    stopped_at: list[int] = []
    records: dict[Path, tuple[int, str]] = {}

    with workflow(cluster, checkout, "--set-resources", "compute:gpu=2") as output:

        def disturb(sweep: Sweep, after: int, how: Callable[[], object]) -> None:
            stopped = until(lambda: middle(runs, sweep, after) or output(), "a sweep in its middle", 240)
            assert stopped != output(), "the workflow ended before a sweep was in its middle"
            stopped_at.append(stopped[1])
            for record in runs.glob("*/record.json"):
                records.setdefault(record, (record.stat().st_mtime_ns, record.read_text()))
            how()

        disturb(CANCELLED, 2, lambda: cluster("scancel", job_tries(cluster.jobs(), STOPPED)[0]["JobId"]))
        disturb(KILLED, 2, lambda: os.kill(training(STOPPED), signal.SIGKILL))
        # Steps until now were made by the killed process and not by the next try.
        time.sleep(0.5)
        _, killed_at = middle(runs, KILLED)
        disturb(KILLED, killed_at, lambda: cluster.node_state("down"))
        cluster.node_state("resume")
        until(output, "the end of the workflow", 300)
    return SimpleNamespace(jobs=cluster.jobs(), stopped_at=stopped_at, records=records)


def training(job: Job) -> int:
    """Return the id of the process that trains a job."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:  # It has just ended.
            continue
        if "train" in words and job.job_id in words:
            return int(path.parent.name)
    raise AssertionError(f"nothing trains {job.job_id}")


def test_every_job_requests_the_resources_of_the_plan(seen):
    for planned in PLAN.jobs:
        needed, job = job_cost(PLAN, planned), job_tries(seen.jobs, planned)[0]
        assert job["TresPerJob"] == f"gres/gpu:{needed.gpus}" == "gres/gpu:1"
        assert f"cpu={needed.cpus},mem={needed.mem_mb}M,node=1" in job["ReqTRES"]
        assert job["TimeLimit"] == f"00:{needed.minutes:02}:00"
    (compute,) = rule_jobs(seen.jobs, "compute")
    assert compute["TresPerJob"] == "gres/gpu:2"
    assert {job["TresPerJob"] for job in rule_jobs(seen.jobs, "evaluate")} == {"gres/gpu:1"}
    (tokens,) = rule_jobs(seen.jobs, "tokens")
    assert "TresPerJob" not in tokens
    # Downloads, tables and figures are not jobs of Slurm.
    assert {job["Comment"].split("_")[1] for job in seen.jobs} == {"dataset", "tokens", "train", "evaluate", "compute"}


def test_slurm_gives_each_run_its_gpu(seen, checkout):
    records = [json.loads(path.read_text()) for path in (checkout / "results/cluster/runs").glob("*/record.json")]
    assert {record["environment"]["cuda_visible_devices"] for record in records} <= {"0", "1"}
    assert len(records) == sum(sweep.n_runs for sweep in PLAN.sweeps)


def test_a_stopped_job_is_tried_again_and_goes_on(seen, checkout):
    tries = job_tries(seen.jobs, STOPPED)
    assert [job["JobState"] for job in tries] == ["CANCELLED", "FAILED", "COMPLETED"]
    minutes = job_cost(PLAN, STOPPED).minutes
    assert [job["TimeLimit"] for job in tries] == [f"00:{number * minutes:02}:00" for number in (1, 2, 3)]
    # A job that lost its node is put back into the queue by Slurm itself.
    assert {job["JobState"] for job in seen.jobs if int(job["Restarts"])} == {"COMPLETED"}
    log = (checkout / f"results/cluster/logs/{STOPPED.job_id}.log").read_text()
    went_on = list(map(int, re.findall(r"goes on after step (\d+)", log)))
    assert len(went_on) == 3
    assert all(step >= stopped for step, stopped in zip(went_on, seen.stopped_at, strict=True)), (went_on, seen)


def test_finished_runs_are_not_trained_again(seen):
    assert len(seen.records) >= 2
    for record, (written, text) in seen.records.items():
        assert (record.stat().st_mtime_ns, record.read_text()) == (written, text)


def test_the_numbers_are_those_of_a_run_on_this_machine(seen, checkout):
    """The runs and curves of both presets' results are the same to the last bit."""
    shutil.copy(PRESET, checkout / "local.yaml")
    snakemake(checkout, "results/local/tables/runs.parquet", "--config", "preset=local.yaml")
    for table, keys in (("runs", ["run_id"]), ("curves", ["run_id", "split", "metric", "step"])):
        ours, theirs = (
            pd.read_parquet(checkout / f"results/{preset}/tables/{table}.parquet").set_index(keys).sort_index()
            for preset in ("cluster", "local")
        )
        columns = MEASURED if table == "runs" else ["value"]
        pd.testing.assert_frame_equal(ours[columns], theirs[columns], check_exact=True)
