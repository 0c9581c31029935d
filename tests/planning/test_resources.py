"""The resources that jobs request of a cluster are fast to compute and never less than the estimate."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

import pytest

from lorabench.config.loading import load_preset
from lorabench.models.specs import dimensions
from lorabench.planning import bill
from lorabench.planning.plan import make_plan
from lorabench.planning.resources import (
    compute_resources,
    evaluation_resources,
    job_resources,
    restarts,
    tokens_resources,
)
from lorabench.planning.seconds import job_seconds
from lorabench.runs import Job


def every_job(plan):
    """Return the resources of all jobs of a plan, by the jobs' ids."""
    preset = plan.preset
    jobs = {job.job_id: job_resources(plan, job) for job in plan.jobs}
    jobs |= {job.eval_id: evaluation_resources(plan, job) for job in plan.evaluations()}
    if preset.experiments.compute:
        jobs["compute"] = compute_resources(plan)
    return jobs


@pytest.mark.parametrize("name", ["laptop", "paper"])
def test_every_job_asks_for_something_sensible(name):
    plan = make_plan(load_preset(name))
    execution = plan.preset.execution
    jobs = every_job(plan)
    assert jobs
    for job in jobs.values():
        assert job.gpus in ((0,) if execution.gpu is None else (1, 2, 4, 8))
        assert job.gpus <= execution.max_gpus
        assert (job.gpu_mem_mb > 0) == (job.gpus > 0)
        assert job.cpus == execution.threads * max(1, job.gpus)
        assert job.mem_mb > 300
        assert job.disk_mb >= 1
    for job in plan.jobs:
        requested = jobs[job.job_id]
        assert requested.minutes * 60 > job_seconds(plan.preset, job, requested.gpus)


def test_tokens_take_no_gpu_and_no_more_memory_for_a_larger_dataset():
    paper = load_preset("paper")
    small, large = (tokens_resources(paper, "llama-3-1-8b-base", name) for name in ("tulu3-10k", "tulu3"))
    assert (small.gpus, small.cpus, large.gpu_mem_mb) == (0, paper.execution.threads, 0)
    # Tokenizing holds a part of the dataset in memory, so large datasets need no more.
    assert small.mem_mb == large.mem_mb
    assert small.disk_mb < large.disk_mb
    assert small.minutes <= large.minutes


def test_weights_of_the_best_runs_stay_on_disk():
    core = load_preset("core")
    plan = make_plan(core)
    full = next(s for s in plan.sweeps if s.condition.method == "fullft" and s.condition.model == "llama-3-2-1b-base")
    assert job_resources(plan, Job((full,))).disk_mb == pytest.approx(4 * 1235.8144 * full.seeds.best, abs=1)
    # Besides: the weights of the other runs until the best is known, and two checkpoints.
    working = job_resources(plan, Job((full,))).working_disk_mb
    assert working == pytest.approx((4 * (full.most_runs - full.seeds.best) + 2 * 12) * 1235.8144, abs=2)
    everything = make_plan(core.with_execution(keep_weights="all"))
    assert job_resources(everything, Job((full,))).disk_mb == pytest.approx(4 * 1235.8144 * full.most_runs, abs=1)


def test_a_job_is_asked_to_stop_as_early_as_its_checkpoints_take():
    plan = make_plan(load_preset("paper"))
    largest = max(plan.jobs, key=lambda job: job_resources(plan, job).gpus)
    parameters = dimensions(plan.preset.models[largest.sweeps[0].condition.model]).parameters
    assert parameters > 3e10
    # Weights and two moments in fp32 at 200 MB/s, twice; a step of SFT takes little beside them.
    writing = 2 * 12 * parameters / 200e6
    assert writing < job_resources(plan, largest).saving_seconds < 1.01 * writing
    small = make_plan(load_preset("smoke"))
    assert {job_resources(small, job).saving_seconds for job in small.jobs} == {120}


def test_the_bill_counts_the_gpus_that_jobs_ask_for():
    plan = make_plan(load_preset("paper"))
    largest = max(job.gpus for job in every_job(plan).values())
    assert bill.total(plan).gpus == largest > 1


def test_a_thousand_jobs_take_no_time_and_no_torch():
    script = (
        "import sys; from lorabench.config.loading import load_preset; from lorabench.planning.plan import make_plan;"
        "from lorabench.planning import bill, resources; from lorabench.doctor import speeds;"
        "from lorabench.cli import show;"
        "plan = make_plan(load_preset('paper')); bill.per_experiment(plan);"
        "assert not {'torch', 'transformers', 'pandas', 'numpy', 'pyarrow'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    plan = make_plan(load_preset("paper"))
    jobs = len(every_job(plan))
    started = time.process_time()
    for _ in range(1000 // jobs + 1):
        every_job(plan)
    assert time.process_time() - started < 5


def test_a_limit_ends_the_longest_job_so_often():
    plan = make_plan(load_preset("smoke"))
    jobs = [replace(job_resources(plan, plan.jobs[0]), minutes=minutes) for minutes in (30, 3000)]
    assert [restarts(jobs, limit) for limit in (3001, 3000, 1440, 60)] == [0, 1, 2, 50]
    assert restarts([], 60) == 0
