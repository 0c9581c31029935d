"""The cost of a job, estimated before it is run: tokens, FLOPs and seconds.

FLOPs of linear layers are counted as in the paper's section on compute efficiency: per token, forward and backward, 6
for each trained parameter and 4 for each frozen one; LoRA saves the weight gradient of the base and pays for A and B.
The two products of attention, which the paper leaves out, are added: with contexts of thousands of tokens they are no
longer small. Seconds are the FLOPs at the speed of `execution`, plus the time that does not depend on that speed:
starting, loading, and on a GPU drawing responses token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorabench.config import EvalTask, Execution, Preset
from lorabench.gpus import GPUS
from lorabench.lanes import lanes_of, turns
from lorabench.lengths import longest_sequence, prompt_tokens, tokens_per_example
from lorabench.memory import cast_parameters
from lorabench.models.dimensions import Dimensions, dimensions

if TYPE_CHECKING:
    from lorabench.plan import Condition, EvalJob, Job, Sweep

# Seconds in which a job on one core imports its libraries, loads and writes.
_START_SECONDS = 6.0
_EVALUATION_START_SECONDS = 12.0
# Seconds of drawing a token on a CPU over seconds of a forward pass for one token of a text: one position at a time
# leaves most of a machine idle. On one core the tiny base draws 11,000 tokens a second; at 50 GFLOP/s it would read
# 30,000.
_DECODING = 3.0

# Assumptions about GPUs, until runs are measured: seconds in which a job starts and imports its libraries, and bytes/s
# at which weights are read from disk.
_GPU_START_SECONDS = 60.0
_READING = 1e9
# Seconds of launching one layer from Python for one position: the least that a drawn token takes, whatever the batch.
_LAYER_SECONDS = 0.8e-3
# The speed of several GPUs, which wait for each other, as a share of the summed speed of as many single ones.
_SHARDED = 0.8
# Tokens of the longest answer where neither lm-eval's task nor the preset gives a limit; a batch takes as long as its
# longest answer.
_LONGEST_ANSWER = 256


def speed(execution: Execution, gpus: int = 1) -> float:
    """Useful FLOP/s of a job on a CPU, or on the given number of GPUs."""
    if execution.gflops is not None:
        single = execution.gflops * 1e9
    else:
        assert execution.gpu
        gpu = GPUS[execution.gpu]
        single = gpu.peak_flops * gpu.efficiency
    return single if gpus <= 1 else single * gpus * _SHARDED


def linear_flops_per_token(sizes: Dimensions, lora: int | None) -> float:
    """FLOPs of a forward and backward pass for one token, in linear layers only, as the paper counts them.

    Args:
        lora: LoRA's parameters that a token passes through; None is full fine-tuning.
    """
    return 6.0 * sizes.active_linear if lora is None else 4.0 * sizes.active_linear + 6.0 * lora


def attention_flops_per_token(sizes: Dimensions, context: float) -> float:
    """FLOPs of attention's forward pass for a token that attends to `context` others; backward takes twice as many."""
    return 4.0 * context * sizes.heads * sizes.head_dim * sizes.layers


@dataclass(frozen=True)
class RunTokens:
    """Tokens of one run: trained on, evaluated without a gradient, and drawn.

    `context` is the mean number of tokens that a token attends to.
    """

    trained: float
    evaluated: float
    drawn: float
    context: float


def run_tokens(preset: Preset, condition: Condition) -> RunTokens:
    """Estimate the tokens of each run of a condition."""
    rollouts = condition.rollouts
    if rollouts is None:
        dataset = preset.datasets[condition.dataset]
        per_example = tokens_per_example(preset.models[condition.model], dataset)
        examples = _validations(preset, condition.steps) * dataset.validation + dataset.test
        trained = condition.steps * condition.batch_size * per_example
        # A causal token attends to half of its example, but most tokens are in examples twice as long as the mean.
        return RunTokens(trained, examples * per_example, 0.0, per_example)
    prompt, response = prompt_tokens(preset, condition), rollouts.mean_response_tokens
    episodes = condition.steps * condition.batch_size
    graded = rollouts.evaluations * _graded(preset, condition)
    # A prompt passes through the model once for its group, both in sampling and in learning.
    prompts = episodes / rollouts.group_size * prompt
    drawn = (episodes + graded) * response
    return RunTokens(episodes * response + prompts, prompts + graded * prompt, drawn, prompt + response)


def _validations(preset: Preset, steps: int) -> int:
    """The number of validations of a run, at the steps where `lorabench.training.sft.curve_steps` places them."""
    protocol = preset.protocol
    spaced = {round(steps ** (point / (protocol.curve_points - 1))) for point in range(protocol.curve_points)}
    return len(spaced | {step for step in protocol.validate_at if step <= steps})


def _graded(preset: Preset, condition: Condition) -> int:
    """The number of responses that are graded in one evaluation of an RL run."""
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
    """FLOPs of the forward passes that activation checkpointing repeats."""


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
    """FLOPs of all runs of a sweep, with their evaluation and sampling."""
    flops = _run_flops(preset, sweep.condition)
    return sweep.n_runs * (flops.trained + flops.evaluated + flops.drawn)


def run_seconds(preset: Preset, sweep: Sweep, gpus: int) -> tuple[float, float]:
    """Estimate the wall-clock seconds of one run on `gpus` GPUs (0: a CPU), in two parts.

    Returns:
        The seconds that are inversely proportional to the speed of `execution`, and those that do not depend on it.
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
    """Wall-clock seconds of a job before its first step, without reading a large model."""
    return _START_SECONDS if preset.execution.gpu is None else _GPU_START_SECONDS


def job_seconds(preset: Preset, job: Job, gpus: int) -> float:
    """Estimate the wall-clock seconds of a job on `gpus` GPUs (0: a CPU), which starts once for all its sweeps."""
    return start_seconds(preset) + sum(sweep_seconds(preset, sweep, gpus) for sweep in job.sweeps)


def sweep_seconds(preset: Preset, sweep: Sweep, gpus: int) -> float:
    """Estimate the wall-clock seconds of a sweep on `gpus` GPUs (0: a CPU), without the start of its job."""
    seconds = sweep.n_runs * sum(run_seconds(preset, sweep, gpus))
    if not gpus:
        return seconds
    # Full fine-tuning loads the base again for each run.
    loads = sweep.n_runs if sweep.condition.method == "fullft" else 1
    weights = 4 * dimensions(preset.models[sweep.condition.model]).parameters
    return seconds + loads * weights / _READING


def _launch_seconds(preset: Preset, sweep: Sweep, gpus: int) -> float:
    """The least wall-clock seconds of a run on GPUs, however small the model: launching its passes layer by layer.

    The passes that runs share as lanes are divided among them.
    """
    condition = sweep.condition
    tokens, most = run_tokens(preset, condition), gpus * preset.execution.max_batch_tokens
    share = turns(preset, sweep, lanes_of(preset, sweep, gpus)) / sweep.n_runs
    # A training step counts as three passes, two of them backward.
    passes = 3 * condition.steps * max(share, tokens.trained / condition.steps / most) + tokens.evaluated / most
    return passes * dimensions(preset.models[condition.model]).layers * _LAYER_SECONDS


def _drawing_seconds(preset: Preset, sweep: Sweep, gpus: int) -> float:
    """Seconds of drawing one run's responses on GPUs beside its FLOPs: launches, and traffic of weights and cache."""
    condition, execution = sweep.condition, preset.execution
    rollouts = condition.rollouts
    assert rollouts
    assert execution.gpu
    sizes, gpu = dimensions(preset.models[condition.model]), GPUS[execution.gpu]
    lanes = lanes_of(preset, sweep, gpus)
    rows = max(1.0, gpus * execution.max_cache_tokens / longest_sequence(preset, condition))
    # Each batch of rows is drawn until its longest response ends; lanes share batches.
    batches = condition.steps * max(1.0, lanes * condition.batch_size / rows)
    batches += rollouts.evaluations * max(1.0, lanes * _graded(preset, condition) / rows)
    # Autocast copies frozen weights for every position and trained weights once; weights that are kept in bf16, and the
    # copy from which processes of a sharded model sample, are read in bf16.
    cast = cast_parameters(preset, sizes, condition.placement, gpus)
    other = (8 if condition.method == "lora" and gpus == 1 else 2) * (sizes.parameters - cast)
    weights = (2 * cast + other) / gpu.bandwidth
    positions = batches / lanes * rollouts.max_new_tokens
    # Keys and values are repeated for all heads, cast, and read.
    tokens = run_tokens(preset, condition)
    cache = tokens.drawn * tokens.context * sizes.layers * 16 * sizes.heads * sizes.head_dim / gpus / gpu.bandwidth
    return positions * (sizes.layers * _LAYER_SECONDS + weights) + cache


def evaluation_flops(preset: Preset, job: EvalJob) -> tuple[float, float]:
    """Estimate the tokens that an evaluation with lm-eval reads or draws, and their FLOPs."""
    assert preset.evaluation
    parameters = dimensions(preset.models[job.model]).active_linear
    tokens = sum(_documents(task) * task.mean_tokens for task in preset.evaluation.tasks)
    return tokens, 2.0 * parameters * tokens


def evaluation_seconds(preset: Preset, job: EvalJob) -> float:
    """Estimate the wall-clock seconds of one evaluation with lm-eval, on a CPU or one GPU."""
    assert preset.evaluation
    sizes, gpu = dimensions(preset.models[job.model]), preset.execution.gpu
    seconds = _EVALUATION_START_SECONDS if gpu is None else _GPU_START_SECONDS + 4 * sizes.parameters / _READING
    for task in preset.evaluation.tasks:
        read = 2.0 * sizes.active_linear * _documents(task) * task.mean_tokens / speed(preset.execution)
        # Tasks about what was learned mostly draw answers; tasks about what was forgotten read texts.
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
        seconds += flops * tokens / speed(preset.execution)
    return seconds
