"""Claims B1, B3, B4 and B9: the optimal learning rate, by method, rank and length of the run."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from lorabench.analysis.arms import arm_label
from lorabench.analysis.at_step import at_end, at_step, coupled
from lorabench.analysis.comparison import Arm, Comparison, Judging, comparisons, require
from lorabench.analysis.estimate import combined
from lorabench.analysis.finding import Finding, UnjudgedError, decide, together, worst
from lorabench.analysis.optima import PAPER_RATIO, as_ratio, in_words, judge_ratio, ratio_text
from lorabench.analysis.rules import Above, Problem, Within
from lorabench.claims.claim import Claim
from lorabench.claims.conditions import longest_run
from lorabench.claims.evidence import SWEEP, over
from lorabench.claims.scopes import FULL_STEPS, every_dataset

LR_RATIO = f"LoRA's optimal LR is about {PAPER_RATIO:g} times that of full fine-tuning"
"""The fact that several claims state."""

LOW_RANK = 4
"""The rank from which the optimal LR is nearly the same at all ranks."""

SAME_FACTOR = 2.0
"""The factor between two optimal LRs up to which the paper calls them nearly the same."""

LEAST_SHIFT = 1.25
"""The least factor by which rank 1's optimal LR is lower: in published sweeps of Qwen3-30B-A3B it is 1.2 to 2.4."""

HIGH_RANK = 16
"""The rank from which a rank counts as high beside rank 1."""

SHORT_STEPS = (50, 100)
"""The lengths, in steps, that count as short."""

SHORT_RATIO = 15.0
"""The ratio of optimal LRs that the paper gives for short runs."""

GROWTH = math.sqrt(SHORT_RATIO / PAPER_RATIO)
"""The least growth of the ratio, from long runs to short ones, that matters: half of the paper's on a log axis."""

_SEEDS = "further seeds at the LRs around the optimum"

_FACTOR = "the preset's lr_factor (1.6 unless it says otherwise)"


def ratio_rule(ratio: float, factor: float) -> tuple[Within, str]:
    """Return the rule that the logarithm of a ratio is that of another within a factor, and the margin in words."""
    return (
        Within(math.log(ratio / factor), math.log(ratio * factor)),
        f"within a factor of {factor:g} of {ratio:g}, by the preset's lr_factor",
    )


def lr_ratio_ten(comparison: Comparison) -> Finding:
    """B1: judge the optimal LR of the highest rank over that of FullFT."""
    lora, fullft = require(("LoRA above rank 1", comparison.highest), ("FullFT", comparison.fullft))
    return judge_ratio(comparison, lora, fullft, *ratio_rule(PAPER_RATIO, comparison.judging.margins.lr_factor))


B1 = Claim(
    id="B1",
    kind="empirical",
    statement=f"The optimal LR of LoRA is {PAPER_RATIO:g} times that of full fine-tuning",
    figure="2",
    criterion=(
        "In every comparison the fitted optimal LR of the highest rank, over that of FullFT, is "
        f"{PAPER_RATIO:g} within a factor that is the margin, {_FACTOR}"
    ),
    needs=f"{SWEEP}; {_SEEDS}",
    paper_value="10 (fit over 14 models: 9.8)",
    unit="ratio",
    experiments=("rank",),
    judge=over(every_dataset, lr_ratio_ten),
    fact=LR_RATIO,
    core=True,
)


def lr_independent_of_rank(comparison: Comparison) -> Finding:
    """B3: judge the optimal LR of the highest rank over that of the lowest from LOW_RANK up."""
    arms = {rank: arm for rank, arm in comparison.lora.items() if rank >= LOW_RANK}
    if len(arms) < 2:
        raise UnjudgedError("inconclusive" if arms else "not tested", f"fewer than two LoRA ranks from {LOW_RANK} up")
    rule = Within(-math.log(SAME_FACTOR), math.log(SAME_FACTOR))
    margin_rule = f"within a factor of {SAME_FACTOR:g}, the paper's own number"
    return judge_ratio(comparison, arms[max(arms)], arms[min(arms)], rule, margin_rule)


B3 = Claim(
    id="B3",
    kind="empirical",
    statement=f"The optimal LR of LoRA is nearly the same at all ranks from {LOW_RANK} up",
    figure="2",
    criterion=(
        f"In every comparison the fitted optimal LR of the highest rank is that of the lowest rank from {LOW_RANK} "
        f"up, within a factor of {SAME_FACTOR:g}"
    ),
    needs=f"LoRA on all layers at two or more ranks from {LOW_RANK} up, each with an LR grid; {_SEEDS}",
    paper_value="less than 2 from rank 4 to 512",
    unit="ratio",
    experiments=("rank",),
    judge=over(every_dataset, lr_independent_of_rank),
    core=True,
)


def rank_1_lower_lr(comparison: Comparison) -> Finding:
    """B4: judge the optimal LR of each rank from HIGH_RANK up, or else of the highest, over that of rank 1."""
    rank_1, highest = require(("LoRA r1", comparison.lora.get(1)), ("LoRA above rank 1", comparison.highest))
    others = [arm for rank, arm in comparison.lora.items() if rank >= HIGH_RANK] or [highest]
    rule, margin_rule = (
        Above(math.log(LEAST_SHIFT)),
        f"a factor of {LEAST_SHIFT:g}, about the least of published sweeps",
    )
    judged = [judge_ratio(comparison, arm, rank_1, rule, margin_rule) for arm in others]
    return replace(worst(judged), run_ids=tuple(sorted(comparison.of([rank_1, *others])["run_id"])))


B4 = Claim(
    id="B4",
    kind="empirical",
    statement="Rank 1 has a lower optimal LR than high ranks",
    figure="2",
    criterion=(
        f"In every comparison the fitted optimal LR of each rank from {HIGH_RANK} up, or else of the highest rank, is "
        f"above that of rank 1 by a factor of {LEAST_SHIFT:g}"
    ),
    needs=f"LoRA on all layers at rank 1 and a higher one, each with an LR grid; {_SEEDS}",
    paper_value="lower; no number",
    unit="ratio",
    experiments=("rank",),
    judge=over(every_dataset, rank_1_lower_lr),
    core=True,
)


def short_runs_want_more(comparison: Comparison) -> Finding:
    """B9: judge the LR ratio of the highest rank to FullFT at short lengths, and over the ratio at full length."""
    lora, fullft = require(("LoRA above rank 1", comparison.highest), ("FullFT", comparison.fullft))
    steps = fullft["steps"]
    lengths = [step for step in SHORT_STEPS if steps is not None and step < steps]
    if not lengths:
        raise UnjudgedError("not tested", f"runs of {steps or 'unknown'} steps, none longer than {SHORT_STEPS[0]}")
    runs = comparison.of([lora, fullft])
    # The losses by test example are those at the end, and of another split.
    judging = Judging(comparison.judging.margins, noise=comparison.judging.noise)
    [full] = comparisons(at_end(runs), comparison.curves, judging)
    findings: list[Finding] = []
    for step in lengths:
        held = comparisons(at_step(runs, comparison.curves, step), comparison.curves, judging)
        if not held or held[0].highest is None or held[0].fullft is None:
            findings.append(Finding("not tested", f"no validation losses of both methods at step {step}"))
        else:
            findings += _of_length(held[0], full, step)
    decisive = together(findings)
    length = f"at {steps} steps, by validation losses: {ratio_text(full, *_arms(full))}"
    return replace(decisive, reason=f"{decisive.reason}; {length}")


def _arms(comparison: Comparison) -> list[Arm]:
    return require(("LoRA", comparison.highest), ("FullFT", comparison.fullft))


def _of_length(short: Comparison, full: Comparison, step: int) -> list[Finding]:
    """Judge the ratio at a step, and the ratio there over that at the end of the same runs."""
    lora, fullft = _arms(short)
    labels = arm_label(lora), arm_label(fullft)
    factor = short.judging.margins.lr_factor
    at_length = judge_ratio(short, lora, fullft, *ratio_rule(SHORT_RATIO, factor))
    growth = combined(
        np.subtract, *coupled(short, full, short.fit.log_ratio(*labels), full.fit.log_ratio(*labels), short.label)
    )
    problems = [
        Problem(f"{when} {problem.text}", problem.remedy)
        for when, comparison in ((f"at step {step}", short), ("at the end", full))
        for problem in comparison.problems(_arms(comparison), resolved=True)
    ]
    rule, margin_rule = Above(math.log(GROWTH)), f"half of the paper's growth, a factor of {GROWTH:.2f}"
    text = f"ratio at step {step} over that at the end {in_words(growth)}"
    grown = as_ratio(decide(rule, growth, text, short.of([lora, fullft])["run_id"], problems, margin_rule))
    return [replace(at_length, reason=f"at step {step} {at_length.reason}"), grown]


B9 = Claim(
    id="B9",
    kind="opinion",
    statement=(
        f"Short runs need a higher ratio of LRs, about {SHORT_RATIO:g} in runs of fewer than about {max(SHORT_STEPS)} "
        "steps"
    ),
    figure="text",
    criterion=(
        f"Two numbers are judged, with the loss after {SHORT_STEPS[0]} and after {SHORT_STEPS[1]} steps of longer "
        f"runs. The ratio of optimal LRs there is {SHORT_RATIO:g} within a factor that is the margin, {_FACTOR}; and "
        f"it is above the ratio at the end of the same runs by a factor of {GROWTH:.2f}, half of the paper's growth "
        "on a log axis. All losses are on the validation split, as the test split is measured at the end only. A short "
        "run is the beginning of a long one, so the errors of the two ratios are taken as correlated, as the residuals "
        "of the runs are"
    ),
    needs=(
        f"{SWEEP}; runs of {FULL_STEPS:,} steps or more with validation losses at steps {SHORT_STEPS[0]} and "
        f"{SHORT_STEPS[1]}; {_SEEDS}"
    ),
    paper_value="about 15 below about 100 steps; 10 for long runs",
    unit="ratio",
    experiments=("short_run",),
    judge=over(every_dataset, short_runs_want_more),
    conditions=(longest_run(FULL_STEPS, ("long_runs", "core", "paper")),),
    fact=LR_RATIO,
)

CLAIMS = (B1, B3, B4, B9)
