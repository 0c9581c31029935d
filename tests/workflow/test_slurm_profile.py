"""The Slurm profile without a cluster: the resources that jobs would request. tests/slurm runs it on a real Slurm."""

import os
import re

import pytest

from lorabench.planning.costs import evaluation_cost, job_cost
from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout

from ..forks import run_forked
from .checkout import adapt_profile, fresh_clone, git, snakemake

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return fresh_clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture
def checkout(clone):
    yield clone
    git(clone, "checkout", "-q", ".")


def requested(output: str, rule: str) -> dict[str, dict[str, str]]:
    """Return the resources of a rule's jobs in a dry run, by the jobs' first wildcard."""
    jobs = {}
    for block in re.findall(rf"^rule {rule}:\n((?:    .*\n)+)", output, re.MULTILINE):
        name, [resources] = re.search(r"wildcards: \w+=([^,\n]+)|$", block)[1], re.findall(r"resources: (.*)", block)
        jobs[name] = dict(re.findall(r"(\w+)=([^,]+)", resources))
    return jobs


@pytest.fixture(autouse=True)
def partition(tmp_path_factory, monkeypatch):
    """A stand-in of sinfo that reports partitions; returns a function that sets the limit of the default one."""
    folder = tmp_path_factory.mktemp("bin")

    def set_limit(limit: str) -> None:
        # The executor wants squeue where there is sinfo.
        for name, reports in (("sinfo", f"echo 'main*|{limit}'; echo 'short|12:00:00'"), ("squeue", "exit 0")):
            (folder / name).write_text(f"#!/bin/sh\n{reports}\n")
            (folder / name).chmod(0o755)

    set_limit("infinite")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return set_limit


def dry_run(checkout, *arguments: str, preset: str = "paper") -> str:
    options = ["--profile", "slurm", "--dry-run", *arguments, "--config", f"preset={preset}"]
    status, output = run_forked(["snakemake", "--cores", "2", *options], checkout)
    assert status == 0, output
    return output


def test_every_job_requests_the_resources_of_the_plan(checkout):
    output = dry_run(checkout)
    plan = make_plan(Layout.of("paper").preset)
    # The runs of a sweep that is too long for one job are jobs of their own, which request the same.
    jobs, evaluations = requested(output, "train") | requested(output, "train_run"), requested(output, "evaluate")
    assert requested(output, "train_run").keys() == {job.job_id for job in plan.jobs if plan.is_split(job)}
    needed = {job.job_id: job_cost(plan, job) for job in plan.jobs}
    needed |= {job.eval_id: evaluation_cost(plan, job) for job in plan.evaluations()}
    assert jobs.keys() | evaluations.keys() == needed.keys()
    for name, resources in (jobs | evaluations).items():
        estimate = needed[name]
        numbers = [int(resources[name]) for name in ("gpu", "cpus_per_task", "mem_mb", "runtime", "nodes")]
        assert numbers == [estimate.gpus, estimate.cpus, estimate.mem_mb, estimate.minutes, 1]
        # Jobs that save checkpoints are told before their time is over, by half of it at most.
        early = min(estimate.saving_seconds, 30 * estimate.minutes)
        assert resources.get("slurm_extra") == (f"--signal=TERM@{early}" if early else None)
        assert not {"gres", "gpu_model"} & resources.keys()
    assert all("gpu" not in resources for resources in requested(output, "tokens").values())


def test_what_a_site_sets_is_what_jobs_request(checkout, partition):
    """The GPUs by a name or as gres, no memory and cores beside them, and no more time than the partition allows."""
    plan = make_plan(Layout.of("core").preset)
    partition("1-00:00:00")
    adapt_profile(checkout, "# gpu_type: h100", "gpu_type: h100")
    for changes, limit in (
        ({}, 1440),
        ({"gpu_option: gpu": "gpu_option: gres", "# slurm_partition: gpu": "slurm_partition: main,short"}, 720),
        (
            {
                "# max_runtime: 1440": "max_runtime: 600",
                "mem_with_gpus: true": "mem_with_gpus: false",
                "cpus_with_gpus: true": "cpus_with_gpus: false",
            },
            600,
        ),
    ):
        for old, new in changes.items():
            adapt_profile(checkout, old, new)
        output = dry_run(checkout, preset="core")
        trained, tokens = requested(output, "train") | requested(output, "train_run"), requested(output, "tokens")
        minutes = {name: int(resources["runtime"]) for name, resources in trained.items()}
        assert minutes == {job.job_id: min(limit, job_cost(plan, job).minutes) for job in plan.jobs}
        assert max(minutes.values()) == limit
        for name, resources in trained.items():
            if limit == 1440:
                assert resources["gpu_model"] == "h100"
            else:
                assert resources["gres"] == f"gpu:h100:{job_cost(plan, plan.job(name)).gpus}"
                assert not {"gpu", "gpu_model"} & resources.keys()
            # The executor leaves out --mem for 0, and --cpus-per-task for a negative number.
            assert ((resources["mem_mb"], resources["cpus_per_task"]) == ("0", "-1")) == (limit == 600)
        for resources in tokens.values():
            assert not {"gres", "gpu_model"} & resources.keys()
            assert min(int(resources["mem_mb"]), int(resources["cpus_per_task"])) > 0


def test_a_limit_that_nobody_knows_is_asked_for_before_a_long_job_is_submitted(checkout, partition):
    partition("n/a")
    output = snakemake(checkout, "--profile", "slurm", "--config", "preset=core", fails=True)
    sentence = "sinfo does not say how long the partition lets a job run: set max_runtime in the profile"
    assert sentence in output
    assert "Traceback" not in output
    assert not (checkout / "results/core").exists()
    # A dry run submits nothing, so it only says so.
    assert sentence in dry_run(checkout, preset="core")


def test_a_wrong_setting_is_one_sentence(checkout):
    for old, new, sentence in (
        ("# max_runtime: 1440", "max_runtime: 0", "max_runtime = 0 in the profile: minutes are needed"),
        ("gpu_option: gpu", "gpu_option: grse", "gpu_option = 'grse' in the profile: allowed: gpu, gres"),
    ):
        adapt_profile(checkout, old, new)
        arguments = ("--dry-run", "results/smoke/plan.parquet", "--config", "preset=smoke")
        output = snakemake(checkout, "--profile", "slurm", *arguments, fails=True)
        assert sentence in output
        assert "Traceback" not in output
        adapt_profile(checkout, new, old)
    # Arrays of jobs would wait forever.
    output = snakemake(checkout, "--profile", "slurm", "--slurm-array-jobs=all", *arguments[1:], fails=True)
    assert "slurm-array-jobs = 'all': leave this option out" in output
