"""Estimate the seconds that sweeps, jobs and evaluations take."""

from __future__ import annotations

from math import ceil, inf, sqrt
from typing import Literal, NamedTuple

from lorabench.config.execution import Execution
from lorabench.config.fields import CHANGES_BASE
from lorabench.config.inputs import FileDataset, HubDataset
from lorabench.config.preset import Preset
from lorabench.models.specs import Dimensions, dimensions
from lorabench.planning import memory
from lorabench.planning.flops import (
    graded_problems,
    longest_sequence,
    run_work,
    share_rows,
    unembedding_flops_per_token,
)
from lorabench.planning.roofline import Parts, StepSeconds, arm_seconds, step_seconds
from lorabench.runs import Condition, EvalJob, Job, Sweep
from lorabench.utils.gpus import GPUS

# Seconds in which a job imports its libraries, loads and writes: on one core, there with lm-eval's libraries, and on a
# GPU, where it is an assumption until runs are measured, as are the bytes/s at which weights are read from disk.
_START_SECONDS, _EVALUATION_START_SECONDS, _GPU_START_SECONDS, _READING = 6.0, 12.0, 60.0, 1e9
# Seconds in which vLLM starts: on a CPU measured on the tiny bases (14 to 30), on a GPU an assumption.
_ENGINE_START_SECONDS, _GPU_ENGINE_START_SECONDS = 20.0, 90.0
# Seconds of drawing a token on a CPU over those of a forward pass for one token of a text: one position at a time
# leaves most of a machine idle. On one core the tiny base draws 11,000 tokens a second; at 50 GFLOP/s it would read
# 30,000. The engine vLLM takes more, over this project's own sampler: measured for 64 responses of SmolLM2-135M with 16
# tokens each on two cores.
_DECODING = {"own": 3.0, "vllm": 3.0 * 4.2}
# Seconds of launching one layer from Python for one position: the least that a drawn token takes, whatever the batch.
_LAYER_SECONDS = 0.8e-3
# Assumed for GPUs until it is measured: the share of a GPU's peaks (of products, and of reading memory) that the engine
# reaches; the least seconds of a position, in which the host schedules it and takes its tokens.
_EFFICIENCY, _POSITION_SECONDS = 0.5, 5e-3
# Assumed for GPUs: the bytes/s at which weights are written to shared memory for an engine and as fast read, once in a
# step, and the least seconds of doing so.
_THROUGH_MEMORY, _HANDOVER_SECONDS = 2e9, 0.2
# The speed of several GPUs, which wait for each other, as a share of the summed speed of as many single ones.
_SHARDED = 0.8
# Seconds of a variant's step over those of a step of LoRA: measured on the tiny bases, on one core (studies/variants).
_OVER_LORA: dict[str, float] = {"dora": 1.2}
# Positions of drawing responses whose rows waiting responses take, over those of rows that are never idle.
_REFILLED = 1.2
# Tokens of the longest answer where neither lm-eval's task nor the preset gives a limit; a batch takes as long as its
# longest answer.
_LONGEST_ANSWER = 256
# Tokens with padding over those without, less 1, in batches of one example: an assumption for log-normal lengths with a
# standard deviation of 1. It falls with the root of the batch, whose examples are sorted into micro-batches.
_PADDING = 1.3


def flops_per_second(execution: Execution) -> float:
    """Return the useful FLOP/s of a job on a CPU."""
    assert execution.gflops is not None
    return execution.gflops * 1e9


def _together(execution: Execution, gpus: int) -> float:
    """Return the speed of some GPUs, of which one by its roofline has the speed 1."""
    return (gpus * _SHARDED if gpus > 1 else 1.0) / execution.gpu_time


def run_seconds(preset: Preset, sweep: Sweep, gpus: int) -> tuple[float, float]:
    """Estimate the wall-clock seconds of one run on `gpus` GPUs (0: a CPU).

    The first number is inversely proportional to the speed of `execution`, and the second does not depend on it.
    """
    preset = memory.decided(preset, sweep, gpus)
    condition, execution, sizes = sweep.condition, preset.execution, dimensions(preset.models[sweep.condition.model])
    work = run_work(preset, condition)
    if execution.gpu is None or not gpus:
        # Padding and tokens that are not scored are in the speed, which is measured on finished runs.
        flops = work.trained_flops + work.evaluated_flops + work.recomputed_flops
        flops *= _OVER_LORA.get(condition.method, 1.0)
        return (flops + _DECODING[execution.sampler] * work.drawn_flops) / flops_per_second(execution), 0.0
    gpu = GPUS[execution.gpu]
    # Examples share rows without padding, or a batch is split by length into micro-batches, whose rows are as long as
    # the longest. Then examples of generated data differ little in length, and long ones are alone in their
    # micro-batch. Padding of RL and of evaluations, which sort all examples by length, is not counted.
    dataset, padded = preset.sources[condition.dataset], 1.0
    if (
        not share_rows(preset, sizes)
        and isinstance(dataset, HubDataset | FileDataset)
        and 4 * dataset.mean_tokens <= execution.max_batch_tokens
    ):
        padded += _PADDING / sqrt(max(1, condition.batch_size // gpus))
    at_once = gpus * execution.max_batch_tokens
    trained = condition.steps * ceil(padded * work.trained / condition.steps / at_once)
    evaluated = work.evaluated / at_once
    each, speed = pass_seconds(preset, condition), _together(execution, gpus)
    computing = condition.steps * each.each_step + trained * gpus * each.each_pass
    computing += padded * work.trained * sum(each.trained.token) + work.trained_scored * sum(each.trained.scored)
    computing += work.evaluated * sum(each.evaluated.token) + work.evaluated_scored * sum(each.evaluated.scored)
    computing /= speed
    # However small the model, its passes are launched layer by layer. A training step counts as three passes, two of
    # them backward.
    waiting = max(0.0, (3 * trained + evaluated) * sizes.layers * _LAYER_SECONDS - computing)
    if (rollouts := condition.rollouts) is None:
        return computing, waiting
    rows: float = gpus * memory.engine_batch(preset, condition).responses
    if not (engine := memory.uses_engine(preset, condition)):
        rows = gpus * execution.max_cache_tokens / longest_sequence(preset, condition)
    longest, positions = rollouts.max_new_tokens, 0.0
    for times, responses in (
        (condition.steps, condition.batch_size),
        (rollouts.evaluations, graded_problems(preset, condition)),
    ):
        rounds = responses / max(1.0, rows)
        # In the engine waiting responses take the rows of those that have ended, rather than wait for the longest.
        refilled = max(longest, _REFILLED * rounds * rollouts.mean_response_tokens)
        positions += times * (refilled if engine else max(1.0, rounds) * longest)
    if engine:
        handover = _HANDOVER_SECONDS + 2 * memory.handover_bytes(preset, condition) / _THROUGH_MEMORY
        drawing = _engine_seconds(preset, sizes, work.drawn / gpus, positions, work.context)
        return computing, waiting + drawing + (condition.steps + rollouts.evaluations) * handover
    # The own sampler launches each layer for every position, and reads weights and cache: keys and values are read,
    # repeated for all heads, and read again.
    cache, bandwidth = work.drawn * work.context * sizes.layers * 12 * sizes.heads * sizes.head_dim, gpu.bandwidth
    drawing = positions * (sizes.layers * _LAYER_SECONDS + 2 * sizes.parameters / bandwidth) + cache / bandwidth / gpus
    reading = work.drawn * sum(map(sum, each.evaluated)) / speed
    return computing + reading, waiting + drawing


def pass_seconds(preset: Preset, condition: Condition) -> StepSeconds:
    """Return the seconds of a condition's passes on one GPU, at the lengths and numbers of tokens of its runs."""
    work, most = run_work(preset, condition), preset.execution.max_batch_tokens
    return step_seconds(
        preset, condition, min(most, work.trained / condition.steps), work.learned_context, work.context
    )


class Training(NamedTuple):
    """What training on a token takes by the plan, in seconds, and its useful FLOP/s as a share of the GPU's peak."""

    share: float
    kernels: Parts
    launches: float


def training_of(preset: Preset, sweep: Sweep, gpus: int) -> Training:
    """Return what training a sweep's runs takes, without padding, evaluations and drawing; for a job on GPUs."""
    assert preset.execution.gpu
    peak = GPUS[preset.execution.gpu].peak_flops
    preset, condition = memory.decided(preset, sweep, gpus), sweep.condition
    work, each = run_work(preset, condition), pass_seconds(preset, condition)
    layers = dimensions(preset.models[condition.model]).layers
    scored, at_once = work.trained_scored / work.trained, gpus * preset.execution.max_batch_tokens
    passes = condition.steps * ceil(work.trained / condition.steps / at_once)
    weights = (condition.steps * each.each_step + passes * gpus * each.each_pass) / work.trained
    kernels = each.trained.token.plus(each.trained.scored, scored).plus(Parts(elementwise=weights))
    kernels = Parts(*(seconds / _together(preset.execution, 1) for seconds in kernels))
    launches = max(0.0, 3 * passes * gpus * layers * _LAYER_SECONDS / work.trained - sum(kernels))
    flops = work.trained_flops / work.trained - (1 - scored) * unembedding_flops_per_token(preset, condition)[0]
    return Training(flops / (sum(kernels) + launches) / peak, kernels, launches)


def _engine_seconds(preset: Preset, sizes: Dimensions, tokens: float, positions: float, context: float) -> float:
    """Return the seconds in which the engine of one GPU draws a number of tokens at a number of positions.

    Linear layers read their weights at each position, or compute where that takes longer; then keys and values of the
    mean `context` are read. Both reach a share of the GPU's peak, and the host takes its own time at each position.
    """
    assert preset.execution.gpu
    gpu = GPUS[preset.execution.gpu]
    weights = positions * memory.number_bytes(preset) * sizes.parameters / gpu.bandwidth
    products = 2.0 * tokens * sizes.active_linear / gpu.peak_flops
    cache = tokens * context * memory.cache_bytes(preset, sizes) / gpu.bandwidth
    return max(positions * _POSITION_SECONDS, (max(weights, products) + cache) / _EFFICIENCY)


def start_seconds(preset: Preset, condition: Condition | None = None) -> float:
    """Return the wall-clock seconds of a job, of training on a condition, before its first step.

    Reading a large model is not among them.
    """
    starts_engine = condition is not None and memory.uses_engine(preset, condition)
    if preset.execution.gpu is None:
        return _START_SECONDS + starts_engine * _ENGINE_START_SECONDS
    return _GPU_START_SECONDS + starts_engine * _GPU_ENGINE_START_SECONDS


def job_seconds(preset: Preset, job: Job, gpus: int, runs: Literal["one", "expected", "most"] = "expected") -> float:
    """Estimate the wall-clock seconds of a job that trains so many runs of its sweeps, and starts once for all."""
    seconds = 0.0
    for sweep in job.sweeps:
        number = {"one": 1, "expected": sweep.n_runs, "most": sweep.most_runs}[runs]
        seconds += sweep_seconds(preset, sweep, gpus, number)
    return start_seconds(preset, job.sweeps[0].condition) + seconds


def sweep_seconds(preset: Preset, sweep: Sweep, gpus: int, runs: int) -> float:
    """Estimate the wall-clock seconds of some runs of a sweep, one after the other, without the start of their job."""
    seconds = runs * sum(run_seconds(preset, sweep, gpus))
    # On GPUs the base is loaded again for each run that changes it.
    loads = (runs if sweep.condition.method in ("fullft", *CHANGES_BASE) else 1) if gpus else 0
    return seconds + loads * 4 * dimensions(preset.models[sweep.condition.model]).parameters / _READING


def gpus_used(preset: Preset, sweep: Sweep) -> int:
    """Return the number of GPUs of a sweep's jobs, a power of two; 0 on a CPU, and UserError where no number holds one.

    It is the smallest that holds a job. Where each run is a job of its own, it is doubled, as far as `max_gpus` allows,
    until a run takes no longer than `job_hours`, and a run of each wave, one after the other, no longer than
    `path_hours`.
    """
    gpus, execution = memory.gpus_needed(preset, sweep), preset.execution
    while 0 < 2 * gpus <= memory.most_gpus(preset, sweep.condition) and is_split(preset, sweep, gpus):
        hours, waves = job_seconds(preset, Job((sweep,)), gpus, "one") / 3600, len(sweep.expected_waves())
        in_time = hours <= execution.job_hours and waves * hours <= (execution.path_hours or inf)
        # The weights of a sharded model are in fp32, so that more GPUs may not hold what one does.
        if in_time or not memory.fits(preset, sweep, 2 * gpus):
            break
        gpus *= 2
    return gpus


def is_split(preset: Preset, sweep: Sweep, gpus: int) -> bool:
    """Return whether each run of a sweep is a job of its own, since all runs together would take too long for one."""
    return job_seconds(preset, Job((sweep,)), gpus) > 3600 * preset.execution.job_hours and sweep.n_runs > 1


def evaluation_seconds(preset: Preset, job: EvalJob) -> float:
    """Estimate the wall-clock seconds of one evaluation with lm-eval, on a CPU or one GPU."""
    assert preset.evaluation
    execution, sizes = preset.execution, dimensions(preset.models[job.model])
    gpu, engine = execution.gpu, execution.sampler == "vllm"
    if gpu is None:
        seconds = _EVALUATION_START_SECONDS + engine * _ENGINE_START_SECONDS
    else:
        seconds = _GPU_START_SECONDS + engine * _GPU_ENGINE_START_SECONDS + 4 * sizes.parameters / _READING
    for task in preset.evaluation.tasks:
        documents, longest = min(task.documents, task.limit or task.documents), task.max_new_tokens or _LONGEST_ANSWER
        tokens = documents * task.mean_tokens
        if gpu is None:
            read = 2.0 * sizes.active_linear * tokens / flops_per_second(execution)
        else:
            size = preset.evaluation.batch_size * task.mean_tokens
            each = arm_seconds(preset, sizes, None, None, size, task.mean_tokens, task.mean_tokens).evaluated
            read = tokens * sum(map(sum, each)) * execution.gpu_time
        if task.about == "forgotten":
            # Tasks about what was forgotten read texts; tasks about what was learned mostly draw answers.
            seconds += read
        elif gpu is None:
            seconds += read * _DECODING[execution.sampler]
        # On a GPU all answers are as long as the longest.
        elif engine:
            rows = max(1.0, execution.max_cache_tokens / task.mean_tokens)
            positions = max(longest, _REFILLED * documents / rows * longest)
            seconds += read + _engine_seconds(preset, sizes, documents * longest, positions, task.mean_tokens)
        else:
            positions = documents / preset.evaluation.batch_size * longest
            seconds += read + positions * (sizes.layers * _LAYER_SECONDS + 2 * sizes.parameters / GPUS[gpu].bandwidth)
    return seconds
