"""Scenes of learning curves: their gaps and bends, the departures of low ranks, and early curves (see `scenes`).

Further seeds are trained at the three LRs around the optimum, where curves can be interpolated at it.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from benchmarks.calibration import scenes
from benchmarks.calibration.made import Curve, MadeArm, MadeSweep
from benchmarks.calibration.noise import NoiseLevels
from benchmarks.calibration.scenes import FULLFT, RUN, TEN, an_optimum, lora, sign
from benchmarks.calibration.worlds import progress

made_arm = partial(scenes.made_arm, seeds=5)

STEPS = 1000
"""The steps of a run, from which on curves count as long."""

POINTS = np.unique(np.geomspace(1, STEPS, 80).astype(int))
"""The steps with a training loss."""

EARLY_POINTS = np.arange(1, 101)
"""The steps with a training loss where early curves are compared."""


def _flat(steps: np.ndarray) -> np.ndarray:
    return np.zeros(len(steps))


def _from(start: float, gap: float) -> Curve:
    """Return a gap of a size from a step on."""
    return lambda steps: np.where(steps >= start, gap, 0.0)


def gaps(k: float, noise: NoiseLevels, random: np.random.Generator) -> list[MadeSweep]:
    """Return FullFT and the highest rank, whose curve is k margins off in the last third of log(step)."""
    optimum = an_optimum(random)
    apart = _from(STEPS ** (2 / 3), sign(random) * k * noise.margin)
    arms = [
        made_arm(FULLFT, optimum, noise.loss, random, curve=_flat),
        made_arm(lora(64), optimum + TEN, noise.loss, random, curve=apart),
    ]
    return [MadeSweep(arms, RUN, curve_steps=POINTS)]


def bends(k: float, noise: NoiseLevels, random: np.random.Generator) -> list[MadeSweep]:
    """Return FullFT and the highest rank; in the second half of log(step), FullFT's curve bends by k times 10%."""
    optimum = an_optimum(random)
    depth = -sign(random) * k * 0.1 * noise.gain / 2

    def bend(steps: np.ndarray) -> np.ndarray:
        place = np.clip(2 * progress(steps, STEPS) - 1, 0, 1)
        return np.asarray(depth * 4 * place * (1 - place))

    arms = [
        made_arm(FULLFT, optimum, noise.loss, random, curve=bend),
        made_arm(lora(64), optimum + TEN, noise.loss, random, curve=_flat),
    ]
    return [MadeSweep(arms, RUN, curve_steps=POINTS)]


def equal_flops(k: float, noise: NoiseLevels, random: np.random.Generator) -> list[MadeSweep]:
    """Return FullFT, and a rank whose steps take 2/3 of its FLOPs.

    At equal FLOPs, the rank is 2 margins ahead of FullFT, and k margins in the last quarter of log(step).
    """
    optimum, margin = an_optimum(random), noise.margin

    def behind(steps: np.ndarray) -> np.ndarray:
        ahead = np.where(steps >= STEPS ** (3 / 4), k, 2.0) * margin
        return np.asarray(noise.gain * (progress(steps, STEPS) - progress(2 * steps / 3, STEPS)) - ahead)

    arms = [
        made_arm({**FULLFT, "train_tokens": 1_000_000, "train_flops": 3e12}, optimum, noise.loss, random, curve=_flat),
        made_arm(lora(16, train_tokens=1_000_000, train_flops=2e12), optimum + TEN, noise.loss, random, curve=behind),
    ]
    sweep = MadeSweep(arms, RUN, curve_steps=POINTS, validation_steps=POINTS.tolist())
    return [sweep]


def _departing(noise: NoiseLevels, step: float, share: float) -> Curve:
    """Return what a curve has above the shared one if its slope from a step on is a share of the shared slope.

    The training loss of a step is measured before its update, so a curve that leaves at a step does so one update
    earlier.
    """
    left = progress(np.array(step - 1), STEPS)
    return lambda steps: (1 - share) * noise.gain * np.maximum(progress(steps, STEPS) - left, 0)


def capacity(k: float, noise: NoiseLevels, random: np.random.Generator) -> list[MadeSweep]:
    """Return FullFT and ranks, of which 1 and 4 leave the shared curve.

    Rank 4 leaves at a step that is 2 to the power 1.5 k times that of rank 1. The slope of rank 1 after that is a share
    of FullFT's that is 0.475 k below the middle of 0.05 to 1. Its final test loss is k margins above FullFT's.
    """
    optimum, share = an_optimum(random), 0.525
    arms = [
        made_arm(FULLFT, optimum, noise.loss, random, curve=_flat),
        made_arm(
            lora(1),
            optimum + TEN,
            noise.loss + k * noise.margin,
            random,
            curve=_departing(noise, 25, share - 0.475 * k),
        ),
        made_arm(lora(4), optimum + TEN, noise.loss, random, curve=_departing(noise, 25 * 2 ** (1.5 * k), share)),
        made_arm(lora(64), optimum + TEN, noise.loss, random, curve=_flat),
    ]
    return [MadeSweep(arms, RUN, curve_steps=POINTS)]


def thresholds(k: float, noise: NoiseLevels, random: np.random.Generator) -> list[MadeSweep]:
    """Return ranks 1 to 32, which leave the shared curve at steps that go as rank to the 1 + k/2 or 1 - k/2."""
    optimum, power = an_optimum(random), 1 + sign(random) * k / 2
    ranks = (1, 2, 4, 8, 16, 32)
    arms = [made_arm(FULLFT, optimum, noise.loss, random, curve=_flat)]
    for rank in ranks:
        step = 50 * (rank / 32**0.5) ** power
        arms.append(made_arm(lora(rank), optimum + TEN, noise.loss, random, curve=_departing(noise, step, 0.525)))
    arms.append(made_arm(lora(64), optimum + TEN, noise.loss, random, curve=_flat))
    return [MadeSweep(arms, RUN, curve_steps=POINTS)]


def _early(curve: Curve, noise: NoiseLevels, random: np.random.Generator) -> list[MadeSweep]:
    """Return FullFT with a grid of LRs, and two ranks at one LR with six seeds; one has a curve beyond the other's."""
    optimum = an_optimum(random)
    at = optimum + TEN + random.uniform(-0.5, 0.5)
    lrs = np.exp(np.array([at]))
    arms = [
        made_arm(FULLFT, optimum, noise.loss, random, curve=_flat),
        MadeArm(lora(16), optimum + TEN, noise.loss, lrs, 6, curve=curve),
        MadeArm(lora(64), optimum + TEN, noise.loss, lrs, 6, curve=_flat),
    ]
    # The difference of two ranks in their first steps is what the claims are about.
    return [MadeSweep(arms, {**RUN, "steps": 100}, curve_steps=EARLY_POINTS, without=("lag",))]


def early(k: float, noise: NoiseLevels, random: np.random.Generator) -> list[MadeSweep]:
    """Return two ranks at one LR.

    From step 46 on, the last of six windows, they are k margins apart. Up to step 10 the lower rank is (k - 1) quarters
    of a margin worse.
    """
    margin, apart = noise.margin, sign(random) * k * noise.margin
    return _early(
        lambda steps: np.where(steps >= 46, apart, np.where(steps <= 10, (k - 1) * margin / 4, 0.0)), noise, random
    )


def early_growth(k: float, noise: NoiseLevels, random: np.random.Generator) -> list[MadeSweep]:
    """Return two ranks at one LR whose difference grows by k times 20% of its mean, a margin, per tenfold steps."""
    mean, middle = noise.margin, float(np.log10(EARLY_POINTS[1:]).mean())
    return _early(lambda steps: mean * (1 + 0.2 * k * (np.log10(np.maximum(steps + 1, 1)) - middle)), noise, random)
