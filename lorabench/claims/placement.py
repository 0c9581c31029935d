"""Claims E1 to E5 and E7: which layers carry LoRA."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pandas as pd

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison, require
from lorabench.analysis.finding import (
    MAX_ERROR_MARGIN,
    MIN_SEEDS,
    SIGMAS,
    Finding,
    UnjudgedError,
    exceeds,
    finding,
    noise_problems,
    sigma_text,
    together,
)
from lorabench.claims.claim import Claim
from lorabench.claims.evidence import over
from lorabench.claims.rl_shared import LEARNED, if_learned, over_problems
from lorabench.claims.scopes import Scoped, every_dataset

MAX_COUNT_DIFFERENCE = 0.1
"""The difference of two parameter counts, as a share of the smaller, up to which they are about equal.

The paper's pair differs by 3.5%.
"""

SMALL_DATA = 1000
"""The number of training examples seen up to which a dataset is tiny."""

_NEEDS = (
    "LoRA on attention and on the MLP at about equal parameter counts{}, each with an LR grid whose best LR is not at "
    f"its edge; {MIN_SEEDS} seeds at the best LRs"
)

_WITH_ALL = ", and on the MLP and all layers at one rank"

_WORSE = (
    f"of the arms nearest in parameter count (within {MAX_COUNT_DIFFERENCE:.0%}, and where possible with at least as "
    f"many parameters on attention), attention's test NLL minus the MLP's is more than {SIGMAS} sigma with its 95% "
    "interval above 0"
)
_BELOW = f"Contradicted if the whole interval is below {SIGMAS} sigma"

_SAME = (
    "at every rank that both have, the 95% interval of the MLP's test NLL minus that of all layers lies within "
    f"{SIGMAS} sigma"
)


def _is_moe(comparison: Comparison) -> bool:
    return "family" in comparison.runs and bool(comparison.runs["family"].astype(str).str.endswith("moe").any())


def dense(comparisons: list[Comparison]) -> list[Scoped]:
    """Choose the models without experts."""
    chosen = [(comparison, "") for comparison in comparisons if not _is_moe(comparison)]
    if not chosen:
        raise UnjudgedError("not tested", "no dense model among these runs")
    return chosen


def mixture_of_experts(comparisons: list[Comparison]) -> list[Scoped]:
    """Choose the models with experts, by the column `family`."""
    chosen = [(comparison, "") for comparison in comparisons if _is_moe(comparison)]
    if not chosen:
        raise UnjudgedError("not tested", "no mixture of experts among these runs")
    return chosen


def _at_most(examples: pd.Series[int]) -> bool:
    return bool(examples.notna().all() and (examples <= SMALL_DATA).all())


def tiny_dataset(comparisons: list[Comparison]) -> list[Scoped]:
    """Choose the comparisons whose runs see at most `SMALL_DATA` examples."""
    seen = [(comparison, comparison.runs["steps"] * comparison.runs["batch_size"]) for comparison in comparisons]
    chosen = [(comparison, f" ({examples.max()} examples)") for comparison, examples in seen if _at_most(examples)]
    if not chosen:
        raise UnjudgedError("not tested", f"no runs on at most {SMALL_DATA} examples")
    return chosen


def _count(comparison: Comparison, arm: Arm) -> int:
    counts = comparison.rows[arm_label(arm)]["trainable_params"].dropna().unique()
    if len(counts) != 1:
        raise UnjudgedError("inconclusive", f"{arm_label(arm)}: {len(counts)} parameter counts in the runs table")
    return int(counts[0])


def _equal_pair(comparison: Comparison) -> tuple[Arm, Arm, str]:
    """Return the arms on attention and on the MLP nearest in parameter count, and their counts in words.

    A pair in which attention has at least as many parameters is preferred: a lack of them can't explain its loss.
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
    counts_text = " and ".join(f"{counts[arm_label(arm)]:,}" for arm in chosen) + " parameters"
    return *chosen, counts_text


def attention_worse(comparison: Comparison) -> Finding:
    """E1, E7: judge the test NLL of LoRA on attention minus that on the MLP at about equal parameter counts."""
    attn, mlp, counts = _equal_pair(comparison)
    estimate, interval, text, problems = comparison.final_gap(attn, mlp)
    sigma, dof = comparison.sigma("test")
    return finding(
        comparison.of([attn, mlp])["run_id"],
        f"{text}, {sigma_text(sigma)} ({counts})",
        exceeds(estimate, *interval, SIGMAS * sigma),
        noise_problems(sigma, dof) + problems,
        estimate,
        interval,
        -estimate,
    )


E1 = Claim(
    id="E1",
    kind="empirical",
    statement="On a dense model, LoRA on attention alone is worse than on the MLP alone at equal parameter counts",
    figure="4",
    criterion=f"On every dense model: {_WORSE}. {_BELOW}",
    needs=_NEEDS.format(""),
    paper_value="0.25B attention parameters worse than 0.24B in the MLP; no loss given",
    unit="nats per token",
    experiments=("placement",),
    judge=over(dense, attention_worse),
    columns=("trainable_params",),
    core=True,
)


E7 = Claim(
    id="E7",
    kind="empirical",
    statement="Attention alone is worse even with very little data",
    figure="text",
    criterion=f"On runs that see at most {SMALL_DATA:,} examples: {_WORSE}. {_BELOW}",
    needs=_NEEDS.format("") + f"; at most {SMALL_DATA:,} examples",
    paper_value="no number",
    unit="nats per token",
    experiments=("placement_small",),
    judge=over(tiny_dataset, attention_worse),
    columns=("trainable_params",),
)


def attention_adds_nothing(comparison: Comparison) -> Finding:
    """E2: judge the test NLL of LoRA on the MLP minus that on all layers, at every rank that both have."""
    mlp, all_layers = comparison.placed("mlp"), comparison.lora
    require(
        ("LoRA on the MLP", next(iter(mlp.values()), None)),
        ("LoRA on all layers", next(iter(all_layers.values()), None)),
    )
    ranks = [rank for rank in mlp if rank in all_layers]
    if not ranks:
        raise UnjudgedError("inconclusive", "no rank with LoRA on the MLP and on all layers")
    return together([comparison.equal_losses(mlp[rank], all_layers[rank]) for rank in ranks])


E2 = Claim(
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
    core=True,
)


def both_parts(comparison: Comparison) -> Finding:
    """E3, E4: judge whether attention is worse, and whether the MLP alone is as good as all layers."""
    findings = []
    for what, judge in (
        ("attention alone is worse", attention_worse),
        ("the MLP alone is enough", attention_adds_nothing),
    ):
        try:
            part = judge(comparison)
        except UnjudgedError as unjudged:
            part = unjudged.finding
        findings.append(replace(part, reason=f"{what}? {part.verdict}: {part.reason}"))
    verdicts = {part.verdict for part in findings}
    decided = together(findings)
    # One half of the claim does not confirm it.
    return replace(decided, verdict="inconclusive") if verdicts == {"confirmed", "not tested"} else decided


E3 = Claim(
    id="E3",
    kind="empirical",
    statement="In a mixture of experts too, attention alone is worse and adds nothing to the MLP",
    figure="4",
    criterion=(
        f"On every model whose family ends in moe: {_WORSE}; and {_SAME}. Contradicted if the whole interval of the "
        f"first difference is below {SIGMAS} sigma, or that of the second outside"
    ),
    needs=_NEEDS.format(_WITH_ALL) + "; a mixture of experts",
    paper_value="same as for the dense model (Qwen3-30B-A3B-Base); no number",
    unit="nats per token",
    experiments=("placement",),
    judge=over(mixture_of_experts, both_parts),
    columns=("trainable_params",),
)


E4 = Claim(
    id="E4",
    kind="empirical",
    statement="On a small dataset too, attention alone is worse and adds nothing to the MLP",
    figure="5",
    criterion=(
        f"By test NLL: {_WORSE}; and {_SAME}. Contradicted if the whole interval of the first difference is below "
        f"{SIGMAS} sigma, or that of the second outside"
    ),
    needs=_NEEDS.format(_WITH_ALL),
    paper_value="same as on the large dataset (rank 256); no number",
    unit="nats per token",
    experiments=("placement_small",),
    judge=over(every_dataset, both_parts),
    columns=("trainable_params",),
)


def placement_in_rl(comparison: Comparison) -> Finding:
    """E5: judge E3 on error rates, where the MLP has learned."""
    return if_learned(comparison, both_parts(comparison), list(comparison.placed("mlp").values()))


E5 = Claim(
    id="E5",
    kind="empirical",
    statement="In RL on MATH, attention alone is worse than the MLP alone, and adds nothing to it",
    figure="5",
    criterion=(
        "By the test error rate at the evaluation that is best on validation: of the arms nearest in parameter count "
        f"(within {MAX_COUNT_DIFFERENCE:.0%}, and where possible with at least as many parameters on attention), "
        f"attention's minus the MLP's is more than {SIGMAS} sigma with its 95% interval above 0; and at every rank "
        f"that both have, the interval of the MLP's minus that of all layers lies within {SIGMAS} sigma, which must be "
        f"at most {MAX_ERROR_MARGIN:g}. {LEARNED.format('the MLP')}"
    ),
    needs=(
        "RL runs of LoRA on attention and on the MLP at about equal parameter counts, and on the MLP and all layers "
        f"at one rank, each with an LR grid whose best LR is not at its edge; {MIN_SEEDS} seeds at the best LRs"
    ),
    paper_value="no number",
    unit="error rate",
    experiments=("placement_rl",),
    judge=over_problems(placement_in_rl, "best_reward"),
    columns=("base_reward", "best_reward", "trainable_params"),
    task="rl",
)

CLAIMS = (E1, E2, E3, E4, E5, E7)
