"""Claims on reinforcement learning: B10, E5 and F. The tables hold no rewards, so that only arithmetic is judged."""

from __future__ import annotations

from collections.abc import Callable

from lorabench.analysis.claims.claim import Claim, untestable
from lorabench.analysis.claims.evidence import Evidence
from lorabench.analysis.claims.finding import Finding, UnjudgedError, Verdict

MATH_BITS = 10_000 * 32
"""What RL on MATH can teach at 1 bit per episode: problems times samples of each."""


def rank_1_holds_math(evidence: Evidence) -> Finding:
    """F6: rank-1 parameters on Llama-3.1-8B over the bits of RL on MATH."""
    counts = evidence.counts
    if counts.empty:
        raise UnjudgedError("not tested", "there is no table of parameter counts")
    rank_1 = counts["architecture"].eq("llama-3.1-8b") & counts["placement"].eq("all") & counts["rank"].eq(1)
    rows = counts[rank_1 & counts["part"].eq("all")].dropna(subset=["include_unembedding", "trainable_params"])
    found = {bool(row["include_unembedding"]): int(row["trainable_params"]) for row in rows.to_dict("records")}
    if True not in found:
        raise UnjudgedError(
            "not tested", "the counts table has no rank 1 on all layers and unembedding of llama-3.1-8b"
        )
    ratios = {include: parameters / MATH_BITS for include, parameters in found.items()}
    verdict: Verdict = "confirmed" if min(ratios.values()) > 1 else "contradicted"
    told = ", ".join(
        f"{parameters:,} {'with' if include else 'without'} the unembedding ({ratios[include]:.1f} times)"
        for include, parameters in sorted(found.items())
    )
    return Finding(verdict, f"rank-1 parameters over {MATH_BITS:,} bits: {told}", estimate=ratios[True])


def _needs(what: str) -> Callable[[Evidence], Finding]:
    return untestable(f"the tables hold no reinforcement learning: it needs {what}")


_RUNS = "RL runs of LoRA and FullFT over an LR grid, with final rewards of 3 seeds"

CLAIMS = (
    Claim(
        id="B10",
        kind="empirical",
        statement="In RL too, the optimal LR of LoRA is 10 times that of full fine-tuning",
        figure="6, 7",
        criterion="The 95% interval of the ratio of the LRs with the highest final reward lies within 5 to 20",
        needs=_RUNS,
        paper_value="10",
        unit="ratio",
        experiments=("rl_math", "rl_gsm8k", "rl_deepmath"),
        judge=_needs("final rewards by LR"),
    ),
    Claim(
        id="E5",
        kind="empirical",
        statement="In RL on MATH, attention alone is worse than the MLP alone, and adds nothing to it",
        figure="5",
        criterion="Best reward: attention below the MLP by more than 2 sigma, the MLP within 2 sigma of all layers",
        needs="RL runs of LoRA on attention, on the MLP and on all layers, with final rewards of 3 seeds",
        paper_value="no number",
        unit="accuracy",
        experiments=("placement_rl",),
        judge=_needs("best rewards by placement"),
    ),
    Claim(
        id="F1",
        kind="empirical",
        statement="In RL on MATH and GSM8K, LoRA of rank 1 reaches the peak of full fine-tuning",
        figure="6",
        criterion="Highest final reward over LRs: rank 1 within 2 sigma of FullFT",
        needs=f"{_RUNS}; rank 1",
        paper_value="the same peak; no number",
        unit="accuracy",
        experiments=("rl_math", "rl_gsm8k"),
        judge=_needs("final rewards of rank 1 and FullFT"),
    ),
    Claim(
        id="F2",
        kind="empirical",
        statement="In RL, LoRA has a wider range of good LRs than full fine-tuning",
        figure="6, 7",
        criterion="The range of LRs with at least 95% of an arm's own peak is wider in log LR for LoRA than for FullFT",
        needs=_RUNS,
        paper_value="wider; no number",
        unit="decades of LR",
        experiments=("rl_math", "rl_gsm8k", "rl_deepmath"),
        judge=_needs("final rewards by LR"),
    ),
    Claim(
        id="F3",
        kind="empirical",
        statement="In RL on DeepMath, all ranks and full fine-tuning progress alike",
        figure="7",
        criterion="Largest gap between smoothed reward curves at the best LRs, after the start: at most 2 sigma",
        needs="RL runs on DeepMath with reward curves",
        paper_value="almost identical; no number",
        unit="accuracy",
        experiments=("rl_deepmath",),
        judge=_needs("reward curves on DeepMath"),
    ),
    Claim(
        id="F4",
        kind="empirical",
        statement="Held-out AIME 2024 and 2025 problems show the same as DeepMath",
        figure="8",
        criterion="Final AIME accuracy of LoRA and FullFT within the binomial interval",
        needs="RL runs on DeepMath, evaluated on AIME 2024 and 2025",
        paper_value="no number",
        unit="accuracy",
        experiments=("rl_deepmath",),
        judge=_needs("AIME accuracies"),
    ),
    Claim(
        id="F5",
        kind="empirical",
        statement="In RL, chains of thought grow the same way in LoRA and full fine-tuning",
        figure="8",
        criterion="Mean final response length of LoRA over FullFT's within 0.8 to 1.25, both growing",
        needs="RL runs on DeepMath with response lengths",
        paper_value="no number",
        unit="ratio",
        experiments=("rl_deepmath",),
        judge=_needs("response lengths"),
    ),
    Claim(
        id="F6",
        kind="theory",
        statement="Rank-1 LoRA has far more parameters than RL on MATH gives bits",
        figure="text",
        criterion=(
            "Counted on Llama-3.1-8B, with and without the unembedding, there are more rank-1 parameters than "
            f"{MATH_BITS:,} bits (10,000 problems, 32 samples each, 1 bit per episode). The estimate is their ratio "
            "with the unembedding"
        ),
        needs="the table of parameter counts; no runs",
        paper_value="3M parameters for 320,000 bits, almost 10 times",
        unit="ratio",
        experiments=(),
        judge=rank_1_holds_math,
    ),
    Claim(
        id="F7",
        kind="theory",
        statement="Where all samples of a group get the same reward, RL learns nothing",
        figure="text",
        criterion="No change of the policy over steps whose advantages are all 0",
        needs="RL runs on problems whose samples all get the same reward",
        paper_value="the entropy of the advantage is 0",
        unit="parameter change",
        experiments=("rl_arithmetic",),
        judge=_needs("advantages and updates by step"),
    ),
    Claim(
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
    ),
    Claim(
        id="F9",
        kind="theory",
        statement="RL takes in about 1,000 times fewer bits per token than SFT",
        figure="text",
        criterion="SFT's first-epoch bits per token over 1 bit per episode and the tokens of an episode: 100 to 10,000",
        needs="SFT runs, and RL runs with response lengths",
        paper_value="about 1,000",
        unit="ratio",
        experiments=("rl_math", "rl_gsm8k", "rl_deepmath"),
        judge=_needs("tokens per episode"),
    ),
)
