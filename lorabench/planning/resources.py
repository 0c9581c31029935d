"""The resources that each job requests of a cluster, from the estimates that `lorabench plan` prints.

They are computed for every job of the DAG, so this module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from lorabench.config.preset import Preset
from lorabench.errors import UserError
from lorabench.models.specs import dimensions
from lorabench.planning.engine import engine_memory, handover_bytes, uses_engine
from lorabench.planning.flops import tokens_per_example
from lorabench.planning.memory import USABLE, gpus_needed, peak_bytes, step_memory, trained_parameters
from lorabench.planning.plan import Plan
from lorabench.planning.seconds import compute_seconds, evaluation_seconds, job_seconds, run_seconds
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
DOCTOR_MINUTES = 30
"""Minutes of the job that checks a machine."""
# MB of the host for that job, which computes a few layers of a large model on the CPU to compare with.
_DOCTOR_MEMORY = 48_000


@dataclass(frozen=True)
class Resources:
    """The resources that a job requests."""

    gpus: int
    """0 for a CPU job."""
    cpus: int
    mem_mb: int
    """Memory of the host."""
    gpu_mem_mb: int
    """Estimated peak on each GPU; 0 on a CPU."""
    minutes: int
    """Wall-clock limit: the estimate with a margin."""
    disk_mb: int
    """Size of the files that the job leaves under results/."""
    working_disk_mb: int = 0
    """The most that the job also needs there while it runs: checkpoints, and weights until the best LR is known."""
    saving_seconds: int = 0
    """Time in which the job ends its step and writes its checkpoints when it is asked to stop; 0 if it has none."""


def job_resources(plan: Plan, job: Job) -> Resources:
    """Return the resources of a training job: the memory of its largest sweep, and the most time that all may take.

    Raises:
        UserError: a sweep fits on no number of GPUs that the preset allows.
    """
    preset, keeps_all = plan.preset, plan.preset.execution.keep_weights == "all"
    gpus = max(gpus_needed(preset, sweep) for sweep in job.sweeps)
    peak = disk = working = saving = shared = state = 0.0
    for sweep in job.sweeps:
        condition = sweep.condition
        sizes = dimensions(preset.models[condition.model])
        trained = trained_parameters(preset, sizes, condition.rank, condition.placement)
        peak = max(peak, peak_bytes(preset, sweep, gpus))
        kept = sweep.most_runs if keeps_all else sweep.seeds.best
        disk += _WEIGHT * kept * trained
        # Besides the weights of all runs there are two checkpoints while one replaces the other.
        working = max(working, (_WEIGHT * (sweep.most_runs - kept) + 2 * _STATE) * trained)
        # The job is asked to stop when it has time for a step and for its checkpoint.
        step = sum(run_seconds(preset, sweep, gpus)) / condition.steps
        saving, state = max(saving, step + _STATE * trained / _WRITING), max(state, _STATE * trained)
        if uses_engine(preset, condition):
            # Engines take shared memory, where new weights are written beside the old, and on GPUs a process each.
            shared = max(shared, 2 * handover_bytes(preset, condition) + gpus * _GPU_PROCESS)
    seconds = job_seconds(preset, job, gpus, most=True)
    return replace(
        _resources(preset, job.sweeps[0].condition.model, gpus, peak, seconds, disk, shared, state),
        working_disk_mb=math.ceil(working / MB),
        saving_seconds=max(_LEAST_SAVING, math.ceil(_TIME_MARGIN * saving)),
    )


def evaluation_resources(plan: Plan, job: EvalJob) -> Resources:
    """Return the resources of an evaluation's job, which uses one GPU or a CPU.

    Raises:
        UserError: the model does not fit.
    """
    preset, evaluation = plan.preset, plan.preset.evaluation
    assert evaluation
    sizes = dimensions(preset.models[job.model])
    # Weights in fp32, with bf16 copies that may live at the same time; logits of a batch of long texts in both types.
    longest = 2 * max((task.mean_tokens for task in evaluation.tasks if task.about == "forgotten"), default=0)
    peak = 6.0 * sizes.parameters + 6.0 * evaluation.batch_size * longest * sizes.vocabulary
    if preset.execution.sampler == "vllm":
        peak = engine_memory(preset, job.model).total
    return _on_one(preset, "the evaluation", job.model, peak, evaluation_seconds(preset, job), 20 * MB)


def compute_resources(plan: Plan) -> Resources:
    """Return the resources of the job that measures training steps, which uses one GPU or a CPU.

    It holds all arms of a model at once, and they share its base.

    Raises:
        UserError: they do not fit.
    """
    preset = plan.preset
    experiment, protocol = preset.experiments.compute, preset.protocol
    assert experiment
    # The measured steps keep all activations, whatever the preset sets for training.
    measured, row = preset.with_execution(activation_checkpointing=False), experiment.sequence_length
    peaks = {}
    for model in experiment.models:
        sizes = dimensions(preset.models[model])
        adapters = sum(sizes.lora("all", rank, protocol.include_unembedding)[0] for rank in experiment.ranks)
        peaks[model] = 12 * adapters + step_memory(measured, sizes, None, None, experiment.batch_size * row, row).total
    largest = max(peaks, key=lambda model: peaks[model])
    return _on_one(preset, "experiment compute", largest, peaks[largest], compute_seconds(preset), MB)


def doctor_resources(plan: Plan) -> Resources:
    """Return the resources of the job that checks a machine: those of the largest job on one GPU, or on a CPU.

    Raises:
        UserError: a sweep fits on no number of GPUs that the preset allows.
    """
    jobs = [job_resources(plan, job) for job in plan.jobs]
    single = [job for job in jobs if job.gpus <= 1] or jobs
    gpus, execution = min(job.gpus for job in single), plan.preset.execution
    memory = max(max(job.mem_mb for job in single), _DOCTOR_MEMORY if gpus else 0)
    peak = max(job.gpu_mem_mb for job in single)
    return Resources(min(gpus, 1), execution.threads, math.ceil(memory), peak, DOCTOR_MINUTES, 0)


def tokens_resources(preset: Preset, model: str, dataset: str) -> Resources:
    """Return the resources of the job that tokenizes a dataset: a process per thread and one that writes, no GPU."""
    spec, processes = preset.datasets[dataset], preset.execution.threads
    tokens = (spec.train + spec.validation + spec.test) * tokens_per_example(preset.models[model], spec)
    seconds = tokens / (processes * _TOKENIZED_PER_SECOND)
    minutes = math.ceil(_TIME_MARGIN * seconds / 60) + _EXTRA_MINUTES
    # A token's id takes 4 bytes, its mask of scored tokens a byte; there are files of both and the cache made of them.
    memory, disk = (1 + processes) * _PROCESS, 2 * 5 * tokens
    return Resources(0, processes, math.ceil(memory / MB), 0, minutes, math.ceil(disk / MB))


def restarts(jobs: Iterable[Resources], limit: int) -> int:
    """Return the number of times that a limit in minutes may end the longest of some jobs before it is done."""
    return max((job.minutes for job in jobs), default=0) // limit


def _on_one(preset: Preset, what: str, model: str, peak: float, seconds: float, disk: float) -> Resources:
    """Return the resources of a job of one process, on a GPU if the preset has one."""
    gpu = preset.execution.gpu
    if gpu is None:
        return _resources(preset, model, 0, peak + _PROCESS, seconds, disk)
    available = USABLE * GPUS[gpu].memory
    if peak > available:
        raise UserError(
            f"{what} needs {peak / GB:.0f} GB for {model} on one {gpu}, which has {available / GB:.0f} GB to give; "
            f"leave that model out of it, or choose another execution.gpu"
        )
    return _resources(preset, model, 1, peak, seconds, disk)


def _resources(
    preset: Preset,
    model: str,
    gpus: int,
    peak: float,
    seconds: float,
    disk: float,
    shared: float = 0.0,
    state: float = 0.0,
) -> Resources:
    # Weights are read through the host's memory, and a GPU's checkpoint of `state` bytes is written from there.
    copied = max(6 * dimensions(preset.models[model]).parameters, state)
    host = shared + (copied + gpus * _GPU_PROCESS if gpus else peak)
    return Resources(
        gpus=gpus,
        cpus=preset.execution.threads * max(1, gpus),
        mem_mb=math.ceil(_MEMORY_MARGIN * host / MB),
        gpu_mem_mb=math.ceil(peak / MB) if gpus else 0,
        minutes=math.ceil(_TIME_MARGIN * seconds / 60) + _EXTRA_MINUTES,
        disk_mb=math.ceil(disk / MB),
    )
