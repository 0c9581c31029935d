"""The theory `movement` of the ratio R of LoRA's to full fine-tuning's optimal learning rate (LR).

With width d, rank r, T steps and the optimal LR F of full fine-tuning,

    R sqrt(1 + (R F / u*)^2) = c d / alpha / (1 + k/r)        u* = u0 (128/d) sqrt(50/T)

u* is the LR at which A moves by as much as its initial size, into a direction that has nothing to do with it. The net
movement grows as that of a random walk, by the mean LR of a run where the LR falls. studies/lr_ratio derives it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_advice.theory import MOVEMENT


@dataclass(frozen=True)
class Setting:
    """A condition of LoRA."""

    width: float
    steps: float
    alpha: float
    rank: float = 16
    """16 stands for any high rank, where a published source does not give it."""
    mean_lr: float = 1.0
    """The mean LR of a run over its highest."""

    @property
    def scale(self) -> float:
        """Alpha with what a low rank does to it."""
        return self.alpha * (1 + MOVEMENT["k"] / self.rank)

    @property
    def unit(self) -> float:
        """u*, of the highest LR of a run."""
        return MOVEMENT["u0"] * 128 / self.width * math.sqrt(50 / self.steps) / self.mean_lr


def movement_ratio(setting: Setting, fullft_lr: float) -> float:
    """Return the predicted ratio where full fine-tuning has this optimal LR."""
    return _root(fullft_lr / setting.unit, MOVEMENT["c"] * setting.width / setting.scale)


def converted_lr(lr: float, here: Setting, there: Setting, fullft_growth: float = 1.0) -> float:
    """Convert LoRA's optimal LR from one setting of a model to another.

    By the theory, LR sqrt(1 + (LR / u*)^2) alpha (1 + k/r) is c d times full fine-tuning's optimal LR, which does not
    depend on alpha and the rank; `fullft_growth` is that LR there over that here, for another length or batch size.
    """
    target = lr * math.hypot(1.0, lr / here.unit) * here.scale * fullft_growth / there.scale
    return _root(1 / there.unit, target)


def _root(factor: float, target: float) -> float:
    """Return the positive y with y sqrt(1 + (factor y)^2) = target, in a form that also holds where the factor is 0."""
    return math.sqrt(2 * target**2 / (1 + math.sqrt(1 + 4 * (factor * target) ** 2)))
