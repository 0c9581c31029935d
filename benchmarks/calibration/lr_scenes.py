"""Scenes of optimal learning rates: lengths of runs, models, and the law of LRs (see `scenes`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.calibration.made import MadeSweep
from benchmarks.calibration.noise import NoiseLevels
from benchmarks.calibration.scenes import FULLFT, LR_MARGIN, RUN, TEN, an_optimum, lora, made_arm, sign
from benchmarks.calibration.worlds import make_tables
from lorabench.claims.across_models import MAX_EXPONENT_DISTANCE, MAX_REGRET
from lorabench.claims.learning_rate import GROWTH, SHORT_RATIO
from lorabench.store.tables import Tables


def lengths(k: float, noise: NoiseLevels, random: np.random.Generator) -> Tables:
    """Return runs of 1,000 steps in which the ratio of optimal LRs is 15 up to step 100 and k margins lower at the end.

    The margin is a factor of the square root of 1.5.
    """
    optimum, fall = an_optimum(random), k * math.log(GROWTH)
    at = optimum + math.log(SHORT_RATIO) - fall

    def moved(steps: np.ndarray) -> np.ndarray:
        return np.where(steps <= 100, fall, 0.0)

    arms = [
        made_arm(FULLFT, optimum, noise.loss, random, seeds=6),
        replace(made_arm(lora(64), at, noise.loss, random, seeds=6), moved=moved),
    ]
    sweep = MadeSweep(arms, {**RUN, "steps": 1000}, validation_steps=(50, 100, 1000))
    return make_tables([sweep], noise, random)


_WIDTHS = (("llama", 1024), ("llama", 2048), ("llama", 4096), ("qwen3", 1024), ("qwen3", 4096))
"""Family and hidden size of the models of a law of LRs."""


def _models(
    models: Sequence[tuple[str, int]],
    log_lrs: Sequence[tuple[float, float]],
    noise: NoiseLevels,
    random: np.random.Generator,
) -> Tables:
    """Return sweeps of models with given optima of FullFT and of LoRA, in ln LR."""
    sweeps = []
    for (family, width), (of_fullft, of_lora) in zip(models, log_lrs, strict=True):
        arms = [
            made_arm(FULLFT, of_fullft, noise.loss, random, seeds=5),
            made_arm(lora(16), of_lora, noise.loss, random, seeds=5),
        ]
        columns = {**RUN, "model": f"{family}-{width}", "family": family, "hidden_size": width}
        sweeps.append(MadeSweep(arms, columns))
    return make_tables(sweeps, noise, random)


def models(k: float, noise: NoiseLevels, random: np.random.Generator) -> Tables:
    """Return sweeps of four models, one of which has a ratio of optimal LRs that is k margins off the mean of all."""
    # A model that is off by 4/3 moves the mean by 1/3.
    apart = sign(random) * k * LR_MARGIN * 4 / 3
    optimum = an_optimum(random)
    log_lrs = [(optimum, optimum + TEN + (apart if number == 0 else 0.0)) for number in range(4)]
    return _models([*_WIDTHS[:2], *_WIDTHS[3:]], log_lrs, noise, random)


def law(k: float, noise: NoiseLevels, random: np.random.Generator) -> Tables:
    """Return sweeps of five models whose optimal LRs follow the published law, but for two effects.

    The middle model of one family is off the law, so that the law fitted to all has k times the regret of 0.5% of the
    loss. The exponent of the other family is off by k times 0.3.
    """
    exponents = {"llama": 0.781, "qwen3": 0.075 + sign(random) * k * MAX_EXPONENT_DISTANCE}
    # What a law with one base leaves of a model that is off by 1, as a sum of squares over the models.
    z = np.array([math.log(2000 / width) for _, width in _WIDTHS])
    is_llama = np.array([family == "llama" for family, _ in _WIDTHS])
    design, off = np.column_stack([np.ones_like(z), z * is_llama, z * ~is_llama]), np.eye(len(z))[1]
    left = off - design @ np.linalg.lstsq(design, off, rcond=None)[0]
    steepness = noise.curvature / noise.loss
    apart = sign(random) * math.sqrt(MAX_REGRET * k * len(z) / steepness / float(left @ left))
    log_lrs = []
    for number, (family, width) in enumerate(_WIDTHS):
        of_fullft = math.log(5e-5) + exponents[family] * math.log(2000 / width) + (apart if number == 1 else 0.0)
        log_lrs.append((of_fullft, of_fullft + TEN))
    return _models(_WIDTHS, log_lrs, noise, random)
