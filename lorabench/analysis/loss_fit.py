"""One fit per comparison: the loss of each arm as a curve in log LR, with its own optimum and its own minimum.

`mixed_fit` has the model of the losses and of their noise. Here its coefficients become what claims ask for: the
lowest points of the curves with the errors from seeds and from test examples.

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

from lorabench.analysis import estimate
from lorabench.analysis.arms import arm_label, each_arm, kept, with_losses
from lorabench.analysis.estimate import N_DRAWS, Estimate, ExampleLosses
from lorabench.analysis.fit_rows import ArmGrid, arm_grid, counted_rows, lowest_point, run_array
from lorabench.analysis.mixed_fit import MixedFit, fit_mixed
from lorabench.store.checks import is_rl

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
    sizes: Mapping[str, float]
    """The sizes of what seeds do, by part (see `_sizes`); empty with one seed."""
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
        both = numbers[label], numbers[other]
        shares = np.square([each.seed_error for each in both])
        width_error = float(shares @ [each.width_error for each in both] / max(shares.sum(), 1e-300))
        difference = replace(estimate.combined(np.subtract, *both), width_error=width_error)
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
    of_rl = bool(is_rl(runs).any())
    arms = {arm_label(arm): run_array(rows) for arm, rows in each_arm(with_losses(runs))}
    grids = {label: grid for label, rows in arms.items() if (grid := arm_grid(rows, cliffs=of_rl))}
    nothing = LossFit(grids, {}, {}, math.nan, 0, {}, {}, {}, {}, "", {}, {}, {})
    if (counted := counted_rows(arms, grids)) is None:
        return nothing
    means = counted.runs[(counted.runs["n"] > 1) & np.isfinite(counted.runs["sd"])]
    if len(counted.seeds) > 1:
        noise = None
    elif len(means):
        pooled = math.sqrt(float(((means["n"] - 1) * means["sd"] ** 2).sum() / (means["n"] - 1).sum()))
        noise = Noise(pooled, int((means["n"] - 1).sum()), "the standard deviations in the table")
    if (fitted := fit_mixed(counted, None if noise is None else (noise.sigma, noise.dof))) is None:
        return nothing
    sigma, dof = math.nan, 0
    if len(counted.seeds) > 1 or noise is not None:
        sigma, dof = fitted.sigma, fitted.dof
    if noise is None and len(counted.in_arm) > 1 and not math.isnan(sigma):
        # The error lies between the cells of arm and seed, of which there are fewer than runs.
        dof = max(1, min(dof, int(counted.cells.max()) + 1 - len(counted.in_arm) - (len(counted.seeds) - 1)))
    fitted_ids, influences, n_examples, n_groups = counted.runs["run_id"].tolist(), None, 0, 0
    splits: dict[str, list[str]] = {}
    on_runs = examples.influences(fitted_ids) if examples else None
    if examples and on_runs is not None:
        hat, weighted = fitted.hat / counted.weights, counted.weights[:, None] * on_runs
        influences = estimate.without_run_noise(weighted, fitted.design, hat, fitted.noise)
        n_examples, n_groups = examples.n_examples(fitted_ids), on_runs.shape[1]
        splits = examples.splits(fitted_ids)
    of_arms = [place for own in fitted.places.values() for place in own]
    of_seeds = fitted.coefficients.copy()
    of_seeds[of_arms] = 0.0
    effects = np.append(contrasts := np.delete(fitted.coefficients, of_arms), -contrasts.sum())
    # The losses without the effects of their seeds that all arms share.
    losses = counted.runs["test_loss"] - fitted.design @ of_seeds / counted.weights
    luck = np.zeros((N_DRAWS, 1))
    if len(counted.in_arm) == 1 and len(counted.seeds) > 1:
        # Of one arm alone, what seeds do to it does not cancel: it moves the intercept, as the mean over these seeds.
        luck[:, 0] = estimate.mean_over_seeds(effects, f"new {name}").seed_part

    def lowest_within(coefficients: np.ndarray, label: str) -> np.ndarray:
        # An optimum may lie beyond the LRs that count; a loss is not extrapolated.
        bend, ends = fitted.bends.get(label), (grids[label].reach, counted.ends[label])
        return np.array([lowest_point(coefficients, at, bend)[part] for part, at in enumerate(ends)])

    lowest, measured, curvature, seeds, run_ids, counts = {}, {}, {}, {}, {}, counted.runs["n"]
    for label, chosen in counted.in_arm.items():
        places = fitted.places[label]
        curvature[label] = float(fitted.coefficients[places[2]])
        run_ids[label] = tuple(counted.runs["run_id"][chosen].tolist())
        # A row of n seeds stands for its own seed and the next n - 1.
        seeds[label] = frozenset(seed + k for seed, n in counted.runs[chosen][["seed", "n"]].tolist() for k in range(n))
        position, value = lowest_within(fitted.coefficients[places], label).tolist()
        lowest[label] = math.log(grids[label].lrs[grids[label].centre]) + position, value
        at_lrs = chosen & (counted.runs["lr"] == np.unique(counted.runs["lr"][chosen])[:, None])
        measured[label] = min(
            (float(np.average(losses[at], weights=counts[at])), sigma / math.sqrt(counts[at].sum())) for at in at_lrs
        )

    @cache
    def estimated(label: str) -> tuple[Estimate, Estimate, bool]:
        # Draws of all coefficients at once would take much memory.
        grid, places, ends = grids[label], fitted.places[label], counted.ends[label]
        own, drawn = fitted.coefficients[places], np.full((N_DRAWS, len(places)), math.nan)
        if dof and sigma > 0:
            drawn = fitted.draws(label, f"seeds of {name}")
            drawn[:, :1] += luck
        value = lowest_within(own, label)
        by_seed, by_example = lowest_within(own + drawn, label) - value[:, None], np.array([None, None])
        if influences is not None:
            of_examples = own + estimate.example_draws(influences[places], test_split, len(splits))
            by_example = lowest_within(of_examples, label) - value[:, None]
        counts = len(seeds[label]), n_examples, n_groups, bool(splits) and all("@" in name for name in splits)
        position, minimum = (Estimate(float(value[part]), by_seed[part], by_example[part], *counts) for part in (0, 1))
        optimum = replace(position, value=lowest[label][0])
        if own[2] > 0:
            # The flatter a curve may be, the less may be known of its optimum.
            optimum = replace(optimum, width_error=min(estimate.standard_error(drawn[:, 2]) / own[2], 1.0))
        outside = (position.draws <= ends[0] + 1e-9) | (position.draws >= ends[1] - 1e-9)
        # 2.5% is what lies on each side of a 95% interval.
        inside = own[2] > 0 and position.known and float(outside.mean()) <= 0.025
        return optimum, minimum, inside and grid.edge is None and grid.coarse is None

    text = "" if noise is None else f"; seed noise from {noise.source}"
    if 1 < n_groups < min(n_examples, FEW_GROUPS):
        text += f"; the {n_examples} test examples come from {n_groups} groups"
    optima, minima, resolved = (
        ByArm({label: lambda label=label, part=part: estimated(label)[part] for label in lowest}) for part in range(3)
    )
    sizes = _sizes(fitted, effects) if len(counted.seeds) > 1 else {}
    numbers = lowest, measured, sigma, dof, curvature, sizes, seeds, run_ids, text, optima, minima, resolved
    return LossFit(grids, *numbers)


def _sizes(fitted: MixedFit, effects: np.ndarray) -> dict[str, float]:
    """Return how large the parts of the model are: as standard deviations, the effects of seeds that all arms share,
    their walk one unit of ln LR from the optimum, what one arm, full fine-tuning and a run have besides; the share of
    the walk that kinds of arms have in common, its growth, and the spread of curvatures over their mean."""
    arms, (walk, arm, fullft, share, growth, spread) = len(fitted.places), fitted.sizes.tolist()
    run = fitted.sigma / math.sqrt(1 + arm**2 + fullft**2 / arms)
    if arms == 1:
        arm = math.nan
    if arms == 1 or "FullFT" not in fitted.places:
        fullft = share = math.nan
    sizes = {"common": float(effects.std(ddof=1)), "walk": walk * run, "arm": arm * run, "fullft": fullft * run}
    return sizes | {"run": run, "share": share, "growth": growth, "curvatures": spread}
