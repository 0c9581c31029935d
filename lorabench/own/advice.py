"""Settings to start from, by the paper and its authors' code: learning rates, rank, batch size. No torch, no files."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorabench.analysis.lr_law import PUBLISHED, lineage, predict

ALPHA = 32.0
DEFAULT_RANK = 32
"""Of the authors' library."""
MAX_RANK = 512
"""The paper's largest."""
SHORT_STEPS = 100
SHORT_RATIO = 15.0
"""LR ratio in runs below SHORT_STEPS, called anecdotal (paper notes, 2.6)."""
SMALLEST_WIDTH = 1000
"""Of the models whose LR the authors print by their law."""
LAW_BATCH = 128
"""Examples per step in the sweep that the law was fitted on."""
POINTS_PER_DECADE = 3
RL_SHARE = 0.25
"""Of the law's LR, in reinforcement learning: the authors take 4e-5 and 8e-5 for GSM8K on 8B parameters, where the law
has 2.9e-4 (paper notes, 4.2)."""
GROUP_SIZE = PROBLEMS_PER_STEP = 16
RL_STEPS = (50, 300)
"""Fewest and most."""

# An LR without a law lies anywhere between those of the law's families, or so far beyond: half a decade, chosen here.
_BEYOND = math.sqrt(10)
# Grid points on each side of the law's prediction.
_AROUND = 2
_LARGEST_BATCH, _SMALLEST_BATCH = 32, 4


@dataclass(frozen=True)
class Lr:
    """A learning rate to start from. No value: the law does not cover the family, and there is a range alone."""

    value: float | None
    low: float
    high: float


def law_lr(family: str, hidden_size: int, method: str) -> Lr:
    """The law's LR for a model; for a family that it does not cover, a range around those of the families it does."""
    value = predict(PUBLISHED, family, hidden_size, method)
    if math.isfinite(value):
        return Lr(value, value, value)
    covered = [predict(PUBLISHED, name, hidden_size, method) for name in PUBLISHED.exponents]
    return Lr(None, min(covered) / _BEYOND, max(covered) * _BEYOND)


def covered(family: str) -> bool:
    """Whether the law has an exponent for a family."""
    return lineage(family) in PUBLISHED.exponents


def lr_grid(lr: Lr) -> list[float]:
    """LRs at three points per decade, 1, 2.2, 4.6: two on each side of a prediction, or the whole of a range."""
    lowest, highest = (POINTS_PER_DECADE * math.log10(end) for end in (lr.low, lr.high))
    if lr.value is None:
        first, last = math.floor(lowest), math.ceil(highest)
    else:
        first, last = round(lowest) - _AROUND, round(highest) + _AROUND
    return [float(f"{10 ** (place / POINTS_PER_DECADE):.1e}") for place in range(first, last + 1)]


def rl_lr(lr: Lr) -> Lr:
    """The LR to start from in reinforcement learning, from that of the law."""
    return Lr(lr.value and RL_SHARE * lr.value, RL_SHARE * lr.low, RL_SHARE * lr.high)


def rl_steps(problems: int, per_step: int, epochs: float) -> int:
    """Steps of so many problems each that go through all of them so often, within RL_STEPS."""
    fewest, most = RL_STEPS
    return min(most, max(fewest, math.ceil(epochs * problems / per_step)))


def batch_size(examples: int) -> int:
    """Small, since both methods do best there: 32, or less to make an epoch of 100 steps, but at least 4."""
    size = _LARGEST_BATCH
    while size > _SMALLEST_BATCH and examples // size < SHORT_STEPS:
        size //= 2
    return min(size, examples)


def capacity_rank(parameters_per_rank: float, completion_tokens: float) -> int:
    """Smallest power of two whose LoRA has a parameter for each completion token (paper notes, 3.4)."""
    return 1 << math.ceil(math.log2(max(1.0, completion_tokens / parameters_per_rank)))


def max_rank(hidden_size: int) -> int:
    """A higher rank makes LoRA's matrices larger than those they adapt, or is beyond what the paper tried."""
    return min(MAX_RANK, hidden_size // 2)


def recommended_rank(hidden_size: int, parameters_per_rank: float, completion_tokens: float | None) -> int:
    """The authors' default, or more where the data need it, as far as that goes."""
    needed = 1 if completion_tokens is None else capacity_rank(parameters_per_rank, completion_tokens)
    return min(max(DEFAULT_RANK, needed), max_rank(hidden_size))
