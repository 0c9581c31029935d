"""Claims E and M: which layers carry LoRA, and how many parameters that makes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pandas as pd

from lorabench.analysis.arms import arm_label
from lorabench.analysis.claims.claim import Claim
from lorabench.analysis.claims.evidence import Arm, Comparison, Evidence, Scoped, every_dataset, over, require
from lorabench.analysis.claims.finding import (
    MIN_SEEDS,
    Finding,
    UnjudgedError,
    Verdict,
    exceeds,
    finding,
    noise_problems,
    sigma_text,
    together,
    within,
)

MAX_COUNT_DIFFERENCE = 0.1
"""Two arms have about equal parameter counts up to this share of the smaller; the paper's pair is at 3.5%."""

SMALL_DATA = 1000
"""Training examples seen that make a dataset tiny."""

PAPER_COUNTS = {
    ("mlp", 256): 486_866_944,
    ("attn", 256): 251_985_920,
    ("all", 256): 704_970_752,
    ("mlp", 128): 243_433_472,
}
"""Trainable parameters on Llama-3.1-8B by placement and rank; the paper prints 0.49B, 0.25B, 0.70B and 0.24B."""

SAME_ORDER = 10.0
"""Ratios are of the same order up to this factor."""


def attention_worse(comparison: Comparison) -> Finding:
    """E1, E7: test NLL of LoRA on attention minus that of LoRA on the MLP at about equal parameter counts."""
    attn, mlp, told = _equal_pair(comparison)
    estimate, interval, text, problems = comparison.final_gap(attn, mlp)
    sigma, dof = comparison.sigma("test")
    return finding(
        comparison.of([attn, mlp])["run_id"],
        f"{text}, {sigma_text(sigma)} ({told})",
        exceeds(estimate, *interval, 2 * sigma),
        noise_problems(sigma, dof) + problems,
        estimate,
        interval,
        -estimate,
    )


def _equal_pair(comparison: Comparison) -> tuple[Arm, Arm, str]:
    """The arms on attention and on the MLP nearest in parameter count, and their counts in words.

    A pair where attention has at least as many comes first: its deficit is then not for want of parameters.
    """
    attn, mlp = comparison.placed("attn"), comparison.placed("mlp")
    require(("LoRA on attention", next(iter(attn.values()), None)), ("LoRA on the MLP", next(iter(mlp.values()), None)))
    counts = {arm_label(arm): _count(comparison, arm) for arm in (*attn.values(), *mlp.values())}

    def excess(pair: tuple[Arm, Arm]) -> float:
        of_attn, of_mlp = (counts[arm_label(arm)] for arm in pair)
        return (of_attn - of_mlp) / min(of_attn, of_mlp)

    pairs = list(product(attn.values(), mlp.values()))
    nearest = min(pairs, key=lambda pair: abs(excess(pair)))
    if abs(excess(nearest)) > MAX_COUNT_DIFFERENCE:
        labels = " and ".join(arm_label(arm) for arm in nearest)
        raise UnjudgedError(
            "inconclusive",
            f"no arms of about equal parameter counts: the nearest, {labels}, differ by {abs(excess(nearest)):.0%}",
        )
    stricter = [pair for pair in pairs if 0 <= excess(pair) <= MAX_COUNT_DIFFERENCE]
    chosen = min(stricter, key=excess, default=nearest)
    told = " and ".join(f"{counts[arm_label(arm)]:,}" for arm in chosen) + " parameters"
    return *chosen, told


def _count(comparison: Comparison, arm: Arm) -> int:
    counts = comparison.rows[arm_label(arm)]["trainable_params"].dropna().unique()
    if len(counts) != 1:
        raise UnjudgedError("inconclusive", f"{arm_label(arm)}: {len(counts)} parameter counts in the runs table")
    return int(counts[0])


def attention_adds_nothing(comparison: Comparison) -> Finding:
    """E2: test NLL of LoRA on the MLP minus that of LoRA on all layers, at every rank that both have."""
    mlp, every = comparison.placed("mlp"), comparison.lora
    require(
        ("LoRA on the MLP", next(iter(mlp.values()), None)), ("LoRA on all layers", next(iter(every.values()), None))
    )
    ranks = [rank for rank in mlp if rank in every]
    if not ranks:
        raise UnjudgedError("inconclusive", "no rank with LoRA on the MLP and on all layers")
    return together([comparison.equal_losses(mlp[rank], every[rank]) for rank in ranks])


def both_parts(comparison: Comparison) -> Finding:
    """E3, E4: attention is worse, and the MLP alone is as good as all layers."""
    found = []
    for what, judge in (
        ("attention alone is worse", attention_worse),
        ("the MLP alone is enough", attention_adds_nothing),
    ):
        try:
            one = judge(comparison)
        except UnjudgedError as unjudged:
            one = unjudged.finding
        found.append(replace(one, reason=f"{what}? {one.verdict}: {one.reason}"))
    verdicts = {one.verdict for one in found}
    decided = together(found)
    # Half of the claim is not the claim.
    return replace(decided, verdict="inconclusive") if verdicts == {"confirmed", "not tested"} else decided


def dense(comparisons: list[Comparison]) -> list[Scoped]:
    """Models without experts."""
    found = [(comparison, "") for comparison in comparisons if not _is_moe(comparison)]
    if not found:
        raise UnjudgedError("not tested", "no dense model among these runs")
    return found


def mixture_of_experts(comparisons: list[Comparison]) -> list[Scoped]:
    """Models with experts, by the column `family`."""
    found = [(comparison, "") for comparison in comparisons if _is_moe(comparison)]
    if not found:
        raise UnjudgedError("not tested", "no mixture of experts among these runs")
    return found


def _is_moe(comparison: Comparison) -> bool:
    return "family" in comparison.runs and bool(comparison.runs["family"].astype(str).str.endswith("moe").any())


def tiny_dataset(comparisons: list[Comparison]) -> list[Scoped]:
    """Runs that see at most `SMALL_DATA` examples."""
    seen = [(comparison, comparison.runs["steps"] * comparison.runs["batch_size"]) for comparison in comparisons]
    found = [(comparison, f" ({examples.max()} examples)") for comparison, examples in seen if _at_most(examples)]
    if not found:
        raise UnjudgedError("not tested", f"no runs on at most {SMALL_DATA} examples")
    return found


def _at_most(examples: pd.Series[int]) -> bool:
    return bool(examples.notna().all() and (examples <= SMALL_DATA).all())


def parameter_counts(evidence: Evidence) -> Finding:
    """E6: trainable parameters of the paper's four configurations, against the exact numbers."""
    counts = _counts(evidence, "llama-3.1-8b")
    chosen = counts[counts["part"].eq("all") & counts["include_unembedding"].eq(True)]
    by_arm = {(row["placement"], int(row["rank"])): int(row["trainable_params"]) for row in chosen.to_dict("records")}
    missing = [_arm_words(arm) for arm in PAPER_COUNTS if arm not in by_arm]
    if len(missing) == len(PAPER_COUNTS):
        raise UnjudgedError("not tested", "the counts table has none of the paper's configurations on llama-3.1-8b")
    off = {arm: by_arm[arm] - expected for arm, expected in PAPER_COUNTS.items() if arm in by_arm}
    wrong = [f"{_arm_words(arm)} is off by {difference:+,}" for arm, difference in off.items() if difference]
    told = ", ".join(f"{_arm_words(arm)} {by_arm[arm]:,}" for arm in off)
    verdict: Verdict = "contradicted" if wrong else "inconclusive" if missing else "confirmed"
    notes = wrong + [f"{arm} is not counted" for arm in missing]
    largest = max(off.values(), key=abs)
    return Finding(verdict, "; ".join([f"llama-3.1-8b with the unembedding: {told}", *notes]), estimate=float(largest))


def _arm_words(arm: tuple[str, int]) -> str:
    return f"{arm[0]} r{arm[1]}"


def expert_ratio(evidence: Evidence) -> Finding:
    """M1: LoRA's share of parameters in the experts against attention and the unembedding, at every rank counted."""
    counts = _counts(evidence, "qwen3-30b-a3b")
    by_part = counts[counts["part"].isin(_MOE_PARTS)].assign(
        share=lambda rows: rows["trainable_params"].astype(float) / rows["base_params"].astype(float)
    )
    found = []
    for rank, rows in by_part.groupby("rank"):
        share = rows.drop_duplicates("part").set_index("part")["share"]
        missing = [part for part in _MOE_PARTS if part not in share]
        if missing:
            found.append(Finding("inconclusive", f"total rank {rank}: {' and '.join(missing)} not counted"))
            continue
        factors = {part: float(share[part] / share["experts"]) for part in _MOE_PARTS if part != "experts"}
        furthest = max(factors.values(), key=lambda factor: max(factor, 1 / factor))
        told = ", ".join(f"{part} {share[part]:.3%}" for part in _MOE_PARTS)
        times = ", ".join(f"{part} / experts {factor:.1f}" for part, factor in factors.items())
        verdict = within(furthest, furthest, (1 / SAME_ORDER, SAME_ORDER))
        text = f"qwen3-30b-a3b at total rank {rank}, LoRA over base parameters: {told} ({times})"
        found.append(Finding(verdict, text, estimate=furthest, strain=max(furthest, 1 / furthest)))
    if not found:
        raise UnjudgedError("not tested", "the counts table has no parts of qwen3-30b-a3b")
    return together(found)


_MOE_PARTS = ("experts", "attention", "unembedding")


def _counts(evidence: Evidence, architecture: str) -> pd.DataFrame:
    counts = evidence.counts
    if counts.empty:
        raise UnjudgedError("not tested", "there is no table of parameter counts")
    return counts[counts["architecture"] == architecture]


_NEEDS = (
    "LoRA on attention and on the MLP at about equal parameter counts{}, each with an LR grid whose best LR is not at "
    f"its edge; {MIN_SEEDS} seeds at the best LRs"
)
_WITH_ALL = ", and on the MLP and all layers at one rank"
_WORSE = (
    "of the arms nearest in parameter count (within 10%, attention having at least as many if such a pair is there), "
    "attention's test NLL minus the MLP's is more than 2 sigma with its 95% interval above 0. Contradicted if the "
    "whole interval is below 2 sigma"
)
_SAME = (
    "at every rank that both have, the 95% interval of the MLP's test NLL minus that of all layers lies within 2 sigma"
)

CLAIMS = (
    Claim(
        id="E1",
        kind="empirical",
        statement="On a dense model, LoRA on attention alone is worse than on the MLP alone at equal parameter counts",
        figure="4",
        criterion=f"On every dense model: {_WORSE}",
        needs=_NEEDS.format(""),
        paper_value="0.25B attention parameters worse than 0.24B in the MLP; no loss given",
        unit="nats per token",
        experiments=("placement",),
        judge=over(dense, attention_worse),
        columns=("trainable_params",),
    ),
    Claim(
        id="E2",
        kind="empirical",
        statement="On a dense model, LoRA on attention adds nothing to LoRA on the MLP",
        figure="4",
        criterion=f"On every dense model: {_SAME}",
        needs=f"LoRA on the MLP and on all layers at one rank, each with an LR grid; {MIN_SEEDS} seeds at the best LRs",
        paper_value="no benefit; no number",
        unit="nats per token",
        experiments=("placement",),
        judge=over(dense, attention_adds_nothing),
    ),
    Claim(
        id="E3",
        kind="empirical",
        statement="In a mixture of experts too, attention alone is worse and adds nothing to the MLP",
        figure="4",
        criterion=f"On every model whose family ends in moe, both: {_WORSE}; and {_SAME}",
        needs=_NEEDS.format(_WITH_ALL) + "; a mixture of experts",
        paper_value="same as for the dense model (Qwen3-30B-A3B-Base); no number",
        unit="nats per token",
        experiments=("placement",),
        judge=over(mixture_of_experts, both_parts),
        columns=("trainable_params",),
    ),
    Claim(
        id="E4",
        kind="empirical",
        statement="On a small dataset too, attention alone is worse and adds nothing to the MLP",
        figure="5",
        criterion=f"Both: {_WORSE}; and {_SAME}",
        needs=_NEEDS.format(_WITH_ALL),
        paper_value="same as on the large dataset (rank 256); no number",
        unit="nats per token",
        experiments=("placement_small",),
        judge=over(every_dataset, both_parts),
        columns=("trainable_params",),
    ),
    Claim(
        id="E6",
        kind="empirical",
        statement="LoRA has 0.49B (mlp r256), 0.25B (attn r256), 0.70B (all r256) and 0.24B (mlp r128) parameters",
        figure="4 (table)",
        criterion=(
            "Counted on Llama-3.1-8B with the unembedding in every placement: exactly 486,866,944, 251,985,920, "
            "704,970,752 and 243,433,472. The estimate is the largest difference from these"
        ),
        needs="the table of parameter counts; no runs",
        paper_value="0.49B, 0.25B, 0.70B, 0.24B",
        unit="parameters",
        experiments=(),
        judge=parameter_counts,
    ),
    Claim(
        id="E7",
        kind="empirical",
        statement="Attention alone is worse even with very little data",
        figure="text",
        criterion=f"On runs that see at most {SMALL_DATA:,} examples: {_WORSE}",
        needs=_NEEDS.format("") + f"; at most {SMALL_DATA:,} examples",
        paper_value="no number",
        unit="nats per token",
        experiments=("placement_small",),
        judge=over(tiny_dataset, attention_worse),
        columns=("trainable_params",),
    ),
    Claim(
        id="M1",
        kind="theory",
        statement="A rank of total/8 for each expert keeps LoRA's share of parameters the same as in other layers",
        figure="text",
        criterion=(
            "Counted on Qwen3-30B-A3B with expert rank = total rank / 8, gate and up of an expert as one matrix: LoRA "
            "over base parameters of attention and of the unembedding, each over that of the experts, lies within "
            f"{1 / SAME_ORDER:g} to {SAME_ORDER:g}. "
            "The estimate is the factor furthest from 1"
        ),
        needs="the table of parameter counts; no runs",
        paper_value="the same, by dividing by the 8 active experts",
        unit="ratio",
        experiments=(),
        judge=expert_ratio,
    ),
)
