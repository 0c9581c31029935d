"""Rewards of reinforcement learning: health of runs, error rates as losses, curves, and ranges of good LRs.

A policy that gives one answer to all problems, or follows a cheap rule, solves no problem, but may have a peak over
learning rates as any other. The accuracies of the best constant answer and of the best cheap rule are the controls of a
problem set. The rules of this module are the only place that compares runs with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_label, arm_table, each_arm
from lorabench.analysis.comparison import Arm, Comparison, comparisons
from lorabench.analysis.curves import metric_points
from lorabench.analysis.estimate import N_DRAWS, Estimate, example_draws, multivariate_student, uniform
from lorabench.runs import GOOD, MAX_KL, TIE
from lorabench.store.checks import is_rl

MAX_OPEN = 0.025
"""The share of draws in which a range of good LRs may reach an end of its grid and still counts as closed there."""

TestReward = Literal["final_reward", "best_reward"]

LEAD = 0.15
"""The least lead in test accuracy over both controls with which a method counts as having learned the task."""

MAX_TRUNCATED = 0.1
"""The share of responses cut off at the end of training above which a run is sick."""

COLLAPSED = 0.02
"""The entropy in nats per token below which a policy hardly samples more than one response."""

MIN_GAIN = 0.05
"""The least gain in test accuracy over the base model that counts as learning; a loss of as much may be a breakdown."""

CONTROLS = {"constant_reward": "best constant answer", "rule_reward": "best cheap rule"}
"""The columns of `runs` with the accuracies of the controls, and their names."""


def is_sick(runs: pd.DataFrame) -> pd.Series[bool]:
    """Return which runs of RL ended sick, so that their accuracy is no peak; what is not known makes no run sick.

    A run is sick if more than MAX_TRUNCATED of its last responses are cut off. So is one whose test accuracy is not
    above both controls, if its entropy is below COLLAPSED or the base was more accurate by MIN_GAIN. A run whose
    accuracy is exactly that of the base, as after no reward at all, is no peak and not sick.

    Args:
        runs: columns final_truncated, final_entropy, base_reward, final_reward and CONTROLS, as far as they are known.
    """
    columns = ["final_truncated", "final_entropy", "base_reward", "final_reward", *CONTROLS]
    truncated, entropy, base, final, *controls = _numbers(runs, columns)
    broken = (entropy < COLLAPSED) | (base - final >= MIN_GAIN)
    collapsed = broken & (final <= np.fmax.reduce(controls))
    return pd.Series((final != base) & ((truncated > MAX_TRUNCATED) | collapsed), index=runs.index)


def _numbers(runs: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """Return columns as numbers, (columns, runs); null values, and columns that the runs lack, are NaN."""
    unknown = np.full(len(runs), math.nan)
    return np.array([runs[name].to_numpy(float, na_value=math.nan) if name in runs else unknown for name in columns])


def beyond_controls(runs: pd.DataFrame) -> pd.Series[bool]:
    """Return by model and dataset whether every method is ahead of both controls by LEAD or more (see `leads`)."""
    lead = leads(runs)
    return (lead["lead"] >= LEAD).groupby([lead["model"], lead["dataset"]]).all()


def leads(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the lead of each method over the controls.

    Args:
        runs: runs of RL with the columns model, dataset, method, rank, placement, lr, status, final_reward and
            CONTROLS; sick runs do not count.

    Returns:
        One row per model, dataset and method: accuracy (the best mean over seeds at one LR, of any rank and placement),
        constant_reward, rule_reward, and lead (accuracy minus the higher control; NaN where no control is known).
    """
    method, numbers = ["model", "dataset", "method"], [*CONTROLS, "final_reward"]
    known = runs[[*method, "rank", "placement", "lr"]].assign(
        **dict(zip(numbers, _numbers(runs, numbers), strict=True))
    )
    known["accuracy"] = known["final_reward"].where(runs["status"].eq("done") & ~is_sick(runs))
    by_lr = known.groupby([*method, "rank", "placement", "lr"], dropna=False, sort=False)["accuracy"].mean()
    table = by_lr.groupby(method, sort=False).max().reset_index()
    table = table.join(known.groupby(method[:2])[list(CONTROLS)].max(), on=method[:2])
    return table.assign(lead=table["accuracy"].fillna(0.0) - table[list(CONTROLS)].max(axis=1))


def sampler_mismatch(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Return the measures of the sampler against the learner over the steps of all runs of each arm of RL.

    Runs of supervised fine-tuning are left out, and metrics that the curves lack become NaN.

    Returns:
        One row per arm: run_ids, kl_mean (nats per token), kl_max (the largest absolute value), ratio_mean, ratio_max,
        ratio_above_2 (the mean share of tokens), n_measured (runs with a KL), and n_above (see `runs_above_max_kl`).
    """
    columns = ["run_ids", "kl_mean", "kl_max", "ratio_mean", "ratio_max", "ratio_above_2", "n_measured", "n_above"]
    metrics = ("kl", "ratio_mean", "ratio_max", "ratio_above_2")
    points = [metric_points(curves, "train", metric).astype({"value": float}).set_index("run_id") for metric in metrics]
    above, rows = runs_above_max_kl(curves), []
    for arm, arm_runs in each_arm(runs[is_rl(runs)]):
        ids = arm_runs["run_id"]
        kl, mean, largest, above_2 = (table.loc[table.index.isin(ids), "value"] for table in points)
        numbers = [kl.mean(), kl.abs().max(), mean.mean(), largest.max(), above_2.mean()]
        counts = [kl.index.nunique(), int(ids.isin(above).sum())]
        rows.append(arm | dict(zip(columns, [list(ids), *numbers, *counts], strict=True)))
    return arm_table(rows, columns)


def runs_above_max_kl(curves: pd.DataFrame) -> set[str]:
    """Return the run_id of each run with a step whose KL has an absolute value above MAX_KL."""
    kl = metric_points(curves, "train", "kl")
    return set(kl.loc[kl["value"].astype(float).abs() > MAX_KL, "run_id"])


def with_error_rates(runs: pd.DataFrame, test_reward: TestReward = "final_reward") -> pd.DataFrame:
    """Return the RL runs with their error rates as losses.

    A run that never got a reward counts as finished: its policy is the base model, whose accuracies it has. A sick run
    (see `is_sick`) counts as diverged, whatever its accuracy, so that it is never an optimum.

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
        runs: as for `with_error_rates`.
        curves: their curves, optionally with examples.
        split: train, validation, test, or the name of a held-out problem set.
        metric: a metric of the split, such as reward (train), accuracy (other splits), response_length.

    Returns:
        One row per arm and step, ascending: lr, step, episodes, mean and sd over the finished seeds that have the step
        (in the metric's unit; sd NaN with one seed), n_seeds, run_ids.
    """
    points = metric_points(curves, split, metric, ("run_id", "step", "examples", "value"))
    points = points.sort_values(["step", "run_id"]).astype({"value": float})
    columns = ["step", "episodes", "mean", "sd", "n_seeds", "run_ids"]
    rows: list[dict[Any, Any]] = []
    for comparison in comparisons(with_error_rates(runs), curves):
        for arm in comparison.arms:
            chosen = comparison.at_optimum(arm)
            by_step = points[points["run_id"].isin(chosen["run_id"])].groupby("step", as_index=False)
            table = by_step.agg(
                episodes=("examples", "max"),
                mean=("value", "mean"),
                sd=("value", "std"),
                n_seeds=("run_id", "size"),
                run_ids=("run_id", list),
            )
            rows += [arm | {"lr": float(chosen["lr"].iloc[0])} | row for row in table.to_dict("records")]
    return arm_table(rows, ["lr", *columns]).astype({"step": "Int64", "episodes": "Int64"})


def flat_top(comparison: Comparison, arm: Arm) -> list[float]:
    """Return the neighbouring LRs of an arm that are all equally good, so that its optimal LR is open.

    Policies that end at one and the same rule have one and the same accuracy, whatever their LR, and a parabola always
    has an optimum. Two LRs are equally good if their test error rates agree exactly with every seed that both have; so
    are three or more that can't be told from the best by the noise of the fit (two standard errors). Two such LRs are
    no flat top, since the optimum may lie halfway between them.

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
    """The lowest good LR of the grid."""
    lr_high: float
    open_low: bool
    """Whether the range may go on below its grid, so that the width is a lower bound."""
    open_high: bool
    between: tuple[float, ...]
    """The LRs in the middle of the steps of the grid in which the range ends."""
    run_ids: tuple[str, ...] = field(repr=False)

    @property
    def open(self) -> bool:
        return self.open_low or self.open_high


def good_range(comparison: Comparison, arm: Arm) -> GoodRange:
    """Measure the range of good LRs of an arm with a finished run; the runs have error rates as losses.

    At an LR of the grid the accuracy is the mean over its seeds; it is 0 where the run diverged. The peak is the
    accuracy at the LR nearest to the fitted optimum. A step of the grid between a good LR and another counts half. That
    the range may end anywhere in that step is part of the error, and so are the seeds (the noise of the fit, without
    effects of seeds that all arms share) and the test problems, which are resampled alike for all arms. One bad LR does
    not cut off the good LRs beyond it.
    """
    rows, fit = comparison.rows[arm_label(arm)], comparison.fit
    lost = rows["status"] == "diverged"
    accuracy_or_0 = (1 - rows["test_loss"].astype(float)).where(~lost, 0.0)
    rows = rows[["run_id", "lr"]].assign(accuracy=accuracy_or_0, lost=lost).dropna(subset=["accuracy"])
    at_optimum, by_lr = comparison.at_optimum(arm), rows.groupby("lr")
    accuracy, n_runs = by_lr["accuracy"].mean(), by_lr.size().to_numpy(float)
    lrs, accuracies = accuracy.index.to_numpy(float), accuracy.to_numpy(float)
    steps, halves = np.diff(np.log10(lrs)), np.full(len(lrs) - 1, 0.5)
    peak = int(np.flatnonzero(lrs == float(at_optimum["lr"].iloc[0]))[0])
    is_good = _is_good(accuracies, peak)
    value = float(_width(is_good, steps, halves))
    name = f"good LRs of {comparison.label} {arm_label(arm)}"
    good, seed_part = is_good[None], np.full(N_DRAWS, math.nan)
    if fit.sigma > 0:
        # A mean over runs that all diverged has no noise.
        variances = fit.sigma**2 / n_runs * ~by_lr["lost"].all().to_numpy(bool)
        good = _is_good(accuracies + multivariate_student(np.diag(variances), max(fit.dof, 1), name), peak)
        seed_part = _width(good, steps, uniform(len(steps), f"ends of {name}")) - value
    finished = rows[~rows["lost"]]
    means = (finished["lr"].to_numpy(float)[:, None] == lrs) / n_runs
    test_split = str(comparison.runs["dataset"].iloc[0])
    examples, run_ids = comparison.judging.examples, list(finished["run_id"])
    influences, example_part, n_test = examples.influences(run_ids), None, (0, 0)
    if influences is not None:
        moved = accuracies - example_draws(means.T @ influences, test_split)
        example_part = _width(_is_good(moved, peak), steps, halves) - value
        n_test = len(examples.tokens[run_ids[0]]), influences.shape[1]
    width = Estimate(value, seed_part, example_part, len(at_optimum), *n_test)
    lowest, highest = lrs[is_good][[0, -1]].tolist()
    open_low, open_high = (good.mean(axis=0) > MAX_OPEN)[[0, -1]].tolist()
    ends = np.flatnonzero(is_good[:-1] != is_good[1:])
    between = tuple(np.sqrt(lrs[ends] * lrs[ends + 1]).tolist())
    return GoodRange(width, lowest, highest, open_low, open_high, between, tuple(rows["run_id"]))


def _is_good(accuracies: np.ndarray, peak: int) -> np.ndarray:
    return np.asarray(accuracies >= GOOD * accuracies[..., peak : peak + 1] - TIE)


def _width(good: np.ndarray, steps: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the length of the good parts of a grid, (...), from whether each LR is good, (..., LRs).

    Its steps are in decades, and `ends` is the share of each that is good if one of its two LRs is, (..., LRs - 1).
    """
    both, either = good[..., :-1] & good[..., 1:], good[..., :-1] ^ good[..., 1:]
    return np.asarray(((both + either * ends) * steps).sum(axis=-1))
