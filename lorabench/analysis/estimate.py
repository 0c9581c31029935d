"""Estimates: numbers with the distribution of their error, from which intervals of any level are taken.

An error has two independent parts: one from seeds (weights, data order), and one from the test examples, or from their
groups where they share a source. Each is kept as draws, so that functions of several estimates have intervals too, and
estimates from one fit keep their correlation. The draws are quantiles of the error's distribution, at points that fill
the unit cube evenly, in an order that belongs to the error's name. So the ends of an interval are continuous in the
data; docs/estimates.md says how precise they are.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import chdtri, ndtri, stdtrit

from lorabench.store.checks import check_test_losses

N_DRAWS = int(os.environ.get("LORABENCH_DRAWS", 2**16))
"""Number of draws of an error, a power of two from 2**12 up, as Sobol's points need; calibration sets a smaller one."""

_SHARES = (np.arange(N_DRAWS) + 0.5) / N_DRAWS

POWER = 0.8
"""The probability with which an effect of the smallest detectable size would have been seen."""


@dataclass(frozen=True)
class Estimate:
    """A number with its error; if the error is not known, the draws are NaN."""

    value: float
    seed_part: np.ndarray = field(repr=False)
    """Draws of the error from seeds, shape (N_DRAWS,), in the unit of the value."""
    example_part: np.ndarray | None = field(default=None, repr=False)
    """Draws of the error from test examples, shape (N_DRAWS,); NaN where all examples are of one group. None without
    losses by example; this error is then not known and counts as 0."""
    n_seeds: int = 0
    n_examples: int = 0
    n_groups: int = 0
    """The number of groups of test examples; `n_examples` where each example is its own group."""
    renewed: bool = False
    """Whether a further batch of runs has other test examples."""
    width_error: float = math.nan
    """The standard deviation, between runs of one design, of ln of the width of its intervals; NaN where it follows
    from the shape of the draws."""
    looks: int = 0
    """The number of batches after each of which the number is tested; 0 for a single test."""

    @property
    def draws(self) -> np.ndarray:
        """Draws of the number with both errors, shape (N_DRAWS,)."""
        return self.value + self.seed_part + (0.0 if self.example_part is None else self.example_part)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the ends of the equal-tailed interval of a level; NaN if the error is not known."""
        low, high = np.quantile(self.ordered, [(1 - level) / 2, (1 + level) / 2]).tolist()
        return low, high

    @cached_property
    def ordered(self) -> np.ndarray:
        """The draws in ascending order, NaN last."""
        return np.sort(self.draws)

    @cached_property
    def known(self) -> bool:
        """Whether the number and its error are known."""
        return math.isfinite(self.value) and bool(np.isfinite(self.draws).all())

    @property
    def detectable(self) -> float:
        """The smallest true difference from 0 whose 95% interval would leave out 0 with probability POWER."""
        low, middle, most, high = np.quantile(self.ordered, [0.025, 0.5, POWER, 0.975]).tolist()
        return float((high - low) / 2 + most - middle)

    @cached_property
    def seed_error(self) -> float:
        """The standard error from seeds, as half of the draws' central 68%."""
        return standard_error(self.seed_part)

    @cached_property
    def example_error(self) -> float:
        """The standard error from test examples; 0 where it is not known."""
        return 0.0 if self.example_part is None else standard_error(self.example_part)


def standard_error(part: np.ndarray) -> float:
    """Return the standard error of draws, as half of their central 68%."""
    low, high = np.quantile(part, [0.1587, 0.8413]).tolist()
    return float(high - low) / 2


def combined(function: Callable[..., ArrayLike], *estimates: Estimate) -> Estimate:
    """Return a function of estimates, which maps one number or array for each to a number or array, with the error that
    follows from theirs. Draws are taken together, so that those of one fit keep their correlation."""
    value = float(np.asarray(function(*(each.value for each in estimates))))
    seed_part = np.asarray(function(*(each.value + each.seed_part for each in estimates))) - value
    example_part, parts = None, [each.value + each.example_part for each in estimates if each.example_part is not None]
    if len(parts) == len(estimates):
        example_part = np.asarray(function(*parts)) - value
    names = ("n_seeds", "n_examples", "n_groups", "renewed")
    return Estimate(value, seed_part, example_part, *(min(getattr(each, name) for each in estimates) for name in names))


def unknown(value: float = math.nan) -> Estimate:
    """Return a number whose error is not known."""
    return Estimate(value, np.full(N_DRAWS, math.nan))


def exact(value: float) -> Estimate:
    """Return a number without an error, such as a count."""
    return Estimate(value, np.zeros(N_DRAWS))


def student(value: float, error: float, dof: float, name: str, n_seeds: int = 0) -> Estimate:
    """Return a number with a t distributed error, given its standard error; it is not known below one degree of
    freedom. Draws of different names are independent, and those of one name are always the same."""
    known = dof >= 1 and math.isfinite(error)
    seed_part = error * shuffled(_t_quantiles(dof), name) if known else np.full(N_DRAWS, math.nan)
    return Estimate(value, seed_part, None, n_seeds)


@lru_cache(maxsize=256)
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
    """Estimate the ratio of the means of paired values, (n,) each; NaN if the denominator's mean is not positive. Its
    error, from the residuals numerator - ratio * denominator, lacks what pairs share; two pairs are needed."""
    n = len(numerator)
    mean = float(denominator.mean()) if n else math.nan
    if not mean > 0:
        return replace(unknown(), n_seeds=n)
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
    """Return draws of a multivariate t distribution around 0, (N_DRAWS, numbers), by the name of the numbers. The
    covariance, (numbers, numbers), is that if the degrees of freedom were many."""
    roots, numbers = cholesky_root(covariance)[None], len(covariance)
    return mixture_of_students(np.ones(1), np.zeros((1, numbers)), roots, dof, name, range(numbers))


def mixture_of_students(
    weights: np.ndarray,
    shifts: np.ndarray,
    roots: np.ndarray,
    dof: float,
    name: str,
    chosen: Sequence[int],
    known: np.ndarray | None = None,
) -> np.ndarray:
    """Return draws of a mixture of multivariate t distributions, (N_DRAWS, chosen places), by the name of the numbers.

    Each part has a weight, (parts,), a centre, (parts, numbers), and a triangular root of its covariance if the degrees
    of freedom were many, (parts, numbers, numbers). To it comes an independent normal error, if any, of which the root
    of the covariance is `known`, of the same shape.
    """
    numbers = shifts.shape[1]
    shares, order, even = _even_points(math.ceil(numbers * (1 if known is None else 2) / _BLOCK))
    places, by_share, draws = list(chosen), np.empty((N_DRAWS, len(chosen))), np.empty((N_DRAWS, len(chosen)))
    # One chi-squared draw for all numbers makes normal ones multivariate t.
    factors = _chi_factors(dof)[order, None]
    ends = [0, *np.searchsorted(shares, np.cumsum(weights)[:-1]).tolist(), N_DRAWS]
    for number, at in enumerate(map(slice, ends[:-1], ends[1:])):
        by_share[at] = shifts[number, places] + factors[at] * (even[at, :numbers] @ roots[number, places].T)
        if known is not None:
            by_share[at] += even[at, numbers : 2 * numbers] @ known[number, places].T
    draws[order] = by_share
    return shuffled(draws, name)


def cholesky_root(covariance: np.ndarray) -> np.ndarray:
    """Return lower triangular roots of covariances, (..., numbers, numbers), in which a number may follow from others
    or have no error. They are continuous in the covariance, as eigenvectors are not; a negligible share is added to
    each variance."""
    errors = np.sqrt(np.diagonal(covariance, axis1=-2, axis2=-1))[..., None]
    scales = np.where(errors > 0, errors, 1.0)
    correlations = covariance / (scales * np.swapaxes(scales, -1, -2))
    return np.asarray(errors * np.linalg.cholesky(correlations + 1e-6 * np.eye(covariance.shape[-1])))


@lru_cache(maxsize=256)
def _chi_factors(dof: float) -> np.ndarray:
    return np.asarray(np.sqrt(dof / chdtri(dof, 1 - _SHARES)))


_BLOCK = 32
"""Fits whose numbers fill as many blocks of this size share their points."""


@lru_cache(maxsize=4)
def _even_points(blocks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ascending shares, (N_DRAWS,), the ranks of further shares, (N_DRAWS,), and normal numbers, (N_DRAWS,
    _BLOCK * blocks). The quantiles of all of them together fill the unit cube evenly."""
    from scipy.stats.qmc import Sobol  # takes half a second to import

    # Half of a step keeps the points, which are whole steps, off 0.
    points = Sobol(_BLOCK * blocks + 2, seed=np.random.default_rng(0)).random(N_DRAWS) + 2.0**-31
    points = points[np.argsort(points[:, 0], kind="stable")]
    order = np.argsort(points[:, 1], kind="stable")
    return points[order, 1], order, np.asarray(ndtri(points[order, 2:]))


def shuffled(draws: np.ndarray, name: str) -> np.ndarray:
    """Return draws in the order of a name, (N_DRAWS, ...); the orders of different names are independent."""
    random = generator(name)
    # To turn one of 64 random orders by a random number of places is faster than to make another one.
    order, start = _order(int(random.integers(64))), int(random.integers(N_DRAWS))
    # `take` is several times as fast as indexing.
    return np.concatenate([np.take(draws, order[start:], axis=0), np.take(draws, order[:start], axis=0)])


@lru_cache(maxsize=64)
def _order(number: int) -> np.ndarray:
    return generator(f"order {number}").permutation(N_DRAWS)


def generator(name: str) -> np.random.Generator:
    """Return the random generator of a name, so that no number depends on what else is in a table."""
    return np.random.default_rng(zlib.crc32(name.encode()))


@dataclass(frozen=True)
class ExampleLosses:
    """The losses of runs by test example, from the table `test_losses`.

    Test examples that share their source, such as a package or a document, err together. The error of a mean loss is
    therefore found by leaving out one group of examples at a time (the jackknife by clusters), with a t distribution
    with one degree of freedom less than there are groups, as MacKinnon, Nielsen and Webb recommend for few groups
    ("Cluster-robust inference: A guide to empirical practice", 2023).
    """

    nats: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    """By run_id, the summed loss of each example, (examples,)."""
    tokens: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    """By run_id, the scored tokens of each example, (examples,)."""
    groups: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    """By run_id, the number of each example's group, (examples,); where a run is missing, each example is its own."""
    test_data: Mapping[str, str] = field(default_factory=dict, repr=False)
    """By run_id, what identifies its test split; where a run is missing, all runs have one test split."""

    @classmethod
    def of(cls, table: pd.DataFrame) -> ExampleLosses:
        """Read the table `test_losses`, which `check_test_losses` checks; an example without a group is its own."""
        if table.empty:
            return cls()
        check_test_losses(table)
        groups = pd.factorize(table["group"])[0] if "group" in table else np.full(len(table), -1)
        groups = np.where(groups < 0, -1 - table["example"].to_numpy(int), groups)
        # A groupby of as many short groups is slow.
        place, run_ids = pd.factorize(table["run_id"])
        order, ends = np.lexsort((table["example"].to_numpy(float), place)), np.cumsum(np.bincount(place))[:-1]
        columns = table["loss"].to_numpy(float), table["tokens"].to_numpy(float), groups
        parts = (np.split(values[order], ends) for values in columns)
        nats, tokens, by_group = (dict(zip(map(str, run_ids), of_runs, strict=True)) for of_runs in parts)
        first = table.drop_duplicates("run_id").reindex(columns=["run_id", "test_data"]).dropna()
        return cls(nats, tokens, by_group, dict(zip(first["run_id"].map(str), first["test_data"], strict=True)))

    def splits(self, run_ids: Sequence[str]) -> dict[str, list[str]]:
        """Return the runs on each test split, by what identifies it; one split if that of a run is not known."""
        if not all(run_id in self.test_data for run_id in run_ids):
            return {"": list(run_ids)}
        names = sorted({self.test_data[run_id] for run_id in run_ids})
        return {name: [run_id for run_id in run_ids if self.test_data[run_id] == name] for name in names}

    def n_examples(self, run_ids: Sequence[str]) -> int:
        """Return the number of test examples of runs, in all splits."""
        return sum(len(self.tokens[own[0]]) for own in self.splits(run_ids).values())

    def influences(self, run_ids: Sequence[str]) -> np.ndarray | None:
        """Return what groups of test examples do to the mean losses of runs, (runs, groups).

        The product with their transpose is the covariance of the mean losses over other groups. The groups of a test
        split move only the runs on it, so that their error is averaged over splits, and that of a split that all runs
        share is not. They are NaN where a split has one group only. None if a run lacks its losses, or runs on one
        split have different examples.
        """
        if not len(run_ids) or any(run_id not in self.nats for run_id in run_ids):
            return None
        blocks = []
        for own in self.splits(run_ids).values():
            if (falls := self._on_one_split(own)) is None:
                return None
            block = np.zeros((len(run_ids), falls.shape[1]))
            block[np.isin(run_ids, own)] = falls
            blocks.append(block)
        return np.hstack(blocks)

    def _on_one_split(self, run_ids: Sequence[str]) -> np.ndarray | None:
        splits = [
            (self.tokens[run_id], self.groups.get(run_id, np.arange(len(self.tokens[run_id])))) for run_id in run_ids
        ]
        tokens, groups = splits[0]
        if not all(np.array_equal(own, tokens) and np.array_equal(other, groups) for own, other in splits):
            return None
        number = np.unique(groups, return_inverse=True)[1]
        tokens, nats = np.bincount(number, tokens), [np.bincount(number, self.nats[run_id]) for run_id in run_ids]
        n, total = len(tokens), tokens.sum()
        if n < 2:
            return np.full((len(run_ids), n), math.nan)
        means = np.sum(nats, axis=1, keepdims=True) / total
        # A mean loss falls by this much if a group is left out.
        falls: np.ndarray = (nats - means * tokens) / (total - tokens)
        return falls * math.sqrt((n - 1) / n)


def example_draws(influences: np.ndarray, test_split: str, splits: int = 1) -> np.ndarray:
    """Draw the error from test examples of several numbers, (N_DRAWS, numbers), from the influences of groups on them.

    These are (numbers, groups), as from `ExampleLosses.influences` or sums of those; NaN gives NaN. Numbers of one test
    split, or of so many `splits` together, which are named, have their draws in common.
    """
    n, numbers = influences.shape[1], influences.T.astype(np.float32)
    factors = shuffled(_chi_factors(max(n - splits, 1)), f"groups of {test_split}") / _UNIT
    sums = [part.astype(np.float32) @ numbers for part in _multipliers(test_split, n)]
    return np.asarray(factors[:, None] * np.concatenate(sums))


_UNIT = 30
"""The standard deviation of multipliers, which are whole numbers so that they take one byte each."""


@lru_cache(maxsize=16)
def _multipliers(name: str, n: int) -> list[np.ndarray]:
    """Return N_DRAWS normal draws for n groups of test examples, times _UNIT and rounded, in parts, (2**12, n) each."""
    random = generator(f"examples of {name}")
    parts = (random.standard_normal((2**12, n), np.float32) for _ in range(N_DRAWS // 2**12))
    return [np.clip(np.rint(_UNIT * drawn), -127, 127).astype(np.int8) for drawn in parts]


def without_run_noise(
    influences: np.ndarray, design: np.ndarray, hat: np.ndarray, covariance: np.ndarray
) -> np.ndarray:
    """Return the influences of groups of test examples on the coefficients of a fit, without what seeds have already.

    Two runs of one arm differ on single test examples by chance alone, which both the spread between runs, the error
    from seeds, and the influences contain. Only what an example does to all runs of an arm, or to the shape of its loss
    against the LR, is an error of its own. So the influences on the runs, (runs, groups), are fitted like their mean
    losses, and the variance of the residuals is taken from that of the coefficients. `hat`, (coefficients, runs), makes
    coefficients from losses, and the covariance of runs is that over the variance of their noise.
    """
    effects = hat @ influences
    # A coefficient that is held near a value known before the runs takes less than a degree of freedom.
    dof = len(influences) - float(np.trace(hat @ design))
    residual = influences - design @ effects
    squares = float((residual * np.linalg.solve(covariance, residual)).sum())
    if dof < 1 or not squares > 0:
        return np.asarray(effects)
    root = cholesky_root(hat @ covariance @ hat.T * squares / dof)
    # In the units of the noise of runs, the singular values are standard deviations, and that of the noise is 1.
    vectors, deviations, groups = np.linalg.svd(np.linalg.solve(root, effects), full_matrices=False)
    return np.asarray(root @ (vectors * np.sqrt(np.clip(deviations**2 - 1, 0, None))) @ groups)
