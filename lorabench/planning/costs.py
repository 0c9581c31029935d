"""What each job of a plan costs and requests of a cluster, and what experiments and the whole plan cost; no torch.

Each function that returns costs raises a UserError where a job fits on no number of GPUs that the preset allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from lorabench.config.fields import FROM_WEIGHTS
from lorabench.config.preset import Preset
from lorabench.errors import UserError
from lorabench.models.specs import dimensions
from lorabench.planning import flops, seconds
from lorabench.planning.memory import USABLE, engine_memory, handover_bytes, step_memory, sweep_memory, uses_engine
from lorabench.planning.plan import Plan
from lorabench.planning.roofline import arm_seconds
from lorabench.runs import EvalJob, Job
from lorabench.utils.gpus import GB, GPUS

MB = 1e6
# Bytes of a trained parameter in kept weights, and in a checkpoint, which also has Adam's two moments.
_WEIGHT, _STATE = 4, 12
# Factors on the estimates, because a job that is cut off costs more than one that waits a little longer to start.
_TIME_MARGIN, _MEMORY_MARGIN = 2.0, 1.25
_EXTRA_MINUTES = 10
# Guesses in bytes: a CPU process with its libraries and data, and the host memory of a GPU process besides weights.
_PROCESS, _GPU_PROCESS = 1.5e9, 6e9
# An assumption, until it is measured: bytes/s at which a job writes its checkpoints to a shared file system, and the
# least seconds that it is given for them.
_WRITING, _LEAST_SAVING = 200 * MB, 120
# Tokens per second of one process. The tiny base's tokenizer was measured at 280,000 to 580,000 on one core; large ones
# are slower.
_TOKENIZED_PER_SECOND = 100_000
# Bytes of a CPU process that trains, in RL with the graders' processes: measured on `laptop`.
_SFT_PROCESS, _RL_PROCESS = 0.54 * GB, 0.85 * GB


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one job requests, and what it or several jobs are expected to take."""

    jobs: int = 1
    runs: int = 0
    most_runs: int = 0
    """The largest possible number of runs, which differs from `runs` where sweeps find their LRs."""
    tokens: float = 0.0
    """Tokens that pass forward and backward; of an evaluation those that pass forward."""
    flops: float = 0.0
    job_hours: float = 0.0
    """Wall-clock hours of all jobs, one after the other."""
    longest_job_hours: float = 0.0
    most_job_hours: float = 0.0
    gpu_hours: float = 0.0
    most_gpu_hours: float = 0.0
    gpus: int
    """GPUs of the largest job; 0 on a CPU."""
    memory: float
    """Bytes: the largest peak of a job on each GPU, or on a CPU of its process."""
    disk: float
    """Bytes that are kept under results/."""
    working_disk: float = 0.0
    """The most bytes that a job also needs there while it runs: checkpoints, and weights until the best LR is known."""
    cpus: int
    mem_mb: int
    """Memory of the host."""
    minutes: int
    """Wall-clock limit of a job: the most hours with a margin."""
    saving_seconds: int = 0
    """Time in which the job ends its step and writes its checkpoints when it is asked to stop; 0 if it has none."""


# Of these the largest of several jobs counts; all other fields are added.
_LARGEST = {"longest_job_hours", "gpus", "memory", "working_disk", "cpus", "mem_mb", "minutes", "saving_seconds"}


def combined(costs: Iterable[Cost]) -> Cost:
    """Return the cost of some jobs together."""
    jobs = list(costs)
    columns: dict[str, Any] = {field.name: [getattr(job, field.name) for job in jobs] for field in fields(Cost)}
    return Cost(**{name: max(column) if name in _LARGEST else sum(column) for name, column in columns.items()})


def per_experiment(plan: Plan) -> dict[str, Cost]:
    """Return the cost of each experiment, of the `evaluation`, and of the `total`, in which shared runs count once."""
    trained = {job: job_cost(plan, job) for job in plan.jobs}
    rows = {name: [trained[job] for job in plan.jobs_of(name)] for name in plan.preset.experiments.trained()}
    if plan.preset.experiments.compute is not None:
        rows["compute"] = [compute_cost(plan)]
    if evaluations := [evaluation_cost(plan, job) for job in plan.evaluations()]:
        rows["evaluation"] = evaluations
    rows["total"] = [*trained.values(), *rows.get("compute", []), *evaluations]
    return {name: combined(jobs) for name, jobs in rows.items()}


def path_hours(plan: Plan, job: Job) -> float:
    """Return the wall-clock hours of a training job that no number of machines makes fewer.

    They are those of the expected number of runs, or of waves where each run is a job of its own.
    """
    return job_cost(plan, job).longest_job_hours * (len(job.sweeps[0].expected_waves()) if plan.is_split(job) else 1)


def job_cost(plan: Plan, job: Job) -> Cost:
    """Return the cost of the sweeps of a training job: the memory of the largest, and the time that all take.

    Where each run is a job of its own, a request is that of one run.
    """
    preset, keeps_all, is_split = plan.preset, plan.preset.execution.keep_weights == "all", plan.is_split(job)
    gpus = max(plan.gpus[sweep] for sweep in job.sweeps)
    peak = disk = working = saving = shared = state = 0.0
    for sweep in job.sweeps:
        condition = sweep.condition
        sizes = dimensions(preset.models[condition.model])
        lora = flops.lora_parameters(preset, sizes, condition.rank, condition.placement)[0]
        trained = sizes.parameters if condition.rank is None else lora
        # On a CPU whole processes count, and on a GPU the tensors.
        process = 0.0 if gpus else _SFT_PROCESS if condition.rollouts is None else _RL_PROCESS
        peak = max(peak, process + sweep_memory(preset, sweep, max(1, gpus)))
        kept = sweep.most_runs if keeps_all else sweep.seeds.best
        # PiSSA and OLoRA are saved as LoRA of twice the rank.
        saved = (2 if condition.method in FROM_WEIGHTS else 1) * trained
        disk += _WEIGHT * kept * saved
        # Besides the weights of all runs there are two checkpoints of a run while one replaces the other.
        at_once = max(sweep.expected_waves()) if is_split else 1
        working = max(working, _WEIGHT * (sweep.most_runs - kept) * saved + 2 * _STATE * at_once * trained)
        # The job is asked to stop when it has time for a step and for its checkpoint.
        step = sum(seconds.run_seconds(preset, sweep, gpus)) / condition.steps
        saving, state = max(saving, step + _STATE * trained / _WRITING), max(state, _STATE * trained)
        if uses_engine(preset, condition):
            # Engines take shared memory, where new weights are written beside the old, and on GPUs a process each.
            shared = max(shared, 2 * handover_bytes(preset, condition) + gpus * _GPU_PROCESS)
    most_runs = sum(sweep.most_runs for sweep in job.sweeps)
    if is_split:
        times, most_times = job.n_runs, most_runs
        time = most_time = seconds.job_seconds(preset, job, gpus, "one")
    else:
        times = most_times = 1
        time, most_time = seconds.job_seconds(preset, job, gpus), seconds.job_seconds(preset, job, gpus, "most")
    # Weights are read through the host's memory, and a GPU's checkpoint is written from there.
    host = peak
    if gpus:
        host = max(6 * dimensions(preset.models[job.sweeps[0].condition.model]).parameters, state) + gpus * _GPU_PROCESS
    return _cost(
        preset,
        gpus,
        peak,
        shared + host,
        disk,
        most_time,
        runs=job.n_runs,
        most_runs=most_runs,
        tokens=sum(sweep.n_runs * flops.run_work(preset, sweep.condition).trained for sweep in job.sweeps),
        flops=sum(flops.sweep_flops(preset, sweep) for sweep in job.sweeps),
        job_hours=times * time / 3600,
        most_job_hours=most_times * most_time / 3600,
        longest_job_hours=time / 3600,
        working_disk=MB * math.ceil(working / MB),
        saving_seconds=max(_LEAST_SAVING, math.ceil(_TIME_MARGIN * saving)),
    )


def evaluation_cost(plan: Plan, job: EvalJob) -> Cost:
    """Return the cost of an evaluation with lm-eval, which uses one GPU or a CPU."""
    preset, evaluation = plan.preset, plan.preset.evaluation
    assert evaluation
    sizes = dimensions(preset.models[job.model])
    # Weights in fp32, with bf16 copies that may live at the same time; logits of a batch of long texts in both types.
    longest = 2 * max((task.mean_tokens for task in evaluation.tasks if task.about == "forgotten"), default=0)
    own = 6.0 * sizes.parameters + 6.0 * evaluation.batch_size * longest * sizes.vocabulary
    peak = engine_memory(preset, job.model)[0] if preset.execution.sampler == "vllm" else own
    tokens = sum(min(task.documents, task.limit or task.documents) * task.mean_tokens for task in evaluation.tasks)
    work = {"tokens": tokens, "flops": 2.0 * sizes.active_linear * tokens}
    return _on_one(preset, "the evaluation", job.model, peak, seconds.evaluation_seconds(preset, job), 20 * MB, **work)


def compute_cost(plan: Plan) -> Cost:
    """Return the cost of the job that measures training steps, which uses one GPU or a CPU.

    It holds all arms of a model at once, and they share its base.
    """
    preset = plan.preset
    experiment, head = preset.experiments.compute, preset.protocol.include_unembedding
    assert experiment
    # The measured steps keep all activations, whatever the preset sets for training.
    measured, row = preset.with_execution(activation_checkpointing=False), experiment.sequence_length
    batch, time, peaks = experiment.batch_size * row, seconds.start_seconds(preset), {}
    for model in experiment.models:
        sizes = dimensions(preset.models[model])
        adapters = [sizes.lora("all", rank, head) for rank in experiment.ranks]
        base = sum(step_memory(measured, sizes, None, None, batch, row))
        peaks[model] = 12 * sum(parameters for parameters, _ in adapters) + base
        # A few steps more than are timed count FLOPs and measure memory.
        steps = experiment.repeats + 8
        if preset.execution.gpu is None:
            arms = None, *(active for _, active in adapters)
            per_token = sum(flops.linear_flops_per_token(sizes, lora) for lora in arms)
            time += steps * batch * per_token / seconds.flops_per_second(preset.execution)
            continue
        for rank in (None, *experiment.ranks):
            each = arm_seconds(measured, sizes, rank, "all" if rank else None, batch, row / 2, row / 2)
            time += steps * preset.execution.gpu_time * (batch * sum(map(sum, each.trained)) + each.each_step)
    largest = max(peaks, key=lambda model: peaks[model])
    return _on_one(preset, "experiment compute", largest, peaks[largest], time, MB)


def doctor_cost(plan: Plan) -> Cost:
    """Return the cost of the job that checks a machine: the memory of the largest job on one GPU, or on a CPU."""
    jobs = [job_cost(plan, job) for job in plan.jobs]
    largest = combined([job for job in jobs if job.gpus <= 1] or jobs)
    # To compare with a GPU, a few layers of a large model are computed on the CPU.
    mem_mb, cpus = max(largest.mem_mb, 48_000 if largest.gpus else 0), plan.preset.execution.threads
    return Cost(gpus=min(largest.gpus, 1), memory=largest.memory, disk=0, cpus=cpus, mem_mb=mem_mb, minutes=30)


def tokens_cost(preset: Preset, model: str, dataset: str) -> Cost:
    """Return the cost of the job that tokenizes a dataset: a process per thread and one that writes, no GPU."""
    spec, processes = preset.datasets[dataset], preset.execution.threads
    tokens = (spec.train + spec.validation + spec.test) * flops.tokens_per_example(preset.models[model], spec)
    time = tokens / (processes * _TOKENIZED_PER_SECOND)
    memory, minutes = (1 + processes) * _PROCESS, math.ceil(_TIME_MARGIN * time / 60) + _EXTRA_MINUTES
    # A token's id takes 4 bytes, its mask of scored tokens a byte; there are files and the cache made of them.
    disk = MB * math.ceil(2 * 5 * tokens / MB)
    return Cost(gpus=0, memory=memory, disk=disk, cpus=processes, mem_mb=math.ceil(memory / MB), minutes=minutes)


def _on_one(preset: Preset, what: str, model: str, peak: float, time: float, disk: float, **work: Any) -> Cost:
    """Return the cost of a job of one process, on a GPU if the preset has one."""
    gpu, hours = preset.execution.gpu, time / 3600
    gpus, host = 1, 6 * dimensions(preset.models[model]).parameters + _GPU_PROCESS
    if gpu is None:
        gpus, peak = 0, peak + _PROCESS
        host = peak
    elif peak > (available := USABLE * GPUS[gpu].memory):
        raise UserError(
            f"{what} needs {peak / GB:.0f} GB for {model} on one {gpu}, which has {available / GB:.0f} GB to give; "
            f"leave that model out of it, or choose another execution.gpu"
        )
    work |= {"job_hours": hours, "most_job_hours": hours, "longest_job_hours": hours}
    return _cost(preset, gpus, peak, host, disk, time, **work)


def _cost(preset: Preset, gpus: int, peak: float, host: float, disk: float, most_time: float, **work: Any) -> Cost:
    """Return the cost of a job that takes `most_time` seconds at most, and `host` bytes of the host's memory."""
    mem_mb = math.ceil(_MEMORY_MARGIN * host / MB)
    return Cost(
        gpu_hours=gpus * work["job_hours"],
        most_gpu_hours=gpus * work["most_job_hours"],
        gpus=gpus,
        memory=MB * (math.ceil(peak / MB) if gpus else mem_mb),
        disk=MB * math.ceil(disk / MB),
        cpus=preset.execution.threads * max(1, gpus),
        mem_mb=mem_mb,
        minutes=math.ceil(_TIME_MARGIN * most_time / 60) + _EXTRA_MINUTES,
        **work,
    )
