"""What a preset costs, before it is run.

Linear layers only, as the paper counts (its section on compute efficiency): per token, a forward and
backward pass of N parameters takes 6N FLOPs when all are trained; LoRA saves the weight gradient of
the frozen part (4N) and pays for A and B, in all a ratio of 2/3 + 2r/width.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from functools import cache
from typing import TYPE_CHECKING

from lorabench.config import DatasetSpec, ModelSpec, Preset
from lorabench.models.tiny import Recipe, shipped

if TYPE_CHECKING:
    from lorabench.plan import Condition, Plan, Sweep

# Measured on the offline datasets: mean characters of an example as a share of the limit, and at most; characters
# per token of the tiny base's tokenizer and, roughly, of large ones. Those of the hub's problems are guesses.
_SHARE_OF_MAX_CHARS = {"instruct": 0.65, "worked": 0.83}
_MEAN_CHARS = {"instruct": 216, "worked": 500}
_CHARS_OF_A_FACT = 40
_CHARS_OF_A_PROBLEM = {"arithmetic": 90, "gsm_symbolic": 300, "gsm8k": 300, "math": 300, "deepmath": 400, "file": 300}
_CHARS_PER_TOKEN = {"tiny": 2.0, "hub": 3.0, "path": 3.0, "gguf": 3.0}
# Imports, loading, and writing of one job, in seconds on one core.
_START_SECONDS = 8.0
_EVALUATION_START_SECONDS = 12.0


# A token that is drawn takes so many times the seconds of a forward pass over a text: one position at a time leaves
# most of a machine idle. On one core the tiny base draws 11,000 a second, where 50 GFLOP/s would read 30,000. On a GPU
# it depends on the batch, and this is a guess.
_DECODING = 3.0


@dataclass(frozen=True)
class Estimate:
    """Planned work. `tokens` pass forward and backward; `minutes` is wall-clock on `cores` cores."""

    runs: int
    sweeps: int
    tokens: float
    flops: float
    minutes: float

    def plus(self, other: Estimate) -> Estimate:
        """One after the other."""
        return Estimate(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def tokens_per_example(model: ModelSpec, dataset: DatasetSpec) -> float:
    """Estimated tokens of one example."""
    if dataset.kind in ("hub", "file"):
        return dataset.mean_tokens
    if dataset.kind == "facts":
        chars: float = _CHARS_OF_A_FACT
    else:
        chars = min(_SHARE_OF_MAX_CHARS[dataset.kind] * dataset.max_chars, _MEAN_CHARS[dataset.kind])
    return chars / _CHARS_PER_TOKEN[model.kind]


@cache
def shape(model: ModelSpec) -> tuple[int, int]:
    """Number of parameters that take part in a token, and width, of a model."""
    if model.kind == "tiny":
        record = json.loads((shipped(model.name) / "recipe.json").read_text())
        recipe = Recipe(**record["recipe"])
        idle = (recipe.experts - recipe.active_experts) * recipe.layers * 3 * recipe.hidden_size
        return record["parameters"] - idle * recipe.intermediate_size, recipe.hidden_size
    return model.parameters, model.hidden_size


def train_flops(condition: Condition, parameters: int, width: int, tokens: float) -> float:
    """FLOPs of training on that many tokens, forward and backward."""
    ratio = 1.0 if condition.rank is None else 2 / 3 + 2 * condition.rank / width
    return 6.0 * parameters * tokens * ratio


@dataclass(frozen=True)
class _RunTokens:
    """Tokens of one run: trained on, evaluated without a gradient, and drawn."""

    trained: float
    evaluated: float
    drawn: float


def _run_tokens(preset: Preset, sweep: Sweep) -> _RunTokens:
    condition, rollouts = sweep.condition, sweep.condition.rollouts
    model = preset.models[condition.model]
    if rollouts is None:
        dataset = preset.datasets[condition.dataset]
        per_example = tokens_per_example(model, dataset)
        examples = preset.protocol.curve_points * dataset.validation + dataset.test
        return _RunTokens(condition.steps * condition.batch_size * per_example, examples * per_example, 0.0)
    problems = preset.problems[condition.dataset]
    prompt = _CHARS_OF_A_PROBLEM[problems.kind] / _CHARS_PER_TOKEN[model.kind]
    episodes = condition.steps * condition.batch_size
    held_out = sum(preset.problems[name].test for name in rollouts.held_out) * rollouts.held_out_samples
    graded = problems.validation + problems.test + held_out
    answers = episodes + rollouts.evaluations * graded
    # A prompt goes through the model once for its group, in sampling and in learning.
    prompts = episodes / rollouts.group_size * prompt
    evaluated = prompts + rollouts.evaluations * graded * prompt
    response = rollouts.mean_response_tokens
    return _RunTokens(episodes * response + prompts, evaluated, answers * response)


def sweep_flops(preset: Preset, sweep: Sweep) -> float:
    """FLOPs of all runs of a sweep, evaluation and sampling included."""
    trained, forward, _ = _run_flops(preset, sweep)
    return sweep.n_runs * (trained + forward)


def _run_flops(preset: Preset, sweep: Sweep) -> tuple[float, float, float]:
    """FLOPs of one run: training; forward passes, drawn tokens among them; drawn tokens alone."""
    parameters, width = shape(preset.models[sweep.condition.model])
    tokens = _run_tokens(preset, sweep)

    def flops(count: float) -> float:
        return train_flops(sweep.condition, parameters, width, count)

    return flops(tokens.trained), flops(tokens.evaluated + tokens.drawn) / 3, flops(tokens.drawn) / 3


def estimate(plan: Plan, sweeps: list[Sweep], cores: int) -> Estimate:
    """What some sweeps of a plan cost on a machine with that many cores."""
    preset = plan.preset
    flops = sum(sweep_flops(preset, sweep) for sweep in sweeps)
    tokens = sum(sweep.n_runs * _run_tokens(preset, sweep).trained for sweep in sweeps)
    drawn = sum(sweep.n_runs * _run_flops(preset, sweep)[2] for sweep in sweeps)
    seconds = (flops + (_DECODING - 1) * drawn) / (preset.execution.gflops * 1e9) + len(sweeps) * _START_SECONDS
    at_once = max(1, min(jobs_at_once(plan, cores), len(sweeps)))
    return Estimate(sum(sweep.n_runs for sweep in sweeps), len(sweeps), tokens, flops, seconds / at_once / 60)


def evaluation(plan: Plan, cores: int) -> Estimate:
    """What the evaluation of a plan costs on a machine with that many cores; its `sweeps` are its jobs."""
    preset, jobs = plan.preset, plan.evaluations()
    tokens = flops = seconds = 0.0
    for job in jobs:
        assert preset.evaluation
        parameters, _ = shape(preset.models[job.model])
        for task in preset.evaluation.tasks:
            read = min(task.documents, task.limit or task.documents) * task.mean_tokens
            tokens, flops = tokens + read, flops + 2.0 * parameters * read
            # What was learned is mostly told by drawn answers, what was forgotten by the probability of texts.
            seconds += (_DECODING if task.about == "learned" else 1.0) * 2.0 * parameters * read
    seconds = seconds / (preset.execution.gflops * 1e9) + len(jobs) * _EVALUATION_START_SECONDS
    at_once = max(1, min(jobs_at_once(plan, cores), len(jobs)))
    return Estimate(0, len(jobs), tokens, flops, seconds / at_once / 60)


def jobs_at_once(plan: Plan, cores: int) -> int:
    """Sweep jobs that fit on that many cores."""
    return max(1, cores // plan.preset.execution.threads)
