"""Claims B10, F1, F2 and F8: learning rates and peaks of reinforcement learning (RL); and what claims on RL share.

Final accuracies are compared as error rates, 1 - accuracy (see `lorabench.analysis.rewards`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from lorabench.analysis import rewards
from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison, require
from lorabench.analysis.estimate import combined, mean_over_seeds
from lorabench.analysis.finding import MIN_SEEDS, Finding, UnjudgedError
from lorabench.analysis.optima import PAPER_RATIO, judge_ratio
from lorabench.analysis.rewards import COLLAPSED, FAR, LEAD, MAX_TRUNCATED, MIN_GAIN, NEAR, TestReward
from lorabench.analysis.rules import Above, Problem, Remedy, Within
from lorabench.claims import scope
from lorabench.claims.claim import Evidence, claim, doubted, highest_and_full, judge_each, number, unjudged_if
from lorabench.claims.scope import RL_PRESETS, Named
from lorabench.runs import GOOD

CHEAPER = round(1 - GOOD, 9)
"""The smallest difference of the costs of a miss that matters, as a share of an arm's accuracy: what a good LR may lose
(see `lorabench.runs`)."""

CHEAPER_RULE = f"{CHEAPER:.0%} of the accuracy near the best LR, by which an LR counts as good"

LONG_RESPONSE = 30
"""Tokens per response from which a response may hold a chain of thought."""

LONG_RESPONSES = scope.response_length(LONG_RESPONSE, ("core", "paper"))
"""The condition of claims on chains of thought."""

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

    return lambda judge: partial(each, judge)


rl_claim = partial(claim, over=problem_sets, task="rl", columns=("base_reward",), conditions=CONDITIONS)
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
    id="B10",
    statement=f"In RL too, the optimal LR of LoRA is {PAPER_RATIO:g} times that of full fine-tuning",
    figure="6, 7",
    criterion=(
        "On every problem set, the ratio of the optimal LRs of the highest LoRA rank and FullFT is the same as "
        f"{PAPER_RATIO:g} within the factor for LRs that the preset gives. The optima are those of one fit of the test "
        "error rates of all arms in log LR. Inconclusive where an optimum is not resolved by its grid, or where the "
        "accuracies are no parabola: two neighbouring LRs with exactly one test accuracy for each seed, three that the "
        "noise does not tell apart, half of the gain lost at both neighbours of the best LR, or a fitted peak that is "
        "above the best measured accuracy by more than half of the margin of accuracies. "
        f"{LEARNED.format('each of the two')}"
    ),
    needs=RL_RUNS.format("LoRA above rank 1"),
    paper_value="10",
    unit="ratio",
    experiments=RL_EXPERIMENTS,
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


@rl_claim(
    id="F1",
    statement="In RL, LoRA of rank 1 reaches the peak of full fine-tuning",
    figure="6",
    criterion=(
        "On every problem set, the test error rate of rank 1 after the last step is the same as FullFT's within the "
        "margin, or lower. Both are the minima of one fit in log LR, paired by seed; the margin is the share of the "
        "gain in accuracy from the base to FullFT that the preset gives. Inconclusive where all seeds of either have "
        "exactly one accuracy, as on the plateau of a rule that all of them found, or where a fitted peak is above "
        "the best measured accuracy by more than half of the margin. The reason also gives the difference as measured, "
        f"paired by seed, at each arm's best LR among those with most seeds. {LEARNED.format('FullFT')}"
    ),
    needs=RL_RUNS.format("rank 1"),
    paper_value="the same peak on MATH and GSM8K; no number",
    unit="error rate",
    experiments=("rl_math", "rl_gsm8k", "rl_arithmetic", "rl"),
    core=True,
)
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


@rl_claim(
    id="F2",
    statement="In RL, LoRA has a wider range of good LRs than full fine-tuning",
    figure="6, 7",
    criterion=(
        f"An LR misses the best one if it is off by {NEAR:g} to {FAR:g} decades, a factor of {10**NEAR:.1f} to "
        f"{10**FAR:.1f}, to either side. The cost of a miss is the share of its accuracy nearer to its fitted optimum "
        "that an arm loses there; both are means over log LR of the test accuracy, on the line between the means over "
        "seeds at neighbouring LRs. On every problem set, FullFT's cost is above that of the lowest LoRA rank by "
        f"{CHEAPER:g} or more, the share up to which an LR counts as good. A breakdown counts with its accuracy, and a "
        "run without one has the accuracy 0. The error is that of the seeds at each LR and of the test problems, which "
        f"are resampled for both arms alike. {LEARNED.format('each of the two')}"
    ),
    needs=RL_RUNS.format("LoRA"),
    paper_value="wider; no number",
    unit="share of accuracy",
    experiments=RL_EXPERIMENTS,
    core=True,
)
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
        f"off by a factor of {10**NEAR:.1f} to {10**FAR:.1f} from the best LR, FullFT loses {costs[1].value:.1%} of "
        f"its accuracy and {labels[0]} {costs[0].value:.1%}: {number(cheaper, 3, '+')} of the accuracy"
        f"{comparison.fit.noise_text}"
    )
    judged = comparison.decide(Above(CHEAPER), cheaper, text, arms, CHEAPER_RULE, problems)
    return if_learned(comparison, judged, arms)


@claim(
    id="F8",
    kind="prediction",
    statement="RL at the scale of DeepSeek-R1-Zero can be reproduced with low-rank LoRA",
    criterion="LoRA of low rank reaches the final reward of FullFT after 5.3 million episodes",
    needs="RL runs of 5.3 million episodes",
    paper_value="5.3M episodes; not run",
    unit="accuracy",
    experiments=(),
)
def _out_of_reach(evidence: Evidence) -> Finding:
    text = "a prediction that the paper did not test; 5.3 million episodes are out of reach here"
    raise UnjudgedError("not tested", text)
