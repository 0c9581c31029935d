"""Estimate the seconds that sweeps, jobs and evaluations take."""

from __future__ import annotations

from lorabench.config.execution import EvalTask, Execution
from lorabench.config.preset import Preset
from lorabench.models.specs import Dimensions, dimensions
from lorabench.planning.engine import engine_seconds, engine_start_seconds, handover_seconds, uses_engine
from lorabench.planning.flops import (
    evaluated_documents,
    graded_problems,
    linear_flops_per_token,
    longest_sequence,
    run_flops,
    run_tokens,
)
from lorabench.planning.memory import decided
from lorabench.runs import Condition, EvalJob, Job, Sweep
from lorabench.utils.gpus import GPUS, Gpu

# Seconds in which a job on one core imports its libraries, loads and writes; in an evaluation with lm-eval's libraries.
_START_SECONDS = 6.0
_EVALUATION_START_SECONDS = 12.0

# Seconds of drawing a token on a CPU over seconds of a forward pass for one token of a text: one position at a time
# leaves most of a machine idle. On one core the tiny base draws 11,000 tokens a second; at 50 GFLOP/s it would read
# 30,000.
_DECODING = 3.0
# The same with the engine vLLM, over this project's own sampler: measured for 64 responses of SmolLM2-135M on two cores
# (benchmarks/engine.csv).
_ENGINE_OVER_OWN = 4.2

# Assumptions about GPUs, until runs are measured: seconds in which a job starts and imports its libraries, and bytes/s
# at which weights are read from disk.
_GPU_START_SECONDS = 60.0
_READING = 1e9

# Seconds of launching one layer from Python for one position: the least that a drawn token takes, whatever the batch.
_LAYER_SECONDS = 0.8e-3

# The speed of several GPUs, which wait for each other, as a share of the summed speed of as many single ones.
_SHARDED = 0.8

# Seconds of a product in TF32 over those in bf16, the ratio of the peaks of every GPU in lorabench/utils/gpus.py.
_TF32 = 2.0
# Bytes of memory traffic for each parameter of an expert when LoRA is added to it: forward its weight is read and the
# sum written; backward the gradient of the sum is written, and read for both factors.
_ADDED_FORWARD, _ADDED_BACKWARD = 8, 12

# Positions of drawing responses whose rows waiting responses take, over those of rows that are never idle.
_REFILLED = 1.2

# Tokens of the longest answer where neither lm-eval's task nor the preset gives a limit; a batch takes as long as its
# longest answer.
_LONGEST_ANSWER = 256


def flops_per_second(execution: Execution, gpus: int = 1) -> float:
    """Return the useful FLOP/s of a job on a CPU, or on the given number of GPUs."""
    if execution.gflops is not None:
        single = execution.gflops * 1e9
    else:
        assert execution.gpu
        gpu = GPUS[execution.gpu]
        single = gpu.peak_flops * gpu.efficiency
    return single if gpus <= 1 else single * gpus * _SHARDED


def run_seconds(preset: Preset, sweep: Sweep, gpus: int) -> tuple[float, float]:
    """Estimate the wall-clock seconds of one run on `gpus` GPUs (0: a CPU), in two parts.

    Returns:
        The seconds that are inversely proportional to the speed of `execution`, and those that do not depend on it.
    """
    preset = decided(preset, sweep)
    condition, execution, sizes = sweep.condition, preset.execution, dimensions(preset.models[sweep.condition.model])
    flops, tokens = run_flops(preset, condition), run_tokens(preset, condition)
    work = flops.trained + flops.evaluated + flops.recomputed
    if not gpus:
        return (work + _decoding(preset) * flops.drawn) / flops_per_second(execution), 0.0
    if preset.protocol.precision == "bf16":
        # Experts compute in TF32 where all other layers do in bf16.
        experts = [matrix for matrix in sizes.matrices if matrix.part == "experts"]
        active = sum(matrix.active * matrix.d_in * matrix.d_out for matrix in experts)
        work *= 1.0 + (_TF32 - 1.0) * active / sizes.active_linear
    computing = work / flops_per_second(execution, gpus) + _adding_seconds(preset, condition, gpus)
    # However small the model, its passes are launched layer by layer. A training step counts as three passes, two of
    # them backward.
    at_once = gpus * execution.max_batch_tokens
    passes = 3 * max(condition.steps, tokens.trained / at_once) + tokens.evaluated / at_once
    waiting = max(0.0, passes * sizes.layers * _LAYER_SECONDS - computing)
    if condition.rollouts is None:
        return computing, waiting
    if uses_engine(preset, condition):
        return computing, waiting + _engine_seconds(preset, sweep, gpus)
    return computing + flops.drawn / flops_per_second(execution, gpus), waiting + _drawing_seconds(preset, sweep, gpus)


def _adding_seconds(preset: Preset, condition: Condition, gpus: int) -> float:
    """Return the seconds in which a run's LoRA is added to the weights of experts on GPUs, in each pass."""
    execution, sizes = preset.execution, dimensions(preset.models[condition.model])
    if condition.placement in (None, "attn") or not sizes.experts:
        return 0.0
    assert execution.gpu
    experts = sum(matrix.parameters for matrix in sizes.matrices if matrix.part == "experts")
    tokens, most = run_tokens(preset, condition), gpus * execution.max_batch_tokens
    trained, evaluated = max(condition.steps, tokens.trained / most), tokens.evaluated / most
    recomputed = trained if execution.activation_checkpointing is True else 0.0
    traffic = (trained + evaluated + recomputed) * _ADDED_FORWARD + trained * _ADDED_BACKWARD
    return traffic * experts / GPUS[execution.gpu].bandwidth


def start_seconds(preset: Preset, condition: Condition | None = None) -> float:
    """Return the wall-clock seconds of a job before its first step, without reading a large model.

    Args:
        condition: the condition of a training job's first sweep.
    """
    seconds = _START_SECONDS if preset.execution.gpu is None else _GPU_START_SECONDS
    return seconds + (engine_start_seconds(preset) if condition and uses_engine(preset, condition) else 0.0)


def job_seconds(preset: Preset, job: Job, gpus: int, most: bool = False) -> float:
    """Estimate the wall-clock seconds of a job on `gpus` GPUs (0: a CPU), which starts once for all its sweeps.

    With `most` they are those of its largest possible number of runs, else of the expected number.
    """
    start = start_seconds(preset, job.sweeps[0].condition)
    return start + sum(sweep_seconds(preset, sweep, gpus, most) for sweep in job.sweeps)


def sweep_seconds(preset: Preset, sweep: Sweep, gpus: int, most: bool = False) -> float:
    """Estimate the wall-clock seconds of a sweep on `gpus` GPUs (0: a CPU), without the start of its job."""
    runs = sweep.most_runs if most else sweep.n_runs
    seconds = runs * sum(run_seconds(preset, sweep, gpus))
    if not gpus:
        return seconds
    # Full fine-tuning loads the base again for each run.
    loads = runs if sweep.condition.method == "fullft" else 1
    weights = 4 * dimensions(preset.models[sweep.condition.model]).parameters
    return seconds + loads * weights / _READING


def _decoding(preset: Preset) -> float:
    """Return the seconds of drawing a token on a CPU over those of a forward pass for one token of a text."""
    return _DECODING * (_ENGINE_OVER_OWN if preset.execution.sampler == "vllm" else 1.0)


def _drawing_seconds(preset: Preset, sweep: Sweep, gpus: int) -> float:
    """Return the seconds, besides those of FLOPs, of drawing a run's responses on GPUs: launches, and memory traffic of
    weights and cache."""
    condition, execution = sweep.condition, preset.execution
    assert condition.rollouts
    assert execution.gpu
    sizes, gpu = dimensions(preset.models[condition.model]), GPUS[execution.gpu]
    positions = _positions(preset, sweep, gpus, longest_sequence(preset, condition), refills=False)
    position = sizes.layers * layer_seconds(execution) + weights_seconds(preset, condition, sizes, gpus)
    tokens = run_tokens(preset, condition)
    return positions * position + cache_seconds(gpu, sizes, tokens.drawn * tokens.context) / gpus


def _engine_seconds(preset: Preset, sweep: Sweep, gpus: int) -> float:
    """Return the seconds of a run on GPUs in which engines draw its responses and get its weights."""
    condition = sweep.condition
    assert condition.rollouts
    sizes, tokens = dimensions(preset.models[condition.model]), run_tokens(preset, condition)
    # The cache of a running response grows with it.
    positions = _positions(preset, sweep, gpus, tokens.context, refills=True)
    drawing = engine_seconds(preset, sizes, tokens.drawn / gpus, positions, tokens.context)
    return drawing + (condition.steps + condition.rollouts.evaluations) * handover_seconds(preset, sweep)


def _positions(preset: Preset, sweep: Sweep, gpus: int, row_tokens: float, refills: bool) -> float:
    """Return the positions that are drawn until all responses of a run have ended.

    Args:
        row_tokens: tokens of the cache that a response takes.
        refills: whether waiting responses take the rows of those that have ended, rather than wait for the longest.
    """
    condition = sweep.condition
    rollouts = condition.rollouts
    assert rollouts
    rows = max(1.0, gpus * preset.execution.max_cache_tokens / row_tokens)
    longest, mean = rollouts.max_new_tokens, rollouts.mean_response_tokens

    def positions_of(responses: int) -> float:
        if refills:
            return max(longest, _REFILLED * responses / rows * mean)
        return max(1.0, responses / rows) * longest

    graded = rollouts.evaluations * positions_of(graded_problems(preset, condition))
    return condition.steps * positions_of(condition.batch_size) + graded


def layer_seconds(execution: Execution) -> float:
    """Return the least seconds of a layer for a position while a GPU draws responses: measured, or else assumed."""
    return execution.layer_seconds or _LAYER_SECONDS


def weights_seconds(preset: Preset, condition: Condition, sizes: Dimensions, gpus: int) -> float:
    """Return the seconds in which a GPU reads the weights for one position while responses are drawn."""
    execution = preset.execution
    assert execution.gpu
    # Autocast copies frozen weights without LoRA for every position and trained weights once; weights that carry LoRA,
    # and the copy from which processes of a sharded model sample, are read in bf16.
    cast = 0
    if condition.placement is not None and preset.protocol.precision == "bf16" and gpus == 1:
        cast = sizes.carrying(condition.placement, preset.protocol.include_unembedding)
    other = (8 if condition.method == "lora" and gpus == 1 else 2) * (sizes.parameters - cast)
    return (2 * cast + other) / GPUS[execution.gpu].bandwidth


def cache_seconds(gpu: Gpu, sizes: Dimensions, pairs: float) -> float:
    """Return the seconds in which a GPU reads keys and values, repeats them for all heads, and reads them again.

    Args:
        pairs: drawn tokens times the mean number of tokens that each attends to.
    """
    return pairs * sizes.layers * 12 * sizes.heads * sizes.head_dim / gpu.bandwidth


def evaluation_seconds(preset: Preset, job: EvalJob) -> float:
    """Estimate the wall-clock seconds of one evaluation with lm-eval, on a CPU or one GPU."""
    assert preset.evaluation
    sizes, gpu = dimensions(preset.models[job.model]), preset.execution.gpu
    seconds = _EVALUATION_START_SECONDS if gpu is None else _GPU_START_SECONDS + 4 * sizes.parameters / _READING
    if preset.execution.sampler == "vllm":
        seconds += engine_start_seconds(preset)
    for task in preset.evaluation.tasks:
        tokens = evaluated_documents(task) * task.mean_tokens
        read = 2.0 * sizes.active_linear * tokens / flops_per_second(preset.execution)
        # Tasks about what was learned mostly draw answers; tasks about what was forgotten read texts.
        drawn = task.about == "learned"
        seconds += read * _decoding(preset) if drawn and gpu is None else read
        if drawn and gpu is not None:
            seconds += _answering_seconds(preset, task, sizes)
    return seconds


def _answering_seconds(preset: Preset, task: EvalTask, sizes: Dimensions) -> float:
    """Return the seconds, besides those of FLOPs, in which a GPU draws a task's answers, all as long as the longest."""
    assert preset.evaluation
    assert preset.execution.gpu
    documents, longest = evaluated_documents(task), task.max_new_tokens or _LONGEST_ANSWER
    if preset.execution.sampler == "vllm":
        rows = max(1.0, preset.execution.max_cache_tokens / task.mean_tokens)
        positions = max(longest, _REFILLED * documents / rows * longest)
        return engine_seconds(preset, sizes, documents * longest, positions, task.mean_tokens)
    positions = documents / preset.evaluation.batch_size * longest
    weights = 2 * sizes.parameters / GPUS[preset.execution.gpu].bandwidth
    return positions * (sizes.layers * layer_seconds(preset.execution) + weights)


def compute_seconds(preset: Preset) -> float:
    """Estimate the wall-clock seconds of the job that measures training steps.

    It takes a few steps more than it times, to count FLOPs and to measure memory.
    """
    experiment = preset.experiments.compute
    assert experiment
    tokens = experiment.batch_size * experiment.sequence_length * (experiment.repeats + 8)
    seconds = start_seconds(preset)
    for model in experiment.models:
        sizes = dimensions(preset.models[model])
        adapters = (sizes.lora("all", rank, preset.protocol.include_unembedding)[1] for rank in experiment.ranks)
        flops = sum(linear_flops_per_token(sizes, lora) for lora in (None, *adapters))
        seconds += flops * tokens / flops_per_second(preset.execution)
    return seconds
