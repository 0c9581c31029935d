"""Theories of the ratio R of LoRA's to full fine-tuning's optimal learning rate, as functions of a condition.

A condition is a width, a number of steps, a batch size, and LoRA's rank, alpha, initial scale of A, and whether A is
trained. studies/lr_ratio/README.md derives the theories.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lorabench.analysis.arms import ALPHA
from studies.lr_ratio.predictions import MovementTheory, Predictions

WIDTH, STEPS, BATCH_SIZE = 128, 50, 8
"""The condition at which, with the paper's alpha, parameters of theories are given."""


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
    """The mean LR of a run over its highest (see `lorabench.analysis.optima.mean_lr`)."""


LogRatio = Callable[[np.ndarray], np.ndarray]
"""The natural logarithm of a predicted ratio as a function of that of FullFT's optimal LR."""


def predicted(predictions: Predictions, setting: Setting) -> dict[str, LogRatio]:
    """Return what each theory predicts for a setting, by its name; theories that are silent on it are left out.

    With width d, T steps, A's initial scale s and constants of each theory:

    - `movement`: R sqrt(s^2 + (R LR_F / u*)^2) = c d / alpha / (1 + k/r), where LR_F is FullFT's optimal LR and u* = u0
      (128/d) sqrt(50/T) the LR at which A moves by as much as its initial size at s = 1; it goes by the mean LR of a
      run where the LR falls. While A is frozen, R = c d / (s alpha) / (1 + k/r) at rank r.
    - `still`: R = c d / (s alpha), as if A never moved.
    - `mu_a`: c sqrt(d / alpha), the maximal-update theory of LoRA (Chen, Villar and Hayou, arXiv 2602.06204), of any s.
    - `scale`: R (1 + kappa R) = c d / alpha, whatever the length and the batch size.
    - `fixed_lora`: R_128 (d/128)^(fullft_exponent - lora_exponent), in the condition of its parameter only.
    - `constant`: the paper's number, at its alpha 32 only.
    - `naive`: c d / alpha with c = 1/2, the paper's derivation, in which LoRA of full rank is made equal to FullFT.

    All but the first two are silent on a frozen A, and all but the first three on another scale of it.
    """
    movement, scale, fixed_lora = predictions.movement, predictions.scale, predictions.fixed_lora
    still, mu_a, constant, naive = predictions.still, predictions.mu_a, predictions.constant, predictions.naive
    width_over_alpha = setting.width / setting.alpha
    stated: dict[str, LogRatio] = {}
    if movement:
        target = movement.c * width_over_alpha / (1 + movement.k / setting.rank)

        def moving(log_fullft: np.ndarray) -> np.ndarray:
            factor = np.exp(log_fullft) / _unit(movement, setting)
            return np.asarray(0.5 * np.log(_positive_root(setting.init_a**2, factor**2, target**2)))

        stated["movement"] = _fixed(target / setting.init_a) if setting.frozen else moving
    if still:
        stated["still"] = _fixed(still.c * width_over_alpha / setting.init_a)
    if setting.frozen:
        return stated
    if mu_a:
        stated["mu_a"] = _fixed(mu_a.c * math.sqrt(width_over_alpha))
    if setting.init_a != 1:
        return stated
    if scale:
        ratio = _positive_root(1.0, np.asarray(scale.kappa), scale.c * width_over_alpha)
        stated["scale"] = _fixed(float(ratio))
    if fixed_lora and (setting.steps, setting.batch_size, setting.alpha) == (STEPS, BATCH_SIZE, ALPHA):
        exponent = fixed_lora.fullft_exponent - fixed_lora.lora_exponent
        stated["fixed_lora"] = _fixed(fixed_lora.ratio * (setting.width / WIDTH) ** exponent)
    if constant and setting.alpha == ALPHA:
        stated["constant"] = _fixed(constant.ratio)
    if naive:
        stated["naive"] = _fixed(naive.c * width_over_alpha)
    return stated


def converted_lr(lr: float, here: Setting, there: Setting, theory: MovementTheory, fullft_growth: float = 1.0) -> float:
    """Convert LoRA's optimal LR from one setting of a model to another by the theory `movement`, whose c does not
    matter.

    By it, LR sqrt(s^2 + (LR / u*)^2) alpha (1 + k/r) is c d times the optimal LR of FullFT, which does not depend on
    alpha and the rank, and grows by `fullft_growth` to another length or batch size.
    """

    def size_of_a(setting: Setting, at: float) -> float:
        return math.hypot(setting.init_a, 0.0 if setting.frozen else at / _unit(theory, setting))

    def scale(setting: Setting) -> float:
        return setting.alpha * (1 + theory.k / setting.rank)

    target = lr * size_of_a(here, lr) * scale(here) * fullft_growth / scale(there)
    if there.frozen:
        return target / there.init_a
    factor = np.asarray(1 / _unit(theory, there))
    return math.sqrt(float(_positive_root(there.init_a**2, factor**2, target**2)))


def _unit(theory: MovementTheory, setting: Setting) -> float:
    """Return u*, the highest LR of LoRA at which A moves by as much as its initial size, in units of 1/sqrt(d_in)."""
    return theory.u0 * WIDTH / setting.width * math.sqrt(STEPS / setting.steps) / setting.mean_lr


def _positive_root(constant: float, factor: np.ndarray, target: float) -> np.ndarray:
    """Return the positive y with y (constant + factor y) = target, in a form that also holds where the factor is 0."""
    return np.asarray(2 * target / (constant + np.sqrt(constant**2 + 4 * factor * target)))


def _fixed(ratio: float) -> LogRatio:
    return lambda log_fullft: np.full(np.shape(log_fullft), math.log(ratio))
