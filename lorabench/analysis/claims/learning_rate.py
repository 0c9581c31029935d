"""Claims B: the optimal learning rate, by method, rank, model and length of the run."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np

from lorabench.analysis.arms import arm_label
from lorabench.analysis.claims.capacity import same_final_loss
from lorabench.analysis.claims.claim import Claim
from lorabench.analysis.claims.evidence import SWEEP, Arm, Comparison, every_dataset, over, require
from lorabench.analysis.claims.finding import (
    MIN_SEEDS,
    Finding,
    UnjudgedError,
    finding,
    interval_text,
    noise_problems,
    within,
    worst,
)


def lr_ratio_ten(comparison: Comparison) -> Finding:
    """B1: optimal LR of the highest rank over that of FullFT."""
    arms = require(("LoRA above rank 1", comparison.highest), ("FullFT", comparison.fullft))
    return _lr_ratio(comparison, arms[0], arms[1], band=(6.0, 16.0), expected=10.0)


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
        _lr_ratio(comparison, pair[0], pair[1], band=(0.5, 2.0), expected=1.0) for pair in combinations(ordered, 2)
    ]
    told = ", ".join(f"r{rank} {lr:.2g}" for rank, lr in optima.items())
    decisive = worst(pairs)
    return replace(
        decisive, reason=f"{decisive.reason} (optimal LRs: {told})", run_ids=tuple(comparison.of(arms)["run_id"])
    )


def rank_1_lower_lr(comparison: Comparison) -> Finding:
    """B4: optimal LR of rank 1 over that of each rank from 16 up, or of the highest."""
    rank_1, highest = require(("LoRA r1", comparison.lora.get(1)), ("LoRA above rank 1", comparison.highest))
    others = [arm for rank, arm in comparison.lora.items() if rank >= 16] or [highest]
    pairs = [_lr_ratio(comparison, rank_1, arm, band=(0.0, 1.0), expected=1.0, signed=True) for arm in others]
    return replace(worst(pairs), run_ids=tuple(comparison.of([rank_1, *others])["run_id"]))


def _lr_ratio(
    comparison: Comparison,
    arm: Arm,
    other: Arm,
    band: tuple[float, float],
    expected: float,
    signed: bool = False,
) -> Finding:
    """Whether the ratio of two optimal LRs lies in a band; `signed` where only a larger ratio strains the claim."""
    arms = [arm, other]
    optima = [comparison.optima[arm_label(one)] for one in arms]
    draws = [comparison.draws[arm_label(one)] for one in arms]
    estimate = float(optima[0]["lr_opt"] / optima[1]["lr_opt"])
    low, high = (float(bound) for bound in np.quantile(draws[0] / draws[1], [0.025, 0.975]))
    problems = noise_problems(*comparison.sigma("validation")) + comparison.edge_problems(arms)
    problems += [
        f"{arm_label(found)}: optimum not resolved by its grid"
        for found in optima
        if not problems and not found["resolved"]
    ]
    text = (
        f"optimal LR {arm_label(arm)} / {arm_label(other)} = {estimate:.2f} {interval_text(low, high, 2)} "
        f"({optima[0]['lr_opt']:.2g} / {optima[1]['lr_opt']:.2g})"
    )
    strain = math.log(estimate / expected) if estimate > 0 else math.nan
    verdict = within(low, high, band)
    return finding(
        comparison.of(arms)["run_id"], text, verdict, problems, estimate, (low, high), strain if signed else abs(strain)
    )


CLAIMS = (
    Claim(
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
    ),
    Claim(
        id="B2",
        kind="empirical",
        statement="At their optimal LRs, high-rank LoRA and full fine-tuning reach the same loss",
        figure="2",
        criterion=(
            "On every dataset, the 95% interval of the highest rank's test NLL minus FullFT's lies within "
            "max(2 sigma, 0.5% of the loss)"
        ),
        needs=f"{SWEEP}; {MIN_SEEDS} seeds at the best LRs",
        paper_value="about the same; no number",
        unit="nats per token",
        experiments=("rank",),
        judge=over(every_dataset, same_final_loss),
    ),
    Claim(
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
    ),
    Claim(
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
    ),
)
