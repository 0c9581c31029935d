"""Scenes of reinforcement learning (see `scenes`)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from benchmarks.calibration.made import Curve
from benchmarks.calibration.noise import NoiseLevels
from benchmarks.calibration.rl_worlds import MadeRl, make_rl_tables
from benchmarks.calibration.scenes import FULLFT, LR_MARGIN, TEN, lora, made_arm, sign
from lorabench.claims.reinforcement import WIDER
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.store.tables import Tables

_RL = {"model": "made-up", "dataset": "problems", "batch_size": 640, "family": "llama", "hidden_size": 128}


def rl_margin(noise: NoiseLevels) -> float:
    """Return the margin of error rates that the default preset gives."""
    return DEFAULT_MARGINS.reward * (noise.rl_tuned - noise.rl_base)


LENGTH = 360.0
"""The mean length of responses at the end, twice that at first; in tokens. On average it meets the setting of F5."""


def _length(final: float = LENGTH) -> Curve:
    """Return a mean length of responses that grows from LENGTH / 2."""
    return lambda steps: np.exp(np.interp(steps, [5, 45], [math.log(LENGTH / 2), math.log(final)]))


def rl(k: float, noise: NoiseLevels, random: np.random.Generator) -> Tables:
    """Return a sweep of RL with FullFT and ranks 1 and 64.

    Rank 1 has an error rate k margins above FullFT's, so on a held-out set as well, and responses longer or shorter by
    a factor of 1.25 to the k. The training reward of rank 64 is k margins off FullFT's. Its ratio of optimal LRs is k
    margins off 10.
    """
    optimum, error, margin = math.log(2e-4) + random.uniform(-0.5, 0.5), 1 - noise.rl_tuned, rl_margin(noise)
    apart, ratio = sign(random) * k * margin, sign(random) * k * LR_MARGIN
    arms = [
        made_arm(FULLFT, optimum, error, random, seeds=5, n_lrs=6, curve=np.zeros_like),
        made_arm(lora(1), optimum + TEN, error + k * margin, random, seeds=5, n_lrs=6, curve=np.zeros_like),
        made_arm(lora(64), optimum + TEN + ratio, error, random, seeds=5, n_lrs=6, curve=lambda at: 0.0 * at + apart),
    ]
    longer = LENGTH * 1.25 ** (sign(random) * k)
    made = MadeRl(arms, _RL, held_out={"aime24": 480}, lengths={0: _length(), 1: _length(longer), 2: _length()})
    return make_rl_tables(made, noise, random)


def rl_ranges(k: float, noise: NoiseLevels, random: np.random.Generator) -> Tables:
    """Return a sweep of RL in which the good LRs of LoRA span k times 0.2 decades more than those of FullFT."""
    optimum, error = math.log(2e-4) + random.uniform(-0.5, 0.5), 1 - noise.rl_tuned
    # An LR is good up to 95% of the peak accuracy; the widths are in decades.
    width = 2 * math.sqrt(0.05 * noise.rl_tuned / noise.rl_curvature) / TEN
    flatter = (width / (width + WIDER * k)) ** 2
    arms = [
        made_arm(FULLFT, optimum, error, random, seeds=5, n_lrs=6),
        replace(made_arm(lora(64), optimum + TEN, error, random, seeds=5, n_lrs=7), curvature=flatter),
    ]
    return make_rl_tables(MadeRl(arms, _RL, lengths=dict.fromkeys(range(2), _length())), noise, random)


def rl_placements(k: float, noise: NoiseLevels, random: np.random.Generator) -> Tables:
    """Return a sweep of RL in which LoRA on attention alone has an error rate k margins above that on the MLP."""
    optimum, error, margin = math.log(2e-4) + random.uniform(-0.5, 0.5), 1 - noise.rl_tuned, rl_margin(noise)
    at = optimum + TEN
    arms = [
        made_arm(FULLFT, optimum, error, random, seeds=5, n_lrs=6),
        made_arm(lora(64, trainable_params=100_000), at, error, random, seeds=5, n_lrs=6),
        made_arm(lora(64, "attn", trainable_params=40_000), at, error + k * margin, random, seeds=5, n_lrs=6),
        made_arm(lora(52, "mlp", trainable_params=40_000), at, error, random, seeds=5, n_lrs=6),
        made_arm(lora(64, "mlp", trainable_params=50_000), at, error, random, seeds=5, n_lrs=6),
    ]
    return make_rl_tables(MadeRl(arms, _RL, lengths=dict.fromkeys(range(5), _length())), noise, random)
