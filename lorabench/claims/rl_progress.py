"""Claims F3 to F5: train rewards, further problem sets and response lengths during reinforcement learning (RL)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison
from lorabench.analysis.curves import paired_curves, scan
from lorabench.analysis.estimate import Estimate, mean_over_seeds, normal
from lorabench.analysis.finding import Finding, UnjudgedError, decide, worst
from lorabench.analysis.optima import as_ratio
from lorabench.analysis.rl_health import MAX_TRUNCATED, MIN_GAIN
from lorabench.analysis.rules import Above, Problem, Rule, Within, gain_margin
from lorabench.claims.claim import Claim
from lorabench.claims.conditions import response_length
from lorabench.claims.evidence import judge_each
from lorabench.claims.rl_shared import (
    CONDITIONS,
    DEEPMATH_EXPERIMENTS,
    HEALTHY,
    LEARNED,
    LONG_PRESETS,
    LONG_RESPONSE,
    RL_RUNS,
    curve_problems,
    each_rank,
    over_problems,
    points_at_optimum,
    tenths,
)
from lorabench.utils.formats import fixed_interval

PLATEAU = 0.9
"""The share of FullFT's rise of the train reward from which on it counts as being on its plateau."""

BEFORE, AFTER = 3, 2
"""The numbers of equally long windows of steps before the plateau and on it."""

LENGTH_BAND = (0.8, 1.25)
"""The ratios of two response lengths that count as the same."""

LEAST_GROWTH = 1.1
"""The factor from which on response lengths count as growing."""

_OWN_SPLITS = ("train", "validation", "test")


def plateau_step(rewards: pd.Series[float]) -> int:
    """Return the first step at which train rewards have made the share PLATEAU of their rise.

    The rise is that from the first to the last tenth of the steps, and rewards are running means over a tenth.

    Args:
        rewards: mean train reward by step, ascending; at least one.

    Returns:
        A step; the last one if the rewards do not rise.
    """
    tenth = max(1, len(rewards) // 10)
    smooth = rewards.rolling(tenth, center=True, min_periods=1).mean()
    first, last = float(rewards.iloc[:tenth].mean()), float(rewards.iloc[-tenth:].mean())
    there = smooth.index[smooth >= first + PLATEAU * (last - first)]
    return int(there[0]) if last > first and len(there) else int(rewards.index[-1])


def progress_windows(steps: Sequence[int], plateau: int) -> list[tuple[int, int]]:
    """Split steps into BEFORE windows up to the plateau and AFTER windows from there, without the first step.

    Args:
        steps: all steps, ascending. Before the first update all arms are the base model, so step 1 does not count.
        plateau: the first step of the plateau.

    Returns:
        The first and last step of each window; fewer windows if the steps do not suffice for one each.
    """
    later = np.array([step for step in steps if step > 1], int)
    parts = [*np.array_split(later[later < plateau], BEFORE), *np.array_split(later[later >= plateau], AFTER)]
    return [(int(part[0]), int(part[-1])) for part in parts if len(part)]


def same_progress(comparison: Comparison) -> Finding:
    """F3: judge the train reward of each LoRA rank minus FullFT's, in windows of steps before and on the plateau."""

    def judge(lora: Arm, fullft: Arm) -> Finding:
        runs = [comparison.at_optimum(arm) for arm in (lora, fullft)]
        name = f"{comparison.label} {arm_label(lora)} {arm_label(fullft)}"
        curves = paired_curves(runs[0], runs[1], comparison.curves, name, "reward")
        if curves.by_seed.empty:
            raise UnjudgedError("not tested", "no train rewards at steps that FullFT has too")
        rewards = points_at_optimum(comparison, fullft, "train", "reward").groupby("step")["value"].mean()
        plateau = plateau_step(rewards.astype(float))
        margin = comparison.margin
        problems = curve_problems(comparison, [lora, fullft], curves.n_seeds)
        problems += [Problem(margin.problem)] if margin.problem else []
        return scan(
            lambda window: Within.margin(margin.value),
            curves,
            progress_windows(curves.by_seed.index.tolist(), plateau),
            lambda gap: f"train reward - FullFT's = {gap.value:+.4f} {fixed_interval(*gap.interval(), 4)}",
            problems,
            margin.rule,
        )

    return each_rank(comparison, judge, lambda lora, fullft: [fullft])


F3 = Claim(
    id="F3",
    kind="empirical",
    statement="In RL on DeepMath, all ranks and full fine-tuning progress alike",
    figure="7",
    criterion=(
        "At the LRs nearest to the fitted optima, the train reward of every LoRA rank is the same as FullFT's within "
        f"the margin, paired by seed, in each of {BEFORE + AFTER} windows of steps: {BEFORE} before FullFT has made "
        f"{PLATEAU:.0%} of its rise and {AFTER} after that. The intervals hold for all windows at once. The margin is "
        "the share of the gain in test accuracy from the base to FullFT that the preset gives. "
        f"{LEARNED.format('FullFT')}"
    ),
    needs=RL_RUNS.format("LoRA") + ", with train rewards",
    paper_value="almost identical; no number",
    unit="accuracy",
    experiments=DEEPMATH_EXPERIMENTS,
    judge=over_problems(same_progress),
    columns=("base_reward",),
    task="rl",
    conditions=CONDITIONS,
)


def _by_step(comparison: Comparison, arm: Arm, split: str, metric: str) -> pd.DataFrame:
    """Return a metric at the LR nearest to an arm's optimum, a row for each seed and a column for each step."""
    points = points_at_optimum(comparison, arm, split, metric)
    return points.pivot(index="seed", columns="step", values="value").astype(float)


def _paired_gap(lora: pd.Series[float], fullft: pd.Series[float], n_problems: int, name: str) -> Estimate:
    """Estimate an accuracy minus another, each by seed, on one set of problems.

    The answers to single problems are not in the tables, so the error from problems is that of two independent sets
    of so many, which is cautious.
    """
    of_seeds = mean_over_seeds((lora - fullft).dropna(), name)
    # Two more problems, of which one is right, keep the error of accuracies of 0 and 1 above 0.
    shares = [(float(part.mean()) * n_problems + 1) / (n_problems + 2) for part in (lora, fullft)]
    error = math.sqrt(sum(share * (1 - share) for share in shares) / max(n_problems, 1))
    of_problems = error * normal(f"problems of {name}")
    return replace(of_seeds, example_part=of_problems, n_examples=n_problems)


def _follows(comparison: Comparison, name: str, lora: Arm, fullft: Arm) -> Finding:
    """Judge F4 for one further set and one rank."""
    of_lora, of_fullft = (_by_step(comparison, arm, name, "accuracy") for arm in (lora, fullft))
    steps = [step for step in of_fullft.columns.intersection(of_lora.columns).astype(int).tolist() if step > 0]
    paired = [seed for seed in of_lora.index if seed in of_fullft.index]
    if not steps or not paired or 0 not in of_fullft:
        raise UnjudgedError("inconclusive", "no accuracies of both before and after training")
    before, after = float(of_fullft[0].mean()), float(of_fullft[steps[-1]].mean())
    margin = gain_margin(comparison.judging.margins.reward, after - before, "FullFT", rewarded=True)
    problems = curve_problems(comparison, [lora, fullft], len(paired))
    if not after - before >= MIN_GAIN:
        problems.append(Problem(f"FullFT gains less than {MIN_GAIN:g} on it"))
    counts = points_at_optimum(comparison, fullft, name, "n_problems")["value"]
    if counts.empty:
        problems.append(Problem("the number of problems is not known"))
    n_problems = 0 if counts.empty else int(counts.min())
    ids = pd.concat([comparison.at_optimum(arm) for arm in (lora, fullft)])["run_id"]
    findings = []
    for step in steps:
        about = f"{comparison.label} {name} {arm_label(lora)} step {step}"
        gap = _paired_gap(of_lora.loc[paired][step], of_fullft.loc[paired][step], n_problems, about)
        text = f"accuracy - FullFT's = {gap.value:+.4f} {fixed_interval(*gap.interval(), 4)} after step {step}"
        rule = f"{margin.rule} on {name}"
        findings.append(decide(Within.margin(margin.value), gap, text, ids, problems, rule))
    decisive = worst(findings)
    more = f"one of {len(steps)} evaluations on {n_problems} problems; FullFT {before:.3f} before, {after:.3f} after"
    return replace(decisive, reason=f"{decisive.reason} ({more})")


def further_sets_follow(comparison: Comparison) -> Finding:
    """F4: judge the accuracy of each LoRA rank minus FullFT's on AIME, or else on other further sets."""
    curves = comparison.curves
    if not curves.empty:
        curves = curves[curves["run_id"].isin(comparison.runs["run_id"]) & curves["metric"].eq("accuracy")]
    names = [] if curves.empty else sorted(set(curves["split"]) - set(_OWN_SPLITS))
    aime = [name for name in names if name.lower().startswith("aime")]
    if not names:
        raise UnjudgedError("not tested", "no accuracies on further problem sets")
    judged = judge_each(
        (name, partial(each_rank, comparison, partial(_follows, comparison, name), lambda lora, fullft: []))
        for name in aime or names
    )
    return judged if aime else replace(judged, reason=f"{judged.reason}; no AIME problems, these stand for them")


F4 = Claim(
    id="F4",
    kind="empirical",
    statement="Held-out AIME 2024 and 2025 problems show the same as DeepMath",
    figure="8",
    criterion=(
        "On every AIME set, or on every other further set where there is no AIME set, for every LoRA rank and every "
        "evaluation after step 0: the accuracy is the same as FullFT's within the margin, at the LRs nearest to the "
        "fitted optima and paired by seed. The margin is the share that the preset gives of FullFT's own gain in "
        "accuracy on that set. The error from the problems of the set is that of two independent sets, which is "
        f"cautious. {HEALTHY}. Inconclusive where that gain is below {MIN_GAIN:g}"
    ),
    needs=RL_RUNS.format("LoRA") + "; evaluated on AIME 2024 and 2025, or another further set, from step 0 on",
    paper_value="no number",
    unit="accuracy",
    experiments=DEEPMATH_EXPERIMENTS,
    judge=over_problems(further_sets_follow),
    columns=("base_reward",),
    task="rl",
    conditions=CONDITIONS,
)


def _reflection(comparison: Comparison, arm: Arm) -> str:
    shares = tenths(comparison, arm, "reflection").reindex(columns=[1, 10]).mean()
    if shares.isna().any():
        return ""
    return f"; {arm_label(arm)}: {shares[1]:.1%} of responses go back or check at first, {shares[10]:.1%} at last"


def _factor(log_ratio: Estimate) -> str:
    low, high = log_ratio.interval()
    return f"{math.exp(log_ratio.value):.2f} {fixed_interval(math.exp(low), math.exp(high), 2)}"


def _length_problems(comparison: Comparison, arms: Sequence[Arm], n_seeds: int) -> list[Problem]:
    problems = curve_problems(comparison, arms, n_seeds)
    for arm in arms:
        truncated = float(tenths(comparison, arm, "truncated").reindex(columns=[10])[10].mean())
        if truncated > MAX_TRUNCATED:
            problems.append(Problem(f"{arm_label(arm)}: {truncated:.0%} of its last responses cut off"))
    return problems


def same_growth_of_responses(comparison: Comparison) -> Finding:
    """F5: judge the mean length of the last train responses over FullFT's, and over that of the first ones."""

    def judge(lora: Arm, fullft: Arm) -> Finding:
        # Empty responses have no ratio of lengths, so they count as one token.
        arms = [lora, fullft]
        both = [
            tenths(comparison, arm, "response_length").reindex(columns=[1, 10]).dropna().clip(lower=1).map(math.log)
            for arm in arms
        ]
        if any(table.empty for table in both):
            raise UnjudgedError("not tested", "no response lengths of both at the start and the end of training")
        name = f"lengths of {comparison.label} {arm_label(lora)}"
        ratio = mean_over_seeds((both[0][10] - both[1][10]).dropna(), name)
        growths = [mean_over_seeds(table[10] - table[1], f"{name} {end}") for end, table in enumerate(both)]
        text = f"final length / FullFT's = {_factor(ratio)}, grown by {_factor(growths[0])}, FullFT by "
        text += _factor(growths[1]) + "".join(_reflection(comparison, arm) for arm in arms)
        ids = pd.concat([comparison.at_optimum(arm) for arm in arms])["run_id"]
        problems = _length_problems(comparison, arms, ratio.n_seeds)
        same = Within(*map(math.log, LENGTH_BAND))
        rules: list[tuple[Rule, Estimate]] = [
            (same, ratio),
            *((Above(math.log(LEAST_GROWTH)), growth) for growth in growths),
        ]
        band = f"{LENGTH_BAND[0]:g} to {LENGTH_BAND[1]:g}; growth by a factor of {LEAST_GROWTH:g} or more"
        return as_ratio(worst([decide(rule, number, text, ids, problems, band) for rule, number in rules]))

    return each_rank(comparison, judge, lambda lora, fullft: [fullft])


F5 = Claim(
    id="F5",
    kind="empirical",
    statement="In RL, chains of thought grow the same way in LoRA and full fine-tuning",
    figure="8",
    criterion=(
        "The measure is the mean length of train responses at the LRs nearest to the fitted optima, paired by seed. "
        "For every LoRA rank, the mean length in the last tenth of the steps over FullFT's is the same within "
        f"{LENGTH_BAND[0]:g} to {LENGTH_BAND[1]:g}, and the lengths of both grow from the first tenth to the last by a "
        f"factor of {LEAST_GROWTH:g} or more. The estimate is the number that decides. Inconclusive where more than "
        f"{MAX_TRUNCATED:.0%} of the last responses are cut off. {LEARNED.format('FullFT')}. Words of backtracking and "
        "checking are reported, not judged"
    ),
    needs=RL_RUNS.format("LoRA") + ", with response lengths",
    paper_value="no number",
    unit="ratio",
    experiments=DEEPMATH_EXPERIMENTS,
    judge=over_problems(same_growth_of_responses),
    columns=("base_reward",),
    task="rl",
    conditions=(CONDITIONS[0], response_length(LONG_RESPONSE, LONG_PRESETS), CONDITIONS[2]),
)

CLAIMS = (F3, F4, F5)
