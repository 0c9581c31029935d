"""Settings to start from, by the paper and its authors' code: rank, batch size, RL steps.

Nothing here reads a file or imports torch. The authors' code is tinker-cookbook, their library's public repository.
"""

from __future__ import annotations

import math

from lorabench.analysis.lr_law import PUBLISHED, lineage

ALPHA = 32.0
"""The paper's alpha, the same at every rank."""
DEFAULT_RANK = 32
"""The default rank of the authors' library."""
MAX_RANK = 512
"""The paper's largest rank."""
SHORT_STEPS = 100
"""Steps below which the paper calls a run short."""
SHORT_RATIO = 15.0
"""The optimal LR of LoRA over that of FullFT in short runs, which the paper calls anecdotal."""
SMALLEST_WIDTH = 1000
"""About the hidden size of the smallest model, Qwen3-0.6B with 1024, that the authors' law was shown for."""
GROUP_SIZE = PROBLEMS_PER_STEP = 16
RL_STEPS = (50, 300)
"""The smallest and the largest number of steps in reinforcement learning."""

_LARGEST_BATCH, _SMALLEST_BATCH = 32, 4


def covered(family: str) -> bool:
    """Return whether the law has an exponent for a family."""
    return lineage(family) in PUBLISHED.exponents


def rl_steps(problems: int, per_step: int, epochs: float) -> int:
    """Return the number of steps, within RL_STEPS, that go through all problems `epochs` times.

    Args:
        problems: the number of problems for training.
        per_step: the number of problems in each step.
        epochs: passes over the problems.
    """
    fewest, most = RL_STEPS
    return min(most, max(fewest, math.ceil(epochs * problems / per_step)))


def batch_size(examples: int) -> int:
    """Return a batch size: 32, halved down to 4 until an epoch has 100 steps.

    In the paper both methods reach their lowest loss at small batches, and LoRA loses more at large ones.
    """
    size = _LARGEST_BATCH
    while size > _SMALLEST_BATCH and examples // size < SHORT_STEPS:
        size //= 2
    return min(size, examples)


def capacity_rank(parameters_per_rank: float, completion_tokens: float) -> int:
    """Return the smallest power of two at which LoRA has a parameter for each completion token.

    This is the rule in the documentation of the authors' library.
    """
    return 1 << math.ceil(math.log2(max(1.0, completion_tokens / parameters_per_rank)))


def max_rank(hidden_size: int) -> int:
    """Return the highest rank to use: the paper's highest, or the rank at which LoRA's matrices outgrow the weights."""
    return min(MAX_RANK, hidden_size // 2)


def recommended_rank(hidden_size: int, parameters_per_rank: float, completion_tokens: float | None) -> int:
    """Return the authors' default rank, or a higher one up to `max_rank` if the data need it.

    Args:
        hidden_size: the model's width.
        parameters_per_rank: LoRA's parameters at rank 1.
        completion_tokens: scored tokens of the training data; None if unknown.
    """
    needed = 1 if completion_tokens is None else capacity_rank(parameters_per_rank, completion_tokens)
    return min(max(DEFAULT_RANK, needed), max_rank(hidden_size))
