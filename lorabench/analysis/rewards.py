"""Rewards of reinforcement learning: health of runs, error rates as losses, and what a missed LR costs.

A policy that gives one answer to all problems, or follows a cheap rule, solves no problem, but may have a peak over LRs
as any other. The accuracies of the best constant answer and of the best cheap rule are the controls of a problem set.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison
from lorabench.analysis.estimate import N_DRAWS, Estimate, example_draws, multivariate_student, without_run_noise
from lorabench.analysis.fit_rows import MAX_STEP
from lorabench.runs import TIE
from lorabench.store.checks import is_rl

NEAR, FAR = 0.25, 0.5
"""How far in decades an LR that misses the best one is off, at least and at most: factors of 1.8 and 3.2."""

UNSEEN = 0.25
"""By how many decades the LRs of an arm may fall short of FAR."""

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
    """Return which runs of RL ended sick, so that their accuracy is no peak: more than MAX_TRUNCATED of the last
    responses are cut off, or the test accuracy is not above both controls, and the entropy is below COLLAPSED or the
    base was more accurate by MIN_GAIN. A run as accurate as its base is not sick, and what is not known makes none so.
    """
    columns = ["final_truncated", "final_entropy", "base_reward", "final_reward", *CONTROLS]
    numbers = runs.reindex(columns=columns).astype(float)
    final, base = numbers["final_reward"], numbers["base_reward"]
    broken = (numbers["final_entropy"] < COLLAPSED) | (base - final >= MIN_GAIN)
    collapsed = broken & (final <= numbers[[*CONTROLS]].max(axis=1))
    return (final != base) & ((numbers["final_truncated"] > MAX_TRUNCATED) | collapsed)


def beyond_controls(runs: pd.DataFrame) -> pd.Series[bool]:
    """Return by model and dataset whether every method is ahead of both controls by LEAD or more (see `leads`)."""
    lead = leads(runs)
    return (lead["lead"] >= LEAD).groupby([lead["model"], lead["dataset"]]).all()


def leads(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the lead of each method over the controls in runs of RL that are not sick: a row per model, dataset and
    method has accuracy (the best mean over seeds at one LR, of any rank and placement), constant_reward, rule_reward,
    and lead (accuracy minus the higher control; NaN where no control is known)."""
    method = ["model", "dataset", "method"]
    accuracy = runs["final_reward"].where(runs["status"].isin(["done", "collapsed"]) & ~is_sick(runs)).astype(float)
    cells = [runs[name] for name in (*method, "rank", "placement", "lr")]
    highest = accuracy.groupby(cells, dropna=False, sort=False).mean().groupby(method, sort=False).max()
    controls = runs.reindex(columns=[*method[:2], *CONTROLS]).astype(dict.fromkeys(CONTROLS, float))
    table = highest.rename("accuracy").reset_index().join(controls.groupby(method[:2]).max(), on=method[:2])
    return table.assign(lead=table["accuracy"].fillna(0.0) - table[list(CONTROLS)].max(axis=1))


def with_error_rates(runs: pd.DataFrame, test_reward: TestReward = "final_reward") -> pd.DataFrame:
    """Return the RL runs with their error rates as losses: after the last step (`final_reward`), or of the test at the
    evaluation with the best validation accuracy (`best_reward`). A run that never got a reward, or none any more,
    counts as finished, and a sick one (see `is_sick`) as diverged, so that it is never an optimum."""
    rl = runs[is_rl(runs)]
    sick = is_sick(rl)
    return rl.assign(
        status=rl["status"].replace(["unrewarded", "collapsed"], "done").mask(sick, "diverged"),
        validation_loss=(1 - rl["final_valid_reward"].astype(float)).mask(sick),
        test_loss=(1 - rl[test_reward].astype(float)).mask(sick),
    )


def flat_top(comparison: Comparison, arm: Arm) -> list[float]:
    """Return the neighbouring LRs of an arm that are all equally good, if any, so that its optimum is open: two whose
    test error rates agree exactly with every seed that both have, as policies do that end at one rule, or three or more
    that can't be told from the best by the spread of seeds at an LR (two standard errors)."""
    grid = comparison.fit.grids.get(arm_label(arm))
    if grid is None:
        return []
    rows = comparison.rows[arm_label(arm)]
    errors = rows[rows["status"] == "done"].pivot_table(index="seed", columns="lr", values="test_loss").astype(float)
    best, noise = errors[grid.lrs[grid.centre]], math.sqrt(float(errors.var().mean()))
    within_noise, exact = [], []
    for lr in grid.lrs.tolist():
        both = (errors[lr] - best).dropna()
        close = 2 * noise * math.sqrt(1 / errors[lr].count() + 1 / best.count())
        exact.append(len(both) > 0 and bool(np.allclose(both, 0, atol=TIE)))
        within_noise.append(exact[-1] or bool(abs(errors[lr].mean() - best.mean()) <= close))
    for alike, least in ((exact, 2), (within_noise, 3)):
        # The unbroken stretch of equally good LRs around the best one.
        broken = [-1, *np.flatnonzero(~np.array(alike)).tolist(), len(alike)]
        after = next(place for place in broken if place > grid.centre)
        flat = grid.lrs[broken[broken.index(after) - 1] + 1 : after]
        if len(flat) >= least:
            return [float(lr) for lr in flat]
    return []


def missing_lrs(comparison: Comparison, arm: Arm) -> list[float]:
    """Return the LRs that an arm with a fitted optimum lacks for its `cost_of_a_miss`, ascending: its LRs must reach
    FAR to both sides of the optimum, up to UNSEEN, in steps of at most MAX_STEP."""
    lrs = _by_lr(comparison, arm)["lr"].unique()
    optimum = math.exp(comparison.fit.optima[arm_label(arm)].value)
    lacking = [optimum / 10**FAR] if lrs[0] > optimum / 10 ** (FAR - UNSEEN) else []
    for low, high in pairwise(lrs.tolist()):
        if high / low > MAX_STEP and high > optimum / 10**FAR and low < optimum * 10**FAR:
            lacking.append(math.sqrt(low * high))
    return lacking + ([optimum * 10**FAR] if lrs[-1] < optimum * 10 ** (FAR - UNSEEN) else [])


def cost_of_a_miss(comparison: Comparison, arm: Arm) -> Estimate:
    """Estimate the share of its accuracy that an arm loses where its LR misses the best one.

    An LR misses if it lies NEAR to FAR decades below or above the fitted optimum; the cost is 1 minus the mean accuracy
    there over the mean accuracy nearer to the optimum. Both are means over log LR of the final test accuracy, on lines
    between the means over seeds at neighbouring LRs. A run without an accuracy has 0.

    The error from seeds is that of the mean at each LR, from its own standard deviation, with Welch and Satterthwaite's
    degrees of freedom, since breakdowns make some LRs noisier than others. An LR with one run is as noisy as the
    noisiest that counts; where no LR has two, the noise of the fit stands in.
    """
    rows, fit = _by_lr(comparison, arm), comparison.fit
    lrs, cell, n_runs = np.unique(rows["lr"].to_numpy(float), return_inverse=True, return_counts=True)
    accuracy = rows["accuracy"].to_numpy(float)
    means = np.bincount(cell, accuracy) / n_runs
    decades = np.log10(lrs) - fit.optima[arm_label(arm)].value / math.log(10)
    near, both = _mean_weights(decades, NEAR), _mean_weights(decades, FAR)
    far = (FAR * both - NEAR * near) / (FAR - NEAR)
    at_near, at_far = float(near @ means), float(far @ means)
    effect = at_far * near / at_near**2 - far / at_near

    several = (effect != 0) & (n_runs > 1)
    variance, dof = np.full(len(lrs), fit.sigma**2), np.full(len(lrs), float(fit.dof))
    measured_at = np.zeros(len(lrs), int)
    if several.any():
        own = np.bincount(cell, (accuracy - means[cell]) ** 2) / np.maximum(n_runs - 1, 1)
        measured_at = np.where(several, np.arange(len(lrs)), np.argmax(np.where(several, own, -1.0)))
        variance, dof = own[measured_at], n_runs - 1.0
    # The parts of the variance of the cost, by the LR at which their noise was measured.
    parts = np.bincount(measured_at, effect**2 * variance / n_runs, len(lrs))
    errors = np.full((N_DRAWS, len(lrs)), math.nan)
    if parts.sum() > 0:
        counts = parts > 0
        satterthwaite = float(parts.sum() ** 2 / (parts[counts] ** 2 / dof[counts]).sum())
        name = f"cost of a miss of {comparison.label} {arm_label(arm)}"
        errors = multivariate_student(np.diag(variance / n_runs), satterthwaite, name)

    def cost(drawn: np.ndarray) -> np.ndarray:
        return np.asarray(1 - (drawn @ far) / (drawn @ near))

    value = float(cost(means))
    known = rows["final_reward"].notna().to_numpy(bool)
    run_ids, hat = rows["run_id"][known].tolist(), (cell[known] == np.arange(len(lrs))[:, None]) / n_runs[:, None]
    examples, example_part, n_examples, n_groups = comparison.judging.examples, None, 0, 0
    on_runs = examples.influences(run_ids)
    if on_runs is not None:
        influences = without_run_noise(on_runs, np.sign(hat).T, hat, np.eye(len(run_ids)))
        split, n_splits = str(comparison.runs["dataset"].iloc[0]), len(examples.splits(run_ids))
        example_part = cost(means - example_draws(influences, split, n_splits)) - value
        n_examples, n_groups = examples.n_examples(run_ids), on_runs.shape[1]
    return Estimate(value, cost(means + errors) - value, example_part, int(n_runs.max()), n_examples, n_groups)


def _by_lr(comparison: Comparison, arm: Arm) -> pd.DataFrame:
    """Return the runs of an arm that finished or diverged, ascending in LR, with the column accuracy."""
    rows = comparison.rows[arm_label(arm)].sort_values(["lr", "run_id"])
    return rows.assign(accuracy=rows["final_reward"].astype(float).fillna(0.0))


def _mean_weights(decades: np.ndarray, reach: float) -> np.ndarray:
    """Return the weight of each LR in the mean accuracy over log LR from -reach to reach, (LRs,); both are in decades
    from the middle, and the LRs two or more, ascending."""
    ends = np.union1d(decades[np.abs(decades) < reach], [-reach, reach])
    left = np.clip(np.searchsorted(decades, ends) - 1, 0, len(decades) - 2)
    share = (ends - decades[left]) / (decades[left + 1] - decades[left])
    on_line = np.zeros((len(ends), len(decades)))
    np.add.at(on_line, (np.arange(len(ends)), left), 1 - share)
    np.add.at(on_line, (np.arange(len(ends)), left + 1), share)
    return np.asarray(np.trapezoid(on_line, ends, axis=0) / (2 * reach))
