"""The constants of theories of the learning rate (LR), as the suite has judged them, and the paper's law with them.

The law gives the optimal LR of a method by the model's family and hidden size:

    LR = base * M * (pivot / hidden size) ** exponent        M is 1 for full fine-tuning (FullFT)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FACTS = Path(__file__).with_name("facts")

_THEORY: Mapping[str, Any] = json.loads((FACTS / "theory.json").read_text())

ALPHA = float(_THEORY["alpha"])
"""The paper's alpha, at which optimal LRs are stated."""

MOVEMENT: Mapping[str, float] = _THEORY["movement"]
"""The constants c, u0 and k of the theory `movement` (`lr_ratio`)."""

SAME_LR = float(_THEORY["lr_factor"])
"""The factor up to which two LRs count as the same."""

SHORT_RATIO = float(_THEORY["short_ratio"])
"""LoRA's optimal LR over that of FullFT in short runs, by the paper."""

PIVOT = float(_THEORY["law"]["pivot"])
"""The hidden size at which the law gives the base LR."""

EXPONENTS: Mapping[str, float] = _THEORY["law"]["exponents"]
"""The law's exponent of each lineage of models."""


def lineage(family: str) -> str:
    """Return the lineage of a transformers model type: `qwen` for qwen2, qwen3, qwen3_moe; others are their own."""
    return next((name for name in EXPONENTS if family.lower().startswith(name)), family.lower())


def law_lr(family: str, width: float, method: str) -> float:
    """Return the LR of the law for a method, `fullft` or `lora`; NaN for a family without an exponent."""
    base = _THEORY["law"]["base"] * (_THEORY["law"]["multiplier"] if method == "lora" else 1.0)
    return float(base * (PIVOT / width) ** EXPONENTS.get(lineage(family), math.nan))
