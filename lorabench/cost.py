"""What a preset costs, before it is run.

Linear layers only, as the paper counts (its section on compute efficiency): per token, a forward and
backward pass of N parameters takes 6N FLOPs when all are trained; LoRA saves the weight gradient of
the frozen part (4N) and pays for A and B, in all a ratio of 2/3 + 2r/width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from lorabench.config import DatasetSpec, ModelSpec, Preset
from lorabench.models.tiny import Recipe, shipped

if TYPE_CHECKING:
    from lorabench.plan import Condition, Plan, Sweep

# Measured on the offline datasets: mean characters of an example as a share of the limit, and at most; characters
# per token of the tiny base's tokenizer and, roughly, of large ones.
_SHARE_OF_MAX_CHARS = {"instruct": 0.65, "worked": 0.83}
_MEAN_CHARS = {"instruct": 216, "worked": 500}
_CHARS_OF_A_FACT = 40
_CHARS_PER_TOKEN = {"tiny": 2.0, "hub": 3.0, "path": 3.0, "gguf": 3.0}
# Imports, loading, and writing of one job, in seconds on one core.
_START_SECONDS = 8.0


@dataclass(frozen=True)
class Estimate:
    """Planned work. `tokens` pass forward and backward; `minutes` is wall-clock on `cores` cores."""

    runs: int
    sweeps: int
    tokens: float
    flops: float
    minutes: float


def tokens_per_example(model: ModelSpec, dataset: DatasetSpec) -> float:
    """Estimated tokens of one example."""
    if dataset.kind == "hub":
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


def sweep_flops(preset: Preset, sweep: Sweep) -> float:
    """FLOPs of all runs of a sweep, evaluation included."""
    condition = sweep.condition
    model, dataset = preset.models[condition.model], preset.datasets[condition.dataset]
    parameters, width = shape(model)
    per_example = tokens_per_example(model, dataset)
    trained = train_flops(condition, parameters, width, condition.steps * condition.batch_size * per_example)
    evaluated = preset.protocol.curve_points * dataset.validation + dataset.test
    forward = train_flops(condition, parameters, width, evaluated * per_example) / 3
    return sweep.n_runs * (trained + forward)


def estimate(plan: Plan, sweeps: list[Sweep], cores: int) -> Estimate:
    """What some sweeps of a plan cost on a machine with that many cores."""
    preset = plan.preset
    flops = sum(sweep_flops(preset, sweep) for sweep in sweeps)
    tokens = sum(
        sweep.n_runs
        * sweep.condition.steps
        * sweep.condition.batch_size
        * tokens_per_example(preset.models[sweep.condition.model], preset.datasets[sweep.condition.dataset])
        for sweep in sweeps
    )
    seconds = flops / (preset.execution.gflops * 1e9) + len(sweeps) * _START_SECONDS
    at_once = max(1, min(jobs_at_once(plan, cores), len(sweeps)))
    return Estimate(sum(sweep.n_runs for sweep in sweeps), len(sweeps), tokens, flops, seconds / at_once / 60)


def jobs_at_once(plan: Plan, cores: int) -> int:
    """Sweep jobs that fit on that many cores."""
    return max(1, cores // plan.preset.execution.threads)
