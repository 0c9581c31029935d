"""Claims B10, F1, F2 and F8: learning rates and peaks of reinforcement learning (RL)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison, require
from lorabench.analysis.estimate import combined
from lorabench.analysis.finding import Finding, UnjudgedError, decide
from lorabench.analysis.optima import PAPER_RATIO, judge_ratio
from lorabench.analysis.rewards import GoodRange, flat_top, good_ranges
from lorabench.analysis.rules import Above, Problem, Remedy, Within
from lorabench.claims.claim import Claim, untestable
from lorabench.claims.rl_shared import (
    CONDITIONS,
    LEARNED,
    RL_EXPERIMENTS,
    RL_RUNS,
    alike_problems,
    doubted,
    each_rank,
    if_learned,
    over_problems,
    overshoot_problems,
)
from lorabench.runs import GOOD
from lorabench.utils.formats import fixed_interval


def _flat_problems(comparison: Comparison, arms: list[Arm]) -> list[Problem]:
    """Return a problem for each arm that has several equally good LRs, and so no optimum."""
    problems = []
    for arm in arms:
        flat = flat_top(comparison, arm)
        if flat:
            text = f"{arm_label(arm)}: LRs {', '.join(f'{lr:.2g}' for lr in flat)} are equally good"
            remedy = Remedy(f"more seeds at these LRs of {arm_label(arm)}, or problems on which they differ")
            problems.append(Problem(text, remedy))
    return problems


def _breakdown_problems(comparison: Comparison, arms: list[Arm]) -> list[Problem]:
    """Return a problem for each arm whose gain over the base is lost by half or more at both neighbours of its best LR.

    What lies between is then not known, and a parabola through such points has an optimum with too small an error.
    """
    base = float(comparison.runs["base_reward"].astype(float).mean())
    problems = []
    for arm in arms:
        rows = comparison.rows[arm_label(arm)]
        accuracy = (1 - rows["test_loss"].astype(float)).fillna(0.0).groupby(rows["lr"].astype(float)).mean()
        best = int(accuracy.to_numpy().argmax())
        beside = accuracy.iloc[[place for place in (best - 1, best + 1) if 0 <= place < len(accuracy)]]
        if len(beside) == 2 and bool((beside - base < (accuracy.iloc[best] - base) / 2).all()):
            lrs = [math.sqrt(lr * accuracy.index[best]) for lr in beside.index]
            text = f"{arm_label(arm)}: breaks down at both LRs beside {accuracy.index[best]:.2g}"
            remedy = Remedy(
                f"LRs {lrs[0]:.2g} and {lrs[1]:.2g} of {arm_label(arm)}", lrs=tuple((arm_label(arm), lr) for lr in lrs)
            )
            problems.append(Problem(text, remedy))
    return problems


def lr_ratio_ten_in_rl(comparison: Comparison) -> Finding:
    """B10: judge the optimal LR of the highest rank over that of FullFT."""
    lora, fullft = require(("LoRA above rank 1", comparison.highest), ("FullFT", comparison.fullft))
    factor = comparison.judging.margins.lr_factor
    rule = Within(math.log(PAPER_RATIO / factor), math.log(PAPER_RATIO * factor))
    judged = judge_ratio(comparison, lora, fullft, rule, f"{PAPER_RATIO:g} up to a factor of {factor:g}")
    arms = [lora, fullft]
    checks = (_flat_problems, _breakdown_problems, overshoot_problems)
    problems = [problem for check in checks for problem in check(comparison, arms)]
    return if_learned(comparison, doubted(judged, problems), arms)


B10 = Claim(
    id="B10",
    kind="empirical",
    statement=f"In RL too, the optimal LR of LoRA is {PAPER_RATIO:g} times that of full fine-tuning",
    figure="6, 7",
    criterion=(
        "On every problem set, the ratio of the optimal LRs of the highest LoRA rank and FullFT is the same as "
        f"{PAPER_RATIO:g} within the factor for LRs that the preset gives. The optima are those of one fit of the test "
        "error rates of all arms in log LR. Inconclusive where an optimum is not resolved by its grid, or where the "
        "accuracies are no parabola: two neighbouring LRs with exactly one test accuracy for each seed, three that the "
        "noise does not tell apart, half of the gain lost at both LRs beside the best, or a fitted peak that is above "
        "the best measured accuracy by more than half of the margin of accuracies. "
        f"{LEARNED.format('each of the two')}"
    ),
    needs=RL_RUNS.format("LoRA above rank 1"),
    paper_value="10",
    unit="ratio",
    experiments=RL_EXPERIMENTS,
    judge=over_problems(lr_ratio_ten_in_rl),
    columns=("base_reward",),
    task="rl",
    conditions=CONDITIONS,
)


def rank_1_reaches_the_peak(comparison: Comparison) -> Finding:
    """F1: judge the error rate of rank 1 minus FullFT's; a better rank 1 confirms as well."""
    rank_1, fullft = require(("LoRA r1", comparison.lora.get(1)), ("FullFT", comparison.fullft))
    arms = [rank_1, fullft]
    judged = comparison.equal_losses(rank_1, fullft, better_too=True)
    problems = [*alike_problems(comparison, arms), *overshoot_problems(comparison, arms)]
    return if_learned(comparison, doubted(judged, problems), [fullft])


F1 = Claim(
    id="F1",
    kind="empirical",
    statement="In RL on MATH and GSM8K, LoRA of rank 1 reaches the peak of full fine-tuning",
    figure="6",
    criterion=(
        "On every problem set, the test error rate of rank 1 after the last step is the same as FullFT's within the "
        "margin, or lower. Both are the minima of one fit in log LR, paired by seed; the margin is the share of the "
        "gain in accuracy from the base to FullFT that the preset gives. Inconclusive where all seeds of either have "
        "exactly one accuracy, as on the plateau of a rule that all of them found, or where a fitted peak is above "
        f"the best measured accuracy by more than half of the margin. {LEARNED.format('FullFT')}"
    ),
    needs=RL_RUNS.format("rank 1"),
    paper_value="the same peak; no number",
    unit="error rate",
    experiments=("rl_math", "rl_gsm8k", "rl_arithmetic", "rl"),
    judge=over_problems(rank_1_reaches_the_peak),
    columns=("base_reward",),
    task="rl",
    conditions=CONDITIONS,
    core=True,
)

WIDER = 0.2
"""The smallest difference of two ranges of good LRs that matters, in decades: a factor of 1.6."""


def _in_words(good: GoodRange) -> str:
    """Format a range of good LRs."""
    at_least = "at least " if good.open else ""
    return f"{at_least}{good.width.value:.2f} ({good.lr_low:.2g} to {good.lr_high:.2g})"


def _open_problems(lora: GoodRange, fullft: GoodRange, arms: list[Arm]) -> list[Problem]:
    """Return a problem for each range that ends with its grid, unless it is the wider one and so decides nothing."""
    difference = lora.width.value - fullft.width.value
    counts = ((lora, difference < WIDER), (fullft, difference > -WIDER))
    return [
        Problem(f"{arm_label(arm)}: its range of good LRs may go on beyond its grid", Remedy("LRs beyond that grid"))
        for arm, (good, matters) in zip(arms, counts, strict=True)
        if good.open and matters
    ]


def _wider(comparison: Comparison, lora: Arm, fullft: Arm) -> Finding:
    """Judge F2 for one rank."""
    arms = [lora, fullft]
    labels = [arm_label(arm) for arm in arms]
    problems = comparison.problems(arms)
    if not all(label in comparison.fit.minima for label in labels):
        raise UnjudgedError("inconclusive", "; ".join(problem.text for problem in problems))
    ranges = good_ranges(comparison, arms)
    difference = combined(np.subtract, *(good.width for good in ranges))
    text = (
        f"{_in_words(ranges[0])} - FullFT's {_in_words(ranges[1])} = {difference.value:.2f} "
        f"{fixed_interval(*difference.interval(), 2)} decades of good LRs"
    )
    run_ids = [run_id for good in ranges for run_id in good.run_ids]
    problems += _open_problems(ranges[0], ranges[1], arms)
    judged = decide(Above(WIDER), difference, text, run_ids, problems, f"{WIDER:g} decades")
    if judged.verdict != "inconclusive" or problems:
        return judged
    between = tuple((label, lr) for label, good in zip(labels, ranges, strict=True) for lr in good.between)
    if not between:
        return judged
    listed = ", ".join(f"{lr:.2g} of {label}" for label, lr in between)
    return replace(judged, remedy=Remedy(f"LRs where the ranges end: {listed}", lrs=between))


def wider_range_of_lrs(comparison: Comparison) -> Finding:
    """F2: judge the width of the range of good LRs of each LoRA rank minus that of FullFT."""
    return each_rank(
        comparison, lambda lora, fullft: _wider(comparison, lora, fullft), lambda lora, fullft: [lora, fullft]
    )


F2 = Claim(
    id="F2",
    kind="empirical",
    statement="In RL, LoRA has a wider range of good LRs than full fine-tuning",
    figure="6, 7",
    criterion=(
        f"An LR is good if its test accuracy is at least {GOOD:.0%} of that near the arm's own fitted optimum. On "
        "every problem set, for every LoRA rank, the width of the range of good LRs minus FullFT's is above 0 by "
        f"{WIDER:g} decades or more. A step of the grid in which a range ends counts half, and the error has all of "
        "it, beside the seeds and the test problems, which are resampled for both arms alike. A diverged run has the "
        "accuracy 0. Inconclusive where a range that is not clearly the wider one may go on beyond its grid. "
        f"{LEARNED.format('each of the two')}"
    ),
    needs=RL_RUNS.format("LoRA"),
    paper_value="wider; no number",
    unit="decades of LR",
    experiments=RL_EXPERIMENTS,
    judge=over_problems(wider_range_of_lrs),
    columns=("base_reward",),
    task="rl",
    conditions=CONDITIONS,
    core=True,
)


F8 = Claim(
    id="F8",
    kind="prediction",
    statement="RL at the scale of DeepSeek-R1-Zero can be reproduced with low-rank LoRA",
    figure="text",
    criterion="LoRA of low rank reaches the final reward of FullFT after 5.3 million episodes",
    needs="RL runs of 5.3 million episodes",
    paper_value="5.3M episodes; not run",
    unit="accuracy",
    experiments=(),
    judge=untestable("a prediction that the paper did not test; 5.3 million episodes are out of reach here"),
)

CLAIMS = (B10, F1, F2, F8)
