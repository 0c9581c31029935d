"""The rules and statistics that the claims on reinforcement learning (RL) share.

Final accuracies are compared as error rates, 1 - accuracy (see `lorabench.analysis.rewards`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison, comparisons, require
from lorabench.analysis.finding import MIN_SEEDS, SIGMAS, Finding, UnjudgedError
from lorabench.analysis.rewards import TestReward, points_of, with_error_rates
from lorabench.claims.evidence import Evidence, judge_each

MIN_CHAIN = 100
"""Mean tokens per response from which a response may hold a chain of thought; shorter ones are bare answers."""

RL_RUNS = (
    "RL runs of {} and FullFT, each with an LR grid whose best LR is not at its edge and a peak above the base; "
    f"{MIN_SEEDS} seeds at the best LRs"
)
"""The runs that most claims on RL need; the placeholder stands for the LoRA arms."""

LEARNED = f"Inconclusive where the accuracy of {{}} is not above that of the base model by more than {SIGMAS} sigma"
"""The part of a criterion that requires learning; the placeholder stands for the arms that must have learned."""

RL_EXPERIMENTS = ("rl_math", "rl_gsm8k", "rl_deepmath", "rl_arithmetic", "rl")
"""All experiments that compare LoRA of several ranks with FullFT in RL."""

DEEPMATH_EXPERIMENTS = ("rl_deepmath", "rl_arithmetic")
"""The experiment on DeepMath, and the experiment that stands for it on small models."""


def over_problems(
    judge: Callable[[Comparison], Finding], test_reward: TestReward = "final_reward"
) -> Callable[[Evidence], Finding]:
    """Return a function that judges each model and problem set by itself on error rates; the worst finding decides.

    A problem set on which no run ever got a reward is left out: it is evidence for claim F7 only.

    Args:
        judge: judges one comparison, whose losses are error rates.
        test_reward: the column of `runs` with the test accuracy.
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
    """Return the RL runs as error rates, of models and problem sets on which some run got a reward."""
    rewarded = runs["status"].ne("unrewarded").groupby([runs["model"], runs["dataset"]]).transform("any")
    return with_error_rates(runs[rewarded.astype(bool)], test_reward)


def each_rank(
    comparison: Comparison, judge: Callable[[Arm, Arm], Finding], learners: Callable[[Arm, Arm], list[Arm]]
) -> Finding:
    """Judge every LoRA rank on all layers against FullFT; the worst finding decides.

    Args:
        comparison: holds the arms.
        judge: given the LoRA arm and the FullFT arm.
        learners: given the same, returns the arms that must have learned for a verdict.
    """
    fullft, _ = require(("FullFT", comparison.fullft), ("LoRA", next(iter(comparison.lora.values()), None)))

    def judge_rank(lora: Arm) -> Finding:
        return if_learned(comparison, judge(lora, fullft), learners(lora, fullft))

    return judge_each((arm_label(lora), partial(judge_rank, lora)) for lora in comparison.lora.values())


def if_learned(comparison: Comparison, judged: Finding, arms: list[Arm]) -> Finding:
    """Return the finding with the accuracies of arms added; it is inconclusive where one of them has not learned.

    Arms that have not learned are alike whatever the claim says. An arm has learned if its mean test accuracy is above
    that of the base model by more than SIGMAS sigma.
    """
    if not arms:
        return judged
    margin = SIGMAS * np.nan_to_num(comparison.sigma("test")[0])
    accuracy = {arm_label(arm): 1 - float(comparison.losses[arm_label(arm)]["loss_mean"]) for arm in arms}
    base = float(comparison.runs["base_reward"].astype(float).mean())
    if math.isnan(base):
        problems = ["accuracy of the base not known"]
    else:
        problems = [f"{label} has not learned" for label, value in accuracy.items() if not value - base > margin]
    known = {label: value for label, value in (accuracy | {"base": base}).items() if not math.isnan(value)}
    accuracies = ", ".join(f"{label} {value:.3f}" for label, value in known.items())
    reason = "; ".join([judged.reason, *([f"test accuracy {accuracies}"] if accuracies else []), *problems])
    decided = judged.verdict in ("confirmed", "contradicted")
    return replace(judged, reason=reason, verdict="inconclusive" if decided and problems else judged.verdict)


def pair_problems(comparison: Comparison, lora: Arm, fullft: Arm, n_seeds: int) -> list[str]:
    """Return what speaks against a verdict on the curves of two arms at their best LRs, with `n_seeds` paired seeds."""
    problems = comparison.final_gap(lora, fullft)[3]
    return problems or ([f"curves of {n_seeds} paired seeds, {MIN_SEEDS} needed"] if n_seeds < MIN_SEEDS else [])


def at_best(comparison: Comparison, arm: Arm, split: str, metric: str) -> pd.DataFrame:
    """Return the points of a metric over training at an arm's best LR; the columns are seed, step and value."""
    best = comparison.losses[arm_label(arm)]
    points = points_of(comparison.curves, split, metric)
    points = points[points["run_id"].isin(best["run_ids"])]
    return points.assign(seed=points["run_id"].map(dict(zip(best["run_ids"], best["seeds"], strict=True))))


def tenths(comparison: Comparison, arm: Arm, metric: str) -> pd.DataFrame:
    """Return means of a train metric over tenths of the steps, at an arm's best LR.

    Returns:
        One row per seed and one column (1 to 10) per tenth of the steps.
    """
    points = at_best(comparison, arm, "train", metric)
    points = points[points["step"] > 0]
    last = arm["steps"] or points["step"].max()
    tenth = np.ceil(10 * points["step"].astype(float) / last).clip(1, 10).astype(int).rename("tenth")
    return points.groupby(["seed", tenth])["value"].mean().unstack()


def difference(table: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Return one table by seed minus another, for the seeds that are complete in both."""
    differences: pd.DataFrame = (table - other).dropna()
    return differences
