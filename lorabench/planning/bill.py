"""The bill of a plan: the estimated cost of each experiment and of the whole plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lorabench.config.preset import Preset
from lorabench.planning.flops import evaluation_flops, run_tokens, sweep_flops
from lorabench.planning.plan import Plan
from lorabench.planning.resources import MB, Resources, compute_resources, evaluation_resources, job_resources
from lorabench.planning.seconds import compute_seconds, evaluation_seconds, job_seconds
from lorabench.runs import EvalJob, Job


@dataclass(frozen=True)
class JobCost:
    """The expected cost of a job. `tokens` pass forward and backward, those of an evaluation only forward."""

    requested: Resources
    hours: float
    """Wall-clock hours."""
    most_hours: float
    """Wall-clock hours of the largest possible number of runs."""
    runs: int = 0
    most_runs: int = 0
    tokens: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class Bill:
    """The expected cost of planned work."""

    jobs: int
    runs: int
    most_runs: int
    """The largest possible number of runs, which differs from `runs` where sweeps find their LRs."""
    tokens: float
    flops: float
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

    @classmethod
    def summed(cls, costs: Iterable[JobCost]) -> Bill:
        """Return the bill of some jobs: amounts of work are added, and of sizes of a job the largest is taken."""
        costs = list(costs)
        requests = [cost.requested for cost in costs]
        return cls(
            jobs=len(costs),
            runs=sum(cost.runs for cost in costs),
            most_runs=sum(cost.most_runs for cost in costs),
            tokens=sum(cost.tokens for cost in costs),
            flops=sum(cost.flops for cost in costs),
            job_hours=sum(cost.hours for cost in costs),
            most_job_hours=sum(cost.most_hours for cost in costs),
            gpu_hours=sum(cost.requested.gpus * cost.hours for cost in costs),
            most_gpu_hours=sum(cost.requested.gpus * cost.most_hours for cost in costs),
            longest_hours=max((cost.hours for cost in costs), default=0.0),
            gpus=max((job.gpus for job in requests), default=0),
            memory=MB * max((job.gpu_mem_mb if job.gpus else job.mem_mb for job in requests), default=0),
            disk=MB * sum(job.disk_mb for job in requests),
            working_disk=MB * max((job.working_disk_mb for job in requests), default=0),
        )


def training(plan: Plan, jobs: Iterable[Job]) -> Bill:
    """Return the bill of some of a plan's training jobs.

    Raises:
        UserError: a sweep fits on no number of GPUs that the preset allows.
    """
    return Bill.summed(_job_cost(plan, job) for job in jobs)


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
    jobs = {job: _job_cost(plan, job) for job in plan.jobs}
    rows = {name: [jobs[job] for job in plan.jobs_of(name)] for name in plan.preset.experiments.trained()}
    if plan.preset.experiments.compute is not None:
        hours = compute_seconds(plan.preset) / 3600
        rows["compute"] = [JobCost(compute_resources(plan), hours, hours)]
    if evaluations := [_evaluation_cost(plan, job) for job in plan.evaluations()]:
        rows["evaluation"] = evaluations
    rows["total"] = [*jobs.values(), *rows.get("compute", []), *evaluations]
    return {name: Bill.summed(costs) for name, costs in rows.items()}


def _job_cost(plan: Plan, job: Job) -> JobCost:
    preset, requested = plan.preset, job_resources(plan, job)
    hours, most_hours = (job_seconds(preset, job, requested.gpus, most) / 3600 for most in (False, True))
    tokens = sum(sweep.n_runs * run_tokens(preset, sweep.condition).trained for sweep in job.sweeps)
    flops = sum(sweep_flops(preset, sweep) for sweep in job.sweeps)
    return JobCost(requested, hours, most_hours, job.n_runs, job.most_runs, tokens, flops)


def _evaluation_cost(plan: Plan, job: EvalJob) -> JobCost:
    hours, (tokens, flops) = evaluation_seconds(plan.preset, job) / 3600, evaluation_flops(plan.preset, job)
    return JobCost(evaluation_resources(plan, job), hours, hours, tokens=tokens, flops=flops)


def minutes(plan: Plan, bill: Bill, cores: int, most: bool = False) -> float:
    """Estimate the wall-clock minutes of a CPU preset's bill on a machine with `cores` cores.

    With `most` they are those of the largest possible number of runs, else of the expected number.
    """
    hours = bill.most_job_hours if most else bill.job_hours
    return hours * 60 / max(1, min(jobs_at_once(plan.preset, cores), bill.jobs))


def jobs_at_once(preset: Preset, cores: int) -> int:
    """Return the number of jobs that run at once on `cores` cores, at least 1."""
    return max(1, cores // preset.execution.threads)
