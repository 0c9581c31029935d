"""Claims B1, B3, B4 and B9: the optimal learning rate, by method, rank and length of the run."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np

from lorabench.analysis.arms import arm_label
from lorabench.analysis.at_step import at_step
from lorabench.analysis.claims.claim import Claim
from lorabench.analysis.claims.evidence import SWEEP, over
from lorabench.analysis.claims.scopes import (
    every_dataset,
)
from lorabench.analysis.comparison import Comparison, comparisons, require
from lorabench.analysis.finding import (
    Finding,
    UnjudgedError,
    Verdict,
    all_of,
    finding,
    interval_text,
    together,
    within,
    worst,
)
from lorabench.analysis.lr_ratio import QUANTILES, RATIO_BAND, judge_ratio, lr_ratio

SHORT_STEPS, SHORT_BAND = (50, 100), (10.0, 22.0)
"""Lengths that count as short, and the ratios that count as the paper's 15 there."""


def lr_ratio_ten(comparison: Comparison) -> Finding:
    """B1: optimal LR of the highest rank over that of FullFT."""
    arms = require(("LoRA above rank 1", comparison.highest), ("FullFT", comparison.fullft))
    return judge_ratio(comparison, arms[0], arms[1], band=RATIO_BAND, expected=10.0)


B1 = Claim(
    id="B1",
    kind="empirical",
    statement="The optimal LR of LoRA is 10 times that of full fine-tuning",
    figure="2",
    criterion="The 95% interval of the ratio, for the highest rank, lies within 6 to 16",
    needs=f"{SWEEP}; seeds that give sigma",
    paper_value="10 (fit over 14 models: 9.8)",
    unit="ratio",
    experiments=("rank",),
    judge=over(every_dataset, lr_ratio_ten),
    core=True,
)


def lr_independent_of_rank(comparison: Comparison) -> Finding:
    """B3: for every two ranks from 4 up, the larger optimal LR over the smaller.

    Judged by pairs, not by the bootstrap of the largest over the smallest, which noise alone drives up.
    """
    arms = [arm for rank, arm in comparison.lora.items() if rank >= 4]
    if len(arms) < 2:
        raise UnjudgedError("inconclusive" if arms else "not tested", "fewer than two LoRA ranks from 4 up")
    optima = {arm["rank"]: float(comparison.optima[arm_label(arm)]["lr_opt"]) for arm in arms}
    ordered = sorted(arms, key=lambda arm: -np.nan_to_num(optima[arm["rank"]]))
    pairs = [
        judge_ratio(comparison, pair[0], pair[1], band=(0.5, 2.0), expected=1.0) for pair in combinations(ordered, 2)
    ]
    told = ", ".join(f"r{rank} {lr:.2g}" for rank, lr in optima.items())
    decisive = worst(pairs)
    return replace(
        decisive, reason=f"{decisive.reason} (optimal LRs: {told})", run_ids=tuple(comparison.of(arms)["run_id"])
    )


B3 = Claim(
    id="B3",
    kind="empirical",
    statement="The optimal LR of LoRA is nearly the same at all ranks from 4 up",
    figure="2",
    criterion="For every two ranks from 4 up, the 95% interval of the ratio of optimal LRs lies within 1/2 to 2",
    needs="LoRA on all layers at two or more ranks from 4 up, each with an LR grid; seeds that give sigma",
    paper_value="less than 2 from rank 4 to 512",
    unit="ratio",
    experiments=("rank",),
    judge=over(every_dataset, lr_independent_of_rank),
    core=True,
)


def rank_1_lower_lr(comparison: Comparison) -> Finding:
    """B4: optimal LR of rank 1 over that of each rank from 16 up, or of the highest."""
    rank_1, highest = require(("LoRA r1", comparison.lora.get(1)), ("LoRA above rank 1", comparison.highest))
    others = [arm for rank, arm in comparison.lora.items() if rank >= 16] or [highest]
    pairs = [judge_ratio(comparison, rank_1, arm, band=(0.0, 1.0), expected=1.0, signed=True) for arm in others]
    return replace(worst(pairs), run_ids=tuple(comparison.of([rank_1, *others])["run_id"]))


B4 = Claim(
    id="B4",
    kind="empirical",
    statement="Rank 1 has a lower optimal LR than high ranks",
    figure="2",
    criterion=(
        "The 95% interval of rank 1's optimal LR over that of each rank from 16 up (or of the highest) is below "
        "1; the interval takes the place of a whole grid step"
    ),
    needs="LoRA on all layers at rank 1 and a higher one, each with an LR grid; seeds that give sigma",
    paper_value="lower; no number",
    unit="ratio",
    experiments=("rank",),
    judge=over(every_dataset, rank_1_lower_lr),
    core=True,
)


def short_runs_want_more(comparison: Comparison) -> Finding:
    """B9: LR ratio of the highest rank to FullFT at short lengths, against that at full length."""
    lora, fullft = require(("LoRA above rank 1", comparison.highest), ("FullFT", comparison.fullft))
    arms, steps = [lora, fullft], fullft["steps"]
    if steps is None or steps < 2 * max(SHORT_STEPS):
        raise UnjudgedError(
            "not tested", f"runs of {steps or 'unknown'} steps; full length is at least {2 * max(SHORT_STEPS)}"
        )
    full = lr_ratio(comparison, lora, fullft)
    found = []
    for step in SHORT_STEPS:
        then = comparisons(at_step(comparison.of(arms), comparison.curves, step), comparison.curves)
        here = {arm["method"]: arm for one in then for arm in one.arms}
        if set(here) != {"lora", "fullft"}:
            found.append(Finding("not tested", f"no validation losses of both methods at step {step}"))
            continue
        short = lr_ratio(then[0], here["lora"], here["fullft"])
        growth = short.draws / full.draws
        low, high = np.quantile(growth, QUANTILES).tolist()
        above: Verdict = "confirmed" if low > 1 else "contradicted" if high <= 1 else "inconclusive"
        text = (
            f"{step} steps: {short.text}; over that at {steps} steps "
            f"{short.estimate / full.estimate:.2f} {interval_text(low, high, 2)}"
        )
        problems = [f"at {step} steps {fault}" for fault in short.problems]
        problems += [f"at {steps} steps {fault}" for fault in full.problems]
        verdict = all_of([above, within(*short.interval, SHORT_BAND)])
        strain = abs(math.log(short.estimate / 15.0))
        found.append(
            finding(comparison.of(arms)["run_id"], text, verdict, problems, short.estimate, short.interval, strain)
        )
    decisive = together(found)
    return replace(decisive, reason=f"{decisive.reason}; {steps} steps: {full.text}")


B9 = Claim(
    id="B9",
    kind="opinion",
    statement="Short runs want a higher ratio of LRs, about 15 below about 100 steps",
    figure="text",
    criterion=(
        "In runs of at least 200 steps, with losses read on the validation split as of steps 50 and 100: the 95% "
        "interval of the ratio there lies within 10 to 22, and that of this ratio over the ratio at full length "
        "is above 1 (the optima's noise taken as independent). Contradicted if either lies wholly elsewhere at "
        "either length. The estimate is the ratio at the length that decides"
    ),
    needs=f"{SWEEP}; validation losses at steps 50 and 100 of long runs; seeds that give sigma",
    paper_value="about 15 below about 100 steps; 10 for long runs",
    unit="ratio",
    experiments=("short_run",),
    judge=over(every_dataset, short_runs_want_more),
)


CLAIMS = (
    B1,
    B3,
    B4,
    B9,
)
