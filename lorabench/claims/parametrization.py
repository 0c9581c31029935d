"""Claims C4 and C9 to C11: the factor 1/r, other values of alpha and LR ratio, and what A and B do in training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from lorabench.analysis import invariances
from lorabench.analysis.arms import STANDARD, arm_label, each_arm
from lorabench.analysis.comparison import Arm, Comparison, comparisons
from lorabench.analysis.curves import train_curves
from lorabench.analysis.estimate import combined, mean_over_seeds
from lorabench.analysis.finding import MIN_SEEDS, Finding, decide, in_unit, together, without, worst
from lorabench.analysis.optima import as_ratio, in_words
from lorabench.analysis.rules import Above, Problem, Remedy, Within
from lorabench.claims.claim import Evidence, claim, doubted, few_seeds, number, unjudged_if
from lorabench.claims.scope import Named, at_papers_alpha, chosen, learning, lora_runs, papers_alpha, whole_runs

# Bounds whose meaning the criteria say.
FLAT_BAND = (0.95, 1.05)
HALF = 0.5
MAJORITY = 0.1
GROWTH = 1.1

# First descents are compared between runs that agree in these columns.
_WITHOUT_RULE = ["model", "dataset", "placement", "batch_size", "eps"]

_STANDARD_RULE = invariances.RULES[0.0]

_derivation = partial(claim, kind="derivation", unit="ratio", experiments=("parametrization",), over=lora_runs)


def _flat(rows: pd.DataFrame) -> Finding:
    """Judge whether the first descent of every rank by one rule is that of the highest rank, within FLAT_BAND."""
    top, seeds, run_ids = rows["rank"].max(), int(rows["n_seeds"].min()), rows["run_ids"].explode()
    findings, texts = [], []
    for row in rows[rows["rank"] < top].to_dict("records"):
        texts.append(f"r{row['rank']} {number(row['estimate'], 3)}")
        problems = few_seeds(row["n_seeds"])
        rule = Within(*FLAT_BAND)
        findings.append(decide(rule, row["estimate"], "", run_ids, problems, "a ratio of 1 within 5%"))
    decisive = worst(findings)
    text = f"first descent over that of r{top}: {', '.join(texts)}, {seeds} seeds{decisive.reason}"
    return replace(decisive, reason=text)


@_derivation(
    id="C4",
    statement="The factor 1/r makes the expected first update independent of rank",
    criterion=(
        "The measure is the first-order fall of the loss by the first update: the projection of the change of W on "
        "FullFT's gradient in nats, as a mean over seeds, over that of the highest rank, paired by seed. At every rank "
        f"this ratio is between {FLAT_BAND[0]:g} and {FLAT_BAND[1]:g}. Ranks whose alpha grows as sqrt(r) or as r are "
        "the control, and must fail this"
    ),
    needs=(
        f"LoRA of several ranks with alpha {STANDARD['alpha']:g}, and with alpha growing with rank; {MIN_SEEDS} seeds"
    ),
    paper_value="equal; derived",
)
def _first_update_rank_independent(lora: Evidence) -> Iterator[Finding]:
    ratios = invariances.descent_ratios(invariances.first_descents(lora.runs, lora.curves))
    unjudged_if(ratios.empty, "no descent at step 1")
    groups = [group for _, group in ratios.groupby(_WITHOUT_RULE, dropna=False)]
    comparable = [group for group in groups if (group["rule"] == _STANDARD_RULE).sum() > 1]
    text = f"fewer than two ranks with alpha {STANDARD['alpha']:g}"
    unjudged_if(not comparable, text, "inconclusive", Remedy(f"another rank with alpha {STANDARD['alpha']:g}"))
    for group in comparable:
        controls = {rule: _flat(rows) for rule, rows in group.groupby("rule") if len(rows) > 1}
        run_ids = tuple(sorted({run_id for each in controls.values() for run_id in each.run_ids}))
        judged = controls.pop(_STANDARD_RULE)
        reasons, problems = [judged.reason], []
        for rule in [rule for rule in invariances.RULES.values() if rule in controls]:
            reasons.append(f"control {rule}: {controls[rule].reason}")
            if controls[rule].verdict != "contradicted":
                problems.append(Problem(f"the control {rule} does not fail, so the measure can't tell rules apart"))
        if not controls:
            problems = [Problem("no control with another rule", Remedy("ranks whose alpha grows with the rank"))]
        yield doubted(replace(judged, reason="; ".join(reasons), run_ids=run_ids), problems, ["confirmed"])


Variants = tuple[Comparison, Arm, list[Arm]]


def tuned_variants(evidence: Evidence) -> list[tuple[str, Variants]]:
    """Return comparisons, each with its standard arm and the LR-tuned variants of the same rank, layers and epsilon."""
    named = []
    tuned = invariances.with_lr_grid(invariances.with_scales(evidence.runs))
    for comparison in comparisons(tuned, evidence.curves, evidence.judging):
        settings: dict[tuple[object, ...], list[Arm]] = {}
        for arm in comparison.arms:
            settings.setdefault(tuple(arm[name] for name in invariances.PAIR_SETTING), []).append(arm)
        for arms in settings.values():
            standard = [arm for arm in arms if all(arm[name] in (None, value) for name, value in STANDARD.items())]
            variants = [arm for arm in arms if arm not in standard]
            if standard and variants:
                named.append((comparison.label, (comparison, standard[0], variants)))
    unjudged_if(not named, "no LR-tuned variants of alpha or LR ratio besides the standard parametrization")
    return named


def most_examples(named: Named) -> Named:
    """Choose, for each model, the comparisons with the most examples seen, random facts left out."""
    by_model: dict[str, list[tuple[float, str, Comparison]]] = {}
    for name, comparison in learning(named):
        first = comparison.runs.iloc[0]
        if comparison.lora:
            seen = first["steps"] * first["batch_size"]
            by_model.setdefault(first["model"], []).append((0.0 if pd.isna(seen) else float(seen), name, comparison))
    return [
        (f"{name} (longest runs, {comparison.runs['steps'].iloc[0]} steps)", comparison)
        for by_size in by_model.values()
        for seen, name, comparison in by_size
        if seen == max(size for size, _, _ in by_size)
    ]


@claim(
    id="C9",
    kind="opinion",
    statement=f"No other alpha or LR ratio of B and A is better than alpha {STANDARD['alpha']:g} with equal LRs",
    criterion=(
        "The fitted lowest test NLL of each variant of alpha and of LR_B/LR_A is no lower than that of the standard "
        "parametrization, within the margin of losses: a share (2% unless the preset says otherwise) of the gain from "
        "the base to the best of these arms. One fit holds all variants of a setting"
    ),
    needs=f"the standard parametrization and variants of alpha and LR ratio, each LR-tuned; {MIN_SEEDS} seeds",
    paper_value="unable to improve; no number",
    experiments=("parametrization",),
    over=tuned_variants,
)
def _standard_near_optimal(tuned: Variants) -> Finding:
    comparison, standard, variants = tuned
    gaps = [comparison.judge_gap(lambda margin: Within(-margin, math.inf), arm, standard) for arm in variants]
    remedy = Remedy("variants of alpha and of LR_B/LR_A, each with an LR grid")
    missing = [
        Problem(f"no variant of {name}", remedy)
        for name in ("alpha", "lr_ratio")
        if all(arm[name] is None or arm[name] == STANDARD[name] for arm in variants)
    ]
    return doubted(together(gaps), missing, ["confirmed"])


@claim(
    id="C10",
    statement="At the end of full runs, B has a larger spectral norm than A",
    criterion=(
        "The measure is the share of layers in which B has the larger spectral norm after the last step, over seeds, "
        "in the longest SFT runs of each model (most examples seen, random facts left out) at the LR of the grid that "
        f"is nearest to the fitted optimum. At every rank it is above {HALF:g} by a margin of {MAJORITY:g}"
    ),
    needs=f"LoRA on all layers with an LR grid; b_over_a at the last step; {MIN_SEEDS} seeds around the optimum",
    paper_value="larger; no number",
    unit="share of layers",
    experiments=("rank", "short_run", "capacity"),
    over=chosen(at_papers_alpha, most_examples),
    conditions=(papers_alpha, whole_runs),
)
def _b_outgrows_a(comparison: Comparison) -> Finding:
    last = train_curves(comparison.runs, comparison.curves, "b_over_a").groupby("run_id").last()
    last = last[last["step"] == last["steps"].fillna(last["step"])]
    shares = last["value"].astype(float)
    findings = []
    for arm in comparison.lora.values():
        run_ids = [run_id for run_id in comparison.at_optimum(arm)["run_id"] if run_id in shares]
        if run_ids:
            name = f"share of layers {comparison.label} {arm_label(arm)}"
            share = mean_over_seeds(shares.loc[run_ids].to_numpy(), name)
            text = f"{arm_label(arm)} {number(share)} over {len(run_ids)} seeds"
            excess = combined(lambda value: value - HALF, share)
            problems = [*comparison.problems([arm]), *few_seeds(len(run_ids), "seeds")]
            judged = decide(Above(MAJORITY), excess, text, run_ids, problems, f"a share of {HALF + MAJORITY:g}")
            findings.append(in_unit(judged, lambda value: value + HALF))
    unjudged_if(not findings, "no b_over_a at the last step of a run at its optimal LR")
    decided = together(findings)
    return replace(decided, reason=f"share of layers with ||B|| > ||A||: {decided.reason}")


@_derivation(
    id="C11",
    statement="LoRA's effective LR grows during training, since A's updates do nothing while B is 0",
    criterion=(
        "With a control: the norm of the change of W by one step at the last recorded step, relative to the first "
        "step, over the same number of a run with a tenth of LR_A and the same LR_B, paired by seed, is above 1 by a "
        f"factor of {GROWTH:g}. In the control A hardly moves, and Adam's updates shrink as much. Without a control: "
        "the norm of the change of W over the LR, in the first half of the longest runs at the LR nearest to the "
        "fitted optimum (mean of logs over the recorded steps from the square root of its last step on), over that of "
        "the first step, is above 1 by that factor; this can't contradict, since Adam's first update is its largest"
    ),
    needs=f"LoRA with update_norm at the first step and later, and with LR_A a tenth; {MIN_SEEDS} seeds of both",
    paper_value="grows; derived",
)
def _effective_lr_grows(lora: Evidence) -> Finding:
    rule, margin_rule = Above(math.log(GROWTH)), f"a factor of {GROWTH:g}"
    sizes = invariances.step_sizes(lora.runs, lora.curves)
    first_half = sizes[(sizes["step"] <= sizes["steps"].fillna(sizes["step"].max()) / 2)]
    alone, controlled = [], []
    for arm, rows in each_arm(first_half):
        by_run = {run_id: steps.set_index("step")["size"] for run_id, steps in rows.groupby("run_id")}
        by_run = {run_id: size for run_id, size in by_run.items() if 1 in size.index and len(size) > 1}
        if not by_run:
            continue
        # Without a control: from the size of each step by run. On a log axis these are the later half of the steps.
        last = max(by_run[next(iter(by_run))].index)
        logs = [float(np.log(size[size.index >= math.sqrt(last)] / size[1]).mean()) for size in by_run.values()]
        grown = mean_over_seeds(logs, f"growth {arm_label(arm)}")
        text = (
            f"{arm_label(arm)}: change of W per step over the LR is {in_words(grown)} times that of the first step "
            f"from step {math.ceil(math.sqrt(last))} to {last}, {len(by_run)} seeds"
        )
        judged = decide(rule, grown, text, map(str, by_run), few_seeds(len(by_run), "seeds"), margin_rule)
        if judged.verdict == "contradicted":
            reason = f"{judged.reason}; Adam's first update is its largest, so a fall says nothing without a control"
            judged = replace(judged, reason=reason, remedy=Remedy("runs with a tenth of LR_A and the same LR_B"))
        alone.append(as_ratio(without(judged, "contradicted")))
    growth = invariances.update_growth(invariances.fixed_a_controls(lora.runs), lora.curves)
    names = [f"{name}_{speed}" for name in invariances.CONFIGURATION for speed in ("fast", "slow")]
    for _, pairs in growth.groupby([*invariances.PAIR_SETTING, *names], dropna=False):
        first = pairs.iloc[0]
        rank, fast, slow = first["rank"], f"LR {first['lr_fast']:g}", f"{first['lr_slow']:g}"
        over_control = mean_over_seeds(np.log(pairs["growth"]), f"growth r{rank} {fast} over LR {slow}")
        text = (
            f"r{rank} {fast}: change of W at step {first['step']} over the first is {in_words(over_control)} times "
            f"that with LR_A {slow} and the same LR_B, {len(pairs)} seeds"
        )
        run_ids, problems = [*pairs["run_id_fast"], *pairs["run_id_slow"]], few_seeds(len(pairs))
        controlled.append(as_ratio(decide(rule, over_control, text, run_ids, problems, margin_rule)))
    unjudged_if(not controlled and not alone, "no update_norm of the standard parametrization at step 1 and later")
    decided = together(controlled or alone)
    if not controlled or not alone:
        return decided
    uncorrected = together(alone)
    all_ids = tuple(sorted({*decided.run_ids, *uncorrected.run_ids}))
    return replace(decided, reason=f"{decided.reason}; for comparison {uncorrected.reason}", run_ids=all_ids)
