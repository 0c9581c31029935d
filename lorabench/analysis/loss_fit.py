"""One fit per comparison: the loss of each arm as a parabola in log LR, with its own optimum and its own minimum.

The model of the final test loss of a run of arm a, seed s and learning rate LR is

    loss = m_a + c (ln LR - x_a)^2 + d (ln LR - x_a)^3 + u_s + v_as + e,

where m_a is the minimum of the arm, x_a the log of its optimal LR, c the curvature and d the asymmetry: losses rise
faster towards high LRs. Three LRs of one arm can't tell an asymmetry from another optimum and curvature, but several
arms whose optima lie differently between their LRs can. d is therefore shared by all arms, and known before the runs to
be about 0, with a standard deviation of ASYMMETRY times c. Its third power is that of the distance from the optimum of
a fit without it.

The effect u_s of a seed, which all arms share because a seed fixes the order of the data, is a fixed effect, so that
arms are compared within seeds. What a seed does to one arm alone, v_as, and the rest e are random. The curvature is
shared by all arms unless the data refute this (F test at the level CURVATURE_LEVEL); each arm then has its own.

The fit is generalized least squares. The ratio of the two variances is the mean over a grid by restricted likelihood
(REML), whose maximum statsmodels' `MixedLM` finds by descent; a test holds the two together. Its own code is needed
because `MixedLM` gives no t intervals, which matter with three seeds, and takes a hundred times as long.

Only the LRs around the lowest loss of an arm count, up to a factor of MAX_STEP from it, since a loss is a parabola near
its minimum only. The error of a minimum carries the choice of the LR, since the optimum is part of the fit; the seeds;
and the examples of the test split, which are resampled (`example_losses`).

A row may also be the mean of n seeds with their standard deviation. It then counts n times, and if there are only such
rows, the seed noise is that of their deviations, pooled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.special import fdtrc

from lorabench.analysis.arm_grid import ArmGrid, ArmRuns, arm_grid, counted_rows
from lorabench.analysis.arms import arm_label, arm_places, with_arm_columns
from lorabench.analysis.counted_twice import without_run_noise
from lorabench.analysis.estimate import N_DRAWS, Estimate, combined, multivariate_student, unknown
from lorabench.analysis.example_losses import ExampleLosses
from lorabench.analysis.least_squares import FitRows, Solution
from lorabench.analysis.losses import with_losses

CURVATURE_LEVEL = 0.01
"""The level at which one curvature for all arms is refuted."""

ASYMMETRY = 0.3
"""The standard deviation, before the runs, of the asymmetry of the loss over its curvature, per unit of ln LR."""

_LEAST_PRIOR = 0.03
"""The least weight of what is known of the asymmetry before the runs, for runs with hardly any noise."""

_TAIL = 0.025  # on each side of a 95% interval


@dataclass(frozen=True)
class Noise:
    """Seed noise that was measured elsewhere."""

    sigma: float
    """Standard deviation of the final test loss over seeds, in the unit of the loss."""
    dof: int
    """Its degrees of freedom."""
    source: str
    """Where it was measured, for the reason of a verdict."""


@dataclass(frozen=True)
class LossFit:
    """The fit of one comparison."""

    grids: Mapping[str, ArmGrid]
    """The LRs of each arm, by arm label."""
    minima: Mapping[str, Estimate] = field(repr=False)
    """The lowest loss of each arm, in the unit of the loss."""
    optima: Mapping[str, Estimate] = field(repr=False)
    """The natural logarithm of the optimal LR of each arm."""
    resolved: Mapping[str, bool]
    """Whether the optimum of each arm lies between LRs of its grid with a probability of 95% or more."""
    sigma: float
    """Standard deviation of a run's loss without the effect of its seed that all arms share."""
    dof: int
    """Degrees of freedom of sigma."""
    shared_curvature: bool
    curvature: Mapping[str, float]
    """The curvature of each arm, in the unit of the loss per squared unit of ln LR."""
    n_seeds: Mapping[str, int]
    """The number of seeds of each arm with a run that counts."""
    seeds: Mapping[str, frozenset[int]] = field(repr=False)
    run_ids: Mapping[str, tuple[str, ...]] = field(repr=False)
    """The runs of each arm that count."""
    noise_source: str = ""
    """Where the seed noise was measured, if not by these runs."""

    _differences: dict[tuple[str, str, str], Estimate] = field(default_factory=dict, repr=False, compare=False)
    """The gaps and log ratios that were asked for, as several claims ask for the same."""

    def gap(self, label: str, other: str) -> Estimate:
        """Return the minimum of one arm minus that of another; the seeds are those that both have."""
        return self._difference("gap", self.minima, label, other)

    def log_ratio(self, label: str, other: str) -> Estimate:
        """Return the natural logarithm of the ratio of the optimal LRs of two arms."""
        return self._difference("log ratio", self.optima, label, other)

    def _difference(self, name: str, numbers: Mapping[str, Estimate], label: str, other: str) -> Estimate:
        if label not in numbers or other not in numbers:
            return unknown()
        key = (name, label, other)
        if key not in self._differences:
            difference = combined(np.subtract, numbers[label], numbers[other])
            self._differences[key] = replace(difference, n_seeds=len(self.seeds[label] & self.seeds[other]))
        return self._differences[key]


def fit_losses(
    runs: pd.DataFrame,
    examples: ExampleLosses | None = None,
    noise: Noise | None = None,
    name: str = "",
    test_split: str = "",
) -> LossFit:
    """Fit the final losses of the arms of one comparison.

    Args:
        runs: runs of one model, dataset, batch size and length: columns run_id, ARM, lr, seed, status, and the losses
            (see `with_losses`); for rows that are means of several seeds also n_seeds and final_test_nll_sd.
        examples: the losses by test example; without them their error is not known.
        noise: seed noise from elsewhere, for a comparison with one seed.
        name: names the comparison, for the draws of the error from seeds.
        test_split: names the test split, for the draws of the error from examples. Fits with one test split draw the
            same examples, so that their difference keeps what the examples do to both.
    """
    runs = with_arm_columns(with_losses(runs))
    every_run = ArmRuns.of(runs)
    arms = [(arm_label(arm), every_run.at(places)) for arm, places in arm_places(runs)]
    grids = {label: grid for label, of_arm in arms if (grid := arm_grid(label, of_arm))}
    return _Fit(counted_rows(arms, grids), grids, examples or ExampleLosses(), noise, name, test_split).fit()


@dataclass(frozen=True)
class _Fit:
    """The runs of one fit, and what is known beside them."""

    of: FitRows
    grids: Mapping[str, ArmGrid]
    examples: ExampleLosses
    noise: Noise | None
    name: str
    test_split: str

    @cached_property
    def noise_of_rows(self) -> Noise | None:
        """The pooled seed noise of rows that are means of several seeds; None if there are none with a deviation."""
        several = (self.of.n > 1) & np.isfinite(self.of.sd)
        if not several.any():
            return None
        dof = self.of.n[several] - 1
        pooled = math.sqrt(float((dof * self.of.sd[several] ** 2).sum() / dof.sum()))
        return Noise(pooled, int(dof.sum()), "the standard deviations in the table")

    def fit(self) -> LossFit:
        """Fit with one curvature, and with one for each arm if the data refute that."""
        shared = [self.of.labels]
        first = self.of.solve_at(self.of.design(shared), 1.0) if self.of.labels else None
        if first is None:
            return self._nothing()
        groups: list[list[str]] = shared
        optima, prior = self._asymmetry(first)
        solution = self.of.solve(self.of.design(shared, optima), prior) or first
        if 1 < len(self.of.labels) == len(self.of.own_curvature_possible):
            own = [[label] for label in self.of.labels]
            alone = self.of.solve_at(self.of.design(own, optima), solution.ratio, prior)
            one = self.of.solve_at(self.of.design(shared, optima), solution.ratio, prior)
            if alone and one and alone.dof >= 1 and alone.variance > 0:
                more = one.dof - alone.dof
                f = (one.variance * one.dof - alone.variance * alone.dof) / more / alone.variance
                if fdtrc(more, alone.dof, f) < CURVATURE_LEVEL:
                    solution, groups = alone, own
        return self._summary(solution, groups, optima)

    def _asymmetry(self, solution: Solution) -> tuple[dict[str, float] | None, float]:
        """Return the positions of the optima of a fit of parabolas, and how well the asymmetry around them is known.

        The latter is the standard deviation of e over that of the asymmetry before the runs. Without noise, or where
        the losses have no minimum, it is 0 and there are no positions.
        """
        curvature = float(solution.coefficients[2 * len(self.of.labels)])
        if not (curvature > 0 and solution.dof >= 1 and solution.variance > 0):
            return None, 0.0
        optima = {}
        for number, label in enumerate(self.of.labels):
            x = self.of.x[self.of.of_arm[label]]
            places = [2 * number, 2 * number + 1, 2 * len(self.of.labels)]
            position, _ = _vertex(solution.coefficients[places][None], (float(x.min()), float(x.max())))
            optima[label] = float(position[0])
        return optima, max(math.sqrt(solution.variance) / (ASYMMETRY * curvature), _LEAST_PRIOR)

    def _nothing(self) -> LossFit:
        return LossFit(self.grids, {}, {}, {}, math.nan, 0, True, {}, {}, {}, {})

    def _errors(self, solution: Solution) -> tuple[np.ndarray, int, float]:
        """Return draws of the coefficients' error from seeds, (N_DRAWS, coefficients), degrees of freedom and sigma."""
        seeds = len(self.of.seeds)
        sigma = math.sqrt(solution.variance * (1 + solution.ratio))
        dof = solution.dof
        if solution.ratio > 0 and seeds > 1:
            # The error lies between the cells of arm and seed, of which there are fewer than runs.
            dof = max(1, min(dof, len(set(self.of.cells.tolist())) - len(self.of.labels) - (seeds - 1)))
        covariance = solution.variance * solution.unscaled
        if seeds < 2:
            noise = self.noise_of_rows or self.noise
            if noise is None:
                return np.full((N_DRAWS, len(solution.coefficients)), math.nan), 0, math.nan
            # Half of the variance is taken to be the arm's own, which no further LR makes smaller.
            sigma, dof = noise.sigma, noise.dof
            of_runs = sigma**2 * (np.eye(len(self.of.x)) + self.of.same_arm_and_seed) / 2
            of_runs /= np.outer(self.of.weights, self.of.weights)
            covariance = solution.hat @ of_runs @ solution.hat.T
            covariance += solution.variance * solution.of_prior @ solution.of_prior.T
        if dof < 1 or not sigma > 0:
            return np.full((N_DRAWS, len(solution.coefficients)), math.nan), dof, sigma
        order = self._by_importance(len(covariance))
        draws = np.empty((N_DRAWS, len(order)))
        draws[:, order] = multivariate_student(covariance[np.ix_(order, order)], dof, f"seeds of {self.name}")
        return draws, dof, sigma

    def _by_importance(self, n: int) -> list[int]:
        """Return the order of n coefficients that has those first on which the most numbers depend.

        The first draws are the most even. All numbers depend on the curvatures and the asymmetry; an optimum depends on
        a slope besides, a minimum on an intercept, too, and none on the contrasts of seeds.
        """
        arms = len(self.of.labels)
        intercepts, slopes, rest = range(0, 2 * arms, 2), range(1, 2 * arms, 2), range(2 * arms, n)
        return [n - 1, *rest[:-1], *slopes, *intercepts]

    def _from_examples(self, draws: np.ndarray, solution: Solution) -> np.ndarray:
        """Return draws of the coefficients' error from test examples, (N_DRAWS, coefficients).

        Args:
            draws: the same with what single examples do to single runs.
            solution: the coefficients.
        """
        weights = self.of.weights
        influences = weights[:, None] * self.examples.influences(self.of.run_id.tolist())
        return without_run_noise(draws, influences, solution.design, solution.hat / weights, solution.covariance)

    def _summary(
        self, solution: Solution, groups: Sequence[Sequence[str]], centres: Mapping[str, float] | None
    ) -> LossFit:
        of_seeds, dof, sigma = self._errors(solution)
        sampled = self.examples.deviations(self.of.run_id.tolist(), self.test_split, solution.hat.T)
        of_examples = None if sampled is None else self._from_examples(sampled[0], solution)
        n_examples = 0 if sampled is None else sampled[1]
        n_arms = len(self.of.labels)
        curvature_of = {label: 2 * n_arms + number for number, group in enumerate(groups) for label in group}
        minima, optima, resolved, curvature, n_seeds, seeds, run_ids = {}, {}, {}, {}, {}, {}, {}
        for number, label in enumerate(self.of.labels):
            of_arm = self.of.of_arm[label]
            rows_of_seeds = zip(self.of.seed[of_arm].tolist(), self.of.n[of_arm].tolist(), strict=True)
            # A row of n seeds stands for n seeds from its own one on.
            seeds[label] = frozenset(seed + k for seed, n in rows_of_seeds for k in range(n))
            n_seeds[label], run_ids[label] = len(seeds[label]), tuple(self.of.run_id[of_arm].tolist())
            places = [2 * number, 2 * number + 1, curvature_of[label]]
            ends = (float(self.of.x[of_arm].min()), float(self.of.x[of_arm].max()))
            around = None
            if centres is not None:
                places, around = [*places, len(solution.coefficients) - 1], centres[label]
            value = _vertex(solution.coefficients[places][None], ends, around)
            by_seed = _vertex(solution.coefficients[places] + of_seeds[:, places], ends, around)
            by_example = None
            if of_examples is not None:
                by_example = _vertex(solution.coefficients[places] + of_examples[:, places], ends, around)
            position, lowest = (float(part[0]) for part in value)
            centre = math.log(self.grids[label].lrs[self.grids[label].centre])
            optima[label] = Estimate(
                centre + position,
                by_seed[0] - position,
                None if by_example is None else by_example[0] - position,
                n_seeds[label],
                n_examples,
            )
            minima[label] = Estimate(
                lowest,
                by_seed[1] - lowest,
                None if by_example is None else by_example[1] - lowest,
                n_seeds[label],
                n_examples,
            )
            curvature[label] = float(solution.coefficients[curvature_of[label]])
            draws = optima[label].draws - centre
            outside = (draws <= ends[0] + 1e-9) | (draws >= ends[1] - 1e-9)
            grid = self.grids[label]
            resolved[label] = (
                grid.edge is None
                and grid.coarse is None
                and curvature[label] > 0
                and bool(np.isfinite(draws).all())
                and float(outside.mean()) <= _TAIL
            )
        return LossFit(
            self.grids,
            minima,
            optima,
            resolved,
            sigma,
            dof,
            len(groups) == 1,
            curvature,
            n_seeds,
            seeds,
            run_ids,
            self._noise_source(),
        )

    def _noise_source(self) -> str:
        noise = self.noise_of_rows or self.noise
        return noise.source if noise is not None and len(self.of.seeds) < 2 else ""


def _vertex(
    coefficients: np.ndarray, ends: tuple[float, float], around: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return position and value of the lowest point of parabolas or cubics between two ends, (n,) each.

    Args:
        coefficients: intercept, slope and curvature of each parabola, (n, 3); for cubics also the asymmetry, (n, 4).
        ends: the range of positions.
        around: the position from which a cubic's third power is measured.
    """
    intercept, slope, curvature = coefficients.T[:3]
    centre, asymmetry = (0.0, np.zeros(len(slope))) if around is None else (around, coefficients.T[3])

    def height(position: np.ndarray | float) -> np.ndarray:
        u = position - centre
        return np.asarray(intercept + position * (slope + curvature * position) + asymmetry * (u * u * u))

    # With u = position - centre, the slope of the curve is at_centre + 2 curvature u + 3 asymmetry u^2.
    at_centre = slope + 2 * curvature * centre
    discriminant = curvature**2 - 3 * asymmetry * at_centre
    convex = (curvature > 0) & (discriminant > 0)
    root = np.sqrt(np.where(convex, discriminant, 1.0))
    inner = np.clip(centre - at_centre / np.where(convex, curvature + root, 1.0), *ends)
    if convex.all():
        return inner, height(inner)
    lower_end = np.where(height(ends[0]) <= height(ends[1]), *ends)
    # Coefficients that are not known have no lowest point.
    position = np.where(np.isnan(curvature), math.nan, np.where(convex, inner, lower_end))
    return position, height(position)
