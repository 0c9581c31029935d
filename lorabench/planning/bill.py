"""The bill of a plan: the estimated cost of each experiment and of the whole plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from lorabench.config.preset import Preset
from lorabench.models.specs import dimensions
from lorabench.planning.flops import evaluated_documents, run_tokens, sweep_flops
from lorabench.planning.plan import Plan
from lorabench.planning.resources import MB, Resources, compute_resources, evaluation_resources, job_resources
from lorabench.planning.seconds import compute_seconds, evaluation_seconds, job_seconds
from lorabench.runs import EvalJob, Job


@dataclass(frozen=True, kw_only=True)
class Bill:
    """The expected cost of planned work."""

    jobs: int
    runs: int = 0
    most_runs: int = 0
    """The largest possible number of runs, which differs from `runs` where sweeps find their LRs."""
    tokens: float = 0.0
    """Tokens that pass forward and backward; of an evaluation those that pass forward."""
    flops: float = 0.0
    job_hours: float
    """Wall-clock hours of all jobs, one after the other."""
    most_job_hours: float
    gpu_hours: float
    most_gpu_hours: float
    longest_hours: float
    """Wall-clock hours of the longest job."""
    gpus: int
    """GPUs of the largest job; 0 on a CPU."""
    memory: float
    """Bytes: the largest peak of a job on each GPU, or on a CPU of its process."""
    disk: float
    """Bytes that are kept under results/."""
    working_disk: float
    """The most bytes that a job also needs there while it runs."""


# Of these the largest of several jobs counts; all other fields are added.
_LARGEST = {"longest_hours", "gpus", "memory", "working_disk"}


def _summed(bills: Iterable[Bill]) -> Bill:
    jobs = list(bills)
    columns: dict[str, Any] = {field.name: [getattr(job, field.name) for job in jobs] for field in fields(Bill)}
    largest = {name: max(columns.pop(name), default=0) for name in _LARGEST}
    return Bill(**largest, **{name: sum(column) for name, column in columns.items()})


def training(plan: Plan, jobs: Iterable[Job]) -> Bill:
    """Return the bill of some of a plan's training jobs.

    Raises:
        UserError: a sweep fits on no number of GPUs that the preset allows.
    """
    return _summed(_training_job(plan, job) for job in jobs)


def total(plan: Plan) -> Bill:
    """Return the bill of the whole plan; runs that experiments share count once.

    Raises:
        UserError: a job fits on no number of GPUs that the preset allows.
    """
    return per_experiment(plan)["total"]


def per_experiment(plan: Plan) -> dict[str, Bill]:
    """Return the bills of each experiment alone, of the evaluation with lm-eval, and of the `total`, in which shared
    runs count once.

    Raises:
        UserError: a job fits on no number of GPUs that the preset allows.
    """
    jobs = {job: _training_job(plan, job) for job in plan.jobs}
    rows = {name: [jobs[job] for job in plan.jobs_of(name)] for name in plan.preset.experiments.trained()}
    if plan.preset.experiments.compute is not None:
        hours = compute_seconds(plan.preset) / 3600
        rows["compute"] = [_one_job(compute_resources(plan), hours, hours)]
    if evaluations := [_evaluation(plan, job) for job in plan.evaluations()]:
        rows["evaluation"] = evaluations
    rows["total"] = [*jobs.values(), *rows.get("compute", []), *evaluations]
    return {name: _summed(bills) for name, bills in rows.items()}


def _training_job(plan: Plan, job: Job) -> Bill:
    preset, requested = plan.preset, job_resources(plan, job)
    hours, most_hours = (job_seconds(preset, job, requested.gpus, most) / 3600 for most in (False, True))
    tokens = sum(sweep.n_runs * run_tokens(preset, sweep.condition).trained for sweep in job.sweeps)
    flops = sum(sweep_flops(preset, sweep) for sweep in job.sweeps)
    runs, most_runs = job.n_runs, job.most_runs
    return _one_job(requested, hours, most_hours, runs=runs, most_runs=most_runs, tokens=tokens, flops=flops)


def _evaluation(plan: Plan, job: EvalJob) -> Bill:
    preset, hours = plan.preset, evaluation_seconds(plan.preset, job) / 3600
    assert preset.evaluation
    tokens = sum(evaluated_documents(task) * task.mean_tokens for task in preset.evaluation.tasks)
    flops = 2.0 * dimensions(preset.models[job.model]).active_linear * tokens
    return _one_job(evaluation_resources(plan, job), hours, hours, tokens=tokens, flops=flops)


def _one_job(requested: Resources, hours: float, most_hours: float, **work: Any) -> Bill:
    gpus = requested.gpus
    return Bill(
        **work,
        jobs=1,
        job_hours=hours,
        most_job_hours=most_hours,
        gpu_hours=gpus * hours,
        most_gpu_hours=gpus * most_hours,
        longest_hours=hours,
        gpus=gpus,
        memory=MB * (requested.gpu_mem_mb if gpus else requested.mem_mb),
        disk=MB * requested.disk_mb,
        working_disk=MB * requested.working_disk_mb,
    )


def minutes(plan: Plan, bill: Bill, cores: int, most: bool = False) -> float:
    """Estimate the wall-clock minutes of a CPU preset's bill on a machine with `cores` cores.

    With `most` they are those of the largest possible number of runs, else of the expected number.
    """
    hours = bill.most_job_hours if most else bill.job_hours
    return hours * 60 / max(1, min(jobs_at_once(plan.preset, cores), bill.jobs))


def jobs_at_once(preset: Preset, cores: int) -> int:
    """Return the number of jobs that run at once on `cores` cores, at least 1."""
    return max(1, cores // preset.execution.threads)
