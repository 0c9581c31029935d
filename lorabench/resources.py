"""What each job asks of a cluster, from the same estimates that `lorabench plan` prints. No torch: this is called for
every job of the DAG.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorabench import cost
from lorabench.config import Preset
from lorabench.memory import gpus_needed, sweep_memory
from lorabench.models.dimensions import dimensions

if TYPE_CHECKING:
    from lorabench.plan import EvalJob, Plan, Sweep

MB = 1e6
# Asked for over what is estimated: a job that is cut off costs more than one that waits a little longer to start.
_TIME_MARGIN, _MEMORY_MARGIN = 2.0, 1.25
_EXTRA_MINUTES = 10
# A process that has imported torch, transformers and peft, with its token caches or problem sets.
_PROCESS_MB = 1500


@dataclass(frozen=True)
class Resources:
    """What a job asks for."""

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
    """What the job leaves under results/."""


def sweep_resources(plan: Plan, sweep: Sweep) -> Resources:
    """Of a sweep's job.

    Raises:
        UserError: no number of GPUs that the preset allows holds it.
    """
    preset = plan.preset
    gpus = gpus_needed(preset, sweep)
    peak = sweep_memory(preset, sweep, max(1, gpus)).total
    trained = cost.trained_parameters(preset, sweep.condition)
    kept = sweep.n_runs if preset.execution.keep_weights == "all" else sweep.seeds
    seconds = cost.sweep_seconds(preset, sweep, gpus)
    return _resources(preset, sweep.condition.model, gpus, peak, seconds, 4 * trained * kept)


def evaluation_resources(plan: Plan, job: EvalJob) -> Resources:
    """Of an evaluation's job: one GPU, the model and its batch."""
    preset = plan.preset
    seconds = cost.evaluation_seconds(preset, job)
    gpus = 0 if preset.execution.gpu is None else 1
    weights = 6 * dimensions(preset.models[job.model]).parameters
    return _resources(preset, job.model, gpus, weights, seconds, 20 * MB)


def compute_resources(plan: Plan) -> Resources:
    """Of the job that measures training steps."""
    preset = plan.preset
    experiment = preset.experiments.compute
    assert experiment
    sizes = [dimensions(preset.models[name]) for name in experiment.models]
    largest = max(sizes, key=lambda size: size.parameters)
    arms = 1 + len(experiment.ranks)
    tokens = experiment.batch_size * experiment.sequence_length * (experiment.repeats + 4) * arms
    flops = sum(6.0 * size.active_linear * tokens for size in sizes)
    # The base, whose optimizer state stays beside that of each rank.
    peak = 18 * largest.parameters + sum(16 * largest.lora("all", rank, True)[0] for rank in experiment.ranks)
    gpus = 0 if preset.execution.gpu is None else 1
    model = experiment.models[sizes.index(largest)]
    return _resources(preset, model, gpus, peak, flops / cost.speed(preset.execution) + 60, MB)


def tokens_resources(preset: Preset, model: str, dataset: str) -> Resources:
    """Of the job that tokenizes a dataset: one core, no GPU."""
    spec = preset.datasets[dataset]
    examples = spec.train + spec.validation + spec.test
    tokens = examples * cost.tokens_per_example(preset.models[model], spec)
    # Ids of 4 bytes, a byte for what is scored, and the texts themselves.
    size = 5 * tokens
    minutes = math.ceil(_TIME_MARGIN * tokens / 500_000 / 60) + _EXTRA_MINUTES
    return Resources(0, 1, math.ceil(_PROCESS_MB + 6 * size / MB), 0, minutes, math.ceil(size / MB))


def _resources(preset: Preset, model: str, gpus: int, peak: float, seconds: float, disk: float) -> Resources:
    weights = 4 * dimensions(preset.models[model]).parameters
    host = peak if gpus == 0 else 1.5 * weights
    return Resources(
        gpus=gpus,
        cpus=preset.execution.threads * max(1, gpus),
        mem_mb=math.ceil(_PROCESS_MB + _MEMORY_MARGIN * host / MB),
        gpu_mem_mb=math.ceil(peak / MB) if gpus else 0,
        minutes=math.ceil(_TIME_MARGIN * seconds / 60) + _EXTRA_MINUTES,
        disk_mb=math.ceil(disk / MB),
    )
