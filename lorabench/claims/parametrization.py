"""Claims C4 to C11: LoRA's parametrization, which hyperparameters are redundant, and what A and B do in training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis import invariances
from lorabench.analysis.arms import STANDARD, arm_label, each_arm
from lorabench.analysis.comparison import Arm, Comparison, comparisons
from lorabench.analysis.curves import train_curves
from lorabench.analysis.estimate import combined, exact, mean_over_seeds, ratio_of_means
from lorabench.analysis.finding import Finding, decide, in_unit, together, without, worst
from lorabench.analysis.optima import as_ratio, in_words
from lorabench.analysis.rules import Above, Problem, Remedy, Within
from lorabench.analysis.slopes import censored_slope
from lorabench.claims.claim import Evidence, claim, doubted, few_seeds, number, unjudged_if
from lorabench.claims.scope import Named, at_papers_alpha, chosen, learning, lora_runs, papers_alpha, whole_runs

# Bounds whose meaning the criteria say.
FLAT_BAND = (0.95, 1.05)
HALF = 0.5
MAJORITY = 0.1
GROWTH = 1.1
TRAJECTORY_STEPS = 50
IDENTICAL = 1e-5
ZERO_EPS = 1e-12
SLOPE_STEPS = 5
STILL = 0.1
TIME_BAND = (0.8, 1.2)
MIN_TIMES = 3
MIN_TIMES_RANGE = 4

SLOPE_BAND = (0.98, 1.02)
"""The ratios of two initial slopes that count as equal: the losses of equal first updates differ by rounding and by
what little A has moved."""

TIME_ERROR = 0.05
"""The least standard deviation of the natural logarithm of a time until A has moved, since it is interpolated between
recorded steps."""

_STANDARD_RULE = invariances.RULES[0.0]

_PAIR = [
    *invariances.PAIR_SETTING,
    *(f"{name}_{end}" for name in invariances.CONFIGURATION for end in ("fast", "slow")),
]
"""The columns that are equal in pairs of runs which differ in the seed alone."""

_derivation = partial(claim, over=lora_runs)


def _flat(rows: pd.DataFrame) -> Finding:
    """Judge whether the first descent of every rank by one rule is that of the highest rank, within FLAT_BAND."""
    top, seeds, run_ids = rows["rank"].max(), int(rows["n_seeds"].min()), rows["run_ids"].explode()
    findings, texts = [], []
    for row in rows[rows["rank"] < top].to_dict("records"):
        texts.append(f"r{row['rank']} {number(row['estimate'], 3)}")
        rule, problems = Within(*FLAT_BAND), few_seeds(row["n_seeds"])
        findings.append(decide(rule, row["estimate"], "", run_ids, problems, "a ratio of 1 within 5%"))
    decisive = worst(findings)
    text = f"first descent over that of r{top}: {', '.join(texts)}, {seeds} seeds{decisive.reason}"
    return replace(decisive, reason=text)


@_derivation("C4")
def _first_update_rank_independent(lora: Evidence) -> Iterator[Finding]:
    ratios = invariances.descent_ratios(invariances.first_descents(lora.runs, lora.curves))
    unjudged_if(ratios.empty, "no descent at step 1")
    groups = ratios.groupby(invariances.BATCHES, dropna=False)
    comparable = [group for _, group in groups if (group["rule"] == _STANDARD_RULE).sum() > 1]
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


def _pairs(evidence: Evidence, plus: bool = False) -> list[tuple[str, tuple[pd.DataFrame, pd.DataFrame]]]:
    """Return the `invariance_pairs` of each model and dataset, and the table `curves`, after their name."""
    return [(name, (invariances.invariance_pairs(lora.runs, plus), lora.curves)) for name, lora in lora_runs(evidence)]


def _named(pair: pd.Series[Any], speed: str) -> str:
    alpha, init_a, lr, ratio = (pair[f"{name}_{speed}"] for name in invariances.CONFIGURATION)
    return f"alpha {alpha:g} init x{init_a:g} LR_A {lr:g} LR_B/LR_A {ratio:g}"


@_derivation("C5", over=_pairs)
@_derivation("C8", over=partial(_pairs, plus=True))
def _equivalent_trajectories(tested: tuple[pd.DataFrame, pd.DataFrame]) -> Finding:
    pairs, curves = tested
    unjudged_if(pairs.empty, "no runs that should be equivalent")
    last = invariances.differences(pairs, curves, TRAJECTORY_STEPS).groupby("pair").last()
    equal, control = last[last["equivalent"]], last[~last["equivalent"]]
    unjudged_if(equal.empty, "no training losses of runs that should be equivalent")
    furthest, least = equal.sort_values("difference").iloc[-1], float(control["difference"].min())
    largest, eps, steps = float(furthest["difference"]), float(furthest["eps"]), equal["step"].min()
    at_eps = "" if math.isnan(eps) else f", eps {eps:g}"
    text = (
        f"{len(equal)} equivalent pairs of runs differ by at most {largest:.2g} nats (r{furthest['rank']}, "
        f"{_named(furthest, 'fast')} and {_named(furthest, 'slow')}{at_eps}) over {steps} steps"
    )
    text += f"; {len(control)} other pairs by at least {least:.2g}" if len(control) else ""
    problems, alike = [], largest <= IDENTICAL
    if len(equal) < int(pairs["equivalent"].sum()):
        problems.append(Problem("some equivalent pairs have no training losses"))
    if not alike and not eps <= ZERO_EPS:
        remedy = Remedy(f"runs with an epsilon of {ZERO_EPS:g} or less")
        problems.append(Problem("epsilon is not near the zero that the argument is about", remedy))
    if alike and steps < TRAJECTORY_STEPS:
        remedy = Remedy(f"runs of {TRAJECTORY_STEPS} steps")
        problems.append(Problem(f"fewer than {TRAJECTORY_STEPS} steps in common", remedy))
    if alike and control.empty:
        remedy = Remedy("a run that should differ, such as at another LR")
        problems.append(Problem("no pair that should differ", remedy))
    elif alike and not least > IDENTICAL:
        problems.append(Problem("runs that should differ do not, so the measure can't tell them apart"))
    run_ids = last[["run_id_fast", "run_id_slow"]].to_numpy().ravel()
    margin_rule = "the numerical precision of a training loss"
    return decide(Within.margin(IDENTICAL), exact(largest), text, run_ids, problems, margin_rule)


@_derivation("C6")
def _same_initial_slope(lora: Evidence) -> Finding:
    pairs = invariances.tenfold_pairs(lora.runs)
    unjudged_if(pairs.empty, "no runs that differ tenfold in init_a/LR_A alone")
    # Validation losses, as training losses of single steps differ more between batches than over so few updates.
    losses = train_curves(lora.runs[["run_id"]], lora.curves, split="validation")
    early = losses[losses["step"] <= SLOPE_STEPS].groupby("run_id")
    points = early.agg(first=("step", "min"), last=("step", "max"), before=("value", "first"), after=("value", "last"))
    points = points[(points["first"] == 0) & (points["last"] > 0)]
    falls = (points["before"] - points["after"]).astype(float)
    # The claim is about the time before A moves. A pair whose movement was not recorded is judged.
    recorded = train_curves(lora.runs[["run_id"]], lora.curves, "a_moved")
    moved = recorded[recorded["step"] >= SLOPE_STEPS].groupby("run_id")["value"].first().astype(float)
    fast, slow = pairs["run_id_fast"], pairs["run_id_slow"]
    both = pairs.assign(fast=fast.map(falls), slow=slow.map(falls), moved=fast.map(moved))
    both = both.dropna(subset=["fast", "slow"])
    unjudged_if(both.empty, f"no validation losses at step 0 and up to step {SLOPE_STEPS}")
    all_pairs = [pair for _, pair in both.groupby(_PAIR, dropna=False)]
    still = [pair for pair in all_pairs if not pair["moved"].max() > STILL]
    lost = len(all_pairs) - len(still)
    left_out = f"{lost} pairs left out, whose A moved by more than {STILL:.0%} in {SLOPE_STEPS} steps"
    unjudged_if(not still, left_out, "inconclusive", Remedy("the same pairs at a smaller LR_A"))
    findings = []
    for pair in still:
        name = f"r{pair['rank'].iloc[0]} {_named(pair.iloc[0], 'fast')}"
        other = _named(pair.iloc[0], "slow")
        ratio = ratio_of_means(pair["fast"].to_numpy(float), pair["slow"].to_numpy(float), f"{name} / {other}")
        text = f"{name}: {number(ratio, 3)} of the fall of {other} over {len(pair)} seeds"
        a_moved = pair["moved"].max()
        if not math.isnan(a_moved):
            text += f", A moved by {a_moved:.2g}"
        problems = few_seeds(len(pair)) + ([Problem("the loss does not fall")] if math.isnan(ratio.value) else [])
        run_ids = [*pair["run_id_fast"], *pair["run_id_slow"]]
        findings.append(decide(Within(*SLOPE_BAND), ratio, text, run_ids, problems, "a ratio of 1 within 2%"))
    # There may be dozens of pairs, so the reason counts their verdicts.
    counts = pd.Series([judged.verdict for judged in findings]).value_counts()
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return replace(together(findings), reason=f"{worst(findings).reason}; pairs in all: {verdicts}; {left_out}")


def _time_cells(times: pd.DataFrame) -> pd.DataFrame:
    """Return the mean log time until A has moved for each setting and update scale (column group), and time scale; it
    is a bound as the limit of one of the runs is (see `move_times`)."""
    scales = {name: times[name].map(lambda value: f"{value:.9g}") for name in ("update_scale", "time_scale")}
    keyed = times.assign(**{f"{name}_key": scale for name, scale in scales.items()})
    keyed["group"] = keyed.groupby([*invariances.PAIR_SETTING, "update_scale_key"], dropna=False, sort=False).ngroup()
    cells = keyed.groupby(["group", "time_scale_key"], as_index=False, sort=False).agg(
        time_scale=("time_scale", "first"),
        limit=("limit", lambda limits: math.exp(np.log(limits).mean())),
        lowest=("bound", "min"),
        highest=("bound", "max"),
        run_ids=("run_id", list),
    )
    # A mean of an upper and a lower bound bounds nothing.
    cells = cells[~((cells["lowest"] < 0) & (cells["highest"] > 0))]
    return cells.assign(bound=cells["lowest"] + cells["highest"].where(cells["highest"] != cells["lowest"], 0))


_LONGER = Remedy(
    f"{MIN_TIMES} values of init_A / LR_A over a factor of {MIN_TIMES_RANGE} at one alpha * init_A * LR_B, in runs "
    "long enough for A to move by its own norm"
)


@_derivation("C7")
def _time_scale_of_a(lora: Evidence) -> Finding:
    times = invariances.move_times(lora.runs, lora.curves)
    unjudged_if(times.empty, "no a_moved in the curves")
    cells = _time_cells(times)
    groups_known = cells.loc[cells["bound"] == 0, "group"]
    compared = cells[cells["group"].isin(groups_known) & (cells.groupby("group")["group"].transform("size") > 1)]
    text = "no two values of init_a/LR_A at one alpha * init_a * LR_B, in one of which A moved by its own norm"
    unjudged_if(compared.empty, text, "inconclusive", _LONGER)
    slope = censored_slope(
        np.log(compared["time_scale"].to_numpy(float)),
        np.log(compared["limit"].to_numpy(float)),
        compared["bound"].to_numpy(int),
        compared["group"].to_numpy(int),
        TIME_ERROR,
        f"time scale of A on {lora.runs['model'].iloc[0]}/{lora.runs['dataset'].iloc[0]}",
    )
    known = compared[compared["bound"] == 0]
    text = (
        "at fixed alpha * init_a * LR_B, steps until A has moved by its own norm go as (init_a/LR_A) to the power "
        f"{number(slope) if math.isfinite(slope.value) else 'unknown'}, {len(known)} times and "
        f"{len(compared) - len(known)} bounds at {compared['group'].nunique()} update scales"
    )
    problems = []
    scales = known.groupby("group")["time_scale"].agg(["size", "min", "max"])
    if not ((scales["size"] >= MIN_TIMES) & (scales["max"] >= MIN_TIMES_RANGE * scales["min"])).any():
        needed = f"{MIN_TIMES} known times over a factor of {MIN_TIMES_RANGE} in init_a/LR_A needed at one update scale"
        problems.append(Problem(needed, _LONGER))
    ids = compared["run_ids"].explode()
    return decide(Within(*TIME_BAND), slope, text, ids, problems, "an exponent of 1 within a fifth")


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
    by_model: dict[str, list[tuple[float, tuple[str, Comparison]]]] = {}
    for name, comparison in learning(named):
        first = comparison.runs.iloc[0]
        if comparison.lora:
            seen = first["steps"] * first["batch_size"]
            longest = f"{name} (longest runs, {first['steps']} steps)", comparison
            by_model.setdefault(first["model"], []).append((0.0 if pd.isna(seen) else float(seen), longest))
    return [pair for pairs in by_model.values() for seen, pair in pairs if seen == max(size for size, _ in pairs)]


@claim("C9", over=tuned_variants)
def _standard_near_optimal(tuned: Variants) -> Finding:
    comparison, standard, variants = tuned
    gaps = [comparison.judge_gap(lambda margin: Within(-margin, math.inf), arm, standard) for arm in variants]
    remedy = Remedy("variants of alpha and of LR_B/LR_A, each with an LR grid")
    fixed = [name for name in ("alpha", "lr_ratio") if all(arm[name] in (None, STANDARD[name]) for arm in variants)]
    return doubted(together(gaps), [Problem(f"no variant of {name}", remedy) for name in fixed], ["confirmed"])


@claim("C10", over=chosen(at_papers_alpha, most_examples), conditions=(papers_alpha, whole_runs))
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


@_derivation("C11")
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
    for _, pairs in growth.groupby(_PAIR, dropna=False):
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
