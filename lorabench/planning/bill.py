"""The bill of a plan: the estimated cost of each experiment and of the whole plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lorabench.config.preset import Preset
from lorabench.errors import UserError
from lorabench.planning.flops import evaluation_flops, run_tokens, sweep_flops
from lorabench.planning.lane_count import lane_count
from lorabench.planning.plan import Plan
from lorabench.planning.resources import MB, Resources, compute_resources, evaluation_resources, job_resources
from lorabench.planning.seconds import compute_seconds, evaluation_seconds, job_seconds
from lorabench.runs import Job
from lorabench.utils.gpus import GPUS


@dataclass(frozen=True)
class Bill:
    """The expected cost of planned work. `tokens` pass forward and backward, those of an evaluation only forward."""

    jobs: int = 0
    runs: int = 0
    most_runs: int = 0
    """The largest possible number of runs, which differs from `runs` where sweeps find their LRs."""
    tokens: float = 0.0
    flops: float = 0.0
    job_hours: float = 0.0
    """Wall-clock hours of all jobs, one after the other."""
    most_job_hours: float = 0.0
    gpu_hours: float = 0.0
    most_gpu_hours: float = 0.0
    longest_hours: float = 0.0
    """Wall-clock hours of the longest job."""
    gpus: int = 0
    """GPUs of the largest job; 0 on a CPU."""
    memory: float = 0.0
    """Bytes: the largest peak of a job on each GPU, or on a CPU of its process."""
    disk: float = 0.0
    """Bytes that are kept under results/."""
    working_disk: float = 0.0
    """The most bytes that a job needs there besides while it runs."""
    lanes: int = 0
    """The largest number of runs that a job trains together; 0 where nothing is trained."""

    def __add__(self, other: Bill) -> Bill:
        """Add two bills: amounts of work are added, and of two sizes of a job the larger is taken."""
        return Bill(
            self.jobs + other.jobs,
            self.runs + other.runs,
            self.most_runs + other.most_runs,
            self.tokens + other.tokens,
            self.flops + other.flops,
            self.job_hours + other.job_hours,
            self.most_job_hours + other.most_job_hours,
            self.gpu_hours + other.gpu_hours,
            self.most_gpu_hours + other.most_gpu_hours,
            max(self.longest_hours, other.longest_hours),
            max(self.gpus, other.gpus),
            max(self.memory, other.memory),
            self.disk + other.disk,
            max(self.working_disk, other.working_disk),
            max(self.lanes, other.lanes),
        )


def training(plan: Plan, jobs: Iterable[Job]) -> Bill:
    """Return the bill of some of a plan's training jobs.

    Raises:
        UserError: a sweep fits on no number of GPUs that the preset allows.
    """
    preset, total = plan.preset, Bill()
    for job in jobs:
        requested = job_resources(plan, job)
        tokens = sum(sweep.n_runs * run_tokens(preset, sweep.condition).trained for sweep in job.sweeps)
        flops = sum(sweep_flops(preset, sweep) for sweep in job.sweeps)
        bill = _job(requested, job.n_runs, tokens, flops, job_seconds(preset, job, requested.gpus))
        most_hours = job_seconds(preset, job, requested.gpus, most=True) / 3600
        total += replace(
            bill,
            most_runs=job.most_runs,
            most_job_hours=most_hours,
            most_gpu_hours=requested.gpus * most_hours,
            lanes=max(lane_count(preset, sweep, requested.gpus) for sweep in job.sweeps),
        )
    return total


def evaluation(plan: Plan) -> Bill:
    """Return the bill of all evaluations with lm-eval."""
    total = Bill()
    for job in plan.evaluations():
        tokens, flops = evaluation_flops(plan.preset, job)
        total += _job(evaluation_resources(plan, job), 0, tokens, flops, evaluation_seconds(plan.preset, job))
    return total


def compute(plan: Plan) -> Bill:
    """Return the bill of the job that measures training steps, without tokens; it is empty if there is no such job."""
    if plan.preset.experiments.compute is None:
        return Bill()
    return _job(compute_resources(plan), 0, 0.0, 0.0, compute_seconds(plan.preset))


def _job(requested: Resources, runs: int, tokens: float, flops: float, seconds: float) -> Bill:
    hours = seconds / 3600
    memory = requested.gpu_mem_mb if requested.gpus else requested.mem_mb
    return Bill(
        jobs=1,
        runs=runs,
        tokens=tokens,
        flops=flops,
        job_hours=hours,
        most_job_hours=hours,
        gpu_hours=requested.gpus * hours,
        most_gpu_hours=requested.gpus * hours,
        longest_hours=hours,
        gpus=requested.gpus,
        memory=memory * MB,
        disk=requested.disk_mb * MB,
        working_disk=requested.working_disk_mb * MB,
    )


def per_experiment(plan: Plan) -> dict[str, Bill]:
    """Return the bills of each experiment alone, of the evaluation, and of the `total`, in which shared runs count
    once."""
    rows = {name: training(plan, plan.jobs_of(name)) for name in plan.preset.experiments.trained()}
    others = {"compute": compute(plan), "evaluation": evaluation(plan)}
    rows |= {name: bill for name, bill in others.items() if bill.jobs}
    return rows | {"total": total(plan)}


def total(plan: Plan) -> Bill:
    """Return the bill of the whole plan; runs that experiments share count once."""
    return training(plan, plan.jobs) + compute(plan) + evaluation(plan)


def minutes(plan: Plan, bill: Bill, cores: int, most: bool = False) -> float:
    """Estimate the wall-clock minutes of a CPU preset's bill on a machine with `cores` cores.

    With `most` they are those of the largest possible number of runs, else of the expected number.
    """
    hours = bill.most_job_hours if most else bill.job_hours
    return hours * 60 / max(1, min(jobs_at_once(plan.preset, cores), bill.jobs))


def jobs_at_once(preset: Preset, cores: int) -> int:
    """Return the number of jobs that run at once on `cores` cores, at least 1."""
    return max(1, cores // preset.execution.threads)


def on_gpu(preset: Preset, gpu: str) -> Preset:
    """Return the preset with another GPU, and without its `gflops`, which hold for its own GPU.

    Raises:
        UserError: the GPU is unknown.
    """
    if gpu not in GPUS:
        raise UserError(f"gpu {gpu!r} is not known; allowed: {', '.join(GPUS)}")
    execution = preset.execution.model_copy(update={"gpu": gpu, "gflops": None})
    return preset.model_copy(update={"execution": execution})
