"""Theories of the ratio R of LoRA's to full fine-tuning's optimal learning rate, and what each predicts.

Notation: d is the width (hidden size) of the model, T the number of steps, r the rank, LR_L and LR_F the optimal LRs
of LoRA and FullFT, so that R = LR_L / LR_F. A starts uniform within plus and minus 1/sqrt(d_in) of its layer, so its
entries have the standard deviation 1/sqrt(3 d_in), and B starts at 0. Adam moves every entry of a weight by about one
LR per step, in the direction of the sign of its gradient.

**A stands still.** Let x be the input of a layer and g the gradient at its output, so that the gradient of W is g x^T.
A step of FullFT changes W by -LR_F sign(g x^T), and the loss falls by LR_F |g|_1 |x|_1, where |x|_1 is about
sqrt(2/pi) sqrt(d_in) |x|_2. The first step of LoRA changes B by -LR_L sign(g (A x)^T), and the loss falls by
(alpha/r) LR_L |g|_1 |A x|_1, where |A x|_1 is about r sqrt(2/pi) |x|_2 / sqrt(3 d_in): the r entries of A x are sums of
many terms and hence normal. Both learn equally fast if

    R = sqrt(3) d_in / alpha.

The rank cancels. Layers differ in d_in; with its mean over all weights this is R = c d / alpha, with c of about
sqrt(3) * 1.3 = 2.25 for a Llama whose MLP is 2.5 times as wide as the model.

**A moves.** Once B is not 0, Adam moves A as fast as B, by LR_L sign(B^T g x^T), which changes A x by about
LR_L M sqrt(d) |x|_2 sqrt(2/pi), where M is the net number of steps into one direction. This is as large as the initial
A x, of size |x|_2 / sqrt(3 d), at the LR u* of about 1 / (sqrt(3) d M) up to a factor near 1. LoRA's steps are then
larger by the factor 1 + LR_L / u*, so that

    R (1 + LR_L / u*) = R (1 + R LR_F / u*) = c d / alpha.

The theories `movement` and `scale` are this equation with two ways to know LR_F / u*.

A theory is silent (None) on conditions of which it says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lorabench.config.margins import (
    ConstantTheory,
    FixedLoraTheory,
    LrRatioPredictions,
    MovementTheory,
    NaiveTheory,
    ScaleTheory,
)

WIDTH, STEPS, BATCH_SIZE, ALPHA = 128, 50, 8, 32.0
"""The condition at which parameters of theories are given."""

LogRatio = Callable[[np.ndarray], np.ndarray]
"""The natural logarithm of a predicted ratio as a function of that of FullFT's optimal LR."""


@dataclass(frozen=True)
class Setting:
    """A condition whose ratio is predicted; NaN where a published source does not give it."""

    width: float
    steps: float
    batch_size: float
    alpha: float


def _larger_root(factor: np.ndarray, target: float) -> np.ndarray:
    """Return the positive R with R (1 + factor R) = target, in a form that also holds where the factor is near 0."""
    return 2 * target / (1 + np.sqrt(1 + 4 * factor * target))


def movement(theory: MovementTheory, setting: Setting) -> LogRatio:
    """Return the prediction given FullFT's optimal LR: R (1 + R LR_F / u*) = c d / alpha.

    u* = u0 (128/d) sqrt(50/T): the LR at which A's movement matters as much as its initial values falls with the width
    as derived above, and A's net movement grows as that of a random walk, M ~ sqrt(T). Where A hardly moves, R is
    c d / alpha. Where A's movement decides, R is sqrt(c u0 128 sqrt(50/T) / (alpha LR_F)): the width cancels but for
    the square root of LR_F, so the ratio is nearly the same for models of very different widths. The batch size acts
    through LR_F only. The rank does not matter.
    """
    at_unit = theory.u0 * WIDTH / setting.width * math.sqrt(STEPS / setting.steps)

    def log_ratio(log_fullft: np.ndarray) -> np.ndarray:
        ratio = _larger_root(np.exp(log_fullft) / at_unit, theory.c * setting.width / setting.alpha)
        return np.asarray(np.log(ratio))

    return log_ratio


def scale(theory: ScaleTheory, setting: Setting) -> LogRatio:
    """Return the prediction from width and alpha alone: R (1 + kappa R) = c d / alpha.

    FullFT's best LR is taken to be the one whose outputs move by a certain amount over a run. One step moves an output
    by LR_F |x|_1, where the entries of x are of size 1 after a norm, so a run moves it by about LR_F d M, and LR_F is
    proportional to 1 / (d M). So is u*, with the same M, which depends on the number of steps and on the noise of the
    gradients, that is on the batch size. In LR_F / u* = kappa all of this cancels. Hence R is a function of d / alpha:
    c d / alpha where that is small, and sqrt(c d / (kappa alpha)) where it is large, for all lengths and batch sizes.
    LoRA's own optimal LR then goes as 1 / M at small widths whatever the width, and as 1 / (M sqrt(d)) at large ones.
    """
    ratio = _larger_root(np.asarray(theory.kappa), theory.c * setting.width / setting.alpha)
    return _fixed(float(ratio))


def fixed_lora(theory: FixedLoraTheory, setting: Setting) -> LogRatio | None:
    """Return the prediction from the width alone: FullFT's optimal LR falls as a power of it, and LoRA's as another.

    Published sweeps find LoRA's optimum at about the same LR from 0.6B to 32B parameters, while FullFT's falls, so
    the ratio would be FullFT's optimum turned over: R = R_128 (d/128)^(fullft_exponent - lora_exponent). These sweeps
    do not vary alpha, length and batch size, so the theory speaks of the condition of its parameter only: alpha 32 and
    50 steps of 8 examples.
    """
    if (setting.steps, setting.batch_size, setting.alpha) != (STEPS, BATCH_SIZE, ALPHA):
        return None
    return _fixed(theory.ratio * (setting.width / WIDTH) ** (theory.fullft_exponent - theory.lora_exponent))


def constant(theory: ConstantTheory, setting: Setting) -> LogRatio | None:
    """Return the paper's number. The paper has alpha 32 throughout, so the theory is silent on other values."""
    return _fixed(theory.ratio) if setting.alpha == ALPHA else None


def naive(theory: NaiveTheory, setting: Setting) -> LogRatio:
    """Return c d / alpha with c = 1/2: the paper's derivation, in which LoRA of full rank is made equal to FullFT."""
    return _fixed(theory.c * setting.width / setting.alpha)


def _fixed(ratio: float) -> LogRatio:
    return lambda log_fullft: np.full(np.shape(log_fullft), math.log(ratio))


def predicted(predictions: LrRatioPredictions, setting: Setting) -> Mapping[str, LogRatio]:
    """Return what each theory predicts for a setting, by its name; theories that are silent on it are left out."""
    stated: dict[str, LogRatio | None] = {
        "movement": movement(predictions.movement, setting) if predictions.movement else None,
        "scale": scale(predictions.scale, setting) if predictions.scale else None,
        "fixed_lora": fixed_lora(predictions.fixed_lora, setting) if predictions.fixed_lora else None,
        "constant": constant(predictions.constant, setting) if predictions.constant else None,
        "naive": naive(predictions.naive, setting) if predictions.naive else None,
    }
    return {name: log_ratio for name, log_ratio in stated.items() if log_ratio is not None}


def fitted(name: str, setting: Setting) -> bool:
    """Return whether parameters of a theory were fitted in a setting, which then tests nothing."""
    here = (setting.width, setting.steps, setting.batch_size) == (WIDTH, STEPS, BATCH_SIZE)
    return here and name in ("movement", "scale", "fixed_lora")
