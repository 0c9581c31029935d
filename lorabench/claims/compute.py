"""Claims G1 to G3: the FLOPs and memory of LoRA beside full fine-tuning (FullFT), and losses at equal FLOPs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Comparison, require
from lorabench.analysis.curves import scan
from lorabench.analysis.estimate import Estimate
from lorabench.analysis.finding import MIN_SEEDS, Finding, UnjudgedError, finding, nats, together
from lorabench.analysis.optimal_curves import off_optimum, runs_at_optimum
from lorabench.analysis.rules import Above, Problem, Verdict
from lorabench.analysis.step_flops import FLOPS_COLUMNS, each_setting, equal_flops_curves, flops_ratio
from lorabench.claims.claim import Claim
from lorabench.claims.evidence import SWEEP, Evidence, over
from lorabench.claims.learning_curves import AT_OPTIMUM
from lorabench.claims.scopes import every_dataset

TOLERANCE = 0.01
"""The relative difference up to which a count of FLOPs agrees with the formula."""

FAR_BELOW = 8
"""The divisor of the hidden size up to which a rank is far below the width (r << N in the paper)."""

WINDOWS = 2
"""The number of windows, equally long on a logarithmic axis, into which G2 splits the later half of the runs."""


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
    dearer = ", ".join(f"r{rank}" for rank in rows.loc[rows["flops_ratio"] > 1, "rank"])
    text += f"; more FLOPs than FullFT at {dearer}" if dearer else ""
    uncounted = [f"r{rank}" for rank in rows.loc[apart.isna(), "rank"]]
    problems = [Problem(f"no count of FullFT or LoRA for {', '.join(uncounted)}")] if uncounted else []
    verdict: Verdict = "confirmed" if abs(worst) <= TOLERANCE else "contradicted"
    # A count has no noise, so its interval is the number itself.
    return finding((), text, verdict, problems, worst, (worst, worst), abs(worst))


def slightly_over_two_thirds(evidence: Evidence) -> Finding:
    """G1: judge the counted ratio of FLOPs against the formula, at every rank of every model."""
    ratios = _ratios(evidence.compute, FLOPS_COLUMNS)
    return together([_as_formula(setting, rows) for setting, rows in each_setting(ratios)])


G1 = Claim(
    id="G1",
    kind="count",
    statement="A training step of LoRA takes slightly more than 2/3 of the FLOPs of full fine-tuning",
    figure="text",
    criterion=(
        "The FLOPs of the linear layers in a step of a real model, counted as they run, LoRA over FullFT, are within "
        f"{TOLERANCE:.0%} of 2/3 + 2R/N at every rank R of every model. N is defined from the shapes of the layers so "
        "that formula and count agree, so this checks the counting; the ratios say at which ranks it is slightly more "
        "than 2/3. Every layer computes the gradient of its input, as the formula assumes. Time is reported, not "
        "judged"
    ),
    needs="table compute: FullFT and LoRA in the same setting",
    paper_value="2/3 + 2R/N",
    unit="relative difference from the formula",
    experiments=(),
    judge=slightly_over_two_thirds,
)


def ahead_at_equal_flops(comparison: Comparison) -> Finding:
    """G2: judge FullFT's training NLL minus LoRA's at equal FLOPs in the later half of LoRA's run."""
    hidden = comparison.runs["hidden_size"].dropna().unique()
    if len(hidden) != 1:
        raise UnjudgedError("not tested", "hidden_size is not known, or not the same in all runs")
    low_ranks = [arm for rank, arm in comparison.lora.items() if rank <= hidden[0] / FAR_BELOW]
    what = f"LoRA up to rank {hidden[0] // FAR_BELOW} (hidden size {hidden[0]})"
    lora, fullft = require((what, low_ranks[-1] if low_ranks else None), ("FullFT", comparison.fullft))
    label = f"FullFT - {arm_label(lora)}"
    of_lora, of_fullft = (runs_at_optimum(comparison, arm) for arm in (lora, fullft))
    curves = equal_flops_curves(of_lora, of_fullft, comparison.curves, f"{comparison.label} {label} at equal FLOPs")
    windows = curves.windows(WINDOWS)
    if not windows:
        raise UnjudgedError(
            "not tested", "no training and validation curves of paired seeds with training FLOPs in common"
        )
    problems = comparison.problems([lora, fullft])
    if not problems and curves.n_seeds < MIN_SEEDS:
        problems.append(Problem(f"training losses of {curves.n_seeds} paired seeds, {MIN_SEEDS} needed"))
    margin = comparison.margin
    if margin.problem:
        problems.append(Problem(margin.problem))
    problems = problems or off_optimum(comparison, lora, fullft, margin.value)

    def text(difference: Estimate) -> str:
        return f"{label} at the FLOPs of LoRA = {nats(difference)}, {curves.n_seeds} seeds,"

    return scan(lambda window: Above(margin.value), curves, windows, text, problems, margin.rule)


G2 = Claim(
    id="G2",
    kind="prediction",
    statement="At equal training FLOPs, LoRA of a rank far below the width is ahead of full fine-tuning",
    figure="text",
    criterion=(
        f"For the highest rank up to hidden size / {FAR_BELOW}: FullFT's training NLL minus LoRA's at equal FLOPs is "
        f"above 0 by the margin in each of {WINDOWS} windows of steps, which are the later half of the runs on a "
        "logarithmic axis. It is the difference on the same batches, without what FullFT gains there from the FLOPs "
        f"that it has spent beyond LoRA's, by its validation NLL, interpolated in log FLOPs. {AT_OPTIMUM}"
    ),
    needs=(
        f"{SWEEP}; hidden_size, train_flops, train_tokens; training and validation curves; {MIN_SEEDS} seeds at the "
        "LRs around each optimum"
    ),
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
