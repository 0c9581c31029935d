"""The conditions, rules and statistics that the claims on reinforcement learning (RL) share.

Final accuracies are compared as error rates, 1 - accuracy (see `lorabench.analysis.rewards`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison, comparisons, require
from lorabench.analysis.estimate import combined
from lorabench.analysis.finding import MIN_SEEDS, Finding, UnjudgedError, without
from lorabench.analysis.rewards import TestReward, with_error_rates
from lorabench.analysis.rl_health import COLLAPSED, LEAD, MAX_TRUNCATED, MIN_GAIN, beyond_controls
from lorabench.analysis.rules import Problem, Remedy
from lorabench.claims.conditions import beats_controls, response_length, swept
from lorabench.claims.evidence import Evidence, judge_each

RL_PRESETS = ("laptop", "core", "paper")
"""The shipped presets whose RL has sweeps, responses and problems that a claim can be judged on."""

LONG_PRESETS = ("core", "paper")
"""Those of them whose responses are long enough to hold a chain of thought."""

LONG_RESPONSE = 30
"""Tokens per response from which a response may hold a chain of thought."""

RL_RUNS = (
    "RL runs of {} and FullFT, each with an LR grid whose best LR is not at its edge and a peak above the base; "
    f"{MIN_SEEDS} seeds at the LRs around the optimum"
)
"""The runs that most claims on RL need; the placeholder stands for the LoRA arms."""

HEALTHY = (
    "Problem sets count on which FullFT and LoRA are both ahead of the best constant answer and the best cheap rule by "
    f"{LEAD:g} in test accuracy. A run counts as diverged with more than {MAX_TRUNCATED:.0%} of its last responses cut "
    f"off, or, at an accuracy not above these two, with an entropy below {COLLAPSED:g} nats per token or an accuracy "
    f"below that of the base model by {MIN_GAIN:g} or more"
)
"""The part of a criterion that says which problem sets and runs count."""

LEARNED = (
    f"{HEALTHY}. Inconclusive unless the accuracy of {{}} at the fitted optimum is above that of the base model by "
    f"{MIN_GAIN:g} or more, with a 95% interval above 0"
)
"""The part of a criterion that requires learning; the placeholder stands for the arms that must have learned."""

RL_EXPERIMENTS = ("rl_math", "rl_gsm8k", "rl_deepmath", "rl_arithmetic", "rl")
"""All experiments that compare LoRA of several ranks with FullFT in RL."""

DEEPMATH_EXPERIMENTS = ("rl_deepmath", "rl_arithmetic")
"""The experiment on DeepMath, and the experiment that stands for it on small models."""


CONDITIONS = (swept(6, MIN_SEEDS, RL_PRESETS), response_length(8, RL_PRESETS), beats_controls(RL_PRESETS))
"""The conditions of the claims that compare arms in RL."""


def over_problems(
    judge: Callable[[Comparison], Finding], test_reward: TestReward = "final_reward"
) -> Callable[[Evidence], Finding]:
    """Return a function that judges each model and problem set by itself on error rates; the worst finding decides.

    A problem set on which no run ever got a reward is left out: it is evidence for claim F7 only. So is, beside others,
    one on which some method is not ahead of the controls (see `lorabench.analysis.rl_health`).

    Args:
        judge: judges one comparison, whose losses are error rates.
        test_reward: the column of `runs` with the test accuracy.
    """

    def over_rewarded(evidence: Evidence) -> Finding:
        if test_reward not in evidence.rewarded:
            rewarded = rewarded_errors(evidence.standard, test_reward)
            if rewarded.empty:
                raise UnjudgedError("not tested", "no run ever got a reward")
            evidence.rewarded[test_reward] = comparisons(rewarded, evidence.curves, evidence.judging, checked=True)
        compared = evidence.rewarded[test_reward]
        return judge_each((comparison.label, partial(judge, comparison)) for comparison in compared)

    return over_rewarded


def rewarded_errors(runs: pd.DataFrame, test_reward: TestReward = "final_reward") -> pd.DataFrame:
    """Return the RL runs as error rates, of models and problem sets on which some run got a reward.

    Where there are problem sets on which every method is ahead of the controls, these are all.
    """
    rewarded = runs["status"].ne("unrewarded").groupby([runs["model"], runs["dataset"]]).transform("any")
    runs = runs[rewarded.astype(bool)]
    beyond = beyond_controls(runs)
    if beyond.any():
        runs = runs[[bool(beyond[key]) for key in zip(runs["model"], runs["dataset"], strict=True)]]
    return with_error_rates(runs, test_reward)


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

    Arms that have not learned are alike whatever the claim says.
    """
    if not arms:
        return judged
    base = float(comparison.runs["base_reward"].astype(float).mean())
    accuracies, problems = [], [] if math.isfinite(base) else [Problem("accuracy of the base not known")]
    for arm in arms:
        label = arm_label(arm)
        minimum = comparison.fit.minima.get(label)
        if minimum is None:
            continue
        accuracies.append(f"{label} {1 - minimum.value:.3f}")
        gain = combined(lambda error: 1 - error - base, minimum)
        if math.isfinite(base) and not (gain.value >= MIN_GAIN and (not gain.known or gain.interval()[0] > 0)):
            problems.append(Problem(f"{label} has not learned"))
    accuracies += [f"base {base:.3f}"] if math.isfinite(base) else []
    with_accuracies = f"{judged.reason}; peak test accuracy {', '.join(accuracies)}" if accuracies else judged.reason
    return doubted(replace(judged, reason=with_accuracies), problems)


def doubted(judged: Finding, problems: Sequence[Problem]) -> Finding:
    """Return the finding with further problems; with any, a verdict of confirmed or contradicted is inconclusive."""
    if not problems:
        return judged
    reason = "; ".join([judged.reason, *(problem.text for problem in problems)])
    opened = without(replace(judged, reason=reason), "confirmed", "contradicted")
    if judged.verdict not in ("confirmed", "contradicted"):
        return opened
    return replace(opened, remedy=next((problem.remedy for problem in problems if problem.remedy), None))


def alike_problems(comparison: Comparison, arms: Sequence[Arm]) -> list[Problem]:
    """Return a problem for each arm whose seeds all have one accuracy, as policies have that end at one rule."""
    problems = []
    for arm in arms:
        errors = comparison.at_optimum(arm)["test_loss"].astype(float)
        if len(errors) > 1 and float(np.ptp(errors)) < 1e-9:
            text = f"{arm_label(arm)}: all {len(errors)} seeds have the accuracy {1 - errors.iloc[0]:.3f}, a plateau"
            problems.append(Problem(text, Remedy("problems on which the seeds differ")))
    return problems


def overshoot_problems(comparison: Comparison, arms: Sequence[Arm]) -> list[Problem]:
    """Return a problem for each arm whose fitted peak is above its best measured accuracy by half of the margin.

    Where accuracy is flat and then breaks down, a parabola has a peak between the LRs that no run reaches.
    """
    problems = []
    for arm in arms:
        label = arm_label(arm)
        rows = comparison.rows[label]
        errors = rows[rows["status"] == "done"].groupby("lr")["test_loss"].mean().astype(float)
        minimum = comparison.fit.minima.get(label)
        if minimum is None or not errors.min() - minimum.value > comparison.margin.value / 2:
            continue
        lr = math.exp(comparison.fit.optima[label].value)
        text = f"{label}: fitted peak {1 - minimum.value:.3f}, but no LR has more than {1 - errors.min():.3f}"
        problems.append(Problem(text, Remedy(f"LR {lr:.2g} of {label}", lrs=((label, lr),))))
    return problems


def curve_problems(comparison: Comparison, arms: Sequence[Arm], n_seeds: int) -> list[Problem]:
    """Return what speaks against a verdict on the curves of arms at their LR, with a number of paired seeds."""
    problems = comparison.problems(arms)
    if not problems and n_seeds < MIN_SEEDS:
        remedy = Remedy(f"{MIN_SEEDS} seeds with curves (now {n_seeds})", seeds=MIN_SEEDS)
        problems.append(Problem(f"curves of {n_seeds} paired seeds, {MIN_SEEDS} needed", remedy))
    for arm in arms:
        rows, chosen = comparison.rows[arm_label(arm)], comparison.at_optimum(arm)
        lost = int((rows["lr"].isin(chosen["lr"]) & rows["status"].eq("diverged")).sum())
        if lost:
            problems.append(Problem(f"{arm_label(arm)}: {lost} seeds diverged at its best LR"))
    return problems


def points_at_optimum(comparison: Comparison, arm: Arm, split: str, metric: str) -> pd.DataFrame:
    """Return the points of a metric over training at the LR of an arm's grid that is nearest to its fitted optimum.

    Returns:
        Columns seed, step and value.
    """
    points, chosen = comparison.points(split, metric), comparison.at_optimum(arm)
    run = pd.Index(chosen["run_id"]).get_indexer(points["run_id"])
    of_arm: pd.DataFrame = points[run >= 0]
    return of_arm.assign(seed=chosen["seed"].to_numpy()[run[run >= 0]])


def tenths(comparison: Comparison, arm: Arm, metric: str) -> pd.DataFrame:
    """Return means of a train metric over tenths of the steps, at the LR nearest to an arm's fitted optimum.

    Returns:
        One row per seed and one column (1 to 10) per tenth of the steps.
    """
    points = points_at_optimum(comparison, arm, "train", metric)
    step = points["step"].to_numpy(float)
    last = arm["steps"] or step.max(initial=1)
    tenth = np.clip(np.ceil(10 * step / last), 1, 10).astype(int)
    seeds, row = np.unique(points["seed"].to_numpy(int)[step > 0], return_inverse=True)
    cells, shape = 11 * row + tenth[step > 0], (len(seeds), 11)
    sums, sizes = (
        np.bincount(cells, with_weights, 11 * len(seeds)).reshape(shape)
        for with_weights in (points["value"].to_numpy(float)[step > 0], None)
    )
    means = np.divide(sums, sizes, out=np.full(shape, math.nan), where=sizes > 0)
    with_points = np.flatnonzero(sizes.any(axis=0))
    return pd.DataFrame(means[:, with_points], pd.Index(seeds, name="seed"), pd.Index(with_points, name="tenth"))
