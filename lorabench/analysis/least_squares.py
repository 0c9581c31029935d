"""Generalized least squares with two variances: that of a run, and that of an arm and seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_SHARES = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
"""The shares of the variance of an arm and seed in the sum of both that are tried; all are as likely before the runs.
"""


@dataclass(frozen=True)
class Solution:
    """The result of generalized least squares: coefficients, which are linear in the losses, and their covariance."""

    coefficients: np.ndarray
    hat: np.ndarray
    """The matrix that makes the coefficients from the losses, (coefficients, runs)."""
    prior_weights: np.ndarray
    """The weight of the number that is known before the runs in each coefficient, (coefficients, 0 or 1)."""
    design: np.ndarray
    """(runs, coefficients), each row times the square root of its number of seeds."""
    covariance: np.ndarray
    """The runs' covariance over the variance of e, (runs, runs)."""
    unscaled: np.ndarray
    """Covariance over the variance of e, (coefficients, coefficients)."""
    variance: float
    """Variance of e."""
    ratio: float
    """Variance of v over that of e."""
    likelihood: float
    dof: int


@dataclass(frozen=True)
class FitRows:
    """The runs of one fit as arrays, (runs,)."""

    run_id: np.ndarray
    label: np.ndarray
    """The label of each run's arm."""
    seed: np.ndarray
    x: np.ndarray
    """ln LR over the arm's centre."""
    loss: np.ndarray
    n: np.ndarray
    """The number of seeds in a row."""
    sd: np.ndarray
    """Their standard deviation, which is NaN for a single run."""

    @cached_property
    def labels(self) -> list[str]:
        """The arms that are fitted."""
        return list(dict.fromkeys(self.label.tolist()))

    @cached_property
    def in_arm(self) -> dict[str, np.ndarray]:
        """Whether each run is of an arm, by label, (runs,)."""
        return {label: np.asarray(self.label == label, bool) for label in self.labels}

    @cached_property
    def seeds(self) -> list[int]:
        """The seeds, ascending."""
        return sorted(set(self.seed.tolist()))

    @cached_property
    def cells(self) -> np.ndarray:
        """The number of the cell of each run, one for each arm and seed, (runs,)."""
        pairs = list(zip(self.label.tolist(), self.seed.tolist(), strict=True))
        place = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
        return np.array([place[pair] for pair in pairs], int)

    @cached_property
    def same_arm_and_seed(self) -> np.ndarray:
        """1 where two runs are of one arm and seed, 0 elsewhere, (runs, runs)."""
        return np.asarray(self.cells[:, None] == self.cells, float)

    @cached_property
    def weights(self) -> np.ndarray:
        """The square root of the number of seeds in each row, (runs,); weighted rows all have the variance of a run."""
        return np.asarray(np.sqrt(self.n.astype(float)))

    def design(self, curvatures: Sequence[Sequence[str]], optima: Mapping[str, float] | None = None) -> np.ndarray:
        """Return the columns: an intercept and a slope by arm, a curvature by group of arms, contrasts of seeds.

        With optima, as positions by arm, the third power of the distance from them is the last column.
        """
        columns = []
        for in_arm in self.in_arm.values():
            columns += [in_arm.astype(float), in_arm * self.x]
        columns += [np.any([self.in_arm[arm] for arm in group], axis=0) * self.x**2 for group in curvatures]
        # The effects of seeds sum to 0, so that intercepts are means over seeds.
        last = (self.seed == self.seeds[-1]).astype(float)
        columns += [(self.seed == seed).astype(float) - last for seed in self.seeds[:-1]]
        if optima is not None:
            columns.append((self.x - np.array([optima[arm] for arm in self.label.tolist()])) ** 3)
        return np.column_stack(columns)

    def solve(self, design: np.ndarray, prior: float = 0.0, ratio: float | None = None) -> Solution | None:
        """Solve for a ratio of variances, by default its mean by their restricted likelihood.

        Where further seeds have one LR only, the runs say little about the ratio, and the one with the largest
        likelihood is often 0, which takes all LRs of a seed for independent runs and the errors for too small.

        Args:
            design: as from `design`.
            prior: if above 0, how well it is known before the runs that the last coefficient is about 0: the standard
                deviation of e over that of the coefficient.
            ratio: the variance of v over that of e.

        Returns:
            The solution; None if the runs, with what is known before them, do not determine all coefficients.
        """
        weighted, _ = self._with_prior(design, prior)
        n, p = weighted.shape
        if n < p or np.linalg.matrix_rank(weighted) < p:
            return None
        if ratio is not None:
            return self._solution(design, ratio, prior)
        solutions = [self._solution(design, share / (1 - share), prior) for share in _SHARES.tolist()]
        likelihoods = np.array([solution.likelihood for solution in solutions])
        if not np.isfinite(likelihoods).all():
            return solutions[0]
        likelihood = np.exp(likelihoods - likelihoods.max())
        share = float(likelihood @ _SHARES / likelihood.sum())
        return self._solution(design, share / (1 - share), prior)

    def _with_prior(self, design: np.ndarray, prior: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the weighted design and losses; what is known before the runs counts as one more run."""
        design, y = self.weights[:, None] * design, self.weights * self.loss
        if not prior > 0:
            return design, y
        return np.vstack([design, prior * np.eye(design.shape[1])[-1]]), np.append(y, 0.0)

    def _solution(self, design: np.ndarray, ratio: float, prior: float) -> Solution:
        design, y = self._with_prior(design, prior)
        n, p = design.shape
        runs = len(self.loss)
        covariance = np.eye(n)
        covariance[:runs, :runs] += ratio * self.same_arm_and_seed
        inverse = np.linalg.inv(covariance)
        information = design.T @ inverse @ design
        unscaled = np.linalg.inv(information)
        hat = unscaled @ design.T @ inverse
        coefficients = hat @ y
        residual = y - design @ coefficients
        squares = float(residual @ inverse @ residual)
        variance = squares / (n - p) if n > p else 0.0
        likelihood = -math.inf
        if squares > 0 and n > p:
            determinants = np.linalg.slogdet(covariance)[1] + np.linalg.slogdet(information)[1]
            likelihood = -0.5 * ((n - p) * math.log(variance) + determinants)
        return Solution(
            coefficients,
            hat[:, :runs] * self.weights,
            hat[:, runs:],
            design[:runs],
            covariance[:runs, :runs],
            unscaled,
            variance,
            ratio,
            likelihood,
            n - p,
        )
