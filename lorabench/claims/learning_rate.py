"""Claims B1, B3, B4 and B9 on the optimal learning rate."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd

from lorabench.analysis.alpha_rules import judged_arms
from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import COMPARED, Comparison, Judging, comparisons, require
from lorabench.analysis.curves import at_end, at_step
from lorabench.analysis.estimate import combined
from lorabench.analysis.finding import Finding, UnjudgedError, decide, together
from lorabench.analysis.memorisation import is_memorisation
from lorabench.analysis.optima import PAPER_RATIO, as_ratio, coupled, in_words, judge_ratio, ratio_text
from lorabench.analysis.rules import Above, Remedy, Within
from lorabench.claims import scope
from lorabench.claims.claim import (
    Evidence,
    claim,
    condition,
    doubted,
    highest_and_full,
    judge_each,
    named_problems,
    problem_if,
    unjudged_if,
)
from lorabench.claims.scope import FULL_STEPS, HIGH_RANK

# Bounds whose meaning the criteria say.
LOW_RANK = 4
SHORT_STEPS = (50, 100)
SHORT_RATIO = 15.0

SAME_FACTOR, SAME_DOUBLINGS = 2.0, 7
"""The factor between two optimal LRs up to which the paper calls them nearly the same, and the number of doublings of
the rank, from 4 to 512, over which it does."""

MIN_SPAN = 16
"""The least ratio of two ranks whose optimal LRs are compared: 4 doublings, about half of the paper's. With three seeds
an equality over 4 doublings is seen in three cases of four or more, over 2 in one of four to a half, over 1 never."""

LEAST_SHIFT = 1.25
"""The least factor by which rank 1's optimal LR is lower: in published sweeps of Qwen3-30B-A3B it is 1.2 to 2.4."""

GROWTH = math.sqrt(SHORT_RATIO / PAPER_RATIO)
"""The least growth of the ratio, from long runs to short ones, that matters: half of the paper's on a log axis."""


def ratio_rule(ratio: float, factor: float) -> tuple[Within, str]:
    """Return the rule that the logarithm of a ratio is that of another within a factor, and a text on the margin."""
    return (
        Within(math.log(ratio / factor), math.log(ratio * factor)),
        f"within a factor of {factor:g} of {ratio:g}, by the preset's lr_factor",
    )


@claim(
    "B1",
    over=scope.chosen(scope.learning, scope.at_papers_alpha, scope.sweeps_of_both, scope.beyond_short),
    conditions=(
        scope.papers_alpha,
        scope.longer_runs("laptop_more", "long_runs", "lr_ratio", "overnight", "smollm2", "first_gpu", "core", "paper"),
    ),
)
def _lr_ratio_ten(comparison: Comparison) -> Finding:
    lora, fullft = highest_and_full(comparison)
    return judge_ratio(comparison, lora, fullft, *ratio_rule(PAPER_RATIO, comparison.judging.margins.lr_factor))


def same_factor(low: int, high: int) -> float:
    """Return the factor up to which the optimal LRs of two ranks are nearly the same: the paper's, by doublings."""
    return float(SAME_FACTOR ** (math.log2(high / low) / SAME_DOUBLINGS))


FROM_4_TO_64 = same_factor(4, 64)


def _spans(runs: pd.DataFrame) -> pd.Series[float]:
    """Return for each run the ratio of the highest to the lowest rank from `LOW_RANK` up in its comparison."""
    lora = runs[(runs["method"] == "lora") & judged_arms(runs) & runs["placement"].fillna("all").eq("all")]
    by_comparison = lora[lora["rank"] >= LOW_RANK].groupby(COMPARED, dropna=False)["rank"]
    spans: pd.Series[float] = (by_comparison.transform("max") / by_comparison.transform("min")).astype(float)
    return spans


wide_spans = scope.those(lambda comparison: _spans(comparison.runs).max() >= MIN_SPAN, or_all=True)
"""Leave out comparisons whose ranks span less than a factor of `MIN_SPAN`, if others span more."""


@condition(
    f"LoRA ranks from {LOW_RANK} up over a factor of {MIN_SPAN}",
    *("laptop", "long_runs", "overnight", "smollm2", "first_gpu", "core", "paper"),
)
def wide_span(evidence: Evidence) -> str | None:
    spans = _spans(evidence.runs[~is_memorisation(evidence.runs)])
    if spans.empty:
        return "no such ranks"
    return f"a factor of {spans.max():g}" if spans.max() < MIN_SPAN else None


@claim("B3", over=scope.chosen(scope.learning, scope.at_one_alpha, wide_spans), conditions=(scope.one_alpha, wide_span))
def _lr_independent_of_rank(comparison: Comparison) -> Finding:
    arms = {rank: arm for rank, arm in comparison.lora.items() if rank >= LOW_RANK}
    if len(arms) < 2:
        raise UnjudgedError("inconclusive" if arms else "not tested", f"fewer than two LoRA ranks from {LOW_RANK} up")
    low, high = min(arms), max(arms)
    factor = same_factor(low, high)
    margin_rule = (
        f"within a factor of {factor:.2f}: the paper's {SAME_FACTOR:g} over {SAME_DOUBLINGS} doublings of the rank, "
        f"for the {math.log2(high / low):.2g} from {low} to {high}"
    )
    return judge_ratio(comparison, arms[high], arms[low], Within.margin(math.log(factor)), margin_rule)


@claim("B4", over=scope.chosen(scope.learning, scope.at_one_alpha), conditions=(scope.one_alpha,))
def _rank_1_lower_lr(comparison: Comparison) -> Finding:
    rank_1, highest = require(("LoRA r1", comparison.lora.get(1)), ("LoRA above rank 1", comparison.highest))
    others = [arm for rank, arm in comparison.lora.items() if rank >= HIGH_RANK] or [highest]
    ratios = [comparison.fit.log_ratio(arm_label(arm), arm_label(rank_1)) for arm in others]
    shift = combined(lambda *logs: np.mean(logs, axis=0), *ratios)
    by_rank = "; ".join(ratio_text(comparison, arm, rank_1) for arm in others)
    mean = f"their geometric mean is {in_words(shift)}" if len(others) > 1 else ""
    text = "; ".join(part for part in (by_rank, mean) if part)
    margin_rule = f"a factor of {LEAST_SHIFT:g}, about the least of published sweeps"
    rule, arms = Above(math.log(LEAST_SHIFT)), [rank_1, *others]
    return as_ratio(comparison.decide(rule, shift, text, arms, margin_rule, resolved=True))


@claim("B9", conditions=(scope.papers_alpha,))
def _short_runs_want_more(evidence: Evidence) -> Finding:
    swept = [(comparison.runs["steps"].iloc[0], (name, comparison)) for name, comparison in _swept(evidence)]
    known = [(int(steps), named) for steps, named in swept if not pd.isna(steps)]
    short = [named for steps, named in known if SHORT_STEPS[0] <= steps <= SHORT_STEPS[1]]
    whole = [named for steps, named in known if steps >= FULL_STEPS]
    text = f"no runs of {SHORT_STEPS[0]} to {SHORT_STEPS[1]} steps, and none of {FULL_STEPS:,} or more"
    unjudged_if(not short and not whole, text)
    judged = judge_each(scope.one_at_a_time([*short, *whole]), _ratio_of_length)
    lacking = f"no runs of {FULL_STEPS:,} steps or more, whose ratio at the end would have to be lower"
    return doubted(judged, problem_if(not whole, lacking, Remedy(f"runs of {FULL_STEPS:,} steps")), ["confirmed"])


_swept = scope.chosen(scope.learning, scope.at_papers_alpha, scope.sweeps_of_both)


def _ratio_of_length(comparison: Comparison) -> Finding:
    lora, fullft = highest_and_full(comparison)
    steps, runs = fullft["steps"], comparison.of([lora, fullft])
    rule, margin_rule = ratio_rule(SHORT_RATIO, comparison.judging.margins.lr_factor)
    if steps < FULL_STEPS:
        judged = judge_ratio(comparison, lora, fullft, rule, margin_rule)
        return replace(judged, reason=f"{steps} steps, {judged.reason}")
    # The losses by test example are those at the end, and of another split.
    judging = Judging(comparison.judging.margins, noise=comparison.judging.noise)
    [full] = comparisons(at_end(runs), comparison.curves, judging)
    growing = f"half of the paper's growth, a factor of {GROWTH:.2f}"
    findings: list[Finding] = []
    for step in SHORT_STEPS:
        short = next(iter(comparisons(at_step(runs, comparison.curves, step), comparison.curves, judging)), None)
        if short is None or short.highest is None or short.fullft is None:
            findings.append(Finding("not tested", f"no validation losses of both methods at step {step}"))
            continue
        arms = short.highest, short.fullft
        at_length = judge_ratio(short, *arms, rule, margin_rule)
        findings.append(replace(at_length, reason=f"at step {step} {at_length.reason}"))
        from_short, from_full = (part.fit.log_ratio(*map(arm_label, arms)) for part in (short, full))
        growth = combined(np.subtract, from_short, coupled(short, full, from_short, from_full, short.label))
        problems = named_problems(short.problems(arms, resolved=True), f"at step {step}")
        problems += named_problems(full.problems(highest_and_full(full), resolved=True), "at the end")
        text = f"ratio at step {step} over that at the end {in_words(growth)}"
        ids = short.run_ids(arms)
        findings.append(as_ratio(decide(Above(math.log(GROWTH)), growth, text, ids, problems, growing)))
    decisive = together(findings)
    length = f"at {steps} steps, by validation losses: {ratio_text(full, *highest_and_full(full))}"
    return replace(decisive, reason=f"{decisive.reason}; {length}")
