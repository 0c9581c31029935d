"""Claims E6 and M1: how many parameters LoRA has on the layers of published models."""

from __future__ import annotations

import math

import pandas as pd

from lorabench.analysis.finding import Finding, UnjudgedError, together
from lorabench.analysis.rules import Verdict
from lorabench.claims.claim import Claim
from lorabench.claims.evidence import Evidence

PAPER_COUNTS = {
    ("mlp", 256): 486_866_944,
    ("attn", 256): 251_985_920,
    ("all", 256): 704_970_752,
    ("mlp", 128): 243_433_472,
}
"""The trainable parameters on Llama-3.1-8B by placement and rank, which the paper rounds to 10 million."""

_EXACT = ", ".join(f"{count:,}" for count in PAPER_COUNTS.values())


def _counts(evidence: Evidence, architecture: str) -> pd.DataFrame:
    counts = evidence.counts
    if counts.empty:
        raise UnjudgedError("not tested", "there is no table of parameter counts")
    return counts[counts["architecture"] == architecture]


def _arm_words(arm: tuple[str, int]) -> str:
    return f"{arm[0]} r{arm[1]}"


def parameter_counts(evidence: Evidence) -> Finding:
    """E6: judge the trainable parameters of the paper's four configurations against the exact numbers."""
    counts = _counts(evidence, "llama-3.1-8b")
    chosen = counts[counts["part"].eq("all") & counts["include_unembedding"].eq(True)]
    by_arm = {(row["placement"], int(row["rank"])): int(row["trainable_params"]) for row in chosen.to_dict("records")}
    missing = [_arm_words(arm) for arm in PAPER_COUNTS if arm not in by_arm]
    if len(missing) == len(PAPER_COUNTS):
        raise UnjudgedError("not tested", "the counts table has none of the paper's configurations on llama-3.1-8b")
    off = {arm: by_arm[arm] - expected for arm, expected in PAPER_COUNTS.items() if arm in by_arm}
    wrong = [f"{_arm_words(arm)} is off by {difference:+,}" for arm, difference in off.items() if difference]
    counted = ", ".join(f"{_arm_words(arm)} {by_arm[arm]:,}" for arm in off)
    verdict: Verdict = "contradicted" if wrong else "inconclusive" if missing else "confirmed"
    notes = wrong + [f"{arm} is not counted" for arm in missing]
    largest = max(off.values(), key=abs)
    return Finding(
        verdict, "; ".join([f"llama-3.1-8b with the unembedding: {counted}", *notes]), estimate=float(largest)
    )


E6 = Claim(
    id="E6",
    kind="count",
    statement="LoRA has 0.49B (mlp r256), 0.25B (attn r256), 0.70B (all r256) and 0.24B (mlp r128) parameters",
    figure="4 (table)",
    criterion=(
        f"The counts on Llama-3.1-8B, with the unembedding in every placement, are exactly {_EXACT}. The estimate is "
        "the largest difference from these"
    ),
    needs="the table of parameter counts; no runs",
    paper_value="0.49B, 0.25B, 0.70B, 0.24B",
    unit="parameters",
    experiments=(),
    judge=parameter_counts,
)

ACTIVE_EXPERTS = 8
"""The number of experts that Qwen3-30B-A3B activates for a token, by which the paper divides the total rank."""

_MOE_PARTS = ("experts", "attention", "unembedding")


def _distance(factors: dict[str, float]) -> float:
    """Return the distance from 1, on a logarithmic scale, of the factor that is furthest from 1."""
    return max(abs(math.log(factor)) for factor in factors.values())


def _text(factors: dict[str, float]) -> str:
    return ", ".join(f"{part} / experts {factor:.2f}" for part, factor in factors.items())


def _expert_ratio(rank: int, share: pd.Series[float]) -> Finding:
    """Judge M1 at one total rank, from LoRA's share of parameters by part of the model."""
    missing = [part for part in _MOE_PARTS if part not in share]
    if missing:
        return Finding("inconclusive", f"total rank {rank}: {' and '.join(missing)} not counted")
    divided = {part: float(share[part] / share["experts"]) for part in _MOE_PARTS if part != "experts"}
    # An expert's LoRA parameters are proportional to its rank.
    undivided = {part: factor / ACTIVE_EXPERTS for part, factor in divided.items()}
    nearer = _distance(divided) <= _distance(undivided)
    shares = ", ".join(f"{part} {share[part]:.3%}" for part in _MOE_PARTS)
    text = (
        f"qwen3-30b-a3b at total rank {rank}, LoRA over base parameters: {shares}; {_text(divided)}, and without the "
        f"division {_text(undivided)}, which is {'further from' if nearer else 'nearer to'} 1"
    )
    furthest = max(divided.values(), key=lambda factor: abs(math.log(factor)))
    strain = _distance(divided) - _distance(undivided)
    return Finding("confirmed" if nearer else "contradicted", text, estimate=furthest, strain=strain)


def expert_ratio(evidence: Evidence) -> Finding:
    """M1: judge LoRA's share of parameters in the experts against that in attention and the unembedding, by rank."""
    counts = _counts(evidence, "qwen3-30b-a3b")
    by_part = counts[counts["part"].isin(_MOE_PARTS)].assign(
        share=lambda rows: rows["trainable_params"].astype(float) / rows["base_params"].astype(float)
    )
    of_rank = {rank: by_part[by_part["rank"] == rank] for rank in sorted(set(by_part["rank"].astype(int)))}
    findings = [
        _expert_ratio(rank, rows.drop_duplicates("part").set_index("part")["share"]) for rank, rows in of_rank.items()
    ]
    if not findings:
        raise UnjudgedError("not tested", "the counts table has no parts of qwen3-30b-a3b")
    return together(findings)


M1 = Claim(
    id="M1",
    kind="count",
    statement="With an eighth of the total rank, an expert has the same share of LoRA parameters as other layers",
    figure="text",
    criterion=(
        "On Qwen3-30B-A3B, with gate and up of an expert as one matrix, the factor is LoRA over base parameters of "
        "attention, and of the unembedding, over that of the experts. With an expert rank of the total rank / "
        f"{ACTIVE_EXPERTS}, the factor furthest from 1, which is the estimate, is nearer to 1 on a logarithmic scale "
        "than with the total rank for every expert. Contradicted if it is further"
    ),
    needs="the table of parameter counts; no runs",
    paper_value="the same, by dividing by the 8 active experts",
    unit="ratio",
    experiments=(),
    judge=expert_ratio,
)

CLAIMS = (E6, M1)
