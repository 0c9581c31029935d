"""The theory `movement` of the ratio of LoRA's to full fine-tuning's optimal learning rate (LR), and what follows of it.

With width d, rank r, T steps, A's initial scale s and the optimal LRs R LR_F of LoRA and LR_F of full fine-tuning,

    R sqrt(s^2 + (R LR_F / u*)^2) = c d / alpha / (1 + k/r)        u* = u0 (128/d) sqrt(50/T)

u* is the LR at which A moves by as much as its initial size at s = 1, into a direction that has nothing to do with it.
The net movement grows as that of a random walk, by the mean LR of a run where the LR falls. studies/lr_ratio derives it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lora_advice.theory import MOVEMENT

WIDTH, STEPS = 128, 50
"""The width and the number of steps at which u0 is given."""


@dataclass(frozen=True)
class Setting:
    """A condition whose ratio is predicted; NaN where a published source does not give it."""

    width: float
    steps: float
    batch_size: float
    alpha: float
    init_a: float = 1.0
    """The scale of A's initial entries, in units of 1/sqrt(d_in)."""
    frozen: bool = False
    """Whether A stays at its initial values; the ratio is then that of B's optimal LR."""
    rank: float = 16
    """LoRA's rank; 16 stands for any high rank, where a published source does not give it."""
    mean_lr: float = 1.0
    """The mean LR of a run over its highest."""


def positive_root(constant: float, factor: np.ndarray | float, target: float) -> np.ndarray:
    """Return the positive y with y (constant + factor y) = target, in a form that also holds where the factor is 0."""
    return np.asarray(2 * target / (constant + np.sqrt(constant**2 + 4 * np.asarray(factor) * target)))


def unit(setting: Setting, u0: float) -> float:
    """Return u*, the highest LR of LoRA at which A moves by as much as its initial size, in units of 1/sqrt(d_in)."""
    return u0 * WIDTH / setting.width * math.sqrt(STEPS / setting.steps) / setting.mean_lr


def movement_ratio(
    setting: Setting, fullft_lr: np.ndarray | float, theory: Mapping[str, float] = MOVEMENT
) -> np.ndarray:
    """Return the predicted ratio at optimal LRs of full fine-tuning, where A is trained.

    Args:
        theory: the constants c, u0 and k.
    """
    target = theory["c"] * setting.width / setting.alpha / (1 + theory["k"] / setting.rank)
    factor = np.asarray(fullft_lr) / unit(setting, theory["u0"])
    return np.asarray(np.sqrt(positive_root(setting.init_a**2, factor**2, target**2)))


def converted_lr(lr: float, here: Setting, there: Setting, fullft_growth: float = 1.0) -> float:
    """Convert LoRA's optimal LR from one setting of a model to another, where A is trained.

    By the theory, LR sqrt(s^2 + (LR / u*)^2) alpha (1 + k/r) is c d times the optimal LR of full fine-tuning, which
    does not depend on alpha and the rank.

    Args:
        lr: the optimal LR of LoRA at `here`.
        here: the setting that it is from, of one width with `there`.
        there: the setting to convert it to.
        fullft_growth: the optimal LR of full fine-tuning there over that here, for another length or batch size.
    """

    def scale(setting: Setting) -> float:
        return setting.alpha * (1 + MOVEMENT["k"] / setting.rank)

    size_of_a = math.hypot(here.init_a, lr / unit(here, MOVEMENT["u0"]))
    target = lr * size_of_a * scale(here) * fullft_growth / scale(there)
    return math.sqrt(float(positive_root(there.init_a**2, unit(there, MOVEMENT["u0"]) ** -2, target**2)))
