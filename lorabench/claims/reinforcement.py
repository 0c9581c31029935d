"""Claims B10, F1, F2 and F8: learning rates and peaks of reinforcement learning (RL)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison, require
from lorabench.analysis.finding import (
    MAX_ERROR_MARGIN,
    SIGMAS,
    Finding,
    UnjudgedError,
    Verdict,
    finding,
    noise_problems,
    sigma_text,
)
from lorabench.analysis.lr_ratio import PAPER_RATIO, judge_ratio
from lorabench.analysis.rewards import GOOD, band_draws, good_bands
from lorabench.claims.claim import Claim, untestable
from lorabench.claims.rl_shared import LEARNED, RL_EXPERIMENTS, RL_RUNS, each_rank, if_learned, over_problems
from lorabench.utils.formats import fixed_interval

LR_BAND = (5.0, 20.0)
"""The LR ratios that count as PAPER_RATIO in RL: all within a factor of 2 of that ratio."""


def lr_ratio_ten_in_rl(comparison: Comparison) -> Finding:
    """B10: judge the optimal LR of the highest rank over that of FullFT."""
    lora, fullft = require(("LoRA above rank 1", comparison.highest), ("FullFT", comparison.fullft))
    judged = judge_ratio(comparison, lora, fullft, band=LR_BAND, expected=PAPER_RATIO)
    return if_learned(comparison, judged, [lora, fullft])


B10 = Claim(
    id="B10",
    kind="empirical",
    statement=f"In RL too, the optimal LR of LoRA is {PAPER_RATIO:g} times that of full fine-tuning",
    figure="6, 7",
    criterion=(
        "On every problem set, the 95% interval of the ratio of the LRs with the highest validation accuracy, of the "
        f"highest rank over FullFT, lies within {LR_BAND[0]:g} to {LR_BAND[1]:g}; both LRs come from quadratic "
        f"interpolation in log LR. {LEARNED.format('one of them')}"
    ),
    needs=RL_RUNS.format("LoRA above rank 1"),
    paper_value="10",
    unit="ratio",
    experiments=RL_EXPERIMENTS,
    judge=over_problems(lr_ratio_ten_in_rl),
    columns=("base_reward",),
    task="rl",
)


def rank_1_reaches_the_peak(comparison: Comparison) -> Finding:
    """F1: judge the error rate of rank 1 minus FullFT's; a better rank 1 confirms as well."""
    rank_1, fullft = require(("LoRA r1", comparison.lora.get(1)), ("FullFT", comparison.fullft))
    judged = comparison.equal_losses(rank_1, fullft, better_too=True)
    return if_learned(comparison, judged, [fullft])


F1 = Claim(
    id="F1",
    kind="empirical",
    statement="In RL on MATH and GSM8K, LoRA of rank 1 reaches the peak of full fine-tuning",
    figure="6",
    criterion=(
        "On every problem set, the 95% interval of the test error rate of rank 1 minus FullFT's, after the last step, "
        f"each at its best LR on validation and paired by seed, lies below {SIGMAS} sigma, which must be at most "
        f"{MAX_ERROR_MARGIN:g}. Contradicted if it lies wholly above. {LEARNED.format('FullFT')}"
    ),
    needs=RL_RUNS.format("rank 1"),
    paper_value="the same peak; no number",
    unit="error rate",
    experiments=("rl_math", "rl_gsm8k", "rl_arithmetic", "rl"),
    judge=over_problems(rank_1_reaches_the_peak),
    columns=("base_reward",),
    task="rl",
    core=True,
)

MAX_OPEN = 0.025
"""The share of draws in which a range of good LRs may reach its grid's edge and still count as closed."""


def _range(band: pd.Series[Any]) -> str:
    """Format a range of good LRs."""
    at_least = "at least " if band["open_low"] or band["open_high"] else ""
    return f"{at_least}{band['width']:.2f} ({band['lr_low']:.2g} to {band['lr_high']:.2g})"


def _wider(comparison: Comparison, of_arm: dict[str, pd.Series[Any]], lora: Arm, fullft: Arm) -> Finding:
    """Judge F2 for one rank."""
    arms = [lora, fullft]
    bands = [of_arm[arm_label(arm)] for arm in arms]
    draws = [band_draws(comparison.rows[arm_label(arm)], comparison.noise) for arm in arms]
    estimate, step = float(bands[0]["width"] - bands[1]["width"]), max(float(band["step"]) for band in bands)
    if math.isnan(estimate):
        raise UnjudgedError("inconclusive", "no accuracies above 0 of both")
    low, high = np.quantile(draws[0].widths - draws[1].widths, [0.025, 0.975]).tolist()
    verdict: Verdict = "inconclusive"
    if abs(estimate) > step and (low > 0 or high < 0):
        verdict = "confirmed" if low > 0 else "contradicted"
    sigma, dof = comparison.sigma("test")
    text = (
        f"{_range(bands[0])} - FullFT's {_range(bands[1])} = {estimate:.2f} {fixed_interval(low, high, 2)} decades of "
        f"good LRs, of grids {step:.2f} apart, {sigma_text(sigma)}"
    )
    problems = noise_problems(sigma, dof) + comparison.edge_problems(arms)
    # The wider range may extend beyond its grid, but the narrower must not.
    open_share = {"confirmed": draws[1], "contradicted": draws[0]}
    if verdict != "inconclusive" and open_share[verdict].open.mean() > MAX_OPEN:
        problems.append("the narrower range may go on beyond its grid")
    return finding(comparison.of(arms)["run_id"], text, verdict, problems, estimate, (low, high), -estimate)


def wider_range_of_lrs(comparison: Comparison) -> Finding:
    """F2: judge the width of the range of good LRs of each LoRA rank minus that of FullFT."""
    bands = {arm_label(row): row for _, row in good_bands(comparison.runs).iterrows()}
    return each_rank(comparison, partial(_wider, comparison, bands), lambda lora, fullft: [lora, fullft])


F2 = Claim(
    id="F2",
    kind="empirical",
    statement="In RL, LoRA has a wider range of good LRs than full fine-tuning",
    figure="6, 7",
    criterion=(
        f"The range of good LRs has a test accuracy of at least {GOOD:.0%} of an arm's own peak, interpolated linearly "
        "between LRs. On every problem set, for every LoRA rank, the 95% interval of its width in log LR minus "
        "FullFT's lies above 0, the difference is more than one step of the grid, and the narrower range ends within "
        f"its grid. Contradicted if FullFT has the wider range by the same rule. {LEARNED.format('one of them')}"
    ),
    needs=RL_RUNS.format("LoRA"),
    paper_value="wider; no number",
    unit="decades of LR",
    experiments=RL_EXPERIMENTS,
    judge=over_problems(wider_range_of_lrs),
    columns=("base_reward",),
    task="rl",
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
