"""Claims B10, F1, F2 and F8: learning rates and peaks of reinforcement learning (RL); and what claims on RL share.

Final accuracies are compared as error rates, 1 - accuracy (see `lorabench.analysis.rewards`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison, require
from lorabench.analysis.estimate import combined
from lorabench.analysis.finding import MIN_SEEDS, Finding, UnjudgedError, decide
from lorabench.analysis.optima import PAPER_RATIO, judge_ratio
from lorabench.analysis.rewards import COLLAPSED, LEAD, MAX_TRUNCATED, MIN_GAIN, flat_top, good_range
from lorabench.analysis.rules import Above, Problem, Remedy, Within
from lorabench.claims.claim import Claim, Evidence, doubted, highest_and_full, judge_each
from lorabench.claims.scope import beats_controls, response_length, swept
from lorabench.runs import GOOD
from lorabench.utils.formats import fixed_interval

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

CONDITIONS = (swept(6, MIN_SEEDS, RL_PRESETS), response_length(8, RL_PRESETS), beats_controls(RL_PRESETS))
"""The conditions of the claims that compare arms in RL."""

rl_claim = partial(Claim, task="rl", columns=("base_reward",), conditions=CONDITIONS)
"""A claim on RL, to which the conditions above apply unless it states others."""


def over_problems(judge: Callable[[Comparison], Finding], at_best: bool = False) -> Callable[[Evidence], Finding]:
    """Return a function that judges each model and problem set by itself on error rates; the worst finding decides.

    A problem set on which no run ever got a reward is left out: it is evidence for claim F7 only. So is a set on which
    some method is not ahead of the controls, where there are others (see `lorabench.analysis.rewards`).

    Args:
        judge: judges one comparison, whose losses are error rates.
        at_best: whether they are those at the evaluation that is best on validation, and not those after the last step.
    """

    def judge_all(evidence: Evidence) -> Finding:
        compared = evidence.at_best_evaluation if at_best else evidence.at_last_evaluation
        if not compared:
            raise UnjudgedError("not tested", "no run ever got a reward")
        return judge_each(((comparison.label, comparison) for comparison in compared), judge)

    return judge_all


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
    named = ((arm_label(lora), lora) for lora in comparison.lora.values())
    return judge_each(named, lambda lora: if_learned(comparison, judge(lora, fullft), learners(lora, fullft)))


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


def at_one_peak(judged: Finding, comparison: Comparison, arms: Sequence[Arm]) -> Finding:
    """Return the finding on peaks of arms; it is inconclusive where a peak is a plateau or lies above all runs.

    It is a plateau if all seeds have one accuracy, as policies have that end at one rule.
    """
    problems = []
    for arm in arms:
        errors = comparison.at_optimum(arm)["test_loss"].astype(float)
        if len(errors) > 1 and float(np.ptp(errors)) < 1e-9:
            text = f"{arm_label(arm)}: all {len(errors)} seeds have the accuracy {1 - errors.iloc[0]:.3f}, a plateau"
            problems.append(Problem(text, Remedy("problems on which the seeds differ")))
    return doubted(judged, problems + _overshoots(comparison, arms))


def _overshoots(comparison: Comparison, arms: Sequence[Arm]) -> list[Problem]:
    """Return a problem for each arm whose fitted peak is above its best measured accuracy by half of the margin.

    Where accuracy is flat and then breaks down, a parabola has a peak between the LRs that no run reaches.
    """
    problems = []
    for label in map(arm_label, arms):
        rows, minimum = comparison.rows[label], comparison.fit.minima.get(label)
        errors = rows[rows["status"] == "done"].groupby("lr")["test_loss"].mean().astype(float)
        if minimum is not None and errors.min() - minimum.value > comparison.margin.value / 2:
            lr = math.exp(comparison.fit.optima[label].value)
            text = f"{label}: fitted peak {1 - minimum.value:.3f}, but no LR has more than {1 - errors.min():.3f}"
            problems.append(Problem(text, Remedy(f"LR {lr:.2g} of {label}", lrs=((label, lr),))))
    return problems


def _breakdown(comparison: Comparison, arm: Arm) -> Problem | None:
    """Return a problem if half of an arm's gain over the base or more is lost at both neighbours of its best LR.

    What lies between is then not known, and a parabola through such points has an optimum with too small an error.
    """
    label = arm_label(arm)
    rows, base = comparison.rows[label], float(comparison.runs["base_reward"].astype(float).mean())
    accuracy = (1 - rows["test_loss"].astype(float)).fillna(0.0).groupby(rows["lr"].astype(float)).mean()
    best = int(accuracy.to_numpy().argmax())
    neighbours = accuracy.iloc[[place for place in (best - 1, best + 1) if 0 <= place < len(accuracy)]]
    if len(neighbours) < 2 or not bool((neighbours - base < (accuracy.iloc[best] - base) / 2).all()):
        return None
    lrs = tuple((label, math.sqrt(lr * accuracy.index[best])) for lr in neighbours.index)
    text = f"{label}: breaks down at both LRs beside {accuracy.index[best]:.2g}"
    return Problem(text, Remedy(f"LRs {lrs[0][1]:.2g} and {lrs[1][1]:.2g} of {label}", lrs=lrs))


def lr_ratio_ten_in_rl(comparison: Comparison) -> Finding:
    """B10: judge the optimal LR of the highest rank over that of FullFT."""
    lora, fullft = highest_and_full(comparison)
    factor, arms = comparison.judging.margins.lr_factor, [lora, fullft]
    rule = Within(math.log(PAPER_RATIO / factor), math.log(PAPER_RATIO * factor))
    judged = judge_ratio(comparison, lora, fullft, rule, f"{PAPER_RATIO:g} up to a factor of {factor:g}")
    problems = []
    for arm in arms:
        if flat := flat_top(comparison, arm):
            text = f"{arm_label(arm)}: LRs {', '.join(f'{lr:.2g}' for lr in flat)} are equally good"
            remedy = Remedy(f"more seeds at these LRs of {arm_label(arm)}, or problems on which they differ")
            problems.append(Problem(text, remedy))
    problems += [problem for arm in arms if (problem := _breakdown(comparison, arm))]
    return if_learned(comparison, doubted(judged, problems + _overshoots(comparison, arms)), arms)


B10 = rl_claim(
    id="B10",
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
)


def rank_1_reaches_the_peak(comparison: Comparison) -> Finding:
    """F1: judge the error rate of rank 1 minus FullFT's; a better rank 1 confirms as well."""
    rank_1, fullft = require(("LoRA r1", comparison.lora.get(1)), ("FullFT", comparison.fullft))
    arms = [rank_1, fullft]
    judged = comparison.equal_losses(rank_1, fullft, better_too=True)
    return if_learned(comparison, at_one_peak(judged, comparison, arms), [fullft])


F1 = rl_claim(
    id="F1",
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
    core=True,
)

WIDER = 0.2
"""The smallest difference of two ranges of good LRs that matters, in decades: a factor of 1.6."""


def wider_range_of_lrs(comparison: Comparison) -> Finding:
    """F2: judge the width of the range of good LRs of each LoRA rank minus that of FullFT."""

    def judge(lora: Arm, fullft: Arm) -> Finding:
        arms = [lora, fullft]
        labels = [arm_label(arm) for arm in arms]
        problems = comparison.problems(arms)
        if not all(label in comparison.fit.minima for label in labels):
            raise UnjudgedError("inconclusive", "; ".join(problem.text for problem in problems))
        ranges = [good_range(comparison, arm) for arm in arms]
        difference = combined(np.subtract, *(good.width for good in ranges))
        texts = [
            f"{'at least ' if good.open else ''}{good.width.value:.2f} ({good.lr_low:.2g} to {good.lr_high:.2g})"
            for good in ranges
        ]
        text = (
            f"{texts[0]} - FullFT's {texts[1]} = {difference.value:.2f} {fixed_interval(*difference.interval(), 2)} "
            "decades of good LRs"
        )
        # A range that is clearly the wider one may be wider still.
        matters = (difference.value < WIDER, difference.value > -WIDER)
        for label, good, is_narrow in zip(labels, ranges, matters, strict=True):
            if good.open and is_narrow:
                problem = f"{label}: its range of good LRs may go on beyond its grid"
                problems.append(Problem(problem, Remedy("LRs beyond that grid")))
        run_ids = [run_id for good in ranges for run_id in good.run_ids]
        judged = decide(Above(WIDER), difference, text, run_ids, problems, f"{WIDER:g} decades")
        between = tuple((label, lr) for label, good in zip(labels, ranges, strict=True) for lr in good.between)
        if judged.verdict != "inconclusive" or problems or not between:
            return judged
        listed = ", ".join(f"{lr:.2g} of {label}" for label, lr in between)
        return replace(judged, remedy=Remedy(f"LRs where the ranges end: {listed}", lrs=between))

    return each_rank(comparison, judge, lambda lora, fullft: [lora, fullft])


F2 = rl_claim(
    id="F2",
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
    core=True,
)

F8 = Claim(
    id="F8",
    kind="prediction",
    statement="RL at the scale of DeepSeek-R1-Zero can be reproduced with low-rank LoRA",
    criterion="LoRA of low rank reaches the final reward of FullFT after 5.3 million episodes",
    needs="RL runs of 5.3 million episodes",
    paper_value="5.3M episodes; not run",
    unit="accuracy",
    experiments=(),
    judge=lambda _: Finding(
        "not tested", "a prediction that the paper did not test; 5.3 million episodes are out of reach here"
    ),
)

CLAIMS = (B10, F1, F2, F8)
