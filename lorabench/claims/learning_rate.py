"""Claims B1, B3, B4 and B9: the optimal learning rate, by method, rank and length of the run."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np

from lorabench.analysis.arms import arm_label
from lorabench.analysis.at_step import at_step
from lorabench.analysis.comparison import Comparison, comparisons, require
from lorabench.analysis.finding import (
    Finding,
    UnjudgedError,
    Verdict,
    all_of,
    finding,
    together,
    within,
    worst,
)
from lorabench.analysis.lr_ratio import PAPER_RATIO, QUANTILES, RATIO_BAND, judge_ratio, lr_ratio
from lorabench.claims.claim import Claim
from lorabench.claims.evidence import SWEEP, over
from lorabench.claims.scopes import every_dataset
from lorabench.utils.formats import fixed_interval

LOW_RANK = 4
"""The rank from which the optimal LR is nearly the same at all ranks."""

SAME_BAND = (0.5, 2.0)
"""The ratios of two ranks' optimal LRs that count as nearly the same."""

HIGH_RANK = 16
"""The rank from which a rank counts as high beside rank 1."""

SHORT_STEPS = (50, 100)
"""The lengths, in steps, that count as short."""

SHORT_RATIO = 15.0
"""The ratio of optimal LRs that the paper gives for short runs."""

SHORT_BAND = (10.0, 22.0)
"""The LR ratios that count as SHORT_RATIO."""

FULL_STEPS = 2 * max(SHORT_STEPS)
"""The least number of steps of a run that short lengths are compared with."""


def lr_ratio_ten(comparison: Comparison) -> Finding:
    """B1: judge the optimal LR of the highest rank over that of FullFT."""
    lora, fullft = require(("LoRA above rank 1", comparison.highest), ("FullFT", comparison.fullft))
    return judge_ratio(comparison, lora, fullft, band=RATIO_BAND, expected=PAPER_RATIO)


B1 = Claim(
    id="B1",
    kind="empirical",
    statement=f"The optimal LR of LoRA is {PAPER_RATIO:g} times that of full fine-tuning",
    figure="2",
    criterion=(
        f"For the highest rank, the 95% interval of the ratio of optimal LRs lies within {RATIO_BAND[0]:g} to "
        f"{RATIO_BAND[1]:g}"
    ),
    needs=f"{SWEEP}; seeds that give sigma",
    paper_value="10 (fit over 14 models: 9.8)",
    unit="ratio",
    experiments=("rank",),
    judge=over(every_dataset, lr_ratio_ten),
    core=True,
)


def lr_independent_of_rank(comparison: Comparison) -> Finding:
    """B3: judge, for every two ranks from LOW_RANK up, the larger optimal LR over the smaller.

    The bootstrap of the largest LR over the smallest would not do: noise alone drives it up.
    """
    arms = [arm for rank, arm in comparison.lora.items() if rank >= LOW_RANK]
    if len(arms) < 2:
        raise UnjudgedError("inconclusive" if arms else "not tested", f"fewer than two LoRA ranks from {LOW_RANK} up")
    optima = {arm["rank"]: float(comparison.optima[arm_label(arm)]["lr_opt"]) for arm in arms}
    ordered = sorted(arms, key=lambda arm: -np.nan_to_num(optima[arm["rank"]]))
    pairs = [
        judge_ratio(comparison, arm, other, band=SAME_BAND, expected=1.0) for arm, other in combinations(ordered, 2)
    ]
    by_rank = ", ".join(f"r{rank} {lr:.2g}" for rank, lr in optima.items())
    decisive = worst(pairs)
    return replace(
        decisive, reason=f"{decisive.reason} (optimal LRs: {by_rank})", run_ids=tuple(comparison.of(arms)["run_id"])
    )


B3 = Claim(
    id="B3",
    kind="empirical",
    statement=f"The optimal LR of LoRA is nearly the same at all ranks from {LOW_RANK} up",
    figure="2",
    criterion=(
        f"For every two ranks from {LOW_RANK} up, the 95% interval of the larger optimal LR over the smaller lies "
        f"within {SAME_BAND[0]:g} to {SAME_BAND[1]:g}"
    ),
    needs=f"LoRA on all layers at two or more ranks from {LOW_RANK} up, each with an LR grid; seeds that give sigma",
    paper_value="less than 2 from rank 4 to 512",
    unit="ratio",
    experiments=("rank",),
    judge=over(every_dataset, lr_independent_of_rank),
    core=True,
)


def rank_1_lower_lr(comparison: Comparison) -> Finding:
    """B4: judge the optimal LR of rank 1 over that of each rank from HIGH_RANK up, or else of the highest."""
    rank_1, highest = require(("LoRA r1", comparison.lora.get(1)), ("LoRA above rank 1", comparison.highest))
    others = [arm for rank, arm in comparison.lora.items() if rank >= HIGH_RANK] or [highest]
    pairs = [judge_ratio(comparison, rank_1, arm, band=(0.0, 1.0), expected=1.0, signed=True) for arm in others]
    return replace(worst(pairs), run_ids=tuple(comparison.of([rank_1, *others])["run_id"]))


B4 = Claim(
    id="B4",
    kind="empirical",
    statement="Rank 1 has a lower optimal LR than high ranks",
    figure="2",
    criterion=(
        f"The 95% interval of rank 1's optimal LR over that of each rank from {HIGH_RANK} up, or else of the highest "
        "rank, is below 1; it need not be lower by a whole step of the LR grid"
    ),
    needs="LoRA on all layers at rank 1 and a higher one, each with an LR grid; seeds that give sigma",
    paper_value="lower; no number",
    unit="ratio",
    experiments=("rank",),
    judge=over(every_dataset, rank_1_lower_lr),
    core=True,
)


def short_runs_want_more(comparison: Comparison) -> Finding:
    """B9: judge the LR ratio of the highest rank to FullFT at short lengths, and over the ratio at full length."""
    lora, fullft = require(("LoRA above rank 1", comparison.highest), ("FullFT", comparison.fullft))
    arms, steps = [lora, fullft], fullft["steps"]
    if steps is None or steps < FULL_STEPS:
        raise UnjudgedError("not tested", f"runs of {steps or 'unknown'} steps; full length is at least {FULL_STEPS}")
    full = lr_ratio(comparison, lora, fullft)
    findings = []
    for step in SHORT_STEPS:
        short_comparisons = comparisons(at_step(comparison.of(arms), comparison.curves, step), comparison.curves)
        by_method = {arm["method"]: arm for each in short_comparisons for arm in each.arms}
        if set(by_method) != {"lora", "fullft"}:
            findings.append(Finding("not tested", f"no validation losses of both methods at step {step}"))
            continue
        short = lr_ratio(short_comparisons[0], by_method["lora"], by_method["fullft"])
        growth = short.draws / full.draws
        low, high = np.quantile(growth, QUANTILES).tolist()
        above: Verdict = "confirmed" if low > 1 else "contradicted" if high <= 1 else "inconclusive"
        text = (
            f"{step} steps: {short.text}; over that at {steps} steps "
            f"{short.estimate / full.estimate:.2f} {fixed_interval(low, high, 2)}"
        )
        problems = [f"at {step} steps {fault}" for fault in short.problems]
        problems += [f"at {steps} steps {fault}" for fault in full.problems]
        verdict = all_of([above, within(*short.interval, SHORT_BAND)])
        strain = abs(math.log(short.estimate / SHORT_RATIO))
        findings.append(
            finding(comparison.of(arms)["run_id"], text, verdict, problems, short.estimate, short.interval, strain)
        )
    decisive = together(findings)
    return replace(decisive, reason=f"{decisive.reason}; {steps} steps: {full.text}")


B9 = Claim(
    id="B9",
    kind="opinion",
    statement=(
        f"Short runs need a higher ratio of LRs, about {SHORT_RATIO:g} in runs of fewer than about {max(SHORT_STEPS)} "
        "steps"
    ),
    figure="text",
    criterion=(
        f"In runs of at least {FULL_STEPS} steps, with the optima taken from the validation losses at steps "
        f"{SHORT_STEPS[0]} and {SHORT_STEPS[1]}: the 95% interval of the ratio there lies within {SHORT_BAND[0]:g} to "
        f"{SHORT_BAND[1]:g}, and the interval of this ratio over the ratio at full length is above 1, with the noise "
        "of the optima taken as independent. Contradicted if either interval lies wholly outside at either length. "
        "The estimate is the ratio at the length that decides"
    ),
    needs=(
        f"{SWEEP}; validation losses at steps {SHORT_STEPS[0]} and {SHORT_STEPS[1]} of long runs; seeds that give sigma"
    ),
    paper_value="about 15 below about 100 steps; 10 for long runs",
    unit="ratio",
    experiments=("short_run",),
    judge=over(every_dataset, short_runs_want_more),
)

CLAIMS = (B1, B3, B4, B9)
