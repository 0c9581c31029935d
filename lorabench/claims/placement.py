"""Claims E1 to E5 and E7: which layers carry LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import pandas as pd

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Comparison, require
from lorabench.analysis.finding import Finding, together
from lorabench.claims.claim import Evidence, claim, judge_each, unjudged_if
from lorabench.claims.reinforcement import at_one_peak, if_learned, problem_sets, rl_claim
from lorabench.claims.scope import Named, chosen, every_dataset

# A bound whose meaning the criteria say.
SMALL_DATA = 1000

MAX_COUNT_DIFFERENCE = 0.1
"""The difference of two parameter counts, as a share of the smaller, up to which they are about equal. The paper's
pair differs by 3.5%."""


def _with_experts(experts: bool, named: Named) -> Named:
    """Choose the mixtures of experts, by the column `family`, or the models without experts."""
    picked = []
    for name, comparison in named:
        families = comparison.runs.get("family", pd.Series(dtype=str)).astype(str)
        if families.str.endswith("moe").any() == experts:
            picked.append((name, comparison))
    unjudged_if(not picked, f"no {'mixture of experts' if experts else 'dense model'} among these runs")
    return picked


mixtures, dense = partial(_with_experts, True), partial(_with_experts, False)


def tiny_dataset(named: Named) -> Named:
    """Choose the comparisons whose runs see at most `SMALL_DATA` examples."""
    picked: Named = []
    for name, comparison in named:
        examples = comparison.runs["steps"] * comparison.runs["batch_size"]
        if examples.notna().all() and (examples <= SMALL_DATA).all():
            picked.append((f"{name} ({examples.max()} examples)", comparison))
    unjudged_if(not picked, f"no runs on at most {SMALL_DATA} examples")
    return picked


@claim("E1", over=chosen(dense), columns=("trainable_params",))
@claim("E7", over=chosen(tiny_dataset), columns=("trainable_params",))
def _attention_worse(comparison: Comparison) -> Finding:
    attn, mlp = comparison.placed("attn"), comparison.placed("mlp")
    require(("LoRA on attention", next(iter(attn.values()), None)), ("LoRA on the MLP", next(iter(mlp.values()), None)))
    counts: dict[str, int] = {}
    for label in map(arm_label, (*attn.values(), *mlp.values())):
        known = comparison.rows[label]["trainable_params"].dropna().unique()
        unjudged_if(len(known) != 1, f"{label}: {len(known)} parameter counts in the runs table", "inconclusive")
        counts[label] = int(known[0])
    excess: dict[tuple[int, int], float] = {}
    for ranks in product(attn, mlp):
        on_attn, on_mlp = counts[arm_label(attn[ranks[0]])], counts[arm_label(mlp[ranks[1]])]
        excess[ranks] = (on_attn - on_mlp) / min(on_attn, on_mlp)
    nearest = min(excess, key=lambda ranks: abs(excess[ranks]))
    # Attention with at least as many parameters is preferred: a lack of them can't explain its loss.
    more = [ranks for ranks in excess if 0 <= excess[ranks] <= MAX_COUNT_DIFFERENCE]
    on_attn, on_mlp = min(more, key=excess.__getitem__, default=nearest)
    arms = [attn[on_attn], mlp[on_mlp]]
    apart = f"{' and '.join(map(arm_label, arms))}, differ by {abs(excess[nearest]):.0%}"
    text = f"no arms of about equal parameter counts: the nearest, {apart}"
    unjudged_if(abs(excess[nearest]) > MAX_COUNT_DIFFERENCE, text, "inconclusive")
    judged = comparison.worse(*arms)
    numbers = " and ".join(f"{counts[arm_label(arm)]:,}" for arm in arms)
    return replace(judged, reason=f"{judged.reason} ({numbers} parameters)")


@claim("E2", over=chosen(dense))
def _attention_adds_nothing(comparison: Comparison) -> Finding:
    mlp, all_layers = comparison.placed("mlp"), comparison.lora
    require(
        ("LoRA on the MLP", next(iter(mlp.values()), None)),
        ("LoRA on all layers", next(iter(all_layers.values()), None)),
    )
    ranks = [rank for rank in mlp if rank in all_layers]
    unjudged_if(not ranks, "no rank with LoRA on the MLP and on all layers", "inconclusive")
    return together([comparison.equal_losses(mlp[rank], all_layers[rank], better_too=True) for rank in ranks])


Parts = tuple[Callable[[Comparison], Finding], Callable[[Evidence], Named], Evidence]


def both_parts(choose: Callable[[Evidence], Named], evidence: Evidence) -> list[tuple[str, Parts]]:
    """Return the two parts of E3, E4 and E5 after their names: a judge, and from what it chooses its comparisons."""
    return [
        ("attention against the MLP", (_attention_worse, choose, evidence)),
        ("the MLP against all layers", (_attention_adds_nothing, choose, evidence)),
    ]


@claim("E3", over=partial(both_parts, chosen(mixtures)), columns=("trainable_params", "family"))
@claim("E4", over=partial(both_parts, every_dataset), columns=("trainable_params",))
@rl_claim(
    "E5",
    over=partial(both_parts, partial(problem_sets, test_reward="best_reward")),
    columns=("base_reward", "best_reward", "trainable_params"),
)
def _both_parts(part: Parts) -> Finding:
    judge, choose, evidence = part

    def judge_learned(comparison: Comparison) -> Finding:
        judged = judge(comparison)
        if not comparison.is_rl:
            return judged
        lora = [arm for arm in comparison.arms if arm["method"] == "lora"]
        return at_one_peak(if_learned(comparison, judged, list(comparison.placed("mlp").values())), comparison, lora)

    return judge_each(choose(evidence), judge_learned)
