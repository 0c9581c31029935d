"""The optimal learning rate of a method in a new place, pooled from the optima that several sources have measured.

The natural logarithm of the optimal LR of a method, in SFT or in RL, is taken to be

    the paper's law + offset + b ln(batch size / 128) + s ln(steps / 780)
        + an effect of the source + a deviation of the model within its source + the error of the measurement

The law gives the form and its exponents in the width. The offset is free: by how much all sources differ from the law
on average. The other two coefficients have normal priors, since ten sources cannot tell them apart (`PRIORS` names
where each is from). The effects of sources and the deviations of models within a source are normal with mean 0; their
standard deviations have flat priors and are averaged over a grid, so that a prediction carries the doubt about them.
All else is normal, so a prediction is a mixture of normal distributions, one for each point of the grid.

An attribute that a source does not give is taken to be at its reference, and the optimum's error grows by what the
attribute may do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from lorabench.analysis.lr_law import PIVOT, lineage, predict_lr
from lorabench.analysis.lr_law import PUBLISHED as LAW


@dataclass(frozen=True)
class Prior:
    """What is known of a coefficient before the sources are read."""

    mean: float
    sd: float
    why: str


PRIORS = {
    "batch_size": Prior(0.5, 0.25, "the square-root rule of the paper's authors; no effect is two SDs away"),
    "steps": Prior(0.0, 0.25, "the law has no length; a random walk of A, which gives -1/2, is two SDs away"),
}
"""The priors of the coefficients, of ln LR for an e-fold of the attribute."""

REFERENCE = {"batch_size": 128.0, "steps": 780.0}
"""The attributes at which the law is to hold: those of its authors' sweep."""

ALPHA, ALPHA_EXPONENT = 32.0, -0.75
"""All LRs of LoRA are stated at this alpha. Others are converted by a fixed exponent, the middle of the two theories of
`lr_ratio_theories`: -1 while A stands still, and -1/2 when its movement decides."""

# A weak prior of the offset; the SDs of an attribute's logarithm where a source does not give it.
_OFFSET = Prior(0.0, 5.0, "anywhere")
_UNKNOWN = {"batch_size": math.log(4), "steps": math.log(4)}
_UNKNOWN_WIDTH = math.log(2)
# The grid of the standard deviations between and within sources, in ln LR: up to factors of 20 and 3.
_BETWEEN = np.linspace(0.0, 3.0, 31)
_WITHIN = np.linspace(0.0, 1.2, 13)


@dataclass(frozen=True)
class Place:
    """Where a learning rate is to be optimal."""

    log_law: float
    """The natural logarithm of the law's LR there (see `at`)."""
    law_error: float
    """Its standard error where the law does not say: of a family without an exponent, or of an unknown width."""
    batch_size: float
    """NaN where a source does not say, as is `steps`."""
    steps: float

    @classmethod
    def at(cls, family: str, width: float, method: str, batch_size: float, steps: float) -> Place:
        """Return the place of a model and a method.

        Args:
            family: the transformers model type. Without an exponent of its own, the law is the middle of its families.
            width: the hidden size; NaN if it is not known.
            method: `fullft` or `lora`.
            batch_size: examples per step, or responses per step in RL.
            steps: the number of steps.
        """
        names = [lineage(family)] if lineage(family) in LAW.exponents else list(LAW.exponents)
        known = PIVOT if math.isnan(width) else width
        logs = [math.log(predict_lr(LAW, name, known, method)) for name in names]
        of_family = (max(logs) - min(logs)) / 2
        of_width = _UNKNOWN_WIDTH * max(LAW.exponents[name] for name in names) if math.isnan(width) else 0.0
        return cls(sum(logs) / len(logs), math.hypot(of_family, of_width), batch_size, steps)


@dataclass(frozen=True)
class Optimum:
    """The measured optimal LR of one condition of a source, stated at ALPHA."""

    source: str
    model: str
    """The model; all optima of one model in a source share its deviation."""
    place: Place
    log_lr: float
    error: float
    """The standard error of `log_lr`, above 0."""


@dataclass(frozen=True)
class Prediction:
    """The predicted natural logarithm of an optimal LR."""

    mean: float
    low: float
    """The lower end of the interval with the asked probability."""
    high: float
    weights: dict[str, float]
    """By source: how much the prediction moves if all its ln LRs rise by 1."""


class PooledLr:
    """The optima of one method, pooled."""

    def __init__(self, optima: Sequence[Optimum]) -> None:
        """Fit the optima.

        Raises:
            ValueError: there are fewer than two sources, or an error is not above 0.
        """
        self.sources = sorted({optimum.source for optimum in optima})
        if len(self.sources) < 2:
            raise ValueError(f"pooling needs two sources; there are {len(self.sources)}")
        values = np.array([[optimum.log_lr, optimum.error] for optimum in optima])
        if not (np.isfinite(values).all() and (values[:, 1] > 0).all()):
            raise ValueError("every optimum needs a number and an error above 0")
        self._of_source = np.array([[optimum.source == name for name in self.sources] for optimum in optima], float)
        self._design = np.array([_terms(optimum.place) for optimum in optima])
        self._prior = np.array([_OFFSET.sd**2, *(prior.sd**2 for prior in PRIORS.values())])
        self._means = np.array([_OFFSET.mean, *(prior.mean for prior in PRIORS.values())])
        of_law = np.array([optimum.place.log_law for optimum in optima])
        self._rest = values[:, 0] - of_law - self._design @ self._means
        error = values[:, 1] ** 2 + [_of_unknown(optimum.place) for optimum in optima]
        common = (self._design * self._prior) @ self._design.T + np.diag(error)
        same = self._of_source @ self._of_source.T
        self._models = [(optimum.source, optimum.model) for optimum in optima]
        alike = np.array([[one == other for other in self._models] for one in self._models], float)
        self._grid = [(between, within) for between in _BETWEEN for within in _WITHIN]
        self._inverses, log_likelihood = [], []
        for between, within in self._grid:
            covariance = common + between**2 * same + within**2 * alike
            inverse = np.linalg.inv(covariance)
            self._inverses.append(inverse)
            log_determinant = np.linalg.slogdet(covariance)[1]
            log_likelihood.append(-0.5 * (log_determinant + self._rest @ inverse @ self._rest))
        likelihood = np.exp(np.array(log_likelihood) - max(log_likelihood))
        self._shares = likelihood / likelihood.sum()

    @property
    def between(self) -> float:
        """The standard deviation between sources, averaged over its posterior."""
        return float(sum(share * between for share, (between, _) in zip(self._shares, self._grid, strict=True)))

    @property
    def coefficients(self) -> dict[str, tuple[float, float]]:
        """The mean and the standard deviation of each coefficient, the offset from the law first."""
        cross = (self._design * self._prior).T
        gains = [cross @ inverse for inverse in self._inverses]
        means = np.array([self._means + gain @ self._rest for gain in gains])
        variances = np.array([self._prior - np.einsum("ij,ij->i", gain, cross) for gain in gains])
        mean = self._shares @ means
        variance = self._shares @ (variances + (means - mean) ** 2)
        return {
            name: (float(centre), math.sqrt(spread))
            for name, centre, spread in zip(("offset", *PRIORS), mean, variance, strict=True)
        }

    @property
    def effective_parameters(self) -> float:
        """How many coefficients the optima decide rather than the priors: 1 for the offset, and at most 3."""
        priors = (_OFFSET, *PRIORS.values())
        pairs = zip(priors, self.coefficients.values(), strict=True)
        return sum(max(0.0, 1 - (sd / prior.sd) ** 2) for prior, (_, sd) in pairs)

    def predict(
        self,
        place: Place,
        probability: float = 0.8,
        measured: tuple[str, str] | None = None,
        error: float = 0.0,
    ) -> Prediction:
        """Predict the optimum of a further condition.

        Args:
            place: the condition.
            probability: that of the interval.
            measured: the condition's source and model, if the optima have them; by default a further source.
            error: the standard error with which the optimum will be measured, which widens the interval.
        """
        terms = _terms(place)
        at_source = np.array([measured is not None and source == measured[0] for source, _ in self._models], float)
        at_model = np.array([pair == measured for pair in self._models], float)
        covariance = self._design @ (self._prior * terms)
        own = float(terms**2 @ self._prior) + _of_unknown(place) + error**2
        means, variances, gains = [], [], []
        for (between, within), inverse in zip(self._grid, self._inverses, strict=True):
            with_optima = covariance + between**2 * at_source + within**2 * at_model
            gain = with_optima @ inverse
            means.append(float(place.log_law + terms @ self._means + gain @ self._rest))
            variances.append(own + between**2 + within**2 - float(gain @ with_optima))
            gains.append(gain)
        centre, spread = np.array(means), np.sqrt(variances)
        weights = (self._shares @ np.array(gains)) @ self._of_source
        tail = (1 - probability) / 2
        return Prediction(
            float(self._shares @ centre),
            _quantile(tail, self._shares, centre, spread),
            _quantile(1 - tail, self._shares, centre, spread),
            dict(zip(self.sources, weights.tolist(), strict=True)),
        )


def _terms(place: Place) -> np.ndarray:
    """Return what each coefficient is multiplied by."""
    logs = [math.log(getattr(place, name) / reference) for name, reference in REFERENCE.items()]
    return np.array([1.0, *(0.0 if math.isnan(log) else log for log in logs)])


def _of_unknown(place: Place) -> float:
    """Return the variance that the law and the attributes add where they are not known."""
    return place.law_error**2 + sum(
        (PRIORS[name].mean ** 2 + PRIORS[name].sd ** 2) * sd**2
        for name, sd in _UNKNOWN.items()
        if math.isnan(getattr(place, name))
    )


def _quantile(probability: float, shares: np.ndarray, means: np.ndarray, sds: np.ndarray) -> float:
    """Return a quantile of a mixture of normal distributions, by bisection."""
    low, high = float((means - 12 * sds).min()), float((means + 12 * sds).max())
    for _ in range(60):
        middle = (low + high) / 2
        below = float(shares @ ndtr((middle - means) / sds))
        low, high = (middle, high) if below < probability else (low, middle)
    return (low + high) / 2
