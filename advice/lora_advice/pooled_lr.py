"""The optimal learning rate (LR) in a new place, pooled from the optima that several sources have measured.

docs/other-runs.md has the model of optimal LRs. The effects of sources and the deviations of models within a source are
normal with mean 0; their standard deviations have flat priors and are averaged over a grid, so that a prediction
carries the doubt about them. All else is normal, so a prediction is a mixture of normal distributions, one for each
point of the grid. An attribute that a source does not give is taken to be at its reference, and the optimum's error
grows by what the attribute may do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lora_advice.theory import BASE_LRS, EXPONENTS, PIVOT, lineage


class Prior(NamedTuple):
    """The knowledge of a coefficient before the sources are read."""

    mean: float
    sd: float


PRIORS = {
    # The square-root rule of the paper's authors; no effect is two SDs away.
    "batch_size": Prior(0.5, 0.25),
    # The law has no length; a random walk of A, which gives -1/2, is two SDs away.
    "steps": Prior(0.0, 0.25),
}
"""The priors of the coefficients, of ln LR for an e-fold of the attribute."""

REFERENCE = {"batch_size": 128.0, "steps": 780.0}
"""The attributes at which the law is to hold: those of its authors' sweep."""

ALPHA_EXPONENT = -0.75
"""All LRs of LoRA are stated at the paper's alpha. Others are converted by this exponent, the middle of two theories of
`lr_ratio`: -1 while A stands still, and -1/2 when its movement decides."""

# The SD of the weak prior of the offset, around 0; those of an attribute's logarithm where a source does not give it.
OFFSET = 5.0
UNKNOWN, UNKNOWN_WIDTH = math.log(4), math.log(2)
# The grid of the standard deviations between and within sources, in ln LR: up to factors of 20 and 3.
BETWEEN, WITHIN = np.linspace(0.0, 3.0, 31), np.linspace(0.0, 1.2, 13)


@dataclass(frozen=True)
class Place:
    """Where a learning rate is to be optimal."""

    log_law: float  # the natural logarithm of the law's LR there (see `at`)
    law_error: float  # its standard error, of a family without an exponent or an unknown width
    batch_size: float  # NaN where a source does not say, as is `steps`
    steps: float

    @classmethod
    def at(
        cls, family: str, width: float, method: str, batch_size: float, steps: float, width_error: float = 0.0
    ) -> Place:
        """Return the place of a model, by its transformers type, and a method, `fullft` or `lora`.

        For a family without an exponent the law is the middle of the others. The width is NaN if it is not known. The
        batch size is in examples per step, in RL in responses.
        """
        names = [lineage(family)] if lineage(family) in EXPONENTS else list(EXPONENTS)
        ratio = PIVOT / (PIVOT if math.isnan(width) else width)
        logs = [math.log(BASE_LRS[method] * ratio ** EXPONENTS[name]) for name in names]
        family_error = (max(logs) - min(logs)) / 2
        width_error = UNKNOWN_WIDTH if math.isnan(width) else width_error
        law_error = math.hypot(family_error, width_error * max(EXPONENTS[name] for name in names))
        return cls(sum(logs) / len(logs), law_error, batch_size, steps)

    @property
    def terms(self) -> np.ndarray:
        """What the coefficients multiply, (3,): 1, and ln of batch size and steps over their reference."""
        logs = [math.log(getattr(self, name) / reference) for name, reference in REFERENCE.items()]
        return np.array([1.0, *(0.0 if math.isnan(log) else log for log in logs)])

    @property
    def unknown_variance(self) -> float:
        """The variance of ln LR by what is not known of the place."""
        unknown = [prior for name, prior in PRIORS.items() if math.isnan(getattr(self, name))]
        return self.law_error**2 + sum((prior.mean**2 + prior.sd**2) * UNKNOWN**2 for prior in unknown)


@dataclass(frozen=True)
class Optimum:
    """The measured optimal LR of one condition of a source, stated at ALPHA."""

    source: str
    model: str  # the model; all optima of one model in a source share its deviation
    place: Place
    log_lr: float
    error: float  # the standard error of `log_lr`, above 0


@dataclass(frozen=True)
class Prediction:
    """The predicted natural logarithm of an optimal LR, and the ends of the interval with the asked probability."""

    mean: float
    low: float
    high: float
    weights: dict[str, float]  # by source: how much the prediction moves if all its ln LRs rise by 1


class PooledLr:
    """The optima of one method, pooled."""

    def __init__(self, optima: Sequence[Optimum]) -> None:
        """Fit the optima of at least two sources, each with an error above 0."""
        self.sources = sorted({optimum.source for optimum in optima})
        values = np.array([[optimum.log_lr, optimum.error] for optimum in optima])
        self._models = [(optimum.source, optimum.model) for optimum in optima]
        self._source = np.array([[source == name for name in self.sources] for source, _ in self._models], float)
        self.design = np.array([optimum.place.terms for optimum in optima])
        self.prior = np.array([OFFSET**2, *(prior.sd**2 for prior in PRIORS.values())])
        self.means = np.array([0.0, *(prior.mean for prior in PRIORS.values())])
        laws = np.array([optimum.place.log_law for optimum in optima])
        self.rest = values[:, 0] - laws - self.design @ self.means
        error = values[:, 1] ** 2 + [optimum.place.unknown_variance for optimum in optima]
        common = (self.design * self.prior) @ self.design.T + np.diag(error)
        same = self._source @ self._source.T
        alike = np.array([[pair == other for other in self._models] for pair in self._models], float)
        self.grid = [(between, within) for between in BETWEEN for within in WITHIN]
        self.inverses, log_likelihood = [], []
        for between, within in self.grid:
            covariance = common + between**2 * same + within**2 * alike
            inverse = np.linalg.inv(covariance)
            self.inverses.append(inverse)
            log_determinant = np.linalg.slogdet(covariance)[1]
            log_likelihood.append(-0.5 * (log_determinant + self.rest @ inverse @ self.rest))
        likelihood = np.exp(np.array(log_likelihood) - max(log_likelihood))
        self.shares = likelihood / likelihood.sum()

    def predict(
        self, place: Place, probability: float = 0.8, measured: tuple[str, str] | None = None, error: float = 0.0
    ) -> Prediction:
        """Predict the optimum of a further source, or of a `measured` source and model, measured with an error."""
        terms = place.terms
        at_source = np.array([measured is not None and source == measured[0] for source, _ in self._models], float)
        at_model = np.array([pair == measured for pair in self._models], float)
        covariance = self.design @ (self.prior * terms)
        own = float(terms**2 @ self.prior) + place.unknown_variance + error**2
        means, variances, gains = [], [], []
        for (between, within), inverse in zip(self.grid, self.inverses, strict=True):
            with_optima = covariance + between**2 * at_source + within**2 * at_model
            gain = with_optima @ inverse
            means.append(float(place.log_law + terms @ self.means + gain @ self.rest))
            variances.append(own + between**2 + within**2 - float(gain @ with_optima))
            gains.append(gain)
        centre, spread = np.array(means), np.sqrt(variances)
        weights = (self.shares @ np.array(gains)) @ self._source
        heavy = self.shares > 1e-12
        parts = [*zip(self.shares[heavy].tolist(), centre[heavy].tolist(), spread[heavy].tolist(), strict=True)]
        ends = []
        # The quantiles of the mixture of normal distributions, by bisection.
        for quantile in ((1 - probability) / 2, (1 + probability) / 2):
            low, high = float((centre - 12 * spread).min()), float((centre + 12 * spread).max())
            while high - low > 1e-12:
                middle = (low + high) / 2
                below = sum(weight * math.erfc((mean - middle) / sd / math.sqrt(2)) / 2 for weight, mean, sd in parts)
                low, high = (middle, high) if below < quantile else (low, middle)
            ends.append(low)
        by_source = dict(zip(self.sources, weights.tolist(), strict=True))
        return Prediction(float(self.shares @ centre), ends[0], ends[1], by_source)
