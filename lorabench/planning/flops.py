"""The lengths, tokens and FLOPs of runs and evaluations, estimated without reading any data; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from lorabench.config.fields import Placement
from lorabench.config.inputs import DatasetSpec, ModelSpec, curve_examples
from lorabench.config.preset import Preset
from lorabench.models.specs import Dimensions, dimensions
from lorabench.runs import Condition, Sweep

# Measured on the offline datasets: an example's mean length as a share of the limit, and its largest mean; characters
# per token of the tiny base's tokenizer and, roughly, of large ones. The lengths of the hub's problems are guesses.
_SHARE_OF_MAX_CHARS = {"instruct": 0.65, "worked": 0.83, "docstrings": 0.71, "documentation": 0.66}
_MEAN_CHARS = {"instruct": 216, "worked": 500, "docstrings": 459, "documentation": 379}
_CHARS_OF_A_FACT = 40
_CHARS_OF_A_PROBLEM = {"arithmetic": 90, "sums": 8, "deepmath": 400}
_CHARS_OF_OTHER_PROBLEMS = 300
_CHARS_PER_TOKEN = {"tiny": 2.0, "hub": 3.0, "path": 3.0, "gguf": 3.0}
# Unscored tokens of an example on the hub. One of Tulu3 has about 600 tokens, 309 scored (docs/paper.md).
_UNSCORED_ON_HUB = 290

SHARED_ROW = 2048
"""The most tokens of a row that several responses of RL share. A longer row has one response, so that its attention is
plainly causal: it needs no mask, and faster kernels skip what is masked."""


@dataclass(frozen=True)
class RunWork:
    """The tokens that one run trains on, evaluates without a gradient and draws, and the FLOPs of each."""

    trained: float
    evaluated: float
    trained_scored: float
    """Of the trained tokens those whose logits are computed, and so below of the evaluated."""
    evaluated_scored: float
    drawn: float
    context: float
    """The mean number of tokens that a token attends to, but for the rows that are learned from in RL."""
    learned_context: float
    """The same in training."""
    trained_flops: float
    """As all FLOPs but those recomputed, it has the unembedding of every token, scored or not, as the paper counts."""
    evaluated_flops: float
    drawn_flops: float
    recomputed_flops: float
    """FLOPs of the layers' forward passes that activation checkpointing repeats; 0 where `auto` is not decided yet."""


def tokens_per_example(model: ModelSpec, dataset: DatasetSpec) -> float:
    """Return the estimated mean number of tokens of an example."""
    if dataset.kind in ("hub", "file"):
        return dataset.mean_tokens
    chars = (
        _CHARS_OF_A_FACT
        if dataset.kind == "facts"
        else min(_SHARE_OF_MAX_CHARS[dataset.kind] * dataset.max_chars, _MEAN_CHARS[dataset.kind])
    )
    return chars / _CHARS_PER_TOKEN[model.kind]


def _prompt_tokens(preset: Preset, condition: Condition) -> float:
    chars = _CHARS_OF_A_PROBLEM.get(preset.problems[condition.dataset].kind, _CHARS_OF_OTHER_PROBLEMS)
    return chars / _CHARS_PER_TOKEN[preset.models[condition.model].kind]


def longest_sequence(preset: Preset, condition: Condition) -> int:
    """Return the estimated number of tokens of the longest example, or in RL of a prompt with the longest response."""
    if condition.rollouts is not None:
        return round(_prompt_tokens(preset, condition)) + condition.rollouts.max_new_tokens
    dataset = preset.datasets[condition.dataset]
    if dataset.kind == "hub" and dataset.max_tokens is not None:
        return dataset.max_tokens
    chars = _CHARS_OF_A_FACT if dataset.kind == "facts" else dataset.max_chars
    return round(chars / _CHARS_PER_TOKEN[preset.models[condition.model].kind])


def row_limit(longest: int, max_tokens: int) -> int:
    """Return the most tokens of a row that several responses of RL share, of which the `longest` has so many tokens.

    They share the prompt, but attention is computed over the whole row, which is no longer than a micro-batch.
    """
    return min(max_tokens, SHARED_ROW, max(192, 4 * longest))


def is_fused(preset: Preset, sizes: Dimensions) -> bool:
    """Return whether a model's layers are computed by `lorabench.models.fused` on the preset's GPU."""
    return preset.execution.gpu is not None and preset.execution.fused_kernels and sizes.fusible


def share_rows(preset: Preset, sizes: Dimensions) -> bool:
    """Return whether sequences share a row without padding, and without seeing each other."""
    return is_fused(preset, sizes) and preset.protocol.precision == "bf16"


def lora_parameters(
    preset: Preset, sizes: Dimensions, rank: int | None, placement: Placement | None
) -> tuple[int, int]:
    """Return the number of LoRA's parameters, and of those that a token passes; zeros without a rank."""
    if rank is None or placement is None:
        return 0, 0
    return sizes.lora(placement, rank, preset.protocol.include_unembedding)


def linear_flops_per_token(sizes: Dimensions, lora: int | None) -> float:
    """Return the FLOPs of a forward and backward pass for one token, in linear layers only, as the paper counts them.

    A token passes through `lora` parameters of LoRA; None is full fine-tuning.
    """
    return 6.0 * sizes.active_linear if lora is None else 4.0 * sizes.active_linear + 6.0 * lora


def unembedding_flops_per_token(preset: Preset, condition: Condition) -> tuple[float, float]:
    """Return the FLOPs of the unembedding for a token: forward and backward in training, and forward."""
    sizes, rank = dimensions(preset.models[condition.model]), condition.rank
    matrix = sizes.hidden * sizes.vocabulary
    if rank is None:
        return 6.0 * matrix, 2.0 * matrix
    lora = rank * (sizes.hidden + sizes.vocabulary) if preset.protocol.include_unembedding else 0
    return 4.0 * matrix + 6.0 * lora, 2.0 * (matrix + lora)


def attention_flops_per_token(sizes: Dimensions, context: float) -> float:
    """Return the FLOPs of attention for a token that attends to `context` tokens, forward; backward takes twice."""
    return 4.0 * context * sizes.heads * sizes.head_dim * sizes.layers


def run_work(preset: Preset, condition: Condition) -> RunWork:
    """Estimate the tokens and FLOPs of each run of a condition."""
    model, rollouts, steps = preset.models[condition.model], condition.rollouts, condition.steps
    if rollouts is None:
        dataset, protocol = preset.datasets[condition.dataset], preset.protocol
        # The steps after which a run is validated, as `lorabench.training.sft.curve_steps` gives them.
        spaced = {round(steps ** (point / (protocol.curve_points - 1))) for point in range(protocol.curve_points)}
        validations = len(spaced | {step for step in protocol.validate_at if step <= steps})
        # A causal token attends to half of its example, but most tokens are in examples twice as long as the mean.
        context = tokens_per_example(model, dataset)
        # All points but the last are measured on the examples of the curve.
        curve = curve_examples(dataset) or dataset.validation
        examples = steps * condition.batch_size
        evaluations = (validations - 1) * curve + dataset.validation + dataset.test
        trained, evaluated, drawn = examples * context, evaluations * context, 0.0
        # The prompts of other datasets are short.
        scored = max(context / 2, context - (_UNSCORED_ON_HUB if dataset.kind == "hub" else 0))
        trained_scored, evaluated_scored = examples * scored, evaluations * scored
        learned_context = context
    else:
        prompt, response = _prompt_tokens(preset, condition), rollouts.mean_response_tokens
        episodes, graded = steps * condition.batch_size, rollouts.evaluations * graded_problems(preset, condition)
        # A prompt passes through the model once for its group in sampling, and in learning once for each row.
        prompts, size = episodes / rollouts.group_size * prompt, rollouts.group_size
        one_row, most = share_rows(preset, dimensions(model)), preset.execution.max_batch_tokens
        room = (most if one_row else row_limit(longest_sequence(preset, condition), most)) - prompt
        rows = size if response > room else ceil(size * response / room)
        trained, evaluated = episodes * response + rows * prompts, prompts + graded * prompt
        # A token attends to the half of its response; most are in responses twice as long as the mean, if these may be.
        drawn, context = (episodes + graded) * response, prompt + min(response, rollouts.max_new_tokens / 2)
        learned_context = context if one_row else prompt + size * response / rows
        trained_scored, evaluated_scored = episodes * response, 0.0
    sizes = dimensions(model)
    lora = lora_parameters(preset, sizes, condition.rank, condition.placement)[1]
    linear = 2.0 * (sizes.active_linear + lora)
    forward = linear + attention_flops_per_token(sizes, context)
    attention = attention_flops_per_token(sizes, learned_context)
    training = linear_flops_per_token(sizes, None if condition.rank is None else lora) + 3 * attention
    # Activation checkpointing recomputes layers, and not the unembedding.
    layer = (linear + attention - unembedding_flops_per_token(preset, condition)[1]) / sizes.layers
    return RunWork(
        trained,
        evaluated,
        trained_scored,
        evaluated_scored,
        drawn,
        context,
        learned_context,
        trained_flops=trained * training,
        evaluated_flops=evaluated * forward,
        drawn_flops=drawn * forward,
        recomputed_flops=trained * layer * preset.execution.recomputed_layers(sizes.layers),
    )


def graded_problems(preset: Preset, condition: Condition) -> int:
    """Return the number of responses that are graded in one evaluation of an RL run."""
    assert condition.rollouts
    problems = preset.problems[condition.dataset]
    held_out = sum(preset.problems[name].test for name in condition.rollouts.held_out)
    return problems.validation + problems.test + held_out * condition.rollouts.held_out_samples


def sweep_flops(preset: Preset, sweep: Sweep) -> float:
    """Estimate the FLOPs of all runs of a sweep, with their evaluation and sampling."""
    work = run_work(preset, sweep.condition)
    return sweep.n_runs * (work.trained_flops + work.evaluated_flops + work.drawn_flops)
