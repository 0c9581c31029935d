"""Estimates: numbers with the distribution of their error, from which intervals of any level are taken.

An error has two independent parts: one from seeds (weights, data order), which more seeds make smaller, and one from
the examples of the test split, which only more examples make smaller. Each part is kept as draws, so that a function of
several estimates has an interval too, and estimates from one fit keep their correlation.

The same draws are used every time: they are quantiles of the error's distribution, at points that fill the unit cube
evenly and lie in an order that belongs to the name of the error. So the ends of an interval are continuous in the data;
docs/verdicts.md says how precise they are.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import chdtri, ndtri, stdtrit

N_DRAWS = 2**16
"""Number of draws of an error; a power of two, by which Sobol's points fill a cube evenly."""

_SHARES = (np.arange(N_DRAWS) + 0.5) / N_DRAWS
"""Shares of a distribution, equally far apart, (N_DRAWS,)."""

POWER = 0.8
"""The probability with which an effect of the smallest detectable size would have been seen."""


@dataclass(frozen=True)
class Estimate:
    """A number with its error; if the error is not known, the draws are NaN."""

    value: float
    seed_part: np.ndarray = field(repr=False)
    """Draws of the error from seeds, shape (N_DRAWS,), in the unit of the value."""
    example_part: np.ndarray | None = field(default=None, repr=False)
    """Draws of the error from test examples, shape (N_DRAWS,); None where the tables do not hold the losses by
    example, so that this error is not known and counts as 0."""
    n_seeds: int = 0
    n_examples: int = 0

    @property
    def draws(self) -> np.ndarray:
        """Draws of the number with both errors, shape (N_DRAWS,)."""
        return self.value + self.seed_part + (0.0 if self.example_part is None else self.example_part)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the ends of the equal-tailed interval of a level; NaN if the error is not known."""
        tail = (1 - level) / 2
        return self._quantile(tail), self._quantile(1 - tail)

    @cached_property
    def ordered(self) -> np.ndarray:
        """The draws in ascending order, NaN last."""
        return np.sort(self.draws)

    def _quantile(self, share: float) -> float:
        """Return a quantile of the draws, on the line between the two nearest; NaN if some draw is."""
        place = share * (N_DRAWS - 1)
        low, high, last = self.ordered[[math.floor(place), math.ceil(place), -1]].tolist()
        return math.nan if math.isnan(last) else float(low + (high - low) * (place - math.floor(place)))

    @property
    def known(self) -> bool:
        """Whether the number and its error are known."""
        return math.isfinite(self.value) and bool(np.isfinite(self.seed_part).all())

    @property
    def detectable(self) -> float:
        """The smallest true difference from 0 whose 95% interval would leave out 0 with probability POWER."""
        low, high = self.interval()
        return (high - low) / 2 + self._quantile(POWER) - self._quantile(0.5)

    @property
    def seed_error(self) -> float:
        """The standard error from seeds, as half of the draws' central 68%."""
        return _standard_error(self.seed_part)

    @property
    def example_error(self) -> float:
        """The standard error from test examples; 0 where it is not known."""
        return 0.0 if self.example_part is None else _standard_error(self.example_part)


def _standard_error(part: np.ndarray) -> float:
    low, high = np.quantile(part, [0.1587, 0.8413]).tolist()
    return float(high - low) / 2


def combined(function: Callable[..., ArrayLike], *estimates: Estimate) -> Estimate:
    """Return a function of estimates, with the error that follows from theirs.

    Args:
        function: maps one number or array for each estimate to a number or array; it must work element by element.
        estimates: their draws are taken together, so that those of one fit keep their correlation.
    """
    value = float(np.asarray(function(*(each.value for each in estimates))))
    seed_part = np.asarray(function(*(each.value + each.seed_part for each in estimates))) - value
    example_part, parts = None, [each.value + each.example_part for each in estimates if each.example_part is not None]
    if len(parts) == len(estimates):
        example_part = np.asarray(function(*parts)) - value
    n_seeds, n_examples = min(each.n_seeds for each in estimates), min(each.n_examples for each in estimates)
    return Estimate(value, seed_part, example_part, n_seeds, n_examples)


def unknown(value: float = math.nan) -> Estimate:
    """Return a number whose error is not known."""
    return Estimate(value, np.full(N_DRAWS, math.nan))


def exact(value: float) -> Estimate:
    """Return a number without an error, such as a count."""
    return Estimate(value, np.zeros(N_DRAWS))


def student(value: float, error: float, dof: float, name: str, n_seeds: int = 0) -> Estimate:
    """Return a number with a t distributed error, given its standard error.

    With fewer than one degree of freedom the error is not known. Draws of different names are independent, and those of
    one name are always the same.
    """
    known = dof >= 1 and math.isfinite(error)
    seed_part = error * shuffled(_t_quantiles(dof), name) if known else np.full(N_DRAWS, math.nan)
    return Estimate(value, seed_part, None, n_seeds)


@lru_cache(maxsize=64)
def _t_quantiles(dof: float) -> np.ndarray:
    return np.asarray(stdtrit(dof, _SHARES))


def mean_over_seeds(values: Sequence[float] | ArrayLike, name: str) -> Estimate:
    """Return the mean over seeds with its t distributed error; the error is not known with fewer than two seeds."""
    numbers = np.asarray(values, float)
    numbers = numbers[np.isfinite(numbers)]
    n = len(numbers)
    error = float(numbers.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return student(float(numbers.mean()) if n else math.nan, error, n - 1, name, n)


def ratio_of_means(numerator: np.ndarray, denominator: np.ndarray, name: str) -> Estimate:
    """Estimate the ratio of the means of paired values, (n,) each; NaN if the denominator's mean is not positive.

    The error is that of a ratio estimator, from the residuals numerator - ratio * denominator, in which variation that
    the paired values share cancels. It is not known with fewer than two pairs.
    """
    n = len(numerator)
    mean = float(denominator.mean()) if n else math.nan
    if not mean > 0:
        return student(math.nan, math.nan, 0, name, n)
    ratio = float(numerator.mean()) / mean
    residual = float((numerator - ratio * denominator).std(ddof=1)) if n > 1 else math.nan
    return student(ratio, residual / math.sqrt(n) / mean, n - 1, name, n)


def mean_interval(values: ArrayLike) -> tuple[float, float, float]:
    """Return the mean and the ends of its 95% t interval, which are NaN with fewer than two values; without draws."""
    numbers = np.asarray(values, float)
    n, mean = len(numbers), float(numbers.mean()) if len(numbers) else math.nan
    half = t_quantile(n - 1) * float(numbers.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return mean, mean - half, mean + half


def t_quantile(dof: float) -> float:
    """Return the half width of a 95% t interval in standard errors."""
    return float(stdtrit(dof, 0.975))


def normal(name: str) -> np.ndarray:
    """Return draws of the standard normal distribution, (N_DRAWS,); those of different names are independent."""
    return shuffled(ndtri(_SHARES), name)


def multivariate_student(covariance: np.ndarray, dof: float, name: str) -> np.ndarray:
    """Return draws of a multivariate t distribution around 0, (N_DRAWS, numbers), by the name of the numbers.

    The covariance is that if the degrees of freedom, which all numbers share, were many, (numbers, numbers).
    """
    errors = np.sqrt(np.diag(covariance))
    scales = np.where(errors > 0, errors, 1.0)
    # Cholesky's factor is continuous in the covariance. Eigenvectors are not: a small change of the covariance turns
    # them, or exchanges their signs. A negligible share is added, in case one error follows from the others.
    root = np.linalg.cholesky(covariance / np.outer(scales, scales) + 1e-9 * np.eye(len(scales)))
    even = _even_points(math.ceil(len(root) / _BLOCK), normal=True)[:, : len(root)]
    # One chi-squared draw for all numbers makes normal ones multivariate t. Any part of the points is even as well, so
    # its draws can be combined with them in ascending order.
    return shuffled(_chi_factors(dof)[:, None] * (even @ root.T * errors), name)


def uniform(dimensions: int, name: str) -> np.ndarray:
    """Return points that fill the unit cube evenly, (N_DRAWS, dimensions); those of different names are independent."""
    return shuffled(_even_points(math.ceil(dimensions / _BLOCK))[:, :dimensions], name)


@lru_cache(maxsize=64)
def _chi_factors(dof: float) -> np.ndarray:
    return np.asarray(np.sqrt(dof / chdtri(dof, 1 - _SHARES)))


_BLOCK = 32
"""Fits whose numbers fill as many blocks of this size share their points."""


@lru_cache(maxsize=4)
def _even_points(blocks: int, normal: bool = False) -> np.ndarray:
    """Return points, (N_DRAWS, _BLOCK * blocks), that fill the unit cube evenly, as any part of them does, or with
    `normal` the numbers with these shares of a normal distribution."""
    if normal:
        return np.asarray(ndtri(_even_points(blocks)))
    from scipy.stats.qmc import Sobol  # takes half a second to import

    # Half of a step keeps the points, which are whole steps, off 0.
    points = Sobol(_BLOCK * blocks + 1, seed=np.random.default_rng(0)).random(N_DRAWS) + 2.0**-31
    return np.asarray(points[np.argsort(points[:, 0], kind="stable"), 1:])


def shuffled(draws: np.ndarray, name: str) -> np.ndarray:
    """Return draws in the order of a name, (N_DRAWS, ...); the orders of different names are independent."""
    random = generator(name)
    # To turn one of a few random orders by a random number of places is faster than to make another one.
    order, start = _order(int(random.integers(_ORDERS))), int(random.integers(N_DRAWS))
    return np.concatenate([draws[order[start:]], draws[order[:start]]])


_ORDERS = 64
"""The number of random orders; turned by any number of places, they are 4 million."""


@lru_cache(maxsize=_ORDERS)
def _order(number: int) -> np.ndarray:
    return generator(f"order {number}").permutation(N_DRAWS).astype(np.uint32)


def generator(name: str) -> np.random.Generator:
    """Return the random generator of a name, so that no number depends on what else is in a table."""
    return np.random.default_rng(zlib.crc32(name.encode()))


_SUMMED = 2**12
"""The number of draws that are made, and summed, at one time, so that they take little memory."""


@dataclass(frozen=True)
class ExampleLosses:
    """The losses of runs by test example, from the table `test_losses`."""

    nats: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    """By run_id, the summed loss of each example, (examples,)."""
    tokens: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    """By run_id, the scored tokens of each example, (examples,)."""

    @classmethod
    def of(cls, table: pd.DataFrame) -> ExampleLosses:
        """Read the table `test_losses`: columns run_id, example, loss, tokens."""
        if table.empty:
            return cls()
        by_run = table.sort_values("example").astype({"loss": float, "tokens": float}).groupby("run_id")
        return cls(*({str(run): rows.to_numpy() for run, rows in by_run[name]} for name in ("loss", "tokens")))

    def deviations(self, run_ids: Sequence[str], name: str, combined: np.ndarray) -> tuple[np.ndarray, int] | None:
        """Resample the test examples (bootstrap) and compute sums of the runs' mean losses on each resampled split.

        Args:
            run_ids: runs on one test split.
            name: names the test split; the examples of one name are resampled alike.
            combined: weights of the runs in each sum, (runs, numbers).

        Returns:
            The difference of each sum from that on the split itself, (N_DRAWS, numbers), and the number of examples.
            None if a run lacks its losses or the runs have different splits.
        """
        if not len(run_ids) or any(run_id not in self.nats for run_id in run_ids):
            return None
        weights = self.tokens[run_ids[0]]
        if any(not np.array_equal(self.tokens[run_id], weights) for run_id in run_ids):
            return None
        losses = np.array([self.nats[run_id] for run_id in run_ids]).T @ combined
        n = len(weights)
        mean = losses.sum(0) / weights.sum()
        # The mean is subtracted first, so that single precision suffices for the sums over each resampled split.
        numbers = np.column_stack([losses - np.outer(weights, mean), weights]).astype(np.float32)
        counts = _resampled(name, n)
        blocks = (counts[start : start + _SUMMED].astype(np.float32) @ numbers for start in range(0, N_DRAWS, _SUMMED))
        sums = np.concatenate(list(blocks)).astype(float)
        return sums[:, :-1] / np.maximum(sums[:, -1:], 1e-12), n

    def influences(self, run_ids: Sequence[str]) -> np.ndarray:
        """Return the amounts that test examples add to the runs' mean losses, times their number, (runs, examples)."""
        weights = self.tokens[run_ids[0]]
        losses = np.array([self.nats[run_id] for run_id in run_ids])
        means = losses.sum(1, keepdims=True) / weights.sum()
        contributions: np.ndarray = (losses - means * weights) / weights.mean()
        return contributions


@lru_cache(maxsize=16)
def _resampled(name: str, n: int) -> np.ndarray:
    """Return how often each of n examples is drawn, in one byte each, (N_DRAWS, n)."""
    random, offsets = generator(f"examples of {name}"), n * np.arange(_SUMMED)[:, None]
    counts = np.empty((N_DRAWS, n), np.uint8)
    for start in range(0, N_DRAWS, _SUMMED):
        drawn = random.integers(0, n, (_SUMMED, n)) + offsets
        counts[start : start + _SUMMED] = np.bincount(drawn.ravel(), minlength=_SUMMED * n).reshape(_SUMMED, n)
    return counts


def without_run_noise(
    draws: np.ndarray, influences: np.ndarray, design: np.ndarray, hat: np.ndarray, covariance: np.ndarray
) -> np.ndarray:
    """Remove from the error from test examples the part that the error from seeds has in it already.

    Two runs of one arm differ on single test examples by chance alone. The spread between runs, which makes the error
    from seeds, contains these differences, and resampled examples contain them, too. Only a difference that an example
    makes to all runs of an arm, or to the shape of its loss against the LR, is an error of its own. The losses of each
    example are fitted like the mean losses, and the variance of their residuals is taken from that of the coefficients.

    Args:
        draws: draws of the coefficients' error from resampled examples, (draws, coefficients).
        influences: what each example adds to each run's mean loss, times the number of examples, (runs, examples).
        design: the design matrix of the fit, (runs, coefficients).
        hat: makes coefficients from losses, (coefficients, runs).
        covariance: the covariance of runs over the variance of their noise, (runs, runs).

    Returns:
        The draws with the smaller covariance, otherwise changed as little as possible.
    """
    runs, n = influences.shape
    # A coefficient that is held near a value known before the runs takes less than a degree of freedom.
    dof = runs - float(np.trace(hat @ design))
    if dof < 1 or n < 2:
        return draws
    effects = hat @ influences
    residual = influences - design @ effects
    variance = float((residual * np.linalg.solve(covariance, residual)).sum()) / (n - 1) / dof
    unscaled = hat @ covariance @ hat.T
    total = effects @ effects.T / (n - 1)
    values, vectors = np.linalg.eigh(total)
    if not values.max() > 0:
        return draws
    # A direction has at least a negligible variance, so that it can be divided by.
    scales = np.sqrt(np.maximum(values, 1e-12 * values.max()))
    root, whitened = vectors * scales, vectors / scales
    shares, axes = np.linalg.eigh(whitened.T @ unscaled @ whitened * variance)
    shrink = (axes * np.sqrt(np.clip(1 - shares, 0.0, 1.0))) @ axes.T
    shrunk: np.ndarray = draws @ (whitened @ shrink @ root.T)
    return shrunk
