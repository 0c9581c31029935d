"""What seeds do to the losses of made-up sweeps: the parts of `lorabench.analysis.mixed_fit`, with known sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_GROWTH = 10.0
"""The largest factor by which high learning rates (LRs) enlarge the noise."""

_STEP, _STEPS = 0.05, 140
"""The steps of a walk, in ln LR, between which it is interpolated, and their number on each side of an optimum."""


@dataclass(frozen=True)
class SeedNoise:
    """The sizes of what seeds do, as standard deviations (SD) in the unit of the loss. Effects that grow do so with
    exp(growth x), at a distance x in ln LR from the optimum. The defaults are typical of tiny models."""

    common: float = 0.01
    """SD of a seed's level, which all arms share, through the order of the data."""
    walk: float = 0.02
    """SD, one unit of ln LR away from the optimum and before its growth, of an effect that is 0 at the optimum and a
    random walk from there."""
    arm: float = 0.003
    """SD of the level of one arm and seed."""
    fullft: float = 0.005
    """SD of the level of full fine-tuning (FullFT) and a seed."""
    run: float = 0.006
    """SD of what is left for a single run at the optimum; it grows."""
    share: float = 0.7
    """The correlation of the walks of FullFT, LoRA on attention alone, and other LoRA, whose arms share one walk."""
    growth: float = 0.75
    """The rate per ln LR at which walks and what is left grow."""
    steepness: float = 0.0
    """The power of an arm's curvature, over that of the noise levels, by which walks and what is left are larger."""


class SeedEffects:
    """What the seeds of one sweep do to its arms."""

    def __init__(self, sizes: SeedNoise, seeds: int, random: np.random.Generator) -> None:
        self.sizes, self.random = sizes, random
        self.common, self.fullft = random.standard_normal((2, seeds)) * [[sizes.common], [sizes.fullft]]
        # One walk is for all arms, three are for kinds of arms; each has a side of low and one of high LRs.
        steps = random.standard_normal((4, 2, seeds, _STEPS)) * math.sqrt(_STEP)
        self.walks = np.pad(np.cumsum(steps, axis=-1), [(0, 0)] * 3 + [(1, 0)])

    def of_arm(self, columns: Mapping[str, Any], x: np.ndarray, seed: np.ndarray, curvature: float = 1.0) -> np.ndarray:
        """Return what seeds do to the loss of an arm's runs at distances x from its optimum, (runs,); its curvature is
        over that of the noise levels."""
        sizes, is_fullft = self.sizes, columns["method"] == "fullft"
        shared, *of_kinds = self.walks
        own = of_kinds[0 if is_fullft else 1 if columns["placement"] == "attn" else 2]
        walks = math.sqrt(sizes.share) * shared + math.sqrt(1 - sizes.share) * own
        side, place = (x > 0).astype(int), np.minimum(abs(x) / _STEP, _STEPS - 1)
        low, high = (walks[side, seed, place.astype(int) + end] for end in (0, 1))
        growing = sizes.walk * (low + (high - low) * (place % 1)) + sizes.run * self.random.standard_normal(len(x))
        level = self.common + is_fullft * self.fullft + sizes.arm * self.random.standard_normal(len(self.common))
        return np.asarray(
            level[seed] + np.minimum(np.exp(sizes.growth * x), MOST_GROWTH) * growing * curvature**sizes.steepness
        )
