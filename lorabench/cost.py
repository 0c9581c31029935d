"""What a job costs, before it is run: tokens, FLOPs, seconds.

FLOPs of linear layers, as the paper counts (its section on compute efficiency): per token 6 for each parameter that
is trained, forward and backward, and 4 for each that is frozen; LoRA saves the weight gradient of the base and pays
for A and B. On top come the two products of attention, which the paper leaves out: with contexts of thousands of
tokens they are no longer small. Seconds are FLOPs at the speed of `execution`, and what does not depend on it:
starting, loading, and on a GPU drawing token after token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorabench.config import Preset
from lorabench.gpus import GPUS
from lorabench.lanes import lanes_of, turns
from lorabench.lengths import longest_sequence, prompt_tokens, tokens_per_example
from lorabench.memory import cast_parameters
from lorabench.models.dimensions import Dimensions, dimensions

if TYPE_CHECKING:
    from lorabench.config import EvalTask, Execution
    from lorabench.plan import Condition, EvalJob, Job, Sweep

# Imports, loading, and writing of one job, in seconds on one core.
_START_SECONDS = 6.0
_EVALUATION_START_SECONDS = 12.0
# On a CPU a token that is drawn takes so many times the seconds of a forward pass over a text: one position at a time
# leaves most of a machine idle. On one core the tiny base draws 11,000 a second, where 50 GFLOP/s would read 30,000.
_DECODING = 3.0

# Assumptions about GPUs, until runs were measured. A job starts and imports; weights are read from disk, bytes/s.
_GPU_START_SECONDS = 60.0
_READING = 1e9
# Launching one layer for one position from Python: what a token costs at least, whatever the batch.
_LAYER_SECONDS = 0.8e-3
# Several GPUs wait for each other: their share of the speed of as many single ones.
_SHARDED = 0.8
# Where a task of lm-eval says nothing of the longest answer, and the preset neither. A batch lasts as long as that.
_LONGEST_ANSWER = 256


def speed(execution: Execution, gpus: int = 1) -> float:
    """Useful FLOP/s of a job: of a CPU, or of that many GPUs."""
    if execution.gflops is not None:
        one = execution.gflops * 1e9
    else:
        assert execution.gpu
        gpu = GPUS[execution.gpu]
        one = gpu.peak_flops * gpu.efficiency
    return one if gpus <= 1 else one * gpus * _SHARDED


def linear_flops_per_token(sizes: Dimensions, lora: int | None) -> float:
    """FLOPs of a forward and backward pass for one token, linear layers only, as the paper counts.

    Args:
        lora: parameters of LoRA that a token goes through; None in full fine-tuning.
    """
    return 6.0 * sizes.active_linear if lora is None else 4.0 * sizes.active_linear + 6.0 * lora


def attention_flops_per_token(sizes: Dimensions, context: float) -> float:
    """FLOPs of the forward pass for one token that sees so many others; backward takes twice as many."""
    return 4.0 * context * sizes.heads * sizes.head_dim * sizes.layers


@dataclass(frozen=True)
class RunTokens:
    """Tokens of one run: trained on, evaluated without a gradient, and drawn; and how many a token sees on average."""

    trained: float
    evaluated: float
    drawn: float
    context: float


def run_tokens(preset: Preset, condition: Condition) -> RunTokens:
    """Estimated tokens of each run of a condition."""
    rollouts = condition.rollouts
    if rollouts is None:
        dataset = preset.datasets[condition.dataset]
        per_example = tokens_per_example(preset.models[condition.model], dataset)
        examples = _validations(preset, condition.steps) * dataset.validation + dataset.test
        trained = condition.steps * condition.batch_size * per_example
        # A causal token sees half of its example, but most tokens are in examples twice as long as the mean.
        return RunTokens(trained, examples * per_example, 0.0, per_example)
    prompt, response = prompt_tokens(preset, condition), rollouts.mean_response_tokens
    episodes = condition.steps * condition.batch_size
    graded = rollouts.evaluations * _graded(preset, condition)
    # A prompt goes through the model once for its group, in sampling and in learning.
    prompts = episodes / rollouts.group_size * prompt
    drawn = (episodes + graded) * response
    return RunTokens(episodes * response + prompts, prompts + graded * prompt, drawn, prompt + response)


def _validations(preset: Preset, steps: int) -> int:
    """Points of a run's validation curve after the first step, as `lorabench.training.sft.curve_steps` places them."""
    protocol = preset.protocol
    spaced = {round(steps ** (point / (protocol.curve_points - 1))) for point in range(protocol.curve_points)}
    return len(spaced | {step for step in protocol.validate_at if step <= steps})


def _graded(preset: Preset, condition: Condition) -> int:
    """Responses of one evaluation in RL."""
    assert condition.rollouts
    problems = preset.problems[condition.dataset]
    held_out = sum(preset.problems[name].test for name in condition.rollouts.held_out)
    return problems.validation + problems.test + held_out * condition.rollouts.held_out_samples


@dataclass(frozen=True)
class _RunFlops:
    trained: float
    evaluated: float
    drawn: float
    again: float
    """Of forward passes that activation checkpointing repeats."""


def _run_flops(preset: Preset, condition: Condition) -> _RunFlops:
    sizes = dimensions(preset.models[condition.model])
    tokens = run_tokens(preset, condition)
    lora = None
    if condition.rank is not None and condition.placement is not None:
        lora = sizes.lora(condition.placement, condition.rank, preset.protocol.include_unembedding)[1]
    attention = attention_flops_per_token(sizes, tokens.context)
    forward = 2.0 * (sizes.active_linear + (lora or 0)) + attention
    train = linear_flops_per_token(sizes, lora) + 3 * attention
    again = tokens.trained * forward if preset.execution.activation_checkpointing else 0.0
    return _RunFlops(tokens.trained * train, tokens.evaluated * forward, tokens.drawn * forward, again)


def sweep_flops(preset: Preset, sweep: Sweep) -> float:
    """FLOPs of all runs of a sweep, evaluation and sampling included."""
    flops = _run_flops(preset, sweep.condition)
    return sweep.n_runs * (flops.trained + flops.evaluated + flops.drawn)


def run_seconds(preset: Preset, sweep: Sweep, gpus: int) -> tuple[float, float]:
    """What the wall-clock seconds of one run are made of, on so many GPUs (0: a CPU).

    Returns:
        Seconds that go with the speed of `execution`, and those that don't.
    """
    flops = _run_flops(preset, sweep.condition)
    work = flops.trained + flops.evaluated + flops.again
    if not gpus:
        return (work + _DECODING * flops.drawn) / speed(preset.execution), 0.0
    computing = work / speed(preset.execution, gpus)
    waiting = max(0.0, _launch_seconds(preset, sweep, gpus) - computing)
    drawing = _drawing_seconds(preset, sweep, gpus) if sweep.condition.rollouts else 0.0
    return computing + flops.drawn / speed(preset.execution, gpus), waiting + drawing


def start_seconds(preset: Preset) -> float:
    """Wall-clock seconds that a job takes before its first step, but for reading a large model."""
    return _START_SECONDS if preset.execution.gpu is None else _GPU_START_SECONDS


def job_seconds(preset: Preset, job: Job, gpus: int) -> float:
    """Wall-clock seconds of a job on so many GPUs (0: a CPU): it starts once for all its sweeps."""
    return start_seconds(preset) + sum(sweep_seconds(preset, sweep, gpus) for sweep in job.sweeps)


def sweep_seconds(preset: Preset, sweep: Sweep, gpus: int) -> float:
    """Wall-clock seconds of a sweep within a job on so many GPUs; 0 is a CPU."""
    seconds = sweep.n_runs * sum(run_seconds(preset, sweep, gpus))
    if not gpus:
        return seconds
    # Full fine-tuning loads the base anew for each run.
    loads = sweep.n_runs if sweep.condition.method == "fullft" else 1
    weights = 4 * dimensions(preset.models[sweep.condition.model]).parameters
    return seconds + loads * weights / _READING


def _launch_seconds(preset: Preset, sweep: Sweep, gpus: int) -> float:
    """What a run takes at least on GPUs, however small the model: its passes through layers, launched one by one.

    Of passes that runs share as lanes, its share.
    """
    condition = sweep.condition
    tokens, most = run_tokens(preset, condition), gpus * preset.execution.max_batch_tokens
    share = turns(preset, sweep, lanes_of(preset, sweep, gpus)) / sweep.n_runs
    # Backward takes two of three.
    passes = 3 * condition.steps * max(share, tokens.trained / condition.steps / most) + tokens.evaluated / most
    return passes * dimensions(preset.models[condition.model]).layers * _LAYER_SECONDS


def _drawing_seconds(preset: Preset, sweep: Sweep, gpus: int) -> float:
    """Seconds of one run that drawing takes on GPUs beside its FLOPs: launches, and traffic of weights and cache."""
    condition, execution = sweep.condition, preset.execution
    rollouts = condition.rollouts
    assert rollouts
    assert execution.gpu
    sizes, gpu = dimensions(preset.models[condition.model]), GPUS[execution.gpu]
    together = lanes_of(preset, sweep, gpus)
    rows = max(1.0, gpus * execution.max_cache_tokens / longest_sequence(preset, condition))
    # Batches of rows, each drawn until its longest response ends; lanes share them.
    batches = condition.steps * max(1.0, together * condition.batch_size / rows)
    batches += rollouts.evaluations * max(1.0, together * _graded(preset, condition) / rows)
    # Autocast copies frozen weights for every position, and trained ones once; those that stay in bf16 are read there,
    # as is the copy that processes of a sharded model sample from.
    cast = cast_parameters(preset, sizes, condition.placement, gpus)
    other = (8 if condition.method == "lora" and gpus == 1 else 2) * (sizes.parameters - cast)
    weights = (2 * cast + other) / gpu.bandwidth
    positions = batches / together * rollouts.max_new_tokens
    # Keys and values are repeated for all heads, cast, and read.
    tokens = run_tokens(preset, condition)
    cache = tokens.drawn * tokens.context * sizes.layers * 16 * sizes.heads * sizes.head_dim / gpus / gpu.bandwidth
    return positions * (sizes.layers * _LAYER_SECONDS + weights) + cache


def evaluation_flops(preset: Preset, job: EvalJob) -> tuple[float, float]:
    """Tokens that an evaluation with lm-eval reads or draws, and their FLOPs."""
    assert preset.evaluation
    parameters = dimensions(preset.models[job.model]).active_linear
    tokens = sum(_documents(task) * task.mean_tokens for task in preset.evaluation.tasks)
    return tokens, 2.0 * parameters * tokens


def evaluation_seconds(preset: Preset, job: EvalJob) -> float:
    """Wall-clock seconds of one evaluation with lm-eval, on a CPU or one GPU."""
    assert preset.evaluation
    sizes, gpu = dimensions(preset.models[job.model]), preset.execution.gpu
    seconds = _EVALUATION_START_SECONDS if gpu is None else _GPU_START_SECONDS + 4 * sizes.parameters / _READING
    for task in preset.evaluation.tasks:
        read = 2.0 * sizes.active_linear * _documents(task) * task.mean_tokens / speed(preset.execution)
        # What was learned is mostly told by drawn answers, what was forgotten by the probability of texts.
        drawn = task.about == "learned"
        seconds += read * _DECODING if drawn and gpu is None else read
        if drawn and gpu is not None:
            positions = _documents(task) / preset.evaluation.batch_size * (task.max_new_tokens or _LONGEST_ANSWER)
            weights = 2 * sizes.parameters / GPUS[gpu].bandwidth
            seconds += positions * (sizes.layers * _LAYER_SECONDS + weights)
    return seconds


def _documents(task: EvalTask) -> int:
    return min(task.documents, task.limit or task.documents)


def compute_seconds(preset: Preset) -> float:
    """Wall-clock seconds of the job that measures training steps; counting and memory take a few steps more."""
    experiment = preset.experiments.compute
    assert experiment
    tokens = experiment.batch_size * experiment.sequence_length * (experiment.repeats + 8)
    seconds = start_seconds(preset)
    for model in experiment.models:
        sizes = dimensions(preset.models[model])
        adapters = (sizes.lora("all", rank, preset.protocol.include_unembedding)[1] for rank in experiment.ranks)
        flops = sum(linear_flops_per_token(sizes, lora) for lora in (None, *adapters))
        seconds += flops * tokens / speed(preset.execution)
    return seconds
