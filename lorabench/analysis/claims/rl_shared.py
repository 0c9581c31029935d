"""What the claims on reinforcement learning (RL) share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_label
from lorabench.analysis.claims.evidence import Evidence, judge_each
from lorabench.analysis.comparison import Arm, Comparison, comparisons, require
from lorabench.analysis.finding import (
    MIN_SEEDS,
    Finding,
    UnjudgedError,
)
from lorabench.analysis.rewards import TestReward, errors, points_of

MIN_CHAIN = 100
"""Tokens of a mean response from which on it may hold a chain of thought; shorter ones are bare answers."""


RUNS = (
    "RL runs of {} and FullFT, each with an LR grid whose best LR is not at its edge and a peak above the base; "
    f"{MIN_SEEDS} seeds at the best LRs"
)


LEARNED = "Inconclusive where {} is not above the untouched base by more than 2 sigma"


PROBLEM_SETS = ("rl_math", "rl_gsm8k", "rl_deepmath", "rl_arithmetic")


DEEPMATH = ("rl_deepmath", "rl_arithmetic")


def over_problems(
    judge: Callable[[Comparison], Finding], test_reward: TestReward = "final_reward"
) -> Callable[[Evidence], Finding]:
    """Judge each model and problem set by itself, on error rates; the worst finding decides.

    A set that no run ever got a reward on says nothing but what F7 is about.
    """

    def over_rewarded(evidence: Evidence) -> Finding:
        rewarded = rewarded_errors(evidence.standard, test_reward)
        if rewarded.empty:
            raise UnjudgedError("not tested", "no run ever got a reward")
        return judge_each(
            (comparison.label, partial(judge, comparison)) for comparison in comparisons(rewarded, evidence.curves)
        )

    return over_rewarded


def rewarded_errors(runs: pd.DataFrame, test_reward: TestReward = "final_reward") -> pd.DataFrame:
    """RL runs as from `errors`, of the models and problem sets on which any run ever got a reward."""
    rewarded = runs["status"].ne("unrewarded").groupby([runs["model"], runs["dataset"]]).transform("any")
    return errors(runs[rewarded.astype(bool)], test_reward)


def each_rank(
    comparison: Comparison, judge: Callable[[Arm, Arm], Finding], learners: Callable[[Arm, Arm], list[Arm]]
) -> Finding:
    """Judge every LoRA rank on all layers against FullFT; the worst finding decides.

    Args:
        comparison: of which the arms are.
        judge: given the LoRA arm and FullFT.
        learners: given the same, those that must have learned for a verdict.
    """
    fullft, _ = require(("FullFT", comparison.fullft), ("LoRA", next(iter(comparison.lora.values()), None)))

    def judge_one(lora: Arm) -> Finding:
        return if_learned(comparison, judge(lora, fullft), learners(lora, fullft))

    return judge_each((arm_label(lora), partial(judge_one, lora)) for lora in comparison.lora.values())


def if_learned(comparison: Comparison, found: Finding, arms: list[Arm]) -> Finding:
    """The finding with the accuracies of arms; inconclusive where one has not learned, as all are alike then."""
    if not arms:
        return found
    sigma = np.nan_to_num(comparison.sigma("test")[0])
    accuracy = {arm_label(arm): 1 - float(comparison.losses[arm_label(arm)]["nll_mean"]) for arm in arms}
    base = float(comparison.runs["base_reward"].astype(float).mean())
    if math.isnan(base):
        problems = ["accuracy of the base not known"]
    else:
        problems = [f"{label} has not learned" for label, value in accuracy.items() if not value - base > 2 * sigma]
    known = {label: value for label, value in (accuracy | {"base": base}).items() if not math.isnan(value)}
    told = ", ".join(f"{label} {value:.3f}" for label, value in known.items())
    reason = "; ".join([found.reason, *([f"test accuracy {told}"] if told else []), *problems])
    judged = found.verdict in ("confirmed", "contradicted")
    return replace(found, reason=reason, verdict="inconclusive" if judged and problems else found.verdict)


def pair_problems(comparison: Comparison, lora: Arm, fullft: Arm, n_seeds: int) -> list[str]:
    """What speaks against a verdict on curves at two arms' best LRs, of which so many pairs of seeds are there."""
    problems = comparison.final_gap(lora, fullft)[3]
    return problems or ([f"curves of {n_seeds} paired seeds, {MIN_SEEDS} needed"] if n_seeds < MIN_SEEDS else [])


def at_best(comparison: Comparison, arm: Arm, split: str, metric: str) -> pd.DataFrame:
    """A measure over training at an arm's best LR: seed, step and value."""
    best = comparison.losses[arm_label(arm)]
    points = points_of(comparison.curves, split, metric)
    points = points[points["run_id"].isin(best["run_ids"])]
    return points.assign(seed=points["run_id"].map(dict(zip(best["run_ids"], best["seeds"], strict=True))))


def tenths(comparison: Comparison, arm: Arm, metric: str) -> pd.DataFrame:
    """Means of a train metric at an arm's best LR: a row per seed, a column (1 to 10) per tenth of the steps."""
    points = at_best(comparison, arm, "train", metric)
    points = points[points["step"] > 0]
    last = arm["steps"] or points["step"].max()
    tenths = np.ceil(10 * points["step"].astype(float) / last).clip(1, 10).astype(int).rename("tenth")
    return points.groupby(["seed", tenths])["value"].mean().unstack()


def difference(table: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """One table of seeds minus another, of the seeds that both have in full."""
    found: pd.DataFrame = (table - other).dropna()
    return found
