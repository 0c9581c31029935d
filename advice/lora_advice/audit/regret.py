"""What a learning rate would cost: how far it is from the optimum by all that is known, and what that loses.

The optimal LR of a run's place is a distribution, pooled from all known optima (`pooled_lr`): a mixture of
normal distributions of ln LR. At x e-folds from the optimum, a run loses the share 1 - exp(-c x^2) of what training
gains: c x^2 near the optimum, and everything far from it. In nats per token, whose limit is not known, it loses c x^2
up to REACH, and from there on as much more per e-fold as there; in RL the accuracy falls as the share does. There is a
curvature c for LRs that are too low and one for those that are too high. It is pooled from measured grids, and ln c of
a further run is normal.

What was pooled is shipped in one file, since a fit would take longer than all else that an audit does.
`python -m advice.benchmarks.audit_regret` writes it, and holds predicted regrets to measured ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np

from lora_advice.pooled_lr import Place as PooledPlace

EVIDENCE = Path(__file__).parents[1] / "facts" / "lr_evidence.json"
REACH = math.log(6)  # curvatures are those up to this distance from the optimum, in ln LR
NEAR = 4.0  # a width, batch size or length is near what was measured up to this factor
# Values of equal probability that stand for a normal distribution, such as a curvature, and those for an optimum.
_NORMAL = np.array([NormalDist().inv_cdf((part + 0.5) / 100) for part in range(100)])
_PROBABILITIES = (np.arange(200) + 0.5) / 200


class Interval(NamedTuple):
    """An expected value with the ends of an interval of 95%."""

    mean: float
    low: float
    high: float


class Place(NamedTuple):
    """Where a learning rate is used; NaN where it is not known."""

    family: str  # the transformers model type
    width: float
    method: str  # `lora` or `fullft`
    rl: bool
    batch_size: float  # examples per step, in RL responses
    steps: float
    width_error: float = 0.0  # the standard error of the logarithm of the width

    @property
    def task(self) -> str:
        """The name of the task in the file of evidence."""
        return "rl" if self.rl else "sft"


@dataclass(frozen=True)
class Verdict:
    """What a learning rate would cost."""

    log_factor: float  # the natural logarithm of the LR over the recommended one
    recommended: Interval  # the recommended LR at the run's own alpha and rank, with the optimum's 95% interval
    outside_80: bool  # whether the LR lies outside of the optimum's 80% interval
    outside_95: bool
    share: Interval  # the regret as a share of the gain; from 0 if the LR may be the optimum, to 1 if it may diverge
    loss: Interval  # the same in nats per token, in RL in accuracy; where the LR may diverge, the interval has no end
    recommended_share: float  # the share that the recommended LR loses, which may not be the optimum either
    margin: float  # the smallest share of the gain that matters
    p_margin: float  # the probability that the share is above the margin
    may_diverge: bool  # whether the LR may be above the optimum by more than REACH, from where on runs diverge


class LrEvidence:
    """All that is known of optimal LRs and of what other LRs lose."""

    def __init__(self, pooled: Mapping[str, Any]) -> None:
        """Take the content of the file of evidence, as `advice.benchmarks.audit_regret.evidence` makes it."""
        self._pooled = pooled
        self.alpha_exponent = float(pooled["alpha_exponent"])  # the optimal LR of LoRA goes as alpha to this power
        self._optima: dict[tuple[Place, float], tuple[np.ndarray, float]] = {}
        self._curvatures = {
            (task, column): np.exp(log + spread * _NORMAL)
            for task, columns in pooled["curvatures"].items()
            for column, (log, spread) in columns.items()
        }

    def sources(self, place: Place) -> int:
        """Return the number of sources of optima."""
        return int(self._pooled["optima"][place.task][place.method]["sources"])

    def unmeasured(self, place: Place) -> dict[str, str]:
        """Return what of a place is far from all that was measured of its method and task, in words with its value."""
        measured, far = self._pooled["optima"][place.task][place.method]["measured"], {}
        for field, noun in (("width", "width"), ("batch_size", "batch size"), ("steps", "length in steps")):
            value = getattr(place, field)
            if math.isfinite(value) and min(abs(math.log(other / value)) for other in measured[field]) > math.log(NEAR):
                far[field] = f"a {noun} near {value:,.0f}"
        return far

    def shift(self, alpha: float | None, rank: int | None) -> tuple[float, float]:
        """Return what states a log LR of LoRA at the optima's alpha and a high rank, and the standard error of that.

        By the theory `movement`, alpha times 1 + k / rank takes the place of alpha.
        """
        if alpha is None or alpha <= 0:
            return 0.0, abs(self.alpha_exponent) * math.log(2)
        scale = alpha / self._pooled["alpha"]
        return -self.alpha_exponent * math.log(scale * (1 + self._pooled["rank_constant"] / rank if rank else 1.0)), 0.0

    def verdict(self, log_lr: float, place: Place, shift: float = 0.0, error: float = 0.0) -> Verdict:
        """Return what an LR would cost, whose log is stated as the optima are by adding a shift, with its error."""
        optima, mean = self.optimum(place, error)
        at = log_lr + shift
        low, low_80, high_80, high = np.interp((0.025, 0.1, 0.9, 0.975), _PROBABILITIES, optima).tolist()
        outside_95, margin = not low <= at <= high, float(self._pooled["margins"][place.task])
        x = at - optima
        shares, losses = self._regrets(x, place, "share"), self._regrets(x, place, "loss")
        may_diverge = float((x > REACH).mean()) > 0.025
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
            recommended_share=float(self._regrets(mean - optima, place, "share").mean()),
            margin=margin,
            p_margin=float((shares > margin).mean()),
            may_diverge=may_diverge,
        )

    def optimum(self, place: Place, error: float = 0.0) -> tuple[np.ndarray, float]:
        """Return values of equal probability of the optimal log LR of a further source, and their mean."""
        if (place, error) not in self._optima:
            pool = self._pooled["optima"][place.task][place.method]
            pooled = PooledPlace.at(
                place.family, place.width, place.method, place.batch_size, place.steps, place.width_error
            )
            terms = pooled.terms
            products = [terms[i] * terms[j] for i in range(3) for j in range(i, 3)]
            means = pooled.log_law + np.array(pool["means"]) @ terms
            deviations = np.sqrt(np.array(pool["variances"]) @ products + pooled.unknown_variance + error**2)
            values, shares = means[:, None] + deviations[:, None] * _NORMAL, np.array(pool["shares"])
            weights = np.broadcast_to(shares[:, None] / len(_NORMAL), values.shape).ravel()
            order = np.argsort(values, axis=None)
            probabilities = np.cumsum(weights[order]) - weights[order] / 2
            quantiles = np.interp(_PROBABILITIES, probabilities, values.ravel()[order])
            self._optima[place, error] = quantiles, float(shares @ means)
        return self._optima[place, error]

    def _regrets(self, x: np.ndarray, place: Place, unit: Literal["share", "loss"]) -> np.ndarray:
        """Return equally probable regrets at equally probable distances."""
        below, above = (self._curvatures[place.task, f"{unit}_{side}"] for side in ("below", "above"))
        return regret(x[:, None], np.where(x[:, None] < 0, below, above), saturates=place.rl or unit == "share")


def regret(x: np.ndarray, curvature: np.ndarray, saturates: bool) -> np.ndarray:
    """Return what is lost at x e-folds from the optimum: at most 1 if it saturates, or else from REACH on linear."""
    if saturates:
        return np.asarray(-np.expm1(-curvature * x**2))
    size = np.abs(x)
    return np.asarray(curvature * np.where(size < REACH, size**2, REACH * (2 * size - REACH)))


@cache
def shipped_evidence() -> LrEvidence:
    """Return the evidence that is shipped."""
    return LrEvidence(json.loads(EVIDENCE.read_text()))
