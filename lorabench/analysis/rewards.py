"""Rewards of reinforcement learning: error rates as losses, accuracies over training, and ranges of good LRs.

An error rate, 1 - accuracy, is a loss: lower is better, it is reported on the test split, and it has an error from
seeds and one from the problems of the split. `with_error_rates` puts it into the columns `validation_loss` and
`test_loss` (see `lorabench.analysis.losses`), so that the same code fits the optimal LRs and compares the arms of
supervised runs and of RL runs.

Policies that end at one and the same rule have one and the same accuracy, whatever their LR. Such a flat top has no
optimal LR, though a parabola always has one; `flat_top` finds it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_label, arm_table, with_arm_columns
from lorabench.analysis.comparison import Arm, Comparison, comparisons
from lorabench.analysis.curves import metric_points
from lorabench.analysis.estimate import N_DRAWS, Estimate, multivariate_student, uniform
from lorabench.analysis.rl_health import is_sick
from lorabench.runs import GOOD, TIE
from lorabench.store.checks import is_rl

MAX_OPEN = 0.025
"""The share of draws in which a range of good LRs may reach an end of its grid and still counts as closed there."""

TestReward = Literal["final_reward", "best_reward"]


def with_error_rates(runs: pd.DataFrame, test_reward: TestReward = "final_reward") -> pd.DataFrame:
    """Return the RL runs with their error rates as losses.

    A run that never got a reward counts as finished: its policy is the base model, whose accuracies it has. A sick run
    (see `rl_health.is_sick`) counts as diverged, whatever its accuracy, so that it is never an optimum.

    Args:
        runs: columns task, status, final_valid_reward and the column that `test_reward` names; without the column task,
            no run is RL. Columns that `is_sick` reads may be missing.
        test_reward: the test accuracy to report: after the last step (`final_reward`), or at the evaluation with the
            best validation accuracy (`best_reward`).

    Returns:
        The RL runs with status done or diverged, validation_loss = 1 - final_valid_reward and test_loss = 1 -
        `test_reward`. With either test reward, the LR is picked by the validation accuracy after the last step.
    """
    rl = runs[is_rl(runs)]
    sick = is_sick(rl)
    return rl.assign(
        status=rl["status"].replace("unrewarded", "done").mask(sick, "diverged"),
        validation_loss=(1 - rl["final_valid_reward"].astype(float)).mask(sick),
        test_loss=(1 - rl[test_reward].astype(float)).mask(sick),
    )


def reward_curves(
    runs: pd.DataFrame, curves: pd.DataFrame, split: str = "train", metric: str = "reward"
) -> pd.DataFrame:
    """Return a metric over training at the LR of each arm's grid that is nearest to its fitted optimum.

    Args:
        runs: columns run_id, ARM, lr, seed, task, status, final_valid_reward, final_reward.
        curves: columns run_id, step, split, metric, value, and optionally examples.
        split: the split of the curves: train, validation, test, or the name of a held-out problem set.
        metric: the metric of the curves, such as reward (train), accuracy (other splits), response_length.

    Returns:
        One row per arm and step, ascending: lr, step, episodes, mean and sd over the finished seeds that have the step
        (in the metric's unit; sd NaN with one seed), n_seeds, run_ids.

    Raises:
        UserError: See `check_runs`.
    """
    points = metric_points(curves, split, metric, ("run_id", "step", "examples", "value"))
    points = points.sort_values(["step", "run_id"])
    rows: list[dict[str, Any]] = []
    for comparison in comparisons(with_arm_columns(with_error_rates(runs)), curves):
        for arm in comparison.arms:
            chosen = comparison.at_optimum(arm)
            arm_points = points[points["run_id"].isin(chosen["run_id"])]
            rows += [
                arm
                | {"lr": float(chosen["lr"].iloc[0]), "step": step, "episodes": at_step["examples"].max()}
                | {"mean": float(at_step["value"].mean()), "sd": float(at_step["value"].std())}
                | {"n_seeds": len(at_step), "run_ids": list(at_step["run_id"])}
                for step, at_step in arm_points.groupby("step")
            ]
    table = arm_table(rows, ["lr", "step", "episodes", "mean", "sd", "n_seeds", "run_ids"])
    return table.astype({"step": "Int64", "episodes": "Int64"})


def flat_top(comparison: Comparison, arm: Arm) -> list[float]:
    """Return the neighbouring LRs of an arm that are all equally good, so that its optimal LR is open.

    Two LRs are equally good if their test error rates agree exactly with every seed that both have; so are three or
    more that can't be told from the best by the noise of the fit (two standard errors). Two such LRs are no flat top,
    since the optimum may lie halfway between them.

    Returns:
        The LRs, ascending, with the best one of the grid among them; empty if the top is not flat.
    """
    grid = comparison.fit.grids.get(arm_label(arm))
    if grid is None:
        return []
    rows = comparison.rows[arm_label(arm)]
    errors = rows[rows["status"] == "done"].pivot_table(index="seed", columns="lr", values="test_loss").astype(float)
    best = errors[grid.lrs[grid.centre]]
    within_noise, exact = [], []
    for lr in grid.lrs.tolist():
        both = (errors[lr] - best).dropna()
        close = 2 * comparison.fit.sigma * math.sqrt(1 / errors[lr].count() + 1 / best.count())
        exact.append(len(both) > 0 and bool(np.allclose(both, 0, atol=TIE)))
        within_noise.append(exact[-1] or bool(abs(errors[lr].mean() - best.mean()) <= close))
    for alike, least in ((exact, 2), (within_noise, 3)):
        # The unbroken stretch of equally good LRs around the best one.
        low = high = grid.centre
        while low > 0 and alike[low - 1]:
            low -= 1
        while high + 1 < len(alike) and alike[high + 1]:
            high += 1
        if high + 1 - low >= least:
            return [float(lr) for lr in grid.lrs[low : high + 1]]
    return []


@dataclass(frozen=True)
class GoodRange:
    """The LRs at which an arm's test accuracy is at least GOOD times its peak, the accuracy near its fitted optimum."""

    width: Estimate
    """The total length of all good parts in decades of LR."""
    lr_low: float
    """The lowest good LR of the grid; NaN without any."""
    lr_high: float
    open_low: bool
    """Whether the range may go on below its grid, so that the width is a lower bound."""
    open_high: bool
    between: tuple[float, ...]
    """The LRs in the middle of the steps of the grid in which the range ends."""
    run_ids: tuple[str, ...] = field(repr=False)

    @property
    def open(self) -> bool:
        """Whether the width is a lower bound."""
        return self.open_low or self.open_high


def good_ranges(comparison: Comparison, arms: Sequence[Arm]) -> list[GoodRange]:
    """Measure the range of good LRs of several arms.

    At an LR of the grid the accuracy is the mean over its seeds; it is 0 where the run diverged. The peak is the
    accuracy at the LR nearest to the fitted optimum. A step of the grid between a good LR and another counts half. That
    the range may end anywhere in that step is part of the error, and so are the seeds (the noise of the fit, without
    effects of seeds that all arms share) and the test problems, which are resampled alike for all arms. One bad LR does
    not cut off the good LRs beyond it.

    Args:
        comparison: runs with error rates as losses.
        arms: arms with a finished run.
    """
    points = []
    for arm in arms:
        rows = comparison.rows[arm_label(arm)]
        lost = rows["status"] == "diverged"
        accuracy = (1 - rows["test_loss"].astype(float)).where(~lost, 0.0)
        points.append(rows[["run_id", "lr"]].assign(accuracy=accuracy, lost=lost).dropna(subset=["accuracy"]))
    ids = [run_id for rows in points for run_id in rows.loc[~rows["lost"], "run_id"]]
    sampled = comparison.judging.examples.deviations(ids, str(comparison.runs["dataset"].iloc[0]))
    shifts = None if sampled is None else dict(zip(ids, sampled[0].T, strict=True))
    n_examples = 0 if sampled is None else sampled[1]
    return [_good_range(comparison, arm, rows, shifts, n_examples) for arm, rows in zip(arms, points, strict=True)]


def _good_range(
    comparison: Comparison, arm: Arm, rows: pd.DataFrame, shifts: dict[str, np.ndarray] | None, n_examples: int
) -> GoodRange:
    """Measure the range of one arm.

    Args:
        comparison: holds the arm.
        arm: the arm.
        rows: its runs: columns run_id, lr, accuracy, and `lost` for a run that diverged, whose accuracy is 0.
        shifts: draws of each run's error from test problems, (N_DRAWS,).
        n_examples: the number of test problems.
    """
    label, by_lr = arm_label(arm), rows.groupby("lr")
    accuracy = by_lr["accuracy"].mean()
    lrs, accuracies = accuracy.index.to_numpy(float), accuracy.to_numpy(float)
    steps, halves = np.diff(np.log10(lrs)), np.full(len(lrs) - 1, 0.5)
    peak = int(np.flatnonzero(lrs == float(comparison.at_optimum(arm)["lr"].iloc[0]))[0])
    is_good = _is_good(accuracies, peak)
    value = float(_width(is_good, steps, halves))
    name = f"good LRs of {comparison.label} {label}"
    # A mean over runs that all diverged has no noise.
    variances = comparison.fit.sigma**2 / by_lr.size().to_numpy(float) * ~by_lr["lost"].all().to_numpy(bool)
    noise = multivariate_student(np.diag(variances), max(comparison.fit.dof, 1), name)
    good = _is_good(accuracies + noise, peak)
    seed_part = _width(good, steps, uniform(len(steps), f"ends of {name}")) - value
    example_part = None
    if shifts is not None:
        moved = [
            np.mean([shifts.get(run_id, np.zeros(N_DRAWS)) for run_id in run_ids], axis=0)
            for _, run_ids in by_lr["run_id"]
        ]
        example_part = _width(_is_good(accuracies - np.column_stack(moved), peak), steps, halves) - value
    if not comparison.fit.sigma > 0:
        good, seed_part = is_good[None], np.full(N_DRAWS, math.nan)
    is_open = good.mean(axis=0) > MAX_OPEN
    ends = np.flatnonzero(is_good[:-1] != is_good[1:])
    return GoodRange(
        Estimate(value, seed_part, example_part, len(comparison.at_optimum(arm)), n_examples),
        float(lrs[is_good][0]),
        float(lrs[is_good][-1]),
        bool(is_open[0]),
        bool(is_open[-1]),
        tuple(np.sqrt(lrs[ends] * lrs[ends + 1]).tolist()),
        tuple(rows["run_id"]),
    )


def _is_good(accuracies: np.ndarray, peak: int) -> np.ndarray:
    """Return which accuracies (..., LRs) are good, given the index of the LR of the peak."""
    return np.asarray(accuracies >= GOOD * accuracies[..., peak : peak + 1] - TIE)


def _width(good: np.ndarray, steps: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the length of the good parts of grids, (...).

    Args:
        good: whether each LR is good, (..., LRs).
        steps: the steps of the grid in decades, (LRs - 1,).
        ends: the share of each step that is good if one of its two LRs is, (..., LRs - 1).
    """
    both, either = good[..., :-1] & good[..., 1:], good[..., :-1] ^ good[..., 1:]
    return np.asarray(((both + either * ends) * steps).sum(axis=-1))
