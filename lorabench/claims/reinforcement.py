"""Claims B10, F1, F2 and F8: learning rates and peaks of reinforcement learning (RL); and what claims on RL share.

Final accuracies are compared as error rates, 1 - accuracy (see `lorabench.analysis.rewards`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps

import numpy as np

from lorabench.analysis import rewards
from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison, require
from lorabench.analysis.estimate import combined, mean_over_seeds
from lorabench.analysis.finding import Finding, UnjudgedError
from lorabench.analysis.optima import PAPER_RATIO, judge_ratio
from lorabench.analysis.rewards import FAR, MIN_GAIN, NEAR, TestReward
from lorabench.analysis.rules import Above, Problem, Remedy, Within
from lorabench.claims import scope
from lorabench.claims.claim import Evidence, claim, doubted, highest_and_full, judge_each, number, unjudged_if
from lorabench.claims.scope import RL_PRESETS, Named
from lorabench.runs import GOOD

CHEAPER = round(1 - GOOD, 9)
"""The smallest difference of the costs of a miss that matters, as a share of an arm's accuracy: what a good LR may lose
(see `lorabench.runs`)."""

CHEAPER_RULE = f"{CHEAPER:.0%} of the accuracy near the best LR, by which an LR counts as good"

MISS_FACTORS = f"{10**NEAR:.1f} to {10**FAR:.1f}"
"""By what factor an LR that misses the best one is off."""

LONG_RESPONSE = 30
"""Tokens per response from which a response may hold a chain of thought."""

LONG_RESPONSES = scope.response_length(LONG_RESPONSE, ("core", "paper"))
"""The condition of claims on chains of thought."""

CONDITIONS = (scope.swept, scope.response_length(8, RL_PRESETS), scope.beats_controls)
"""The conditions of the claims that compare arms in RL."""


def problem_sets(evidence: Evidence, test_reward: TestReward = "final_reward") -> Named:
    """Return the comparisons of error rates on each model and problem set, by one of the test rewards of a run.

    See `rewarded_errors`; a problem set on which no run ever got a reward is evidence for claim F7 only.
    """
    compared = evidence.compared_by(test_reward)
    unjudged_if(not compared, "no run ever got a reward")
    return [(comparison.label, comparison) for comparison in compared]


RankJudge = Callable[[Comparison, Arm, Arm], Finding]
"""Judges a LoRA arm of a comparison and FullFT."""


def each_rank(*learners: str) -> Callable[[RankJudge], Callable[[Comparison], Finding]]:
    """Return a decorator that makes a judge of one LoRA arm and FullFT judge every rank; the `learners`, of `lora` and
    `fullft`, must have learned."""

    def each(judge: RankJudge, comparison: Comparison) -> Finding:
        fullft, _ = require(("FullFT", comparison.fullft), ("LoRA", next(iter(comparison.lora.values()), None)))

        def judge_rank(lora: Arm) -> Finding:
            learned = [arm for arm in (lora, fullft) if arm["method"] in learners]
            return if_learned(comparison, judge(comparison, lora, fullft), learned)

        return judge_each(((arm_label(lora), lora) for lora in comparison.lora.values()), judge_rank)

    return lambda judge: wraps(judge)(partial(each, judge))


rl_claim = partial(claim, over=problem_sets, columns=("base_reward",), conditions=CONDITIONS)
"""A claim on RL, to which the conditions above apply unless it states others."""


def if_learned(comparison: Comparison, judged: Finding, arms: Sequence[Arm]) -> Finding:
    """Return the finding with the accuracies of arms added; it is inconclusive where one of them has not learned.

    Arms that have not learned are alike whatever the claim says.
    """
    if not arms:
        return judged
    base = float(comparison.runs["base_reward"].astype(float).mean())
    accuracies, problems = [], [] if math.isfinite(base) else [Problem("accuracy of the base not known")]
    for label in map(arm_label, arms):
        if minimum := comparison.fit.minima.get(label):
            accuracies.append(f"{label} {1 - minimum.value:.3f}")
            gain = combined(lambda error: 1 - error - base, minimum)
            if math.isfinite(base) and not (gain.value >= MIN_GAIN and (not gain.known or gain.interval()[0] > 0)):
                problems.append(Problem(f"{label} has not learned"))
    accuracies += [f"base {base:.3f}"] if math.isfinite(base) else []
    with_accuracies = f"{judged.reason}; peak test accuracy {', '.join(accuracies)}" if accuracies else judged.reason
    return doubted(replace(judged, reason=with_accuracies), problems)


def at_one_peak(judged: Finding, comparison: Comparison, arms: Sequence[Arm]) -> Finding:
    """Return the finding on peaks of arms; it is inconclusive where a peak is a plateau.

    It is a plateau if all seeds have one accuracy, as policies have that end at one rule.
    """
    problems = []
    for arm in arms:
        errors = comparison.at_optimum(arm)["test_loss"].astype(float)
        if len(errors) > 1 and float(np.ptp(errors)) < 1e-9:
            text = f"{arm_label(arm)}: all {len(errors)} seeds have the accuracy {1 - errors.iloc[0]:.3f}, a plateau"
            problems.append(Problem(text, Remedy("problems on which the seeds differ")))
    return doubted(judged, problems)


@rl_claim(
    "B10",
    over=lambda evidence: scope.at_papers_alpha(problem_sets(evidence)),
    conditions=(scope.papers_alpha, *CONDITIONS),
)
def _lr_ratio_ten_in_rl(comparison: Comparison) -> Finding:
    arms, factor = highest_and_full(comparison), comparison.judging.margins.lr_factor
    rule = Within(math.log(PAPER_RATIO / factor), math.log(PAPER_RATIO * factor))
    judged = judge_ratio(comparison, *arms, rule, f"{PAPER_RATIO:g} up to a factor of {factor:g}")
    base = float(comparison.runs["base_reward"].astype(float).mean())
    flat_tops, breakdowns = [], []
    for arm in arms:
        label, rows = arm_label(arm), comparison.rows[arm_label(arm)]
        if flat := rewards.flat_top(comparison, arm):
            text = f"{label}: LRs {', '.join(f'{lr:.2g}' for lr in flat)} are equally good"
            remedy = Remedy(f"more seeds at these LRs of {label}, or problems on which they differ")
            flat_tops.append(Problem(text, remedy))
        accuracy = (1 - rows["test_loss"].astype(float)).fillna(0.0).groupby(rows["lr"].astype(float)).mean()
        best = int(accuracy.to_numpy().argmax())
        neighbours = accuracy.iloc[[place for place in (best - 1, best + 1) if 0 <= place < len(accuracy)]]
        # Where half of the gain over the base or more is lost at both neighbours of the best LR, what lies between is
        # not known, and a parabola through such points has an optimum with too small an error.
        if len(neighbours) == 2 and bool((neighbours - base < (accuracy.iloc[best] - base) / 2).all()):
            lrs = tuple((label, math.sqrt(lr * accuracy.index[best])) for lr in neighbours.index)
            text = f"{label}: breaks down at both neighbours of the LR {accuracy.index[best]:.2g}"
            remedy = Remedy(f"LRs {lrs[0][1]:.2g} and {lrs[1][1]:.2g} of {label}", lrs=lrs)
            breakdowns.append(Problem(text, remedy))
    return if_learned(comparison, doubted(judged, [*flat_tops, *breakdowns]), arms)


@rl_claim("F1")
def _rank_1_reaches_the_peak(comparison: Comparison) -> Finding:
    rank_1, fullft = require(("LoRA r1", comparison.lora.get(1)), ("FullFT", comparison.fullft))
    judged = comparison.equal_losses(rank_1, fullft, better_too=True)
    judged = replace(judged, reason=f"{judged.reason}; {_as_measured(comparison, rank_1, fullft)}")
    return if_learned(comparison, at_one_peak(judged, comparison, [rank_1, fullft]), [fullft])


def _as_measured(comparison: Comparison, arm: Arm, other: Arm) -> str:
    """Return as text the mean difference of error rates by seed at each arm's best LR among those with most seeds."""
    best = []
    for label in map(arm_label, (arm, other)):
        done = comparison.rows[label][comparison.rows[label]["status"] == "done"]
        by_seed = done.pivot_table(index="seed", columns="lr", values="test_loss").astype(float)
        most = by_seed.loc[:, by_seed.count() == by_seed.count().max()]
        if most.empty:
            return f"{label} has no finished run"
        best.append(most[most.mean().idxmin()])
    gap = mean_over_seeds((best[0] - best[1]).dropna(), f"as measured {comparison.label} {arm_label(arm)}")
    lrs = " and ".join(f"{each.name:.2g}" for each in best)
    return f"at the best measured LRs, {lrs}: {number(gap, 3, '+')}, {gap.n_seeds} paired seeds"


@rl_claim("F2")
def _a_missed_lr_costs_lora_less(comparison: Comparison) -> Finding:
    lowest = next(iter(comparison.lora.values()), None)
    arms = require(("LoRA", lowest), ("FullFT", comparison.fullft))
    labels = [arm_label(arm) for arm in arms]
    if not all(label in comparison.fit.minima for label in labels):
        raise UnjudgedError("inconclusive", "; ".join(problem.text for problem in comparison.problems(arms)))
    problems = [
        Problem(f"{label}: no LR near {lr:.2g}", Remedy(f"LR {lr:.2g} of {label}", lrs=((label, lr),)))
        for arm, label in zip(arms, labels, strict=True)
        for lr in rewards.missing_lrs(comparison, arm)
    ]
    costs = [rewards.cost_of_a_miss(comparison, arm) for arm in arms]
    cheaper = combined(np.subtract, costs[1], costs[0])
    text = (
        f"off by a factor of {MISS_FACTORS} from the best LR, FullFT loses {costs[1].value:.1%} of "
        f"its accuracy and {labels[0]} {costs[0].value:.1%}: {number(cheaper, 3, '+')} of the accuracy"
        f"{comparison.fit.noise_text}"
    )
    judged = comparison.decide(Above(CHEAPER), cheaper, text, arms, CHEAPER_RULE, problems)
    return if_learned(comparison, judged, arms)


@claim("F8")
def _out_of_reach(evidence: Evidence) -> Finding:
    text = "a prediction that the paper did not test; 5.3 million episodes are out of reach here"
    raise UnjudgedError("not tested", text)
