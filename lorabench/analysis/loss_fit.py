"""One fit per comparison: the loss of each arm as a parabola in log LR, with its own optimum and its own minimum.

The model of the final test loss of a run of arm a, seed s and learning rate LR is that of docs/verdicts.md,

    loss = m_a + c (ln LR - x_a)^2 + d (ln LR - x_a)^3 + u_s + v_as + e,

where the third power is that of the distance from the optimum of a fit without it, and d is known before the runs to be
about 0, since three LRs of one arm can't tell an asymmetry from another optimum and curvature. The fit is generalized
least squares. statsmodels' `MixedLM` finds the most likely ratio of the variances of v and e by descent; a test holds
the two together. It gives no t intervals, which matter with three seeds, and takes a hundred times as long.

A row may also be the mean of n seeds with their standard deviation. It then counts n times, and if there are only such
rows, the seed noise is that of their deviations, pooled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.special import fdtrc

from lorabench.analysis.arms import arm_label, arm_places, with_arm_columns, with_losses
from lorabench.analysis.estimate import (
    N_DRAWS,
    Estimate,
    ExampleLosses,
    combined,
    example_draws,
    multivariate_student,
    unknown,
    without_run_noise,
)
from lorabench.analysis.fit_rows import ArmGrid, FitRows, Solution, arm_grid, counted_rows, run_array

CURVATURE_LEVEL = 0.01
"""The level at which one curvature for all arms is refuted."""

ASYMMETRY = 0.3
"""The standard deviation, before the runs, of the asymmetry of the loss over its curvature, per unit of ln LR."""


FEW_GROUPS = 10
"""The number of groups of test examples below which a reason names it: the error is then uncertain itself, and the
groups hardly stand for others."""


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
    curvature: Mapping[str, float]
    """The curvature of each arm, in the unit of the loss per squared unit of ln LR."""
    seeds: Mapping[str, frozenset[int]] = field(repr=False)
    """The seeds of each arm with a run that counts."""
    run_ids: Mapping[str, tuple[str, ...]] = field(repr=False)
    """The runs of each arm that count."""
    noise_text: str
    """What a reason says at its end about the errors: where the seed noise was measured, if not by these runs, and from
    how many groups the test examples come, if from fewer than FEW_GROUPS."""

    def gap(self, label: str, other: str) -> Estimate:
        """Return the minimum of one arm minus that of another; the seeds are those that both have."""
        return self._difference("gap", self.minima, label, other)

    def log_ratio(self, label: str, other: str) -> Estimate:
        """Return the natural logarithm of the ratio of the optimal LRs of two arms."""
        return self._difference("log ratio", self.optima, label, other)

    @cached_property
    def _differences(self) -> dict[tuple[str, str, str], Estimate]:
        # Several claims ask for the same gaps and log ratios.
        return {}

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
            same examples, so that their difference keeps what they have in common.
    """
    runs = with_arm_columns(with_losses(runs))
    every_run = run_array(runs)
    arms = {arm_label(arm): every_run[places] for arm, places in arm_places(runs)}
    grids = {label: grid for label, rows in arms.items() if (grid := arm_grid(rows))}
    counted = counted_rows(arms, grids)
    fitted = None if counted is None else _fitted(counted)
    if counted is None or fitted is None:
        return LossFit(grids, {}, {}, {}, math.nan, 0, {}, {}, {}, "")
    solution, places_by_arm, around = fitted
    noise = (_noise_of_rows(counted) or noise) if len(counted.seeds) < 2 else None
    seed_draws, dof, sigma = _seed_errors(counted, solution, noise, name)
    by_examples, *n_test = _example_errors(counted, solution, examples or ExampleLosses(), test_split)
    minima, optima, resolved, curvature, seeds, run_ids = {}, {}, {}, {}, {}, {}
    for label, chosen in counted.in_arm.items():
        grid, places, (low, high) = grids[label], places_by_arm[label], counted.ends[label]
        curvature[label] = float(solution.coefficients[places[2]])
        run_ids[label] = tuple(counted.runs["run_id"][chosen].tolist())
        # A row of n seeds stands for its own seed and the next n - 1.
        seeds[label] = frozenset(seed + k for seed, n in counted.runs[chosen][["seed", "n"]].tolist() for k in range(n))
        errors = [np.zeros((1, 1)), seed_draws, *([] if by_examples is None else [by_examples])]
        value, by_seed, *by_example = (
            _vertex((solution.coefficients + error)[:, places], (low, high), around.get(label)) for error in errors
        )
        position, minima[label] = (
            Estimate(
                float(value[part][0]),
                by_seed[part] - value[part],
                by_example[0][part] - value[part] if by_example else None,
                len(seeds[label]),
                *n_test,
            )
            for part in (0, 1)
        )
        optima[label] = replace(position, value=math.log(grid.lrs[grid.centre]) + position.value)
        outside = (position.draws <= low + 1e-9) | (position.draws >= high - 1e-9)
        bounded = grid.edge is None and grid.coarse is None and curvature[label] > 0
        # 2.5% is what lies on each side of a 95% interval.
        resolved[label] = bounded and position.known and float(outside.mean()) <= 0.025
    text = "" if noise is None else f"; seed noise from {noise.source}"
    if 1 < n_test[1] < min(n_test[0], FEW_GROUPS):
        text += f"; the {n_test[0]} test examples come from {n_test[1]} groups"
    return LossFit(grids, minima, optima, resolved, sigma, dof, curvature, seeds, run_ids, text)


def _fitted(rows: FitRows) -> tuple[Solution, dict[str, list[int]], dict[str, float]] | None:
    """Fit with one curvature, and with one for each arm if the data refute that.

    Returns:
        The solution; by arm, the places of its intercept, slope, curvature and asymmetry among the coefficients; and,
        where there is an asymmetry, the position from which each arm's third power is measured. None if the runs
        determine no fit.
    """
    labels = list(rows.in_arm)
    first = rows.solve(rows.design([labels]), ratio=1.0)
    if first is None:
        return None
    places = {label: [2 * number, 2 * number + 1, 2 * len(labels)] for number, label in enumerate(labels)}
    curvature, centres, prior = float(first.coefficients[2 * len(labels)]), {}, 0.0
    # Without noise, or where the losses have no minimum, no asymmetry is fitted.
    if curvature > 0 and first.dof >= 1 and first.variance > 0:
        for label in labels:
            centres[label] = float(_vertex(first.coefficients[places[label]][None], rows.ends[label])[0][0])
        # The standard deviation of e over that of the asymmetry before the runs, which has some weight in any case.
        prior = max(math.sqrt(first.variance) / (ASYMMETRY * curvature), 0.03)
    solution = rows.solve(rows.design([labels], centres), prior) or first
    if len(labels) > 1 and all(len(set(rows.runs["x"][chosen].tolist())) >= 3 for chosen in rows.in_arm.values()):
        alone = rows.solve(rows.design([[label] for label in labels], centres), prior, solution.ratio)
        together = rows.solve(rows.design([labels], centres), prior, solution.ratio)
        if alone and together and alone.dof >= 1 and alone.variance > 0:
            more = together.dof - alone.dof
            f = (together.variance * together.dof - alone.variance * alone.dof) / more / alone.variance
            if fdtrc(more, alone.dof, f) < CURVATURE_LEVEL:
                solution = alone
                for number, label in enumerate(labels):
                    places[label][2] += number
    if centres:
        for own in places.values():
            own.append(len(solution.coefficients) - 1)
    return solution, places, centres


def _noise_of_rows(rows: FitRows) -> Noise | None:
    """Return the pooled seed noise of rows that are means of several seeds, if any."""
    several = rows.runs[(rows.runs["n"] > 1) & np.isfinite(rows.runs["sd"])]
    dof = several["n"] - 1
    if not len(several):
        return None
    pooled = math.sqrt(float((dof * several["sd"] ** 2).sum() / dof.sum()))
    return Noise(pooled, int(dof.sum()), "the standard deviations in the table")


def _seed_errors(rows: FitRows, solution: Solution, noise: Noise | None, name: str) -> tuple[np.ndarray, int, float]:
    """Return draws of the coefficients' error from seeds, (N_DRAWS, coefficients), degrees of freedom and sigma."""
    seeds, arms, n = len(rows.seeds), len(rows.in_arm), len(solution.coefficients)
    sigma, dof = math.sqrt(solution.variance * (1 + solution.ratio)), solution.dof
    covariance = solution.variance * solution.unscaled
    if seeds < 2 and noise is None:
        return np.full((N_DRAWS, n), math.nan), 0, math.nan
    if noise is not None:
        # Half of the variance is taken to be the arm's own, which no further LR makes smaller.
        sigma, dof = noise.sigma, noise.dof
        run_covariance = sigma**2 * (np.eye(len(rows.runs)) + rows.same_arm_and_seed) / 2
        run_covariance /= np.outer(rows.weights, rows.weights)
        covariance = solution.hat @ run_covariance @ solution.hat.T
        covariance += solution.variance * solution.prior_weights @ solution.prior_weights.T
    elif solution.ratio > 0:
        # The error lies between the cells of arm and seed, of which there are fewer than runs.
        dof = max(1, min(dof, len(set(rows.cells.tolist())) - arms - (seeds - 1)))
    if dof < 1 or not sigma > 0:
        return np.full((N_DRAWS, n), math.nan), dof, sigma
    # The first draws are the most even, so the coefficients come first on which the most numbers depend: all depend on
    # the curvatures and the asymmetry, an optimum on a slope besides, a minimum on an intercept, too, and none on the
    # contrasts of seeds.
    intercepts, slopes, rest = range(0, 2 * arms, 2), range(1, 2 * arms, 2), range(2 * arms, n)
    order = [n - 1, *rest[:-1], *slopes, *intercepts]
    draws = np.empty((N_DRAWS, n))
    draws[:, order] = multivariate_student(covariance[np.ix_(order, order)], dof, f"seeds of {name}")
    return draws, dof, sigma


def _example_errors(
    rows: FitRows, solution: Solution, examples: ExampleLosses, test_split: str
) -> tuple[np.ndarray | None, int, int]:
    """Return draws of the coefficients' error from test examples, (N_DRAWS, coefficients), and the numbers of examples
    and of their groups."""
    run_ids = rows.runs["run_id"].tolist()
    on_runs = examples.influences(run_ids)
    if on_runs is None:
        return None, 0, 0
    weighted, hat = rows.weights[:, None] * on_runs, solution.hat / rows.weights
    influences = without_run_noise(weighted, solution.design, hat, solution.covariance)
    return example_draws(influences, test_split), len(examples.tokens[run_ids[0]]), on_runs.shape[1]


def _vertex(
    coefficients: np.ndarray, ends: tuple[float, float], around: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return position and value of the lowest point of parabolas or cubics between two ends, (n,) each.

    Coefficients are the intercept, slope and curvature of each parabola, (n, 3), and for cubics also the asymmetry,
    (n, 4), of the third power of the distance from the position `around`.
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
