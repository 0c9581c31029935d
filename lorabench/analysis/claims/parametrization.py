"""Claims C: early curves by rank, and the parametrisation of LoRA: what is redundant in it and what it does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis.arms import STANDARD, arm_label, each_arm, rows_of
from lorabench.analysis.claims.claim import Claim
from lorabench.analysis.claims.evidence import Comparison, Evidence, Scoped, every_dataset, judge_each, over
from lorabench.analysis.claims.finding import (
    MIN_SEEDS,
    Finding,
    UnjudgedError,
    Verdict,
    equality_problems,
    finding,
    interval_text,
    nats,
    noise_problems,
    sigma_text,
    together,
    within,
    worst,
)
from lorabench.analysis.early import EarlyDifference, early_difference, train_curves
from lorabench.analysis.gaps import best_losses, gap, mean_interval
from lorabench.analysis.noise import seed_noise, sigma_of
from lorabench.analysis.parametrization import (
    CONFIGURATION,
    RULES,
    SETTING,
    descent_ratios,
    differences,
    first_descents,
    invariance_pairs,
    move_times,
    ratio_of_means,
    step_sizes,
    still_controls,
    tenfold_pairs,
    tuned,
    update_growth,
    with_scales,
)
from lorabench.analysis.slopes import against_log, log_log

EARLY_STEPS = 100
"""Steps that count as early (C1); the paper shows no number."""

FIRST_STEPS = 10
"""The first few steps, in which the paper sees a negative difference (C3). Also those that Adam's first moment, with
its decay of 0.9, takes to fill (C11)."""

SIGN_SEEDS = 5
"""Seeds that a verdict on that sign needs."""

TRAJECTORY_STEPS = 50
"""Over which equivalent runs are compared (C5, C8)."""

IDENTICAL = 1e-5
"""Nats per token below which two training losses are the same to numerical precision."""

ZERO_EPS = 1e-12
"""Adam's epsilon up to which it counts as the zero of the invariance argument."""

SLOPE_STEPS = 5
"""Over which the initial slope is taken (C6)."""

STILL = 0.1
"""Movement of A, in its initial norm, below which A is still where it started."""


def same_early_curves(comparison: Comparison) -> Finding:
    """C1: training NLL of two ranks on the same batches, at the step where they are furthest apart for the margin."""
    early = _early(comparison, EARLY_STEPS)
    steps = early.over_seeds().assign(loss=early.loss, margin=2 * early.sigma_batch).rename_axis("step").reset_index()
    steps["margin"] = steps["margin"].mask(steps["step"] <= 20, np.fmin(steps["margin"], 0.01 * steps["loss"]))
    bounds = steps[["low", "high", "margin"]].to_numpy(float)
    verdicts = pd.Series([within(low, high, (-margin, margin)) for low, high, margin in bounds])
    half = (steps["high"] - steps["mean"]).fillna(0.0)
    steps["strain"] = ((steps["mean"].abs() + half) / steps["margin"]).fillna(0.0)
    verdict = _decisive(verdicts)
    furthest = steps[verdicts == verdict].sort_values("strain").iloc[-1]
    mean, interval = float(furthest["mean"]), (float(furthest["low"]), float(furthest["high"]))
    text = (
        f"{_compared(early)} at most {nats(mean, *interval)}, margin {furthest['margin']:.4f} (step "
        f"{furthest['step']:.0f} of {len(steps)}), loss {furthest['loss']:.3f}, batches: "
        f"{sigma_text(early.sigma_batch)}"
    )
    problems = _seed_problems(early, MIN_SEEDS)
    return finding(early.run_ids, text, verdict, problems, mean, interval, float(furthest["strain"]))


def difference_grows(comparison: Comparison) -> Finding:
    """C2: slope of each seed's |difference| of two ranks against log step, and its mean by decade."""
    early = _early(comparison)
    apart = early.by_seed[early.by_seed.index > 1].abs()
    slopes = pd.Series([against_log(apart.index, apart[seed]).slope for seed in apart], dtype=float)
    slope, low, high = mean_interval(slopes)
    # Steps 2..10, 11..100 and so on.
    decade = np.ceil(np.log10(apart.index.to_numpy(float)) - 1e-9).astype(int)
    means = apart.mean(axis=1).groupby(decade).mean()
    ends = np.minimum(10.0 ** means.index.to_numpy(float), apart.index.max())
    told = ", ".join(f"{value:.4f} up to step {end:.0f}" for end, value in zip(ends, means, strict=True))
    text = (
        f"{_compared(early)}, |difference| grows by {nats(slope, low, high)} per decade of steps over {early.n_seeds} "
        f"seeds; mean {told}"
    )
    problems = _seed_problems(early, MIN_SEEDS)
    if len(means) < 2:
        problems.append("fewer than two decades of steps")
    verdict: Verdict = "inconclusive"
    if low > 0 and means.is_monotonic_increasing:
        verdict = "confirmed"
    elif high < 0:
        verdict = "contradicted"
    return finding(early.run_ids, text, verdict, problems, slope, (low, high), -slope)


def difference_negative_at_first(comparison: Comparison) -> Finding:
    """C3: difference of two ranks, mean over the first steps, over seeds."""
    early = _early(comparison, FIRST_STEPS)
    # Before the first update the difference is zero, whatever the ranks.
    first = early.by_seed[early.by_seed.index > 1]
    mean, low, high = mean_interval(first.mean())
    text = f"{_compared(early)} = {nats(mean, low, high)} over steps 2 to {FIRST_STEPS} of {early.n_seeds} seeds"
    problems = _seed_problems(early, SIGN_SEEDS)
    if first.empty or first.index.max() < FIRST_STEPS:
        problems.append(f"fewer than {FIRST_STEPS} steps")
    verdict: Verdict = "confirmed" if high < 0 else "contradicted" if low > 0 else "inconclusive"
    return finding(early.run_ids, text, verdict, problems, mean, (low, high), mean)


def _early(comparison: Comparison, first_steps: int | None = None) -> EarlyDifference:
    """The two ranks that the claims on early curves compare."""
    if not comparison.lora:
        raise UnjudgedError("not tested", "no LoRA on all layers")
    early = early_difference(comparison.of(comparison.lora.values()), comparison.curves, first_steps)
    if early is None:
        raise UnjudgedError("inconclusive", "no two ranks above 1 with training losses at one LR and seed")
    return early


def _compared(early: EarlyDifference) -> str:
    return f"training NLL of r{early.low} - r{early.high} at LR {early.lr:g}"


def _seed_problems(early: EarlyDifference, needed: int) -> list[str]:
    problems = [f"{early.n_seeds} paired seeds, {needed} needed"] if early.n_seeds < needed else []
    return problems + ([f"{early.n_diverged} runs at that LR diverged"] if early.n_diverged else [])


def first_update_rank_independent(lora: pd.DataFrame, curves: pd.DataFrame) -> Finding:
    """C4: descent of the first update by rank, with 1/r and with the rules that should not do."""
    ratios = descent_ratios(first_descents(lora, curves))
    if ratios.empty:
        raise UnjudgedError("not tested", "no descent at step 1")
    groups = [of_batches for _, of_batches in ratios.groupby(_WITHOUT_RULE, dropna=False)]
    comparable = [one for one in groups if (one["rule"] == _STANDARD_RULE).sum() > 1]
    if not comparable:
        raise UnjudgedError("inconclusive", "fewer than two ranks with alpha 32")
    return together([_by_rule(one) for one in comparable])


# What first descents are compared within.
_WITHOUT_RULE = ["model", "dataset", "placement", "batch_size", "eps"]

_STANDARD_RULE, *_CONTROL_RULES = RULES.values()


def _decisive(verdicts: pd.Series[Any]) -> Verdict:
    """Of several verdicts, all of which must be `confirmed`, the one that decides."""
    order: tuple[Verdict, ...] = ("contradicted", "inconclusive")
    return next((verdict for verdict in order if (verdicts == verdict).any()), "confirmed")


def _by_rule(ratios: pd.DataFrame) -> Finding:
    found = {rule: of_rule for rule, of_rule in ratios.groupby("rule") if len(of_rule) > 1}
    verdict, furthest, text = _flat(found[_STANDARD_RULE])
    problems = []
    if furthest["n_seeds"] < MIN_SEEDS:
        problems.append(f"{furthest['n_seeds']} paired seeds, {MIN_SEEDS} needed")
    for rule in _CONTROL_RULES:
        if rule not in found:
            continue
        failed, _, told = _flat(found[rule])
        text += f"; control {rule}: {told}"
        if verdict == "confirmed" and failed != "contradicted":
            problems.append(f"the control {rule} does not fail, so the measure can't tell")
    if verdict == "confirmed" and not found.keys() & set(_CONTROL_RULES):
        problems.append("no control with another rule")
    run_ids = [run_id for of_rule in found.values() for ids in of_rule["run_ids"] for run_id in ids]
    interval = (float(furthest["low"]), float(furthest["high"]))
    ratio = float(furthest["ratio"])
    return finding(run_ids, text, verdict, problems, ratio, interval, abs(ratio - 1))


def _flat(of_rule: pd.DataFrame) -> tuple[Verdict, pd.Series[Any], str]:
    """Whether the first descent is that of the highest rank within 5% at all ranks; the rank that decides; in words."""
    top = of_rule["rank"].max()
    others = of_rule[of_rule["rank"] < top]
    verdicts = pd.Series([within(low, high, (0.95, 1.05)) for low, high in others[["low", "high"]].to_numpy()])
    verdict = _decisive(verdicts)
    deciding = others[(verdicts == verdict).to_numpy()]
    furthest = deciding.sort_values("ratio", key=lambda ratio: (ratio - 1).abs()).iloc[-1]
    told = ", ".join(
        f"r{row['rank']} {row['ratio']:.3f} {interval_text(row['low'], row['high'], 3)}" for _, row in others.iterrows()
    )
    return verdict, furthest, f"first descent over that of r{top}: {told}, {furthest['n_seeds']} seeds"


def equivalent_trajectories(lora: pd.DataFrame, curves: pd.DataFrame, plus: bool = False) -> Finding:
    """C5, C8: largest difference of the training NLL of runs that should be one run, against runs that should not.

    Args:
        plus: only pairs of which one has unequal LRs of A and B and the other does not.
    """
    pairs = invariance_pairs(lora, plus)
    if pairs.empty:
        raise UnjudgedError("not tested", "no runs that should be equivalent")
    last = differences(pairs, curves, TRAJECTORY_STEPS).groupby("pair").last()
    equal, control = last[last["equivalent"]], last[~last["equivalent"]]
    if equal.empty:
        raise UnjudgedError("not tested", "no training losses of runs that should be equivalent")
    furthest = equal.sort_values("difference").iloc[-1]
    largest, eps = float(furthest["difference"]), float(furthest["eps"])
    at_eps = "" if math.isnan(eps) else f", eps {eps:g}"
    text = (
        f"{len(equal)} equivalent pairs of runs differ by at most {largest:.2g} nats (r{furthest['rank']}, "
        f"{_named(furthest, 'fast')} and {_named(furthest, 'slow')}{at_eps}) over {equal['step'].min()} steps"
    )
    problems = []
    if len(equal) < int(pairs["equivalent"].sum()):
        problems.append("some equivalent pairs have no training losses")
    verdict: Verdict = "confirmed" if largest < IDENTICAL else "contradicted"
    if equal["step"].min() < TRAJECTORY_STEPS and verdict == "confirmed":
        problems.append(f"fewer than {TRAJECTORY_STEPS} steps in common")
    if verdict == "contradicted" and not eps <= ZERO_EPS:
        problems.append("epsilon is not near the zero that the argument is about")
    if control.empty:
        problems += ["no pair that should differ"] if verdict == "confirmed" else []
    else:
        nearest = float(control["difference"].min())
        text += f"; {len(control)} other pairs by at least {nearest:.2g}"
        if verdict == "confirmed" and not nearest > max(largest, IDENTICAL):
            problems.append("runs that should differ do not, so the measure can't tell")
    run_ids = last[["run_id_fast", "run_id_slow"]].to_numpy().ravel()
    return finding(run_ids, text, verdict, problems, largest, strain=largest)


def plus_trajectories(lora: pd.DataFrame, curves: pd.DataFrame) -> Finding:
    """C8: as C5, for pairs of which one has unequal LRs of A and B and the other does not."""
    return equivalent_trajectories(lora, curves, plus=True)


def same_initial_slope(lora: pd.DataFrame, curves: pd.DataFrame) -> Finding:
    """C6: fall of the training loss where LR_A alone is ten times as large."""
    pairs = tenfold_pairs(lora)
    if pairs.empty:
        raise UnjudgedError("not tested", "no runs that differ tenfold in init_a/LR_A alone")
    falls = _falls(lora, curves)
    both = pairs.assign(fast=pairs["run_id_fast"].map(falls), slow=pairs["run_id_slow"].map(falls))
    both = both.dropna(subset=["fast", "slow"])
    if both.empty:
        raise UnjudgedError("not tested", f"no validation losses at step 0 and up to step {SLOPE_STEPS}")
    names = [f"{name}_{speed}" for name in CONFIGURATION for speed in ("fast", "slow")]
    every = [of_pair for _, of_pair in both.groupby([*SETTING, *names], dropna=False)]
    # The claim is about the time before A moves. Where that was not recorded, a pair counts.
    moved = _moved_by(lora, curves, SLOPE_STEPS)
    still = [of_pair for of_pair in every if not of_pair["run_id_fast"].map(moved).max() > STILL]
    left_out = (
        f"{len(every) - len(still)} pairs left out, whose A moved by more than {STILL:.0%} in {SLOPE_STEPS} steps"
    )
    if not still:
        raise UnjudgedError("inconclusive", left_out)
    found = [_slope_of(of_pair, moved) for of_pair in still]
    # Not all reasons: there may be dozens.
    counts = pd.Series([one.verdict for one in found]).value_counts()
    told = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    return replace(together(found), reason=f"{worst(found).reason}; pairs in all: {told}; {left_out}")


def _falls(lora: pd.DataFrame, curves: pd.DataFrame) -> pd.Series[float]:
    """Validation NLL before training minus that at the last point up to step SLOPE_STEPS, by run.

    Training losses of single steps would not do: their batches differ more than so few updates do.
    """
    losses = train_curves(lora[["run_id"]], curves, split="validation")
    early = losses[losses["step"] <= SLOPE_STEPS].groupby("run_id")
    points = early.agg(first=("step", "min"), last=("step", "max"), before=("value", "first"), after=("value", "last"))
    points = points[(points["first"] == 0) & (points["last"] > 0)]
    return (points["before"] - points["after"]).astype(float)


def _moved_by(lora: pd.DataFrame, curves: pd.DataFrame, step: int) -> pd.Series[float]:
    """Movement of A by a step, at the first recorded step that is not before it, by run."""
    moved = train_curves(lora[["run_id"]], curves, "a_moved")
    return moved[moved["step"] >= step].groupby("run_id")["value"].first().astype(float)


def _slope_of(of_pair: pd.DataFrame, moved: pd.Series[float]) -> Finding:
    """The finding on one pair of configurations, over seeds."""
    first = of_pair.iloc[0]
    ratio, low, high = ratio_of_means(of_pair["fast"].to_numpy(float), of_pair["slow"].to_numpy(float))
    a_moved = of_pair["run_id_fast"].map(moved).max()
    text = (
        f"r{first['rank']} {_named(first, 'fast')}: {ratio:.3f} {interval_text(low, high, 3)} of the fall of "
        f"{_named(first, 'slow')} over {len(of_pair)} seeds"
    )
    problems = []
    if len(of_pair) < MIN_SEEDS:
        problems.append(f"{len(of_pair)} paired seeds, {MIN_SEEDS} needed")
    if math.isnan(ratio):
        problems.append("the loss does not fall")
    verdict = within(low, high, (0.98, 1.02))
    if not math.isnan(a_moved):
        text += f", A moved by {a_moved:.2g}"
    run_ids = [*of_pair["run_id_fast"], *of_pair["run_id_slow"]]
    return finding(run_ids, text, verdict, problems, ratio, (low, high), abs(ratio - 1))


def _named(pair: pd.Series[Any], speed: str) -> str:
    alpha, init_a, lr, ratio = (pair[f"{name}_{speed}"] for name in CONFIGURATION)
    return f"alpha {alpha:g} init x{init_a:g} LR_A {lr:g} LR_B/LR_A {ratio:g}"


def time_scale_of_a(lora: pd.DataFrame, curves: pd.DataFrame) -> Finding:
    """C7: exponent of the steps until A has moved by its own norm, as a power of init_a/LR_A."""
    times = move_times(lora, curves)
    if times.empty:
        raise UnjudgedError("not tested", "no a_moved in the curves")
    # Seeds of one configuration are no further points of the line.
    cells = times.groupby([*SETTING, *CONFIGURATION], dropna=False).agg(
        time=("time_scale", "first"), step=("step", lambda steps: math.exp(np.log(steps).mean(skipna=False)))
    )
    reached = cells.dropna()
    if reached.empty:
        raise UnjudgedError("inconclusive", f"A did not move by its own norm in any of {len(cells)} configurations")
    line = log_log(reached["time"], reached["step"])
    n_times = reached["time"].map(lambda value: f"{value:.6g}").nunique()
    text = (
        f"steps until A has moved by its own norm go as (init_a/LR_A) to the power {line.slope:.2f} "
        f"{interval_text(line.low, line.high, 2)}, {line.n} configurations with {n_times} time scales"
    )
    left_out = len(cells) - len(reached)
    if left_out:
        text += f"; {left_out} left out, in which A did not get there in every seed, or did before the first record"
    problems = []
    if n_times < 3 or reached["time"].max() < 4 * reached["time"].min():
        problems.append("needs three time scales over a factor of 4")
    verdict = within(line.low, line.high, (0.8, 1.2))
    run_ids = times.loc[times["step"].notna(), "run_id"]
    return finding(run_ids, text, verdict, problems, line.slope, (line.low, line.high), abs(line.slope - 1))


def standard_near_optimal(lora: pd.DataFrame, curves: pd.DataFrame) -> Finding:
    """C9: test NLL of each LR-tuned variant against the standard parametrisation."""
    runs = tuned(lora)
    found = []
    for _, of_setting in runs.groupby(SETTING, dropna=False):
        arms = [arm for arm, _ in each_arm(of_setting)]
        standard = next((arm for arm in arms if _is_standard(arm)), None)
        variants = [arm for arm in arms if not _is_standard(arm)]
        if standard and variants:
            found.append(_best_variant(of_setting, standard, variants))
    if not found:
        raise UnjudgedError("not tested", "no LR-tuned variants of alpha or LR ratio beside the standard one")
    return together(found)


def _is_standard(arm: dict[str, Any]) -> bool:
    return all(arm[name] is None or arm[name] == value for name, value in STANDARD.items())


def _best_variant(runs: pd.DataFrame, standard: dict[str, Any], variants: list[dict[str, Any]]) -> Finding:
    """The finding on one setting: every variant by itself, the worst decides."""
    noise = seed_noise(runs)
    row = rows_of(noise, standard, ["model", "dataset", "batch_size", "steps"]).iloc[0]
    sigma, dof = sigma_of(noise, standard, "test"), int(row["dof"])
    losses = {arm_label(loss): loss for _, loss in best_losses(runs).iterrows()}
    common = noise_problems(sigma, dof)
    for name in ("alpha", "lr_ratio"):
        if all(arm[name] is None or arm[name] == STANDARD[name] for arm in variants):
            common.append(f"no variant of {name}")
    found = []
    for variant in variants:
        apart = gap(runs, variant, standard)
        interval = (apart.ci_low, apart.ci_high)
        problems = [
            f"{label}: " + ("best LR at the edge of its grid" if losses[label]["at_edge"] else "no run finished")
            for label in (arm_label(variant), arm_label(standard))
            if losses[label]["at_edge"] or math.isnan(losses[label]["lr_best"])
        ]
        if apart.n_seeds < MIN_SEEDS:
            problems.append(f"{apart.n_seeds} paired seeds, {MIN_SEEDS} needed")
        if apart.n_diverged:
            problems.append(f"{apart.n_diverged} repeats at the best LR diverged")
        text = f"{arm_label(variant)} - standard = {nats(apart.estimate, *interval)} over {apart.n_seeds} seeds"
        verdict = within(*interval, (-2 * sigma, math.inf))
        problems += equality_problems(verdict, sigma, float(losses[arm_label(standard)]["loss_mean"]))
        run_ids = rows_of(runs, variant)["run_id"]
        found.append(finding(run_ids, text, verdict, problems, apart.estimate, interval, -apart.estimate))
    decided = together(found)
    text = f"{decided.reason}; {sigma_text(sigma)}"
    return finding(
        [*decided.run_ids, *rows_of(runs, standard)["run_id"]],
        text,
        decided.verdict,
        common,
        decided.estimate,
        (decided.ci_low, decided.ci_high),
        decided.strain,
    )


def b_outgrows_a(comparison: Comparison) -> Finding:
    """C10: share of layers in which B has the larger spectral norm, at the last step and the best LR of each rank."""
    arms = list(comparison.lora.values())
    if not arms:
        raise UnjudgedError("not tested", "no LoRA on all layers")
    last = train_curves(comparison.runs, comparison.curves, "b_over_a").groupby("run_id").last()
    last = last[last["step"] == last["steps"].fillna(last["step"])]
    shares = last["value"].astype(float)
    found = []
    for arm in arms:
        run_ids = [run_id for run_id in comparison.losses[arm_label(arm)]["run_ids"] if run_id in shares]
        if not run_ids:
            continue
        share, low, high = mean_interval(shares.loc[run_ids])
        verdict: Verdict = "confirmed" if low > 0.5 else "contradicted" if high <= 0.5 else "inconclusive"
        text = f"{arm_label(arm)} {share:.2f} {interval_text(low, high, 2)} over {len(run_ids)} seeds"
        found.append(finding(run_ids, text, verdict, comparison.edge_problems([arm]), share, (low, high), -share))
    if not found:
        raise UnjudgedError("not tested", "no b_over_a at the last step of a run at its best LR")
    decided = together(found)
    return replace(decided, reason=f"share of layers with ||B|| > ||A||: {decided.reason}")


def longest_runs(comparisons: list[Comparison]) -> list[Scoped]:
    """Per model, the comparisons with the most examples seen, memorisation left out."""
    sized: dict[str, list[tuple[float, Comparison]]] = {}
    for comparison in comparisons:
        first = comparison.runs.iloc[0]
        if comparison.lora and pd.isna(first.get("entropy_bits")):
            seen = first["steps"] * first["batch_size"]
            sized.setdefault(first["model"], []).append((0.0 if pd.isna(seen) else float(seen), comparison))
    return [
        (comparison, f" (longest runs, {comparison.runs['steps'].iloc[0]} steps)")
        for of_model in sized.values()
        for seen, comparison in of_model
        if seen == max(size for size, _ in of_model)
    ]


def effective_lr_grows(lora: pd.DataFrame, curves: pd.DataFrame) -> Finding:
    """C11: the change of W by one step, against runs in which A is still; without such, against the first step."""
    by_itself = _growth_by_itself(lora, curves)
    growth = update_growth(still_controls(lora), curves)
    names = [f"{name}_{speed}" for name in CONFIGURATION for speed in ("fast", "slow")]
    found = [_growth_by_a(of_pair) for _, of_pair in growth.groupby([*SETTING, *names], dropna=False)]
    if not found and not by_itself:
        raise UnjudgedError("not tested", "no update_norm of the standard parametrisation at step 1 and later")
    decided = together(found or by_itself)
    if not found or not by_itself:
        return decided
    uncorrected = together(by_itself)
    run_ids = tuple(sorted({*decided.run_ids, *uncorrected.run_ids}))
    return replace(decided, reason=f"{decided.reason}; for comparison {uncorrected.reason}", run_ids=run_ids)


def _growth_by_a(of_pair: pd.DataFrame) -> Finding:
    """The finding on one LR and rank with its control, over seeds."""
    first = of_pair.iloc[0]
    mean, low, high = mean_interval(np.log(of_pair["growth"]))
    ratio, interval = math.exp(mean), (math.exp(low), math.exp(high))
    text = (
        f"r{first['rank']} LR {first['lr_fast']:g}: change of W at step {first['step']} over the first is {ratio:.2f} "
        f"{interval_text(*interval, 2)} times that with LR_A {first['lr_slow']:g} and the same LR_B, {len(of_pair)} "
        "seeds"
    )
    problems = [f"{len(of_pair)} paired seeds, {MIN_SEEDS} needed"] if len(of_pair) < MIN_SEEDS else []
    verdict: Verdict = "confirmed" if low > 0 else "contradicted" if high < 0 else "inconclusive"
    run_ids = [*of_pair["run_id_fast"], *of_pair["run_id_slow"]]
    return finding(run_ids, text, verdict, problems, ratio, interval, -ratio)


def _growth_by_itself(lora: pd.DataFrame, curves: pd.DataFrame) -> list[Finding]:
    """The findings without a control, one per rank at its best LR."""
    sizes = step_sizes(lora, curves)
    early = sizes[(sizes["step"] <= sizes["steps"].fillna(sizes["step"].max()) / 2)]
    found = []
    for arm, of_arm in each_arm(early):
        by_run = {run_id: rows.set_index("step")["size"] for run_id, rows in of_arm.groupby("run_id")}
        by_run = {run_id: size for run_id, size in by_run.items() if 1 in size.index and len(size) > 1}
        if by_run:
            found.append(_growth(arm_label(arm), by_run))
    return found


def _growth(label: str, sizes: dict[Any, pd.Series[Any]]) -> Finding:
    """The finding on one rank at its best LR, from the sizes of steps of each seed."""
    last = max(sizes[next(iter(sizes))].index)
    # The later half, on a log axis, of what is early.
    growth = pd.Series(
        {run_id: float(np.log(size[size.index >= math.sqrt(last)] / size[1]).mean()) for run_id, size in sizes.items()}
    )
    mean, low, high = mean_interval(growth)
    ratio, interval = math.exp(mean), (math.exp(low), math.exp(high))
    filled = {run_id: size[size.index >= FIRST_STEPS] for run_id, size in sizes.items()}
    slope, slope_low, slope_high = mean_interval(
        pd.Series([log_log(size.index, size).slope for size in filled.values()], dtype=float)
    )
    text = (
        f"{label}: change of W per step over the LR is {ratio:.2f} {interval_text(*interval, 2)} times that "
        f"of the first step from step {math.ceil(math.sqrt(last))} to {last}, {len(sizes)} seeds"
    )
    # It takes two recorded steps to tell.
    if not math.isnan(slope):
        text += f"; it goes as step to the power {slope:.2f} {interval_text(slope_low, slope_high, 2)} from "
        text += f"step {FIRST_STEPS} on"
    problems = [f"{len(sizes)} seeds, {MIN_SEEDS} needed"] if len(sizes) < MIN_SEEDS else []
    verdict: Verdict = "inconclusive"
    if interval[0] > 1:
        verdict = "confirmed"
    elif interval[1] < 1 and slope_high < 0:
        verdict = "contradicted"
    return finding(sizes, text, verdict, problems, ratio, interval, -ratio)


def _on_lora(judge: Callable[[pd.DataFrame, pd.DataFrame], Finding]) -> Callable[[Evidence], Finding]:
    """Judge the LoRA runs of each model and dataset, whatever their parametrisation; the worst finding decides."""

    return lambda evidence: judge_each(
        (f"{model}/{dataset}", partial(judge, runs, evidence.curves))
        for (model, dataset), runs in with_scales(evidence.runs).groupby(["model", "dataset"])
    )


_PAIRS = "LoRA runs of one rank, length and seed, Adam's epsilon near 0"

CLAIMS = (
    Claim(
        id="C1",
        kind="empirical",
        statement="Early in training, learning curves at one LR are the same for all ranks",
        figure="early curves",
        criterion=(
            "Training NLL of the lowest rank above 1 minus that of the highest (the paper: 16 and 256), same batches, "
            f"mean over seeds: at every step up to {EARLY_STEPS} its 95% interval lies within 2 sigma of batches "
            "(standard deviation over seeds, pooled over both ranks and these steps), and up to step 20 within 1% of "
            "the loss too. Contradicted if at some step the whole interval is outside"
        ),
        needs=f"LoRA of two ranks above 1 at one LR, {MIN_SEEDS} seeds, training losses at every step",
        paper_value="nearly on top of each other; no number",
        unit="nats per token",
        experiments=("early",),
        judge=over(every_dataset, same_early_curves),
    ),
    Claim(
        id="C2",
        kind="empirical",
        statement="The difference of early curves grows with time",
        figure="early curves",
        criterion=(
            "Slope of each seed's |difference| (as in C1) against log step, from step 2 to the end: its 95% interval "
            "over seeds is above 0, and the mean |difference| rises from decade to decade of steps. Contradicted if "
            "the interval is below 0"
        ),
        needs=f"as C1, over 10 steps and more; {MIN_SEEDS} seeds",
        paper_value="grows; no number",
        unit="nats per token and decade",
        experiments=("early",),
        judge=over(every_dataset, difference_grows),
    ),
    Claim(
        id="C3",
        kind="opinion",
        statement="In the first few steps the lower rank has a slightly lower loss",
        figure="early curves",
        criterion=(
            f"Difference as in C1, mean over steps 2 to {FIRST_STEPS}: the 95% interval over at least {SIGN_SEEDS} "
            "seeds is below 0. Contradicted if it is above 0"
        ),
        needs=f"as C1; {SIGN_SEEDS} seeds",
        paper_value="negative, tiny; no number",
        unit="nats per token",
        experiments=("early",),
        judge=over(every_dataset, difference_negative_at_first),
    ),
    Claim(
        id="C4",
        kind="theory",
        statement="The factor 1/r makes the expected first update independent of rank",
        figure="text",
        criterion=(
            "First-order fall of the loss by the first update (the projection of the change of W on FullFT's gradient, "
            "in nats), mean over seeds, over that of the highest rank: the 95% interval of the ratio, paired by seed, "
            "is within 0.95 to 1.05 at every rank. Ranks whose alpha grows as sqrt(r) or as r are the control, and "
            "must fail this"
        ),
        needs=f"LoRA of several ranks with alpha 32, and with alpha growing with rank; {MIN_SEEDS} seeds",
        paper_value="equal; derived",
        unit="ratio",
        experiments=("parametrization",),
        judge=_on_lora(first_update_rank_independent),
    ),
    Claim(
        id="C5",
        kind="theory",
        statement="Two of the four hyperparameters alpha, init_A, LR_A, LR_B are redundant",
        figure="text",
        criterion=(
            "Runs with the same alpha * init_A * LR_B and init_A / LR_A, all else equal, have training losses that "
            f"differ by less than {IDENTICAL:g} nats over the first {TRAJECTORY_STEPS} steps; all pairs of which one "
            "of the two differs, the control, differ by more. At the smallest epsilon in the tables; above "
            f"{ZERO_EPS:g}, a difference does not contradict"
        ),
        needs=f"{_PAIRS}, that are equivalent, and some that are not",
        paper_value="exact; derived",
        unit="nats per token",
        experiments=("parametrization",),
        judge=_on_lora(equivalent_trajectories),
    ),
    Claim(
        id="C6",
        kind="theory",
        statement="The initial slope of the curve is set by alpha * init_A * LR_B; LR_A does not matter at first",
        figure="text",
        criterion=(
            f"Fall of the validation loss over the first {SLOPE_STEPS} steps of runs whose LR_A is at least ten times "
            "as large (init_A / LR_A a tenth) at the same alpha * init_A * LR_B: the 95% interval of the ratio of "
            "means, paired by seed, is within 0.98 to 1.02. Pairs whose A has moved by more than "
            f"{STILL:g} of its norm by then are left out: the claim is about the time before A moves"
        ),
        needs=f"{_PAIRS}, with LR_A tenfold and the same LR_B; {MIN_SEEDS} seeds",
        paper_value="irrelevant while B is 0; derived",
        unit="ratio",
        experiments=("parametrization",),
        judge=_on_lora(same_initial_slope),
    ),
    Claim(
        id="C7",
        kind="theory",
        statement="init_A / LR_A sets the number of steps until A has moved from its initial value",
        figure="text",
        criterion=(
            "Log-log slope of the steps until ||A - A0|| / ||A0|| reaches 1 (mean over layers, interpolated on log "
            "axes between recorded steps, mean of logs over seeds) against init_A / LR_A: 95% interval within 0.8 to "
            "1.2. Runs that do not get there are left out"
        ),
        needs="LoRA with three values of init_A / LR_A over a factor of 4, long enough for A to move",
        paper_value="proportional; derived",
        unit="exponent",
        experiments=("parametrization",),
        judge=_on_lora(time_scale_of_a),
    ),
    Claim(
        id="C8",
        kind="theory",
        statement="LoRA+ (a larger LR of B) and a larger alpha are moves along init_A / LR_A",
        figure="text",
        criterion=(
            "As C5, for pairs of which one has unequal LRs of A and B and the other, with another alpha, init_A or LR, "
            "has equal ones"
        ),
        needs=f"{_PAIRS}, that are equivalent with LR_B/LR_A other than 1 and equal to 1",
        paper_value="exact; derived",
        unit="nats per token",
        experiments=("parametrization",),
        judge=_on_lora(plus_trajectories),
    ),
    Claim(
        id="C9",
        kind="opinion",
        statement="No other alpha or LR ratio of B and A is better than alpha 32 with equal LRs",
        figure="text",
        criterion=(
            "Test NLL of each variant (notes: alpha 8, 32, 128; LR_B/LR_A 1, 4, 16) minus that of the standard "
            "parametrisation, each at its own best LR, paired by seed: no 95% interval reaches below -2 sigma. "
            "Contradicted if one lies wholly below"
        ),
        needs=f"the standard parametrisation and variants of alpha and LR ratio, each LR-tuned; {MIN_SEEDS} seeds",
        paper_value="unable to improve; no number",
        unit="nats per token",
        experiments=("parametrization",),
        judge=_on_lora(standard_near_optimal),
    ),
    Claim(
        id="C10",
        kind="empirical",
        statement="At the end of full runs, B has a larger spectral norm than A",
        figure="text",
        criterion=(
            "In the longest SFT runs of each model (most examples seen; memorisation left out), at each rank's best "
            "LR, B has the larger spectral norm in more than half of the layers after the last step: 95% interval over "
            "seeds above 0.5 at every rank. Contradicted if it is below at some rank"
        ),
        needs="LoRA on all layers with an LR grid; b_over_a at the last step; seeds at the best LR",
        paper_value="larger; no number",
        unit="share of layers",
        experiments=("rank", "short_run", "capacity"),
        judge=over(longest_runs, b_outgrows_a),
    ),
    Claim(
        id="C11",
        kind="theory",
        statement="LoRA's effective LR grows during training, since A's updates do nothing while B is 0",
        figure="text",
        criterion=(
            "Norm of the change of W by one step, relative to the first, over that of a run with a tenth of LR_A and "
            "the same LR_B, in which A is still and Adam's own shrinking is the same; at the last step recorded: "
            "95% interval over paired seeds above 1, contradicted if below. Without such a control: ||change of W|| / "
            "LR in the later part of the first half of the longest runs at the best LR (recorded steps from its square "
            "root on, mean of logs) over that of the first step is above 1; contradicted only if it is below 1 and "
            f"falls from step {FIRST_STEPS} on, since Adam's first update is its largest, LR in every entry"
        ),
        needs=f"LoRA with update_norm at the first step and later, and with LR_A a tenth; {MIN_SEEDS} seeds of both",
        paper_value="grows; derived",
        unit="ratio",
        experiments=("parametrization",),
        judge=_on_lora(effective_lr_grows),
    ),
)
