"""The constants of theories of the learning rate (LR), as the suite has judged them, and the paper's law with them.

The law gives the optimal LR of a method by the model's family and hidden size:

    LR = base * M * (pivot / hidden size) ** exponent        M is 1 for full fine-tuning (FullFT)

The theory `movement` is of the ratio R of LoRA's to full fine-tuning's optimal LR, F. With width d, rank r and T steps,

    R sqrt(1 + (R F / u*)^2) = c d / alpha / (1 + k/r)        u* = u0 (128/d) sqrt(50/T)

u* is the LR at which A moves by as much as its initial size, into a direction that has nothing to do with it. The net
movement grows as that of a random walk, by the mean LR of a run where the LR falls. studies/lr_ratio derives it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FACTS = Path(__file__).with_name("facts")
_THEORY: Mapping[str, Any] = json.loads((FACTS / "theory.json").read_text())

ALPHA = float(_THEORY["alpha"])  # the paper's alpha, at which optimal LRs are stated
MOVEMENT: Mapping[str, float] = _THEORY["movement"]  # the constants c, u0 and k of the theory `movement`
SAME_LR = float(_THEORY["lr_factor"])  # the factor up to which two LRs count as the same
SHORT_RATIO = float(_THEORY["short_ratio"])  # LoRA's optimal LR over that of FullFT in short runs, by the paper
PIVOT = float(_THEORY["law"]["pivot"])  # the hidden size at which the law gives the base LR
EXPONENTS: Mapping[str, float] = _THEORY["law"]["exponents"]  # the law's exponent of each lineage of models
BASE_LRS = {"fullft": float(_THEORY["law"]["base"]), "lora": _THEORY["law"]["base"] * _THEORY["law"]["multiplier"]}
"""The law's LR of each method at the pivot."""


def lineage(family: str) -> str:
    """Return the lineage of a transformers model type: `qwen` for qwen2, qwen3, qwen3_moe; others are their own."""
    return next((name for name in EXPONENTS if family.lower().startswith(name)), family.lower())


@dataclass(frozen=True)
class LoraSetting:
    """A condition of LoRA."""

    width: float
    steps: float
    alpha: float
    rank: float = 16  # 16 stands for any high rank, where a published source does not give it
    mean_lr: float = 1.0  # the mean LR of a run over its highest

    @property
    def scale(self) -> float:
        """Alpha with what a low rank does to it."""
        return self.alpha * (1 + MOVEMENT["k"] / self.rank)

    @property
    def unit(self) -> float:
        """u*, of the highest LR of a run."""
        return MOVEMENT["u0"] * 128 / self.width * math.sqrt(50 / self.steps) / self.mean_lr


def movement_ratio(setting: LoraSetting, fullft_lr: float) -> float:
    """Return the predicted ratio where full fine-tuning has this optimal LR."""
    return _root(fullft_lr / setting.unit, MOVEMENT["c"] * setting.width / setting.scale)


def converted_lr(lr: float, here: LoraSetting, there: LoraSetting, fullft_growth: float = 1.0) -> float:
    """Convert LoRA's optimal LR from one setting of a model to another.

    By the theory, LR sqrt(1 + (LR / u*)^2) alpha (1 + k/r) is c d times full fine-tuning's optimal LR, which does not
    depend on alpha and the rank; `fullft_growth` is that LR there over that here, for another length or batch size.
    """
    target = lr * math.hypot(1.0, lr / here.unit) * here.scale * fullft_growth / there.scale
    return _root(1 / there.unit, target)


def _root(factor: float, target: float) -> float:
    """Return the positive y with y sqrt(1 + (factor y)^2) = target, in a form that also holds where the factor is 0."""
    return math.sqrt(2 * target**2 / (1 + math.sqrt(1 + 4 * (factor * target) ** 2)))
