"""Traits of made-up worlds: each breaks one assumption of the fit, by an amount that is drawn for every world.

| trait | assumption that it breaks |
|---|---|
| curvatures | the loss rises equally steeply around the optima of all arms |
| groups | test examples are independent |
| edge | the best learning rate (LR) of an arm lies near the middle of its grid |
| asymmetry | the loss rises about as steeply above the optimum as below it |
| lag | all arms share the learning curve from the first step on |
| cliff | near the optimum, the loss of an arm has no cliff |

A scene leaves out the traits with which its claims would be true or false by another amount (`without`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from benchmarks.calibration.made import Made, MadeArm


@dataclass(frozen=True)
class Traits:
    """The sizes of the traits: the most that a world has of each."""

    curvatures: float = 3.0
    """The largest factor by which an arm's curvature is above or below that of the noise levels; drawn for each arm,
    evenly in its logarithm."""
    groups: float = 1.0
    """The largest SD over groups of test examples of what a group adds to an arm, in margins; drawn for each world."""
    edge: float = 1.0
    """How far optima lie from the middle of their grids, as a share of the way to the last LR but one at either end;
    drawn for each arm."""
    asymmetry: float = 0.6
    """The largest rate per ln LR by which curvatures grow towards high LRs, beyond that of the noise levels; drawn for
    each arm."""
    lag: float = 0.005
    """The largest number of steps by which one LoRA arm starts late, as a share of all steps; drawn for each sweep of
    supervised fine-tuning."""
    cliff: float = 1.0
    """One over the least distance in ln LR from an optimum up to where the loss begins to rise much faster, which is
    drawn for each arm, from there to three times as far; 0 for no cliff."""

    @classmethod
    def only(cls, names: Sequence[str]) -> Traits:
        """Return traits of which only some are there; the others break nothing."""
        return replace(PLAIN, **{name: getattr(cls(), name) for name in names})


PLAIN = Traits(curvatures=1.0, groups=0.0, edge=0.0, asymmetry=0.0, lag=0.0, cliff=0.0)
"""Worlds that meet all assumptions."""

NAMES = tuple(field.name for field in fields(Traits))
"""The names of the traits."""


def with_traits(sweeps: Sequence[Made], traits: Traits, random: np.random.Generator) -> list[Made]:
    """Return sweeps with traits that are drawn for them."""
    groups = traits.groups * random.uniform()
    drawn = []
    for sweep in sweeps:
        kept = replace(traits, **{name: getattr(PLAIN, name) for name in sweep.without})
        arms = [_arm(arm, kept, random) for arm in sweep.arms]
        late = random.choice([number for number, arm in enumerate(arms) if arm.columns["method"] == "lora"])
        arms[late] = replace(arms[late], lag=kept.lag * random.uniform())
        drawn.append(replace(sweep, arms=arms, group_sd=groups if kept.groups else 0.0))
    return drawn


def _arm(arm: MadeArm, traits: Traits, random: np.random.Generator) -> MadeArm:
    curvature = arm.curvature * traits.curvatures ** random.uniform(-1, 1)
    lrs, n = arm.lrs, len(arm.lrs)
    share = random.uniform()
    if n > 2 and traits.edge:
        step = math.log(lrs[1] / lrs[0])
        middle = (n - 1) / 2
        reach = max(0.5, traits.edge * (middle - 1))
        lrs = np.exp(arm.optimum + step * (np.arange(n) - middle + reach * (2 * share - 1)))
    skew, reach = traits.asymmetry * random.uniform(), random.uniform(1, 3)
    cliff = reach / traits.cliff if traits.cliff else math.inf
    return replace(arm, curvature=curvature, lrs=lrs, skew=skew, cliff=cliff)
