"""The learning rate (LR) at which sweeps with `lrs: auto` start. No torch or numpy is imported."""

from __future__ import annotations

import math
from typing import Literal

# The paper's law for Llama models, whose constants are in `lorabench.analysis.lr_law.PUBLISHED`: LR of full fine-tuning
# at width 2000, that of LoRA over it, and the exponent of the width.
_FULLFT, _LORA_OVER_FULLFT, _WIDTH, _EXPONENT = 5e-5, 10.0, 2000.0, 0.781
# In RL tinker-cookbook takes 4e-5 and 8e-5 for LoRA on GSM8K with 8B parameters, about a quarter of the law's 2.9e-4;
# the tiny bases need as much less.
_RL_SHARE = 0.25


def starting_lr(hidden_size: int, task: Literal["sft", "rl"]) -> float:
    """Return the LR in the middle of the first three, the same for LoRA and full fine-tuning.

    It is the geometric mean of the LRs that the paper's law gives the two methods, so that their grids overlap. The
    exponent of Llama serves all families: over widths of 1,024 to 8,192 the start is then within a factor of 3 of that
    for Qwen, which a walk of a step or two makes up for.
    """
    law: float = _FULLFT * math.sqrt(_LORA_OVER_FULLFT) * (_WIDTH / hidden_size) ** _EXPONENT
    return law * (_RL_SHARE if task == "rl" else 1.0)
