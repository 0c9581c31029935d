"""Made-up sweeps as they are described: arms whose optima and minima are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Curve = Callable[[np.ndarray], np.ndarray]
"""Function from steps to what it adds to the loss of an arm at these steps."""

Metric = Callable[[np.ndarray], np.ndarray]
"""Draws a metric of one run at some steps."""


@dataclass(frozen=True)
class MadeArm:
    """An arm with its truth."""

    columns: Mapping[str, Any]
    """The values of `runs` that make it this arm, such as method, rank and placement."""
    optimum: float
    """The natural logarithm of its optimal LR."""
    minimum: float
    """Its lowest loss, in nats per token; in RL its lowest error rate."""
    lrs: np.ndarray
    seeds: int = 3
    repeats: Literal["best", "around", "every"] = "best"
    """At which LRs further seeds are trained: that with the lowest validation loss of the first seed, also the two
    beside it, or all."""
    seeds_around: int | None = None
    """With `around`, the number of seeds at these three LRs; the others are trained at the lowest only. None for all.
    """
    curvature: float = 1.0
    """Its curvature over that of the noise levels."""
    moved: Curve | None = None
    """How far ln of its optimal LR lies above `optimum` after a number of steps; by default nowhere."""
    curve: Curve | None = None
    """What its curves have beyond the common shape; by default what its minimum has beyond that of the sweep."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """Further metrics of the training steps."""


@dataclass(frozen=True)
class MadeSweep:
    """The arms of one comparison."""

    arms: Sequence[MadeArm]
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Values of `runs` that all arms share: model, dataset, batch_size, steps and others."""
    curve_steps: Sequence[int] | np.ndarray = ()
    """The steps with a training loss. A point stands for the mean of the steps since the point before."""
    validation_steps: Sequence[int] = ()
    """The steps with a validation loss, beside step 0."""
    test_examples: int = 132
    validation_examples: int = 42
