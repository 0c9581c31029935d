"""Claims G1 to G3 on FLOPs and memory, and E6, M1 and F6 on parameter counts: LoRA and full fine-tuning (FullFT)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pandas as pd

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Comparison, require
from lorabench.analysis.curves import log_windows, scan
from lorabench.analysis.estimate import exact
from lorabench.analysis.finding import MIN_SEEDS, Finding, UnjudgedError, decide, finding, worst
from lorabench.analysis.optima import lr_errors, off_optimum, runs_at_optimum
from lorabench.analysis.rules import Above, Problem, Verdict, Within
from lorabench.analysis.step_flops import FLOPS_COLUMNS, each_setting, equal_flops_curves, flops_ratio
from lorabench.claims.claim import Evidence, claim, unjudged_if
from lorabench.claims.scope import every_dataset

# Bounds whose meaning the criteria say.
TOLERANCE = 0.01
WINDOWS = 2
MATH_PROBLEMS = 10_000
MATH_SAMPLES = 32
MATH_BITS = MATH_PROBLEMS * MATH_SAMPLES
FAR_MORE = 5.0

FAR_BELOW = 8
"""The divisor of the hidden size up to which a rank is far below the width (r << N in the paper)."""


def _ratios(compute: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Return `flops_ratio` of the table `compute`; raise UnjudgedError where it has none."""
    unjudged_if(compute.empty, "no table compute")
    missing = [name for name in columns if name not in compute]
    unjudged_if(missing, f"the compute table has no column {', '.join(missing)}")
    ratios = flops_ratio(compute)
    unjudged_if(ratios.empty, "the compute table has no LoRA")
    return ratios


@claim("G1")
def _slightly_over_two_thirds(evidence: Evidence) -> Iterator[Finding]:
    for setting, rows in each_setting(_ratios(evidence.compute, FLOPS_COLUMNS)):
        apart = rows["relative_difference"]
        furthest = max(apart.dropna(), key=abs, default=math.nan)
        counted = rows[apart.notna()].to_dict("records")
        ratios = ", ".join(f"r{row['rank']} {row['flops_ratio']:.4f} (formula {row['formula']:.4f})" for row in counted)
        timed = rows.dropna(subset=["step_ratio"]).to_dict("records")
        times = ", ".join(f"r{row['rank']} {row['step_ratio']:.2f}" for row in timed)
        text = f"{setting}: FLOPs of LoRA / FullFT {ratios or 'not known'}; step time {times or 'not measured'}"
        dearer = ", ".join(f"r{rank}" for rank in rows.loc[rows["flops_ratio"] > 1, "rank"])
        if dearer:
            text += f"; more FLOPs than FullFT at {dearer}, as the formula says, so there not slightly more than 2/3"
        uncounted = ", ".join(f"r{rank}" for rank in rows.loc[apart.isna(), "rank"])
        problems = [Problem(f"no count of FullFT or LoRA for {uncounted}")] if uncounted else []
        verdict: Verdict = "confirmed" if abs(furthest) <= TOLERANCE else "contradicted"
        # A count has no noise, so its interval is the number itself.
        yield finding((), text, verdict, problems, furthest, (furthest, furthest), abs(furthest))


@claim("G2", over=every_dataset, columns=("hidden_size", "train_flops", "train_tokens"))
def _ahead_at_equal_flops(comparison: Comparison) -> Finding:
    hidden = comparison.runs["hidden_size"].dropna().unique()
    unjudged_if(len(hidden) != 1, "hidden_size is not known, or not the same in all runs")
    low_ranks = [arm for rank, arm in comparison.lora.items() if rank <= hidden[0] / FAR_BELOW]
    what = f"LoRA up to rank {hidden[0] // FAR_BELOW} (hidden size {hidden[0]})"
    lora, fullft = require((what, low_ranks[-1] if low_ranks else None), ("FullFT", comparison.fullft))
    label = f"FullFT - {arm_label(lora)}"
    runs = [runs_at_optimum(comparison, arm) for arm in (lora, fullft)]
    curves = equal_flops_curves(runs[0], runs[1], comparison.curves, f"{comparison.label} {label} at equal FLOPs")
    curves = replace(curves, lr_errors=lr_errors(comparison, fullft, lora))
    windows = log_windows(curves.by_seed.index, WINDOWS)
    unjudged_if(not windows, "no training and validation curves of paired seeds with training FLOPs in common")
    problems, margin = comparison.problems([lora, fullft]), comparison.margin
    if not problems and curves.n_seeds < MIN_SEEDS:
        problems.append(Problem(f"training losses of {curves.n_seeds} paired seeds, {MIN_SEEDS} needed"))
    problems = [*problems, *margin.problems] or off_optimum(comparison, lora, fullft, margin.value)
    text = f"{label} at the FLOPs of LoRA = {{}}, {curves.n_seeds} seeds,"
    return scan(Above(margin.value), curves, windows, text, problems, margin.rule)


@claim("G3")
def _memory_of_fullft(evidence: Evidence) -> Finding:
    ratios = _ratios(evidence.compute, [*FLOPS_COLUMNS, "peak_mem_bytes"])
    measured = [
        f"{setting} r{row['rank']} {1 / row['memory_ratio']:.2f}"
        for setting, rows in each_setting(ratios)
        for row in rows.dropna(subset=["memory_ratio"]).to_dict("records")
    ]
    reason = "the memory of sampling is not measured, so neither is its ratio; peak memory of a step, FullFT / LoRA: "
    raise UnjudgedError("not tested", reason + ", ".join(measured) if measured else "memory was not measured")


PAPER_COUNTS = {
    ("mlp", 256): 486_866_944,
    ("attn", 256): 251_985_920,
    ("all", 256): 704_970_752,
    ("mlp", 128): 243_433_472,
}
"""The trainable parameters on Llama-3.1-8B by placement and rank, which the paper rounds to 10 million."""

EXACT_COUNTS = ", ".join(f"{count:,}" for count in PAPER_COUNTS.values())


def _counts(evidence: Evidence, architecture: str) -> pd.DataFrame:
    unjudged_if(evidence.counts.empty, "there is no table of parameter counts")
    return evidence.counts[evidence.counts["architecture"] == architecture]


@claim("E6")
def _parameter_counts(evidence: Evidence) -> Finding:
    counts = _counts(evidence, "llama-3.1-8b")
    with_unembedding = counts[counts["part"].eq("all") & counts["include_unembedding"].eq(True)]
    counted = with_unembedding.set_index(["placement", "rank"])["trainable_params"].astype(int).to_dict()
    off = {arm: counted[arm] - expected for arm, expected in PAPER_COUNTS.items() if arm in counted}
    unjudged_if(not off, "the counts table has none of the paper's configurations on llama-3.1-8b")
    names = {arm: f"{arm[0]} r{arm[1]}" for arm in PAPER_COUNTS}
    wrong = [f"{names[arm]} is off by {difference:+,}" for arm, difference in off.items() if difference]
    missing = [f"{name} is not counted" for arm, name in names.items() if arm not in off]
    verdict: Verdict = "contradicted" if wrong else "inconclusive" if missing else "confirmed"
    all_counts = ", ".join(f"{names[arm]} {counted[arm]:,}" for arm in off)
    text = "; ".join([f"llama-3.1-8b with the unembedding: {all_counts}", *wrong, *missing])
    return Finding(verdict, text, estimate=float(max(off.values(), key=abs)))


ACTIVE_EXPERTS = 8
"""The number of experts that Qwen3-30B-A3B activates for a token, by which the paper divides the total rank."""

_MOE_PARTS = ("experts", "attention", "unembedding")


@claim("M1")
def _expert_ratio(evidence: Evidence) -> Iterator[Finding]:
    counts = _counts(evidence, "qwen3-30b-a3b")
    counts = counts[counts["part"].isin(_MOE_PARTS)]
    unjudged_if(counts.empty, "the counts table has no parts of qwen3-30b-a3b")
    shares = counts.assign(share=counts["trainable_params"].astype(float) / counts["base_params"].astype(float))
    for rank, rows in shares.groupby(shares["rank"].astype(int)):
        share = rows.drop_duplicates("part").set_index("part")["share"]
        if missing := [part for part in _MOE_PARTS if part not in share]:
            yield Finding("inconclusive", f"total rank {rank}: {' and '.join(missing)} not counted")
            continue
        divided = {part: float(share[part] / share["experts"]) for part in _MOE_PARTS if part != "experts"}
        # An expert's LoRA parameters are proportional to its rank.
        rules = [divided, {part: factor / ACTIVE_EXPERTS for part, factor in divided.items()}]
        furthest, other = (max(factors.values(), key=lambda factor: abs(math.log(factor))) for factors in rules)
        strain = abs(math.log(furthest)) - abs(math.log(other))
        texts = [", ".join(f"{part} / experts {factor:.2f}" for part, factor in factors.items()) for factors in rules]
        text = (
            f"qwen3-30b-a3b at total rank {rank}, LoRA over base parameters: "
            f"{', '.join(f'{part} {share[part]:.3%}' for part in _MOE_PARTS)}; {texts[0]}, and without the "
            f"division {texts[1]}, which is {'further from' if strain <= 0 else 'nearer to'} 1"
        )
        yield Finding("confirmed" if strain <= 0 else "contradicted", text, estimate=furthest, strain=strain)


@claim("F6")
def _rank_1_holds_math(evidence: Evidence) -> Finding:
    counts = _counts(evidence, "llama-3.1-8b")
    rank_1 = counts["placement"].eq("all") & counts["rank"].eq(1) & counts["part"].eq("all")
    rows = counts[rank_1].dropna(subset=["include_unembedding", "trainable_params"])
    by_unembedding = {bool(row["include_unembedding"]): int(row["trainable_params"]) for row in rows.to_dict("records")}
    text = "the counts table has no rank 1 on all layers and unembedding of llama-3.1-8b"
    unjudged_if(True not in by_unembedding, text)
    findings = []
    for include, parameters in sorted(by_unembedding.items()):
        ratio = parameters / MATH_BITS
        text = f"{parameters:,} {'with' if include else 'without'} the unembedding ({ratio:.1f} times)"
        findings.append(decide(Within(FAR_MORE, math.inf), exact(ratio), text, (), (), f"a factor of {FAR_MORE:g}"))
    counted = ", ".join(judged.reason for judged in findings)
    return replace(worst(findings), reason=f"rank-1 parameters over {MATH_BITS:,} bits: {counted}")
