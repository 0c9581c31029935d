"""Claims G1 to G3: the FLOPs and memory of LoRA beside full fine-tuning (FullFT), and losses at equal FLOPs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Comparison, require
from lorabench.analysis.finding import (
    Finding,
    UnjudgedError,
    finding,
    nats,
    noise_problems,
    sigma_text,
    together,
    within,
)
from lorabench.analysis.step_flops import FLOPS_COLUMNS, each_setting, equal_flops_gap, flops_ratio, loss_by_flops
from lorabench.analysis.student import t_quantile
from lorabench.claims.claim import Claim
from lorabench.claims.evidence import SWEEP, Evidence, over
from lorabench.claims.scopes import every_dataset

TOLERANCE = 0.01
"""The relative difference up to which a count of FLOPs agrees with the formula."""

FAR_BELOW = 8
"""The divisor of the hidden size up to which a rank is far below the width (r << N in the paper)."""


def _ratios(compute: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Return `flops_ratio` of the table `compute`; raise UnjudgedError where it has none."""
    if compute.empty:
        raise UnjudgedError("not tested", "no table compute")
    missing = [name for name in columns if name not in compute]
    if missing:
        raise UnjudgedError("not tested", f"the compute table has no column {', '.join(missing)}")
    ratios = flops_ratio(compute)
    if ratios.empty:
        raise UnjudgedError("not tested", "the compute table has no LoRA")
    return ratios


def _as_formula(setting: str, rows: pd.DataFrame) -> Finding:
    apart = rows["relative_difference"]
    worst = max(apart.dropna(), key=abs, default=math.nan)
    ratios = ", ".join(
        f"r{row['rank']} {row['flops_ratio']:.4f} (formula {row['formula']:.4f})"
        for row in rows[apart.notna()].to_dict("records")
    )
    times = ", ".join(
        f"r{row['rank']} {row['step_ratio']:.2f}" for row in rows.dropna(subset=["step_ratio"]).to_dict("records")
    )
    text = f"{setting}: FLOPs of LoRA / FullFT {ratios or 'not known'}; step time {times or 'not measured'}"
    uncounted = [f"r{rank}" for rank in rows.loc[apart.isna(), "rank"]]
    problems = [f"no count of FullFT or LoRA for {', '.join(uncounted)}"] if uncounted else []
    verdict = within(worst, worst, (-TOLERANCE, TOLERANCE))
    # A count has no noise, so its interval is the number itself.
    return finding((), text, verdict, problems, worst, (worst, worst), abs(worst))


def slightly_over_two_thirds(evidence: Evidence) -> Finding:
    """G1: judge the counted ratio of FLOPs against the formula, at every rank of every model."""
    ratios = _ratios(evidence.compute, FLOPS_COLUMNS)
    return together([_as_formula(setting, rows) for setting, rows in each_setting(ratios)])


G1 = Claim(
    id="G1",
    kind="theory",
    statement="A training step of LoRA takes slightly more than 2/3 of the FLOPs of full fine-tuning",
    figure="text",
    criterion=(
        "The FLOPs of the linear layers in a step of a real model, counted as they run, LoRA over FullFT, are within "
        f"{TOLERANCE:.0%} of 2/3 + 2R/N at every rank R of every model. N is the width of square layers that would "
        "give the same ratio; every layer computes the gradient of its input, as the formula assumes. Time is "
        "reported, not judged"
    ),
    needs="table compute: FullFT and LoRA in the same setting",
    paper_value="2/3 + 2R/N",
    unit="relative difference from the formula",
    experiments=(),
    judge=slightly_over_two_thirds,
)


def ahead_at_equal_flops(comparison: Comparison) -> Finding:
    """G2: judge the envelopes at equal FLOPs where LoRA's minus FullFT's is largest."""
    hidden = comparison.runs["hidden_size"].dropna().unique()
    if len(hidden) != 1:
        raise UnjudgedError("not tested", "hidden_size is not known, or not the same in all runs")
    low_ranks = [arm for rank, arm in comparison.lora.items() if rank <= hidden[0] / FAR_BELOW]
    what = f"LoRA up to rank {hidden[0] // FAR_BELOW} (hidden size {hidden[0]})"
    lora, fullft = require((what, low_ranks[-1] if low_ranks else None), ("FullFT", comparison.fullft))
    points = loss_by_flops(comparison.of([lora, fullft]), comparison.curves)
    gaps = equal_flops_gap(points, lora, fullft)
    if gaps.empty:
        raise UnjudgedError("not tested", "no validation curves with training FLOPs in common")
    sigma, dof = comparison.sigma("validation")
    # The interval is that of two independent runs; it is cautious, since both see the data in the same order.
    half = t_quantile(dof) * math.sqrt(2) * sigma if dof else math.nan
    worst, last = gaps.nlargest(1, "gap").iloc[0], gaps.iloc[-1]
    largest = float(worst["gap"])
    interval = (largest - half, largest + half)
    text = (
        f"{arm_label(lora)} - FullFT at equal FLOPs at most {nats(largest, *interval)} (at {worst['flops']:.2g} FLOPs, "
        f"of {gaps['flops'].iloc[0]:.2g} to {last['flops']:.2g}), at the last {last['gap']:.4f}, {sigma_text(sigma)}"
    )
    problems = noise_problems(sigma, dof) + comparison.edge_problems([lora, fullft])
    verdict = within(*interval, (-math.inf, 0.0))
    return finding(comparison.of([lora, fullft])["run_id"], text, verdict, problems, largest, interval, largest)


G2 = Claim(
    id="G2",
    kind="prediction",
    statement="At equal training FLOPs, LoRA of a rank far below the width is ahead of full fine-tuning",
    figure="text",
    criterion=(
        f"For the highest rank up to hidden size / {FAR_BELOW}: over the second half of the log-FLOPs range that the "
        "envelopes of the validation loss of LoRA and FullFT share, LoRA's minus FullFT's, where it is largest, is at "
        "or below 0 with the 95% interval of a difference of two runs. Contradicted if that whole interval is above 0"
    ),
    needs=f"{SWEEP}; hidden_size, train_flops, train_tokens; validation curves; seeds that give sigma",
    paper_value="clearly ahead; no number",
    unit="nats per token",
    experiments=("rank",),
    judge=over(every_dataset, ahead_at_equal_flops),
    columns=("hidden_size", "train_flops", "train_tokens"),
)


def memory_of_fullft(evidence: Evidence) -> Finding:
    """G3: report the peak memory of a training step; the memory of sampling is not measured."""
    ratios = _ratios(evidence.compute, [*FLOPS_COLUMNS, "peak_mem_bytes"])
    measured = []
    for setting, rows in each_setting(ratios):
        known = rows.dropna(subset=["memory_ratio"])
        pairs = zip(known["rank"], 1 / known["memory_ratio"], strict=True)
        measured += [f"{setting} r{rank} {ratio:.2f}" for rank, ratio in pairs]
    if not measured:
        raise UnjudgedError("not tested", "memory was not measured")
    raise UnjudgedError(
        "not tested",
        "the memory of sampling is not measured, so neither is its ratio; peak memory of a step, FullFT / LoRA: "
        + ", ".join(measured),
    )


G3 = Claim(
    id="G3",
    kind="opinion",
    statement="Full fine-tuning needs about ten times the accelerators that sampling from the same model does",
    figure="text",
    criterion=(
        "The peak memory of a step of FullFT over that of sampling is about 10, and that of LoRA is slightly above 1"
    ),
    needs="peak memory of sampling, which no preset measures",
    paper_value="an order of magnitude",
    unit="ratio",
    experiments=(),
    judge=memory_of_fullft,
)

CLAIMS = (G1, G2, G3)
