"""The design of a preset's sweeps, as made-up sweeps take it over: learning rates (LRs), seeds and test examples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from benchmarks.calibration.made import MadeArm

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
    """At which LRs further seeds are trained, as in `MadeArm`."""
    seeds_around: int | None = None
    """As in `MadeArm`."""


@dataclass(frozen=True)
class Design:
    """How the arms of a comparison are swept."""

    arms: Mapping[Role, ArmDesign]
    test_examples: int
    validation_examples: int

    def of(self, role: Role) -> ArmDesign:
        """Return the design of an arm; that of the arm with the fewest seeds, where the preset has no such arm."""
        return self.arms.get(role) or min(self.arms.values(), key=lambda arm: (arm.seeds, arm.n_lrs))


_DESIGN: ContextVar[Design | None] = ContextVar("design", default=None)


@contextmanager
def designed(design: Design) -> Iterator[None]:
    """Give a design to all sweeps that are made up meanwhile."""
    token = _DESIGN.set(design)
    try:
        yield
    finally:
        _DESIGN.reset(token)


def current() -> Design | None:
    """Return the design that sweeps are given now; None where the scenes' own holds."""
    return _DESIGN.get()


def role(columns: Mapping[str, Any], highest: int | None) -> Role:
    """Return what an arm with these columns is, beside LoRA on all layers up to the highest rank."""
    method, placement = str(columns["method"]), columns.get("placement")
    return method, placement, placement == "all" and columns.get("rank") == highest


def highest_rank(arms: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the highest rank on all layers; None without LoRA on all layers."""
    return max((arm["rank"] for arm in arms if arm.get("placement") == "all"), default=None)


def as_designed(design: Design, arms: Sequence[MadeArm], random: np.random.Generator) -> list[MadeArm]:
    """Return arms with the LRs and seeds of a design; an arm with a single LR keeps it, and its own repeats."""
    highest = highest_rank([arm.columns for arm in arms])
    return [_swept(arm, design.of(role(arm.columns, highest)), random) for arm in arms]


def _swept(arm: MadeArm, design: ArmDesign, random: np.random.Generator) -> MadeArm:
    if len(arm.lrs) == 1:
        return replace(arm, seeds=design.seeds)
    place = np.arange(design.n_lrs) - (design.n_lrs - 1) // 2 + random.uniform(-0.5, 0.5)
    lrs = np.exp(arm.optimum + math.log(design.lr_step) * place)
    return replace(arm, lrs=lrs, seeds=design.seeds, repeats=design.repeats, seeds_around=design.seeds_around)
