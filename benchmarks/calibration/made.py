"""Made-up sweeps as they are described: arms whose optima and minima are known, and the design of their sweeps.

A design holds the learning rates (LRs), seeds and test examples of a preset, which made-up sweeps may take over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np

from lorabench.runs import Racing

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
    """At which LRs further seeds are trained: of fixed LRs that with the lowest validation loss of the first seed, or
    all; or the three around the best one of a sweep that finds its LRs."""
    seeds_around: int | None = None
    """With `around`, the number of seeds at these three LRs; the others are trained at the lowest only. None for all.
    """
    racing: Racing | None = None
    """With `around`, when an LR gets no more seeds; None if all three have the same."""
    curvature: float = 1.0
    """Its curvature over that of the noise levels."""
    skew: float = 0.0
    """The rate per ln LR by which its curvature grows towards high LRs, beyond that of the noise levels."""
    cliff: float = math.inf
    """How far ln LR lies above the optimum where the loss begins to rise much faster."""
    lag: float = 0.0
    """The number of steps by which it starts late, as a share of all steps."""
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
    """The steps with a validation loss, besides step 0."""
    test_examples: int = 132
    validation_examples: int = 42
    group_sd: float = 0.0
    """SD over groups of test examples of what a group adds to the loss of an arm, in margins."""
    without: tuple[str, ...] = ()
    """The traits that a world of this sweep does not have (see `traits`)."""


@dataclass(frozen=True)
class MadeRl:
    """The arms of one comparison of RL, with their lowest error rates as minima."""

    arms: Sequence[MadeArm]
    columns: Mapping[str, Any]
    """Values of `runs` that all arms share."""
    steps: int = 50
    test_examples: int = 160
    """The number of test problems."""
    validation_examples: int = 64
    held_out: Mapping[str, int] = field(default_factory=dict)
    """The number of problems of further sets; their error rates are those of the test split."""
    lengths: Mapping[int, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)
    """The mean length of responses by step, by the arm's position in `arms`."""
    group_sd: float = 0.0
    """As in `MadeSweep`, of the error rate."""
    without: tuple[str, ...] = ()
    """As in `MadeSweep`."""


Made = TypeVar("Made", MadeSweep, MadeRl)

Role = tuple[str, str | None, bool]
"""What an arm is in its comparison: method, placement, and whether it is LoRA at the highest rank on all layers."""


@dataclass(frozen=True)
class ArmDesign:
    """How one arm is swept."""

    n_lrs: int
    lr_step: float
    """The ratio of neighbouring LRs."""
    seeds: int
    repeats: Literal["best", "around", "every"]
    """At which LRs further seeds are trained, as in `MadeArm`, and so below."""
    seeds_around: int | None = None
    racing: Racing | None = None


@dataclass(frozen=True)
class Design:
    """How the arms of a comparison are swept."""

    arms: Mapping[Role, ArmDesign]
    test_examples: int
    validation_examples: int

    def of(self, role: Role) -> ArmDesign:
        """Return the design of an arm; that of the arm with the fewest seeds, where the preset has no such arm."""
        return self.arms.get(role) or min(self.arms.values(), key=lambda arm: (arm.seeds, arm.n_lrs))


def role(columns: Mapping[str, Any], highest: int | None) -> Role:
    """Return what an arm with these columns is, given the highest rank of LoRA on all layers of its comparison."""
    method, placement = str(columns["method"]), columns.get("placement")
    return method, placement, placement == "all" and columns.get("rank") == highest


def highest_rank(arms: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the highest rank on all layers; None without LoRA on all layers."""
    return max((arm["rank"] for arm in arms if arm.get("placement") == "all"), default=None)


def as_designed(design: Design, sweep: Made, random: np.random.Generator) -> Made:
    """Return a sweep with the LRs, seeds and numbers of examples of a design.

    An arm with a single LR keeps it, and its own repeats.
    """
    highest = highest_rank([arm.columns for arm in sweep.arms])
    arms = [_swept(arm, design.of(role(arm.columns, highest)), random) for arm in sweep.arms]
    test, validation = design.test_examples, design.validation_examples
    return replace(sweep, arms=arms, test_examples=test, validation_examples=validation)


def _swept(arm: MadeArm, design: ArmDesign, random: np.random.Generator) -> MadeArm:
    if len(arm.lrs) == 1:
        return replace(arm, seeds=design.seeds)
    place = np.arange(design.n_lrs) - (design.n_lrs - 1) // 2 + random.uniform(-0.5, 0.5)
    lrs = np.exp(arm.optimum + math.log(design.lr_step) * place)
    shared = {name: getattr(design, name) for name in ("seeds", "repeats", "seeds_around", "racing")}
    return replace(arm, lrs=lrs, **shared)
