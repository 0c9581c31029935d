"""`snakemake --cores all --profile slurm` on a real Slurm: what jobs request, and what they survive."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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


@dataclass
class Watcher:
    """Records the steps of each run's checkpoints while jobs run, in the order of time."""

    runs: Path
    steps: dict[str, list[int]] = field(default_factory=dict)

    def __enter__(self) -> "Watcher":
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stopped.wait(0.05):
            for path in self.runs.glob("*.partial/checkpoint.safetensors"):
                try:
                    step = saved_step(path)
                except FileNotFoundError:  # The run has just ended.
                    continue
                seen = self.steps.setdefault(path.parent.name.removesuffix(".partial"), [])
                if not seen or seen[-1] != step:
                    seen.append(step)

    def middle(self, sweep: Sweep) -> str | None:
        """Return a run of the sweep that is half done, once another run has ended; else None."""
        grid = [run.run_id for run in sweep.grid()]
        ended = [run for run in grid if (self.runs / run).exists()]
        middle = range(3, sweep.condition.steps)
        going = [run for run in grid if run not in ended and self.steps.get(run, [0])[-1] in middle]
        return going[0] if ended and going else None


@pytest.fixture(scope="module")
def seen(cluster, checkout):
    """The whole preset, while one job is cancelled, another one is killed, and then the node goes down.

    It has the jobs; the steps of all checkpoints and those at which a run was stopped; and time and content of the
    records of runs that had ended before a disturbance.
    """
    runs = checkout / "results/cluster/runs"
    stopped_at: dict[str, int] = {}
    records: dict[Path, tuple[int, str]] = {}

    def remember(run: str) -> None:
        stopped_at[run] = watcher.steps[run][-1]
        for record in runs.glob("*/record.json"):
            records.setdefault(record, (record.stat().st_mtime_ns, record.read_text()))

    with Watcher(runs) as watcher, workflow(cluster, checkout, "--set-resources", "compute:gpu=2") as output:

        def wait(condition: Callable[[], str | None], what: str) -> str:
            value = until(lambda: condition() or output(), what, 240)
            assert value != output(), f"the workflow ended before {what}"
            return value

        remember(wait(lambda: watcher.middle(CANCELLED), "a sweep in its middle"))
        cluster("scancel", job_tries(cluster.jobs(), STOPPED)[0]["JobId"])
        run = wait(lambda: watcher.middle(KILLED), "another sweep in its middle")
        remember(run)
        os.kill(training(STOPPED), signal.SIGKILL)
        # Steps until now were made by the killed process and not by the next try.
        time.sleep(0.5)
        remember(run)
        remember(wait(lambda: run if watcher.steps[run][-1] > stopped_at[run] else None, "a job that is tried again"))
        cluster.node_state("down")
        cluster.node_state("resume")
        until(output, "the end of the workflow", 300)
    return SimpleNamespace(jobs=cluster.jobs(), steps=watcher.steps, stopped_at=stopped_at, records=records)


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


def test_a_stopped_job_is_tried_again_and_goes_on(seen):
    tries = job_tries(seen.jobs, STOPPED)
    assert [job["JobState"] for job in tries] == ["CANCELLED", "FAILED", "COMPLETED"]
    minutes = job_cost(PLAN, STOPPED).minutes
    assert [job["TimeLimit"] for job in tries] == [f"00:{number * minutes:02}:00" for number in (1, 2, 3)]
    # A job that lost its node is put back into the queue by Slurm itself.
    assert {job["JobState"] for job in seen.jobs if int(job["Restarts"])} == {"COMPLETED"}
    assert len(seen.stopped_at) >= 2
    for run, steps in seen.steps.items():
        assert steps == sorted(steps), f"{run} did not go on from its checkpoint: {steps}"


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


@pytest.mark.slow
def test_decide_runs_its_batches_as_jobs(cluster, checkout):
    command = [str(Path(sys.executable).with_name("lorabench")), "decide", "B3", "--preset", "cluster.yaml"]
    command += ["--budget", "4m", "--profile", "slurm"]
    done = subprocess.run(command, cwd=checkout, env=cluster.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all batches together" in done.stdout
    assert "cluster.yaml@100 is registered in workflow/frozen/" in done.stdout
    # The batch has seeds of its own, so that no job of the preset itself stands for it.
    [job] = make_plan(Layout.of(f"{PRESET}@100").preset).jobs_of("rank")
    assert job_tries(cluster.jobs(), job)[-1]["JobState"] == "COMPLETED"
