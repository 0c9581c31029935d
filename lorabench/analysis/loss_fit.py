"""One fit per comparison: the loss of each arm as a parabola in log LR, with its own optimum and its own minimum.

The model of the final test loss of a run of arm a, seed s and learning rate LR is that of docs/estimates.md,

    loss = m_a + c_a ((ln LR - x_a)^2 + d (ln LR - x_a)^3) + u_s + v_as + e,

where the third power is that of the distance from the optimum of a fit without it. Three LRs of one arm can't tell an
asymmetry from another optimum and curvature, so d is known before the runs to be about 0. The curvatures c_a differ
from their mean by a random effect, whose size is known before the runs, too: few noisy LRs can't tell whether arms have
one curvature, and a test that mostly keeps one biases minima and makes intervals too short. The fit is generalized
least squares. statsmodels' `MixedLM`, which a test holds it to, gives no t intervals and takes a hundred times as long.

A row may also be the mean of n seeds with their standard deviation. It then counts n times, and if there are only such
rows, the seed noise is that of their deviations, pooled.
"""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from scipy.linalg import helmert

from lorabench.analysis import estimate
from lorabench.analysis.arms import arm_label, each_arm, kept, with_losses
from lorabench.analysis.estimate import N_DRAWS, Estimate, ExampleLosses
from lorabench.analysis.fit_rows import ArmGrid, Bend, FitRows, Solution, arm_grid, counted_rows, run_array

SPREAD = 0.7
"""The standard deviation, before the runs, of the curvature of an arm over the mean of all."""

ASYMMETRY = 0.3
"""The standard deviation, before the runs, of the asymmetry of the loss over its curvature, per unit of ln LR."""

LEAST_WEIGHTS = 1e-3, 0.03
"""Floors on the prior weights of (curvature, asymmetry), relative to that of a run, where there is hardly any noise."""

LEAST_SIZE = 0.1
"""The least curvature of an arm over the mean of all by which its asymmetry is scaled."""

BORROWED_DOF = 2
"""The most degrees of freedom of noise that was measured on other data, models or batch sizes.

The logarithm of an estimated standard deviation is then off by 0.64. Between the datasets and batch sizes of `laptop`,
and of `overnight`, that of the noise of seeds differs by 0.8 and 0.5 beyond its own error.
"""

FEW_GROUPS = 10
"""The number of groups of test examples below which a reason names it: the error is then uncertain itself, and the
groups hardly stand for others."""


@dataclass(frozen=True)
class Noise:
    """Seed noise that was measured elsewhere: the standard deviation of the final test loss over seeds, in the unit of
    the loss, its degrees of freedom, and where it was measured, for the reason of a verdict."""

    sigma: float
    dof: int
    source: str

    @classmethod
    def borrowed(cls, sigma: float, dof: float, source: str) -> Noise:
        """Return noise that other runs show, with as many degrees of freedom as it has for the runs in question."""
        return cls(sigma, int(min(dof, BORROWED_DOF)), source)


class ByArm(UserDict[str, Any]):
    """What a fit says of each arm, by arm label: functions, which are called when it is asked for."""

    def __getitem__(self, label: str) -> Any:
        return super().__getitem__(label)()


@dataclass(frozen=True)
class LossFit:
    """The fit of one comparison; mappings are by arm label."""

    grids: Mapping[str, ArmGrid]
    lowest: Mapping[str, tuple[float, float]]
    """The natural logarithm of the optimal LR, and the lowest loss, both without their errors."""
    measured: Mapping[str, tuple[float, float]]
    """The lowest mean loss at an LR, without the effects of seeds that all arms share, and its standard error."""
    sigma: float
    """Standard deviation of a run's loss without the effect of its seed that all arms share, and its degrees of freedom
    below."""
    dof: int
    curvature: Mapping[str, float]
    """In the unit of the loss per squared unit of ln LR."""
    seeds: Mapping[str, frozenset[int]] = field(repr=False)
    """The seeds with a run that counts, and below these runs."""
    run_ids: Mapping[str, tuple[str, ...]] = field(repr=False)
    noise_text: str
    """What a reason says at its end about the errors: where the seed noise was measured, if not by these runs, and from
    how many groups the test examples come, if from fewer than FEW_GROUPS."""
    optima: Mapping[str, Estimate] = field(repr=False)
    """The natural logarithm of the optimal LR, and below the lowest loss."""
    minima: Mapping[str, Estimate] = field(repr=False)
    resolved: Mapping[str, bool] = field(repr=False)
    """Whether the optimum lies between LRs of the grid with a probability of 95% or more."""

    @kept
    def gap(self, label: str, other: str, of: str = "minima") -> Estimate:
        """Return the minimum of one arm minus that of another; the seeds are those that both have."""
        numbers = getattr(self, of)
        if label not in numbers or other not in numbers:
            return estimate.unknown()
        difference = estimate.combined(np.subtract, numbers[label], numbers[other])
        return replace(difference, n_seeds=len(self.seeds[label] & self.seeds[other]))

    def log_ratio(self, label: str, other: str) -> Estimate:
        """Return the natural logarithm of the ratio of the optimal LRs of two arms."""
        return self.gap(label, other, "optima")


def fit_losses(
    runs: pd.DataFrame,
    examples: ExampleLosses | None = None,
    noise: Noise | None = None,
    name: str = "",
    test_split: str = "",
) -> LossFit:
    """Fit the final losses of the arms of one comparison.

    Args:
        runs: runs of one model, dataset, batch size and length: run_id, ARM, lr, seed, status, and the losses (see
            `with_losses`); for rows that are means of several seeds also n_seeds and final_test_nll_sd.
        examples: the losses by test example; without them their error is not known.
        noise: seed noise from elsewhere, for a comparison with one seed.
        name: names the comparison, for the draws of the error from seeds.
        test_split: names the test split, or the splits of all batches. Fits with the same splits draw the same
            examples, whose error cancels in differences.
    """
    arms = {arm_label(arm): run_array(rows) for arm, rows in each_arm(with_losses(runs))}
    grids = {label: grid for label, rows in arms.items() if (grid := arm_grid(rows))}
    nothing = LossFit(grids, {}, {}, math.nan, 0, {}, {}, {}, "", {}, {}, {})
    if (counted := counted_rows(arms, grids)) is None:
        return nothing
    means = counted.runs[(counted.runs["n"] > 1) & np.isfinite(counted.runs["sd"])]
    if len(counted.seeds) > 1:
        noise = None
    elif len(means):
        pooled = math.sqrt(float(((means["n"] - 1) * means["sd"] ** 2).sum() / (means["n"] - 1).sum()))
        noise = Noise(pooled, int((means["n"] - 1).sum()), "the standard deviations in the table")
    if (fitted := _fitted(counted, noise)) is None:
        return nothing
    solution, places_by_arm, bends = fitted
    sigma, dof = math.nan, 0
    if len(counted.seeds) > 1 or noise is not None:
        sigma, dof = math.sqrt(solution.variance * (1 + solution.ratio)), solution.dof
    if noise is None and solution.ratio > 0 and not math.isnan(sigma):
        # The error lies between the cells of arm and seed, of which there are fewer than runs.
        cells = int(counted.cells.max()) + 1
        dof = max(1, min(dof, cells - len(counted.in_arm) - (len(counted.seeds) - 1)))
    # The first draws are the most even, so the coefficients come first on which the most numbers depend: all depend on
    # the asymmetry, an optimum on a curvature and a slope besides, and a minimum on an intercept, too.
    by_kind = [list(dict.fromkeys(kind)) for kind in zip(*places_by_arm.values(), strict=True)]
    order = [place for kind in reversed(by_kind) for place in kind]
    seed_parts = _seed_parts(counted, solution, order, dof, f"seeds of {name}") if dof and sigma > 0 else []
    fitted_ids, influences, n_examples, n_groups = counted.runs["run_id"].tolist(), None, 0, 0
    splits: dict[str, list[str]] = {}
    on_runs = examples.influences(fitted_ids) if examples else None
    if examples and on_runs is not None:
        hat, weighted = solution.hat / counted.weights, counted.weights[:, None] * on_runs
        influences = estimate.without_run_noise(weighted, solution.design, hat, solution.covariance)
        n_examples, n_groups = examples.n_examples(fitted_ids), on_runs.shape[1]
        splits = examples.splits(fitted_ids)
    of_seeds = solution.coefficients.copy()
    of_seeds[[place for own in places_by_arm.values() for place in own]] = 0.0
    # The losses without the effects of their seeds that all arms share.
    losses = counted.runs["test_loss"] - solution.design @ of_seeds / counted.weights
    lowest, measured, curvature, seeds, run_ids = {}, {}, {}, {}, {}
    for label, chosen in counted.in_arm.items():
        places = places_by_arm[label]
        curvature[label] = float(solution.coefficients[places[2]])
        run_ids[label] = tuple(counted.runs["run_id"][chosen].tolist())
        # A row of n seeds stands for its own seed and the next n - 1.
        seeds[label] = frozenset(seed + k for seed, n in counted.runs[chosen][["seed", "n"]].tolist() for k in range(n))
        position, value = map(float, _vertex(solution.coefficients[places], counted.ends[label], bends.get(label)))
        lowest[label] = math.log(grids[label].lrs[grids[label].centre]) + position, value
        at_lrs = chosen & (counted.runs["lr"] == np.unique(counted.runs["lr"][chosen])[:, None])
        by_lr = [float(np.average(losses[at], weights=counted.runs["n"][at])) for at in at_lrs]
        best = int(np.argmin(by_lr))
        measured[label] = by_lr[best], sigma / math.sqrt(counted.runs["n"][at_lrs[best]].sum())

    @cache
    def estimated(label: str) -> tuple[Estimate, Estimate, bool]:
        # Draws of all coefficients at once would take much memory.
        grid, places, ends, bend = grids[label], places_by_arm[label], counted.ends[label], bends.get(label)
        own, drawn = solution.coefficients[places], np.full((N_DRAWS, len(places)), math.nan)
        if seed_parts:
            chosen = [order.index(place) for place in places]
            drawn = np.asarray(sum(estimate.multivariate_student(*part, chosen) for part in seed_parts))
        value = np.array(_vertex(own, ends, bend))
        by_seed = np.array(_vertex(own + drawn, ends, bend)) - value[:, None]
        by_example = np.array([None, None])
        if influences is not None:
            drawn = estimate.example_draws(influences[places], test_split, len(splits))
            by_example = np.array(_vertex(own + drawn, ends, bend)) - value[:, None]
        counts = len(seeds[label]), n_examples, n_groups, all("@" in name for name in splits)
        position, minimum = (Estimate(float(value[part]), by_seed[part], by_example[part], *counts) for part in (0, 1))
        optimum = replace(position, value=lowest[label][0])
        outside = (position.draws <= ends[0] + 1e-9) | (position.draws >= ends[1] - 1e-9)
        bounded = grid.edge is None and grid.coarse is None and curvature[label] > 0
        # 2.5% is what lies on each side of a 95% interval.
        return optimum, minimum, bounded and position.known and float(outside.mean()) <= 0.025

    text = "" if noise is None else f"; seed noise from {noise.source}"
    if 1 < n_groups < min(n_examples, FEW_GROUPS):
        text += f"; the {n_examples} test examples come from {n_groups} groups"
    optima, minima, resolved = (
        ByArm({label: lambda label=label, part=part: estimated(label)[part] for label in lowest}) for part in range(3)
    )
    return LossFit(grids, lowest, measured, sigma, dof, curvature, seeds, run_ids, text, optima, minima, resolved)


def _fitted(rows: FitRows, noise: Noise | None) -> tuple[Solution, dict[str, list[int]], dict[str, Bend]] | None:
    """Fit with one asymmetry and a curvature for each arm, which differs from the mean of all by a random effect.

    Returns:
        The solution; by arm, the places of its intercept, slope, curvature and asymmetry, if any, among the
        coefficients; and, where there is an asymmetry, how it bends each arm. None if the runs determine no fit.
    """
    labels = list(rows.in_arm)
    arms = len(labels)
    first = rows.solve(rows.design([labels]), ratio=1.0)
    if first is None:
        return None
    if noise is not None:
        # Half of the variance is taken to be the arm's own, which no further LR makes smaller.
        first = replace(first, variance=noise.sigma**2 / 2, dof=noise.dof)
    places = {label: [2 * number, 2 * number + 1, 2 * arms] for number, label in enumerate(labels)}
    curvature = float(first.coefficients[2 * arms])
    # Without noise, or where the losses have no minimum, there is one curvature and no asymmetry.
    if not (curvature > 0 and first.dof >= 1 and first.variance > 0):
        return first, places, {}
    bends = {
        label: Bend(float(_vertex(first.coefficients[places[label]], rows.ends[label])[0]), 1.0) for label in labels
    }
    noisy = first
    if noise is None:
        # With curvatures of which nothing is known, they do not count as noise or hide it. An arm with two LRs shares
        # the curvature of another one.
        determined = [label for label, chosen in rows.in_arm.items() if len(np.unique(rows.runs["x"][chosen])) >= 3]
        others = [label for label in labels if label not in determined]
        design = rows.design([determined[:1] + others, *([label] for label in determined[1:])], bends)
        free = rows.solve(design, _known_asymmetry(first, design, curvature))
        noisy = free if free and free.variance > 0 else first
    places = {label: [*places[label][:2], 2 * arms + number] for number, label in enumerate(labels)}
    fitted, used = first, bends
    for _ in range(2):
        design = rows.design([[label] for label in labels], bends)
        # The rows of `helmert` are independent differences of the curvatures, each with the variance of one of them.
        differences = np.zeros((arms - 1, design.shape[1]))
        weight = max(math.sqrt(noisy.variance) / (SPREAD * curvature), LEAST_WEIGHTS[0])
        differences[:, 2 * arms : 3 * arms] = weight * helmert(arms)
        solution = rows.solve(design, np.vstack([differences, _known_asymmetry(noisy, design, curvature)]), noisy.ratio)
        if solution is None:
            return None
        fitted, used = solution, bends
        sizes = {label: float(solution.coefficients[own[2]]) / curvature for label, own in places.items()}
        # The arms differ in curvature, and have one asymmetry in proportion to it.
        bends = {label: Bend(bend.centre, max(sizes[label], LEAST_SIZE)) for label, bend in used.items()}
    for own in places.values():
        own.append(design.shape[1] - 1)
    return replace(fitted, variance=noisy.variance, dof=noisy.dof), places, used


def _known_asymmetry(noisy: Solution, design: np.ndarray, curvature: float) -> np.ndarray:
    """Return what is known of the asymmetry, the last column of a design, as a row for `FitRows.solve`."""
    weight = max(math.sqrt(noisy.variance) / (ASYMMETRY * curvature), LEAST_WEIGHTS[1])
    return weight * np.eye(design.shape[1])[-1:]


def _seed_parts(
    rows: FitRows, solution: Solution, order: list[int], dof: int, name: str
) -> list[tuple[np.ndarray, int, str]]:
    """Return the independent parts of the error from seeds: a covariance of coefficients, its dof and a name for draws.

    No number of an arm depends on the contrasts of seeds, which hold all that seeds do to an arm alone. Its optimum
    then has the error of the noise within seeds, and its minimum also that of the mean of the seeds' effects.
    """
    covariance, seeds = solution.variance * solution.unscaled[np.ix_(order, order)], len(rows.seeds)
    if len(rows.in_arm) > 1 or seeds < 2:
        return [(covariance, dof, name)]
    # The effect of a seed moves the intercept alone, and by its share in the mean, unless rows differ in weight.
    in_seed = rows.cells[:, None] == np.unique(rows.cells)
    weighted, moved = ((hat @ in_seed)[order] for hat in (solution.hat / rows.weights, solution.hat))
    within = covariance - solution.variance * solution.ratio * weighted @ weighted.T
    effects = solution.coefficients[3 : 2 + seeds]
    variance = float(effects @ effects + effects.sum() ** 2) / (seeds - 1)
    return [(within, solution.dof, f"runs, {name}"), (variance * moved @ moved.T, seeds - 1, name)]


def _vertex(
    coefficients: np.ndarray, ends: tuple[float, float], bend: Bend | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return position and value of the lowest point of parabolas or cubics between two ends, (n,) each.

    Coefficients are the intercept, slope and curvature, (n, 3), of cubics also the asymmetry, (n, 4), which `bend`
    applies.
    """
    intercept, slope, curvature = coefficients.T[:3]
    centre, asymmetry = (0.0, 0.0) if bend is None else (bend.centre, bend.size * coefficients.T[3])

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
