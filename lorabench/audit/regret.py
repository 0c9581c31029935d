"""What a learning rate would cost: how far it is from the optimum by all that is known, and what that loses.

The optimal LR of a run's place is a distribution, pooled from all known optima (`analysis.pooled_lr`). At x e-folds
from the optimum, a run loses the share 1 - exp(-c x^2) of what training gains: c x^2 near the optimum, and everything
far from it. In nats per token, whose limit is not known, it loses c x^2 up to REACH, and from there on as much more per
e-fold as there; in RL the accuracy falls as the share does. There is a curvature c for LRs that are too low and one for
those that are too high. It is pooled from measured grids, and ln c of a further run is normal.

The optima and curvatures are shipped as tables; `python -m benchmarks.audit_regret` writes the curvatures, and holds
predicted regrets to measured ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import ndtri

from lorabench.analysis.lr_law import PUBLISHED as LAW
from lorabench.analysis.lr_law import lineage
from lorabench.analysis.pooled_lr import Place, PooledLr
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.sources.lr_optima import LrOptimum, optima_of_table
from lorabench.utils.files import LR_CURVATURES, LR_OPTIMA

Unit = Literal["share", "loss"]

REACH = math.log(6)
"""Curvatures are those up to this distance from the optimum, in ln LR."""

NEAR = 4.0
"""A width, batch size or length is near what was measured up to this factor."""

MARGINS = {False: DEFAULT_MARGINS.loss, True: DEFAULT_MARGINS.reward}
"""The smallest share of the gain that matters in SFT, and in RL (True)."""

# The probabilities of the optimum's intervals, between whose ends its distribution is taken to be normal.
_INTERVALS = (0.8, 0.95, 0.99)
# Numbers of equally probable values that stand for an optimum and for a curvature.
_OPTIMA, _CURVATURES = 200, 50


class Interval(NamedTuple):
    """An expected value with the ends of an interval of 95%."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Curvature:
    """The curvature of a further run, whose logarithm is normal."""

    log: float
    spread: float

    @classmethod
    def pooled(cls, values: Sequence[float], sources: Sequence[str]) -> Curvature:
        """Pool curvatures, of which those above 0 count; all sources weigh the same.

        Raises:
            ValueError: fewer than two count.
        """
        known = [(math.log(value), source) for value, source in zip(values, sources, strict=True) if value > 0]
        if len(known) < 2:
            raise ValueError(f"pooling needs two curvatures above 0; there are {len(known)}")
        logs, names = np.array([log for log, _ in known]), [source for _, source in known]
        weights = np.array([1 / names.count(name) for name in names]) / len(set(names))
        mean, few = float(weights @ logs), float(weights @ weights)
        # The mean has an error too, and the variance around it is too low by the weights of few values.
        variance = float(weights @ (logs - mean) ** 2) / (1 - few) * (1 + few)
        return cls(mean, math.sqrt(variance))

    def values(self) -> np.ndarray:
        """Return values of equal probability."""
        return np.asarray(np.exp(self.log + self.spread * ndtri(_middles(_CURVATURES))))


@dataclass(frozen=True)
class Verdict:
    """What a learning rate would cost."""

    log_factor: float
    """The natural logarithm of the LR over the recommended one."""
    recommended: Interval
    """The recommended LR at the run's own alpha and rank, with the ends of the optimum's 95% interval."""
    outside_80: bool
    """Whether the LR lies outside of the optimum's 80% interval."""
    outside_95: bool
    share: Interval
    """The expected regret as a share of the gain. Its interval starts at 0 where the LR may be the optimum, and ends at
    1 where it may diverge."""
    loss: Interval
    """The same in nats per token, in RL in accuracy; where the LR may diverge, the interval has no end."""
    p_margin: float
    """The probability that the regret is above the margin."""
    may_diverge: bool
    """Whether the LR may be above the optimum by more than REACH, from where on runs diverge."""


class LrEvidence:
    """All that is known of optimal LRs and of what other LRs lose."""

    def __init__(self, optima: Sequence[LrOptimum], curvatures: pd.DataFrame) -> None:
        """Take optima, of which those that count are pooled, and curvatures as in the shipped table."""
        self.optima = [optimum for optimum in optima if optimum.counts]
        self.curvatures = curvatures
        self._pools: dict[tuple[str, bool], PooledLr] = {}
        self._quantiles: dict[tuple[Place, str, bool, float], tuple[np.ndarray, np.ndarray, float]] = {}
        self._curvatures: dict[tuple[bool, str], np.ndarray] = {}

    def unmeasured(self, method: str, rl: bool, width: float, batch_size: float, steps: float) -> list[str]:
        """Return what of a place is far from all that was measured of a method in SFT or RL, with its value."""
        far = []
        asked = {
            "width": ("width", width),
            "batch_size": ("batch size", batch_size),
            "steps": ("length in steps", steps),
        }
        for field, (name, value) in asked.items():
            optima = (optimum for optimum in self.optima if (optimum.method, optimum.rl) == (method, rl))
            known = [getattr(optimum, field) for optimum in optima]
            distances = [abs(math.log(other / value)) for other in known if math.isfinite(other)]
            if math.isfinite(value) and min(distances, default=math.inf) > math.log(NEAR):
                far.append(f"a {name} near {value:,.0f}")
        return far

    def sources(self, method: str, rl: bool) -> int:
        """Return the number of sources of optima."""
        return len({optimum.source for optimum in self.optima if (optimum.method, optimum.rl) == (method, rl)})

    def verdict(
        self, log_lr: float, place: Place, method: str, rl: bool, shift: float = 0.0, error: float = 0.0
    ) -> Verdict:
        """Return what an LR would cost.

        Args:
            log_lr: its natural logarithm.
            place: where it is used.
            method: `lora` or `fullft`.
            rl: whether it is used in RL.
            shift: what to add to a log LR to state it as the optima are, at their alpha and high ranks.
            error: the standard error of `shift`.
        """
        z, values, mean = self._optimum(place, method, rl, error)
        at = log_lr + shift
        low, high = np.interp(ndtri((0.025, 0.975)), z, values)
        low_80, high_80 = np.interp(ndtri((0.1, 0.9)), z, values)
        outside_95 = not low <= at <= high
        x = at - np.interp(ndtri(_middles(_OPTIMA)), z, values)
        may_diverge = float((x > REACH).mean()) > 0.025
        shares, losses = (self._regrets(x, rl, unit) for unit in ("share", "loss"))
        intervals = []
        for regrets in (shares, losses):
            low_end, high_end = np.quantile(regrets, (0.025, 0.975)).tolist()
            intervals.append(Interval(float(regrets.mean()), low_end if outside_95 else 0.0, high_end))
        return Verdict(
            log_factor=at - mean,
            recommended=Interval(*(math.exp(end - shift) for end in (mean, low, high))),
            outside_80=not low_80 <= at <= high_80,
            outside_95=outside_95,
            share=intervals[0]._replace(high=1.0) if may_diverge else intervals[0],
            loss=intervals[1],
            p_margin=float((shares > MARGINS[rl]).mean()),
            may_diverge=may_diverge,
        )

    def _optimum(self, place: Place, method: str, rl: bool, error: float) -> tuple[np.ndarray, np.ndarray, float]:
        """Return quantiles of the optimal log LR with the normal quantiles of their probabilities, and its mean."""
        key = (place, method, rl, error)
        if key not in self._quantiles:
            if (method, rl) not in self._pools:
                chosen = [optimum for optimum in self.optima if (optimum.method, optimum.rl) == (method, rl)]
                self._pools[method, rl] = PooledLr([optimum.pooled for optimum in chosen])
            predicted = [self._pools[method, rl].predict(place, p, error=error) for p in _INTERVALS]
            upper = ndtri((1 + np.array(_INTERVALS)) / 2)
            z = np.concatenate([-upper[::-1], upper])
            values = [*(one.low for one in reversed(predicted)), *(one.high for one in predicted)]
            self._quantiles[key] = z, np.array(values), predicted[0].mean
        return self._quantiles[key]

    def _regrets(self, x: np.ndarray, rl: bool, unit: Unit) -> np.ndarray:
        """Return equally probable regrets at equally probable distances."""
        below, above = (self._values(rl, f"{unit}_{side}") for side in ("below", "above"))
        curvature = np.where(x[:, None] < 0, below, above)
        return regret(x[:, None], curvature, saturates=rl or unit == "share")

    def _values(self, rl: bool, column: str) -> np.ndarray:
        key = (rl, column)
        if key not in self._curvatures:
            known = self.curvatures[self.curvatures["task"] == ("rl" if rl else "sft")]
            pooled = Curvature.pooled(known[column].fillna(0).tolist(), known["source"].tolist())
            self._curvatures[key] = pooled.values()
        return self._curvatures[key]


def regret(x: np.ndarray, curvature: np.ndarray, saturates: bool) -> np.ndarray:
    """Return what is lost at x e-folds from the optimum: at most 1 if it saturates, or else from REACH on linear."""
    if saturates:
        return np.asarray(-np.expm1(-curvature * x**2))
    size = np.abs(x)
    return np.asarray(curvature * np.where(size < REACH, size**2, REACH * (2 * size - REACH)))


def place_of(family: str, width: float, width_error: float, method: str, batch_size: float, steps: float) -> Place:
    """Return the place of a model whose width may be an estimate with a standard error of its logarithm."""
    place = Place.at(family, width, method, batch_size, steps)
    exponent = LAW.exponents.get(lineage(family), max(LAW.exponents.values()))
    return replace(place, law_error=math.hypot(place.law_error, exponent * width_error))


@cache
def shipped_evidence() -> LrEvidence:
    """Return the evidence of the shipped tables."""
    return LrEvidence(optima_of_table(pd.read_csv(LR_OPTIMA)), pd.read_csv(LR_CURVATURES))


def _middles(count: int) -> np.ndarray:
    """Return the probabilities in the middles of equal parts."""
    return (np.arange(count) + 0.5) / count
