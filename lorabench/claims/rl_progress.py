"""Claims F3 to F5, F7 and F9: what happens during reinforcement learning (RL), and how much information it gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_label, kept
from lorabench.analysis.comparison import NEEDED_BY, Arm, Comparison, require
from lorabench.analysis.curves import curves_by_seed, paired, scan
from lorabench.analysis.estimate import Estimate, combined, mean_over_seeds, normal
from lorabench.analysis.finding import MIN_SEEDS, Finding, UnjudgedError, decide, finding, together, worst
from lorabench.analysis.memorisation import description_lengths, is_memorisation
from lorabench.analysis.optima import as_ratio, in_words
from lorabench.analysis.rewards import MAX_TRUNCATED, MIN_GAIN
from lorabench.analysis.rules import Above, Problem, Remedy, Rule, Verdict, Within, gain_margin
from lorabench.claims import reinforcement as rl
from lorabench.claims.claim import Evidence, claim, judge_each, number, problem_if, unjudged_if
from lorabench.claims.scope import beats_controls, swept
from lorabench.store.checks import is_rl

# Bounds whose meaning the criteria say.
PLATEAU = 0.9
BEFORE, AFTER = 3, 2
WINDOWS = BEFORE + AFTER
LENGTH_BAND = (0.8, 1.25)
LEAST_GROWTH = 1.1
BITS_RATIO = 1000.0
BITS_BAND = (100.0, 10_000.0)

_OWN_SPLITS = ("train", "validation", "test")


def curve_problems(comparison: Comparison, arms: Sequence[Arm], n_seeds: int) -> list[Problem]:
    """Return what speaks against a verdict on the curves of arms at their LR, with a number of paired seeds."""
    problems = comparison.problems(arms)
    if not problems and n_seeds < MIN_SEEDS:
        remedy = Remedy(f"{MIN_SEEDS} seeds with curves (now {n_seeds})", seeds=MIN_SEEDS)
        problems.append(Problem(f"curves of {n_seeds} paired seeds, {MIN_SEEDS} needed", remedy))
    for arm in arms:
        rows, chosen = comparison.rows[arm_label(arm)], comparison.at_optimum(arm)
        lost = int((rows["lr"].isin(chosen["lr"]) & rows["status"].eq("diverged")).sum())
        problems += problem_if(lost, f"{arm_label(arm)}: {lost} seeds diverged at its best LR")
    return problems


def points_at_optimum(comparison: Comparison, arm: Arm, split: str, metric: str) -> pd.DataFrame:
    """Return seed, step and value of a metric at the LR of an arm's grid that is nearest to its fitted optimum."""
    points, chosen = comparison.points(split, metric), comparison.at_optimum(arm)
    run = pd.Index(chosen["run_id"]).get_indexer(points["run_id"])
    of_arm: pd.DataFrame = points[run >= 0]
    return of_arm.assign(seed=chosen["seed"].to_numpy()[run[run >= 0]])


@kept
def tenths(comparison: Comparison, arm: Arm, metric: str) -> pd.DataFrame:
    """Return means of a train metric at that LR, a row per seed and a column (1 to 10) per tenth of the steps."""
    points = points_at_optimum(comparison, arm, "train", metric)
    last = arm["steps"] or points["step"].max()
    values = points[points["step"] > 0].astype({"step": float, "value": float})
    tenth = (10 * values["step"] / last).map(math.ceil).clip(1, 10).rename("tenth")
    return values.groupby(["seed", tenth])["value"].mean().unstack()


def progress_windows(steps: Sequence[int], rewards: pd.Series[float]) -> list[tuple[int, int]]:
    """Split steps into BEFORE windows up to the plateau of train rewards and AFTER windows from there, if there are as
    many.

    The plateau begins where running means of the rewards over a tenth of the steps have made the share PLATEAU of their
    rise from the first to the last tenth; without a rise it is the last step. Before the first update all arms are the
    base model, so step 1 does not count.
    """
    tenth = max(1, len(rewards) // 10)
    smooth = rewards.rolling(tenth, center=True, min_periods=1).mean()
    first, last = float(rewards.iloc[:tenth].mean()), float(rewards.iloc[-tenth:].mean())
    there = smooth.index[smooth >= first + PLATEAU * (last - first)]
    plateau = int(there[0]) if last > first and len(there) else int(rewards.index[-1])
    later = np.array([step for step in steps if step > 1], int)
    parts = [*np.array_split(later[later < plateau], BEFORE), *np.array_split(later[later >= plateau], AFTER)]
    return [(int(part[0]), int(part[-1])) for part in parts if len(part)]


@rl.rl_claim("F3")
@rl.each_rank("fullft")
def _same_progress(comparison: Comparison, lora: Arm, fullft: Arm) -> Finding:
    runs, others = comparison.at_optimum(lora), comparison.at_optimum(fullft)
    by_seed = [curves_by_seed(rows, comparison.points("train", "reward")) for rows in (runs, others)]
    name = f"{comparison.label} {arm_label(lora)} {arm_label(fullft)}"
    curves = paired(runs, others, by_seed[0], by_seed[1], name)
    unjudged_if(curves.by_seed.empty, "no train rewards at steps that FullFT has too")
    rewards = points_at_optimum(comparison, fullft, "train", "reward").groupby("step")["value"].mean()
    windows = progress_windows(curves.by_seed.index.tolist(), rewards.astype(float))
    margin = comparison.margin
    problems = [*curve_problems(comparison, [lora, fullft], curves.n_seeds), *margin.problems]
    text, signed = "train reward - FullFT's = {}", partial(number, digits=4, sign="+")
    return scan(Within.margin(margin.value), curves, windows, text, problems, margin.rule, signed)


def _follows(name: str, comparison: Comparison, lora: Arm, fullft: Arm) -> Finding:
    """Judge F4 for one further set and one rank."""
    own, full = (
        points_at_optimum(comparison, arm, name, "accuracy")
        .pivot(index="seed", columns="step", values="value")
        .astype(float)
        for arm in (lora, fullft)
    )
    steps = [step for step in full.columns.intersection(own.columns).astype(int).tolist() if step > 0]
    paired = [seed for seed in own.index if seed in full.index]
    if not steps or not paired or 0 not in full:
        raise UnjudgedError("inconclusive", "no accuracies of both before and after training")
    before, after = float(full[0].mean()), float(full[steps[-1]].mean())
    margin = gain_margin(comparison.judging.margins.reward, after - before, "FullFT", rewarded=True)
    problems = curve_problems(comparison, [lora, fullft], len(paired))
    problems += problem_if(not after - before >= MIN_GAIN, f"FullFT gains less than {MIN_GAIN:g} on it")
    counts = points_at_optimum(comparison, fullft, name, "n_problems")["value"]
    problems += problem_if(counts.empty, "the number of problems is not known")
    n_problems = 0 if counts.empty else int(counts.min())
    ids = pd.concat([comparison.at_optimum(arm) for arm in (lora, fullft)])["run_id"]
    findings = []
    for step in steps:
        about = f"{comparison.label} {name} {arm_label(lora)} step {step}"
        both = [table.loc[paired][step] for table in (own, full)]
        # The answers to single problems are not in the tables, so the error from problems is that of two independent
        # sets of so many, which is cautious. Two more problems, of which one is right, keep the error of accuracies of
        # 0 and 1 above 0.
        shares = [(float(part.mean()) * n_problems + 1) / (n_problems + 2) for part in both]
        error = math.sqrt(sum(share * (1 - share) for share in shares) / max(n_problems, 1))
        by_seed = mean_over_seeds((both[0] - both[1]).dropna(), about)
        gap = replace(by_seed, example_part=error * normal(f"problems of {about}"), n_examples=n_problems)
        text = f"accuracy - FullFT's = {number(gap, 4, '+')} after step {step}"
        rule = f"{margin.rule} on {name}"
        findings.append(decide(Within.margin(margin.value), gap, text, ids, problems, rule))
    decisive = worst(findings)
    more = f"one of {len(steps)} evaluations on {n_problems} problems; FullFT {before:.3f} before, {after:.3f} after"
    return replace(decisive, reason=f"{decisive.reason} ({more})")


@rl.rl_claim("F4")
def _further_sets_follow(comparison: Comparison) -> Finding:
    curves = comparison.curves
    if not curves.empty:
        curves = curves[curves["run_id"].isin(comparison.runs["run_id"]) & curves["metric"].eq("accuracy")]
    names = [] if curves.empty else sorted(set(curves["split"]) - set(_OWN_SPLITS))
    aime = [name for name in names if name.lower().startswith("aime")]
    unjudged_if(not names, "no accuracies on further problem sets")
    judges = ((name, rl.each_rank()(partial(_follows, name))) for name in aime or names)
    judged = judge_each(judges, lambda judge: judge(comparison))
    return judged if aime else replace(judged, reason=f"{judged.reason}; no AIME problems, these stand for them")


@rl.rl_claim("F5", conditions=(swept, rl.LONG_RESPONSES, beats_controls))
@rl.each_rank("fullft")
def _same_growth_of_responses(comparison: Comparison, lora: Arm, fullft: Arm) -> Finding:
    # Empty responses have no ratio of lengths, so they count as one token.
    arms = [lora, fullft]
    lengths = [tenths(comparison, arm, "response_length").reindex(columns=[1, 10]).dropna() for arm in arms]
    logs = [table.clip(lower=1).map(math.log) for table in lengths]
    unjudged_if(any(table.empty for table in logs), "no response lengths of both at the start and the end of training")
    name = f"lengths of {comparison.label} {arm_label(lora)}"
    ratio = mean_over_seeds((logs[0][10] - logs[1][10]).dropna(), name)
    growths = [mean_over_seeds(table[10] - table[1], f"{name} {end}") for end, table in enumerate(logs)]
    own, full = (in_words(growth) for growth in growths)
    text = f"final length / FullFT's = {in_words(ratio)}, grown by {own}, FullFT by {full}"
    problems = curve_problems(comparison, arms, ratio.n_seeds)
    for arm in arms:
        reflection = tenths(comparison, arm, "reflection").reindex(columns=[1, 10]).mean()
        if reflection.notna().all():
            first, last = reflection
            text += f"; {arm_label(arm)}: {first:.1%} of responses go back or check at first, {last:.1%} at last"
        truncated = float(tenths(comparison, arm, "truncated").reindex(columns=[10])[10].mean())
        if truncated > MAX_TRUNCATED:
            problems.append(Problem(f"{arm_label(arm)}: {truncated:.0%} of its last responses cut off"))
    ids = pd.concat([comparison.at_optimum(arm) for arm in arms])["run_id"]
    same, grows = Within(*map(math.log, LENGTH_BAND)), Above(math.log(LEAST_GROWTH))
    rules: list[tuple[Rule, Estimate]] = [(same, ratio), *((grows, growth) for growth in growths)]
    band = f"{LENGTH_BAND[0]:g} to {LENGTH_BAND[1]:g}; growth by a factor of {LEAST_GROWTH:g} or more"
    return as_ratio(worst([decide(rule, each, text, ids, problems, band) for rule, each in rules]))


@claim("F7", columns=("base_reward",))
def _equal_rewards_teach_nothing(evidence: Evidence) -> Finding:
    runs, curves, names = evidence.runs, evidence.curves, ["equal_groups", "grad_norm"]
    if curves.empty:
        curves = pd.DataFrame(columns=["run_id", "step", "split", "metric", "value"])
    at_train = curves[curves["split"].eq("train") & curves["metric"].isin(names) & curves["value"].notna()]
    steps = at_train.pivot(index=["run_id", "step"], columns="metric", values="value").reindex(columns=names).dropna()
    equal = steps["equal_groups"] == 1
    least = runs["run_id"].map(steps["equal_groups"].groupby("run_id").min())
    never = runs[runs["status"].eq("unrewarded") | (runs["status"].ne("diverged") & least.eq(1).fillna(False))]
    unjudged_if(not equal.any() and never.empty, "no step whose groups all have equal rewards")
    at_start = curves["split"].eq("validation") & curves["metric"].eq("accuracy") & curves["step"].eq(0)
    base = never["run_id"].map(curves[at_start].set_index("run_id")["value"])
    pairs = [(never["base_reward"], never["final_reward"]), (base, never["final_valid_reward"])]
    both = [never[["run_id"]].assign(before=before.astype(float), after=after.astype(float)) for before, after in pairs]
    before_and_after = pd.concat(both).dropna()
    changed = before_and_after["before"] != before_and_after["after"]
    largest, learning = float(steps.loc[equal, "grad_norm"].max()), steps.loc[~equal, "grad_norm"] > 0
    texts, problems = [f"{learning.sum()} of {len(learning)} other steps have a gradient above 0"], []
    if equal.any():
        texts.insert(0, f"largest gradient of {equal.sum()} steps whose groups all have equal rewards: {largest:.3g}")
    else:
        problems.append(Problem("no step whose groups all have equal rewards has a gradient norm"))
    if len(before_and_after):
        n_runs = before_and_after["run_id"].nunique()
        texts.append(
            f"of {n_runs} runs without other steps {changed.sum()} of {len(before_and_after)} accuracies changed"
        )
    problems += problem_if(not learning.any(), "no step learns, so the gradients of 0 check nothing")
    verdict: Verdict = "confirmed"
    if largest > 0 or changed.any():
        # These steps learned, whatever other steps did.
        verdict, problems = "contradicted", []
        texts.append("the trainer does not do what the derivation says")
    else:
        texts.append("true by construction, so it only checks the trainer")
    run_ids = {*steps.index[equal].get_level_values("run_id"), *before_and_after["run_id"]}
    return finding(run_ids, "; ".join(texts), verdict, problems, largest)


_FIRST_EPOCH = ("first_epoch_nats", "first_epoch_scored_tokens")


def sft_of_problem_sets(evidence: Evidence) -> list[tuple[str, tuple[Comparison, pd.DataFrame]]]:
    """Return each model and problem set with the first epochs of the model's supervised runs, after its name.

    The table of first epochs has a row per dataset: dataset, run_ids, and bits (per scored token, by run).
    """
    sft = evidence.every_run[~is_rl(evidence.every_run)]
    lengths = description_lengths(sft[~is_memorisation(sft)])
    by_run = sft.set_index("run_id")[list(_FIRST_EPOCH)].astype(float)
    bits = by_run[_FIRST_EPOCH[0]] / by_run[_FIRST_EPOCH[1]] / math.log(2)
    epochs = lengths.assign(bits=lengths["run_ids"].map(lambda run_ids: bits.loc[run_ids].tolist()))
    sets = rl.problem_sets(evidence)
    return [(name, (each, epochs[epochs["model"] == each.arms[0]["model"]])) for name, each in sets]


@claim("F9", over=sft_of_problem_sets, columns=(*NEEDED_BY["sft"], *_FIRST_EPOCH), conditions=(rl.LONG_RESPONSES,))
def _fewer_bits_per_token(compared: tuple[Comparison, pd.DataFrame]) -> Finding:
    from scipy.special import entr

    comparison, epochs = compared
    highest = next(reversed(comparison.lora.values()), None)
    [arm] = require(("FullFT or LoRA on all layers", comparison.fullft or highest))
    tokens = tenths(comparison, arm, "response_length").mean(axis=1)
    unjudged_if(tokens.empty, "no response lengths")
    per_episode = mean_over_seeds(tokens, f"tokens of {comparison.label}")
    episodes = f"{per_episode.value:.3g} tokens per episode, at most 1 bit each"
    rewards = points_at_optimum(comparison, arm, "train", "reward")["value"].to_numpy(float)
    if len(rewards):
        bits = float(np.mean(entr(rewards) + entr(1 - rewards))) / math.log(2)
        episodes += f" ({bits:.2f} by the mean rewards)"
    findings = []
    for row in epochs.to_dict("records"):
        per_token = mean_over_seeds(row["bits"], f"first epoch of {' '.join(row['run_ids'])}")
        ratio = combined(lambda bits, length: np.log(np.maximum(bits * length, 1e-9)), per_token, per_episode)
        text = f"SFT on {row['dataset']} {per_token.value:.3g} bits per token, ratio {math.exp(ratio.value):.3g}"
        run_ids = [*comparison.at_optimum(arm)["run_id"], *row["run_ids"]]
        rule = Within(*map(math.log, BITS_BAND))
        findings.append(as_ratio(decide(rule, ratio, text, run_ids, (), f"a factor of 10 around {BITS_RATIO:,.0f}")))
    unjudged_if(not findings, f"{episodes}; no SFT runs of {arm['model']} with first-epoch losses", "inconclusive")
    decisive = together(findings)
    return replace(decisive, reason=f"{episodes}; {decisive.reason}")
