"""Claims B10, F1 to F5 and F7 to F9: learning rates, peaks and progress of reinforcement learning (RL).

Final accuracies are compared as error rates, 1 - accuracy (see `lorabench.analysis.rewards`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps

import numpy as np
import pandas as pd

from lorabench.analysis import rewards
from lorabench.analysis.alpha_rules import judged_arms
from lorabench.analysis.arms import arm_label, kept
from lorabench.analysis.comparison import NEEDED_BY, Arm, Comparison, comparisons, highest_and_full, require
from lorabench.analysis.curves import curves_by_seed, metric_points, paired, scan
from lorabench.analysis.estimate import Estimate, combined, mean_over_seeds, normal
from lorabench.analysis.finding import MIN_SEEDS, Finding, decide, finding, together, worst
from lorabench.analysis.memorisation import description_lengths, is_memorisation
from lorabench.analysis.optima import PAPER_RATIO, as_ratio, in_words, judge_ratio
from lorabench.analysis.rewards import FAR, MAX_TRUNCATED, MIN_GAIN, NEAR, TestReward, beyond_controls, with_error_rates
from lorabench.analysis.rules import Above, Problem, Remedy, Rule, Verdict, Within
from lorabench.claims import scope
from lorabench.claims.claim import Evidence, claim, doubted, judge_each, number, unjudged_if
from lorabench.claims.scope import RL_PRESETS, Named
from lorabench.runs import GOOD
from lorabench.store.checks import is_rl

# Bounds whose meaning the criteria say.
PLATEAU = 0.9
BEFORE, AFTER = 3, 2
WINDOWS = BEFORE + AFTER
LENGTH_BAND = (0.8, 1.25)
LEAST_GROWTH = 1.1
BITS_RATIO = 1000.0
BITS_BAND = (100.0, 10_000.0)

CHEAPER = round(1 - GOOD, 9)
"""The smallest difference of the costs of a miss that matters, as a share of an arm's accuracy: what a good LR may lose
(see `lorabench.runs`)."""

MISS_FACTORS = f"{10**NEAR:.1f} to {10**FAR:.1f}"
"""By what factor an LR that misses the best one is off."""

LONG_RESPONSE = 30
"""Tokens per response from which a response may hold a chain of thought."""

LONG_RESPONSES = scope.response_length(LONG_RESPONSE, ("core", "paper"))
"""The condition of claims on chains of thought."""

CONDITIONS = (scope.swept, scope.response_length(8, RL_PRESETS), scope.beats_controls)
"""The conditions of the claims that compare arms in RL."""


def rewarded_errors(runs: pd.DataFrame, test_reward: TestReward = "final_reward") -> pd.DataFrame:
    """Return the RL runs as error rates, of models and problem sets on which some run got a reward, and, where there
    are any, every method is ahead of the controls."""
    rewarded = runs["status"].ne("unrewarded").groupby([runs["model"], runs["dataset"]]).transform("any")
    runs = runs[rewarded.astype(bool)]
    beyond = beyond_controls(runs)
    if beyond.any():
        runs = runs[[bool(beyond[key]) for key in zip(runs["model"], runs["dataset"], strict=True)]]
    return with_error_rates(runs, test_reward)


@kept
def problem_sets(evidence: Evidence, test_reward: TestReward = "final_reward") -> Named:
    """Return the comparisons of error rates (see `rewarded_errors`) on each model and problem set; one on which no run
    ever got a reward is evidence for claim F7 only."""
    runs = rewarded_errors(evidence.runs[judged_arms(evidence.runs)], test_reward)
    compared = comparisons(runs, evidence.curves, evidence.judging)
    unjudged_if(not compared, "no run ever got a reward")
    return [(comparison.label, comparison) for comparison in compared]


def each_rank(
    judge: Callable[[Comparison, Arm, Arm], Finding], fullft_learns: bool = True
) -> Callable[[Comparison], Finding]:
    """Return a judge of every rank by a judge of one LoRA arm and FullFT, which must have learned unless said."""

    @wraps(judge)
    def judge_comparison(comparison: Comparison) -> Finding:
        fullft, _ = require(("FullFT", comparison.fullft), ("LoRA", next(iter(comparison.lora.values()), None)))
        learners = [fullft] if fullft_learns else []
        return judge_each(
            ((arm_label(lora), lora) for lora in comparison.lora.values()),
            lambda lora: if_learned(comparison, judge(comparison, lora, fullft), learners),
        )

    return judge_comparison


rl_claim = partial(claim, over=problem_sets, columns=("base_reward",), conditions=CONDITIONS)
"""A claim on RL, to which the conditions above apply unless it states others."""


def if_learned(comparison: Comparison, judged: Finding, arms: Sequence[Arm]) -> Finding:
    """Return the finding with the accuracies of arms added; it is inconclusive where one of them has not learned, since
    such arms are alike whatever the claim says."""
    if not arms:
        return judged
    base = float(comparison.runs["base_reward"].astype(float).mean())
    accuracies, problems = [], [] if math.isfinite(base) else [Problem("accuracy of the base not known")]
    for label in map(arm_label, arms):
        if minimum := comparison.fit.minima.get(label):
            accuracies.append(f"{label} {1 - minimum.value:.3f}")
            gain = combined(lambda error: 1 - error - base, minimum)
            if math.isfinite(base) and not (gain.value >= MIN_GAIN and (not gain.known or gain.interval()[0] > 0)):
                problems.append(Problem(f"{label} has not learned"))
    accuracies += [f"base {base:.3f}"] if math.isfinite(base) else []
    with_accuracies = f"{judged.reason}; peak test accuracy {', '.join(accuracies)}" if accuracies else judged.reason
    return doubted(replace(judged, reason=with_accuracies), problems)


def at_one_peak(judged: Finding, comparison: Comparison, arms: Sequence[Arm]) -> Finding:
    """Return the finding on peaks of arms; it is inconclusive where a peak is a plateau: all seeds have one accuracy,
    as policies have that end at one rule."""
    problems = []
    for arm in arms:
        errors = comparison.at_optimum(arm)["test_loss"].astype(float)
        if len(errors) > 1 and float(np.ptp(errors)) < 1e-9:
            text = f"{arm_label(arm)}: all {len(errors)} seeds have the accuracy {1 - errors.iloc[0]:.3f}, a plateau"
            problems.append(Problem(text, Remedy("problems on which the seeds differ")))
    return doubted(judged, problems)


@rl_claim(
    "B10",
    over=lambda evidence: scope.at_papers_alpha(problem_sets(evidence)),
    conditions=(scope.papers_alpha, *CONDITIONS),
)
def _lr_ratio_ten_in_rl(comparison: Comparison) -> Finding:
    arms, factor = highest_and_full(comparison), comparison.judging.margins.lr_factor
    rule = Within(math.log(PAPER_RATIO / factor), math.log(PAPER_RATIO * factor))
    judged = judge_ratio(comparison, *arms, rule, f"{PAPER_RATIO:g} up to a factor of {factor:g}")
    base = float(comparison.runs["base_reward"].astype(float).mean())
    flat_tops, breakdowns = [], []
    for arm in arms:
        label, rows = arm_label(arm), comparison.rows[arm_label(arm)]
        if flat := rewards.flat_top(comparison, arm):
            text = f"{label}: LRs {', '.join(f'{lr:.2g}' for lr in flat)} are equally good"
            remedy = Remedy(f"more seeds at these LRs of {label}, or problems on which they differ")
            flat_tops.append(Problem(text, remedy))
        accuracy = (1 - rows["test_loss"].astype(float)).fillna(0.0).groupby(rows["lr"].astype(float)).mean()
        best = int(accuracy.to_numpy().argmax())
        neighbours = accuracy.iloc[[place for place in (best - 1, best + 1) if 0 <= place < len(accuracy)]]
        # Where half of the gain over the base or more is lost at both neighbours of the best LR, what lies between is
        # not known, and a parabola through such points has an optimum with too small an error.
        if len(neighbours) == 2 and bool((neighbours - base < (accuracy.iloc[best] - base) / 2).all()):
            lrs = tuple((label, math.sqrt(lr * accuracy.index[best])) for lr in neighbours.index)
            text = f"{label}: breaks down at both neighbours of the LR {accuracy.index[best]:.2g}"
            remedy = Remedy(f"LRs {lrs[0][1]:.2g} and {lrs[1][1]:.2g} of {label}", lrs=lrs)
            breakdowns.append(Problem(text, remedy))
    return if_learned(comparison, doubted(judged, [*flat_tops, *breakdowns]), arms)


@rl_claim("F1")
def _rank_1_reaches_the_peak(comparison: Comparison) -> Finding:
    rank_1, fullft = require(("LoRA r1", comparison.lora.get(1)), ("FullFT", comparison.fullft))
    judged = comparison.equal_losses(rank_1, fullft, better_too=True)
    judged = replace(judged, reason=f"{judged.reason}; {_as_measured(comparison, rank_1, fullft)}")
    return if_learned(comparison, at_one_peak(judged, comparison, [rank_1, fullft]), [fullft])


def _as_measured(comparison: Comparison, arm: Arm, other: Arm) -> str:
    """Return as text the mean difference of error rates by seed at each arm's best LR among those with most seeds."""
    best = []
    for label in map(arm_label, (arm, other)):
        done = comparison.rows[label][comparison.rows[label]["status"] == "done"]
        by_seed = done.pivot_table(index="seed", columns="lr", values="test_loss").astype(float)
        most = by_seed.loc[:, by_seed.count() == by_seed.count().max()]
        if most.empty:
            return f"{label} has no finished run"
        best.append(most[most.mean().idxmin()])
    gap = mean_over_seeds((best[0] - best[1]).dropna(), f"as measured {comparison.label} {arm_label(arm)}")
    lrs = " and ".join(f"{each.name:.2g}" for each in best)
    return f"at the best measured LRs, {lrs}: {number(gap, 3, '+')}, {gap.n_seeds} paired seeds"


@rl_claim("F2")
def _a_missed_lr_costs_lora_less(comparison: Comparison) -> Finding:
    lowest = next(iter(comparison.lora.values()), None)
    arms = require(("LoRA", lowest), ("FullFT", comparison.fullft))
    labels = [arm_label(arm) for arm in arms]
    unknown = "; ".join(problem.text for problem in comparison.problems(arms))
    unjudged_if(not all(label in comparison.fit.minima for label in labels), unknown, "inconclusive")
    problems = [
        Problem(f"{label}: no LR near {lr:.2g}", Remedy(f"LR {lr:.2g} of {label}", lrs=((label, lr),)))
        for arm, label in zip(arms, labels, strict=True)
        for lr in rewards.missing_lrs(comparison, arm)
    ]
    costs = [rewards.cost_of_a_miss(comparison, arm) for arm in arms]
    cheaper = combined(np.subtract, costs[1], costs[0])
    text = (
        f"off by a factor of {MISS_FACTORS} from the best LR, FullFT loses {costs[1].value:.1%} of "
        f"its accuracy and {labels[0]} {costs[0].value:.1%}: {number(cheaper, 3, '+')} of the accuracy"
        f"{comparison.fit.noise_text}"
    )
    margin_rule = f"{CHEAPER:.0%} of the accuracy near the best LR, by which an LR counts as good"
    judged = comparison.decide(Above(CHEAPER), cheaper, text, arms, margin_rule, problems)
    return if_learned(comparison, judged, arms)


@claim("F8")
def _out_of_reach(evidence: Evidence) -> Finding:
    reason = "a prediction that the paper did not test; 5.3 million episodes are out of reach here"
    return Finding("not tested", reason)


def curve_problems(comparison: Comparison, arms: Sequence[Arm], n_seeds: int) -> list[Problem]:
    """Return what speaks against a verdict on the curves of arms at their LR, with a number of paired seeds."""
    problems = comparison.problems(arms)
    if not problems and n_seeds < MIN_SEEDS:
        remedy = Remedy(f"{MIN_SEEDS} seeds with curves (now {n_seeds})", seeds=MIN_SEEDS)
        problems.append(Problem(f"curves of {n_seeds} paired seeds, {MIN_SEEDS} needed", remedy))
    for arm in arms:
        rows, chosen = comparison.rows[arm_label(arm)], comparison.at_optimum(arm)
        lost = int((rows["lr"].isin(chosen["lr"]) & rows["status"].eq("diverged")).sum())
        if lost:
            problems.append(Problem(f"{arm_label(arm)}: {lost} seeds diverged at its best LR"))
    return problems


@kept
def curves_near_optimum(comparison: Comparison, arm: Arm, split: str, metric: str) -> pd.DataFrame:
    """Return a metric at the LR of an arm's grid that is nearest to its fitted optimum, by step (index) and seed."""
    return curves_by_seed(comparison.at_optimum(arm), comparison.points(split, metric))


def tenths(comparison: Comparison, arm: Arm, metric: str) -> pd.DataFrame:
    """Return means of a train metric at that LR, a row per seed and a column (1 to 10) per tenth of the steps."""
    curves = curves_near_optimum(comparison, arm, "train", metric)
    tenth = np.ceil(10 * curves.index.to_numpy(float) / (arm["steps"] or curves.index.max())).clip(max=10)
    return curves.groupby(tenth).mean().drop(index=0.0, errors="ignore").T


def progress_windows(steps: Sequence[int], rewards: pd.Series[float]) -> list[tuple[int, int]]:
    """Split steps from 2 on into BEFORE windows up to the plateau of train rewards and AFTER windows from there, if
    there are as many. It begins where running means of the rewards over a tenth of the steps have made the share
    PLATEAU of their rise from the first to the last tenth; without a rise it is the last step."""
    tenth = max(1, len(rewards) // 10)
    smooth = rewards.rolling(tenth, center=True, min_periods=1).mean()
    first, last = float(rewards.iloc[:tenth].mean()), float(rewards.iloc[-tenth:].mean())
    there = smooth.index[smooth >= first + PLATEAU * (last - first)]
    plateau = int(there[0]) if last > first and len(there) else int(rewards.index[-1])
    later = np.array([step for step in steps if step > 1], int)
    parts = [*np.array_split(later[later < plateau], BEFORE), *np.array_split(later[later >= plateau], AFTER)]
    return [(int(part[0]), int(part[-1])) for part in parts if len(part)]


@rl_claim("F3")
@each_rank
def _same_progress(comparison: Comparison, lora: Arm, fullft: Arm) -> Finding:
    own, full = (curves_near_optimum(comparison, arm, "train", "reward") for arm in (lora, fullft))
    name = f"{comparison.label} {arm_label(lora)} {arm_label(fullft)}"
    curves = paired(comparison.at_optimum(lora), comparison.at_optimum(fullft), own, full, name)
    unjudged_if(curves.by_seed.empty, "no train rewards at steps that FullFT has too")
    windows = progress_windows(curves.by_seed.index.tolist(), full.mean(axis=1))
    margin = comparison.margin
    problems = [*curve_problems(comparison, [lora, fullft], curves.n_seeds), *margin.problems]
    text, signed = "train reward - FullFT's = {}", partial(number, digits=4, sign="+")
    return scan(Within.margin(margin.value), curves, windows, text, problems, margin.rule, signed)


def _follows(name: str, comparison: Comparison, lora: Arm, fullft: Arm) -> Finding:
    """Judge F4 for one further set and one rank."""
    own, full = (curves_near_optimum(comparison, arm, name, "accuracy").T for arm in (lora, fullft))
    steps = [step for step in full.columns.intersection(own.columns).astype(int).tolist() if step > 0]
    paired = [seed for seed in own.index if seed in full.index]
    lacking = not steps or not paired or 0 not in full
    unjudged_if(lacking, "no accuracies of both before and after training", "inconclusive")
    before, after = float(full[0].mean()), float(full[steps[-1]].mean())
    margin = comparison.margin
    problems = [*curve_problems(comparison, [lora, fullft], len(paired)), *margin.problems]
    if not after - before >= MIN_GAIN:
        problems.append(Problem(f"FullFT gains less than {MIN_GAIN:g} on it"))
    counts = curves_near_optimum(comparison, fullft, name, "n_problems")
    if counts.empty:
        problems.append(Problem("the number of problems is not known"))
    n_problems = 0 if counts.empty else int(np.nanmin(counts))
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
        findings.append(decide(Within.margin(margin.value), gap, text, ids, problems, margin.rule))
    decisive = worst(findings)
    more = f"one of {len(steps)} evaluations on {n_problems} problems; FullFT {before:.3f} before, {after:.3f} after"
    return replace(decisive, reason=f"{decisive.reason} ({more})")


@rl_claim("F4")
def _further_sets_follow(comparison: Comparison) -> Finding:
    curves = comparison.curves
    if not curves.empty:
        curves = curves[curves["run_id"].isin(comparison.runs["run_id"]) & curves["metric"].eq("accuracy")]
    names = [] if curves.empty else sorted(set(curves["split"]) - {"train", "validation", "test"})
    aime = [name for name in names if name.lower().startswith("aime")]
    unjudged_if(not names, "no accuracies on further problem sets")
    judges = ((name, each_rank(partial(_follows, name), fullft_learns=False)) for name in aime or names)
    judged = judge_each(judges, lambda judge: judge(comparison))
    return judged if aime else replace(judged, reason=f"{judged.reason}; no AIME problems, these stand for them")


@rl_claim("F5", conditions=(scope.swept, LONG_RESPONSES, scope.beats_controls))
@each_rank
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
    runs, curves, names = evidence.runs, evidence.curves, ("equal_groups", "grad_norm")
    points = [metric_points(curves, "train", name).set_index(["run_id", "step"])["value"] for name in names]
    steps = pd.concat(points, axis=1, keys=names).dropna()
    equal = steps["equal_groups"] == 1
    least = runs["run_id"].map(steps["equal_groups"].groupby("run_id").min())
    never = runs[runs["status"].eq("unrewarded") | (runs["status"].ne("diverged") & least.eq(1).fillna(False))]
    unjudged_if(not equal.any() and never.empty, "no step whose groups all have equal rewards")
    accuracies = metric_points(curves, "validation", "accuracy")
    base = never["run_id"].map(accuracies[accuracies["step"] == 0].set_index("run_id")["value"])
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
        texts.append(f"of {n_runs} runs without other steps {changed.sum()} of {len(changed)} accuracies changed")
    if not learning.any():
        problems.append(Problem("no step learns, so the gradients of 0 check nothing"))
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
    """Return each model and problem set, after its name, with the first epochs of the model's supervised runs by
    dataset: run_ids, and bits (per scored token, by run)."""
    sft = evidence.every_run[~is_rl(evidence.every_run)]
    lengths = description_lengths(sft[~is_memorisation(sft)])
    by_run = sft.set_index("run_id")[list(_FIRST_EPOCH)].astype(float)
    bits = by_run[_FIRST_EPOCH[0]] / by_run[_FIRST_EPOCH[1]] / math.log(2)
    epochs = lengths.assign(bits=lengths["run_ids"].map(lambda run_ids: bits.loc[run_ids].tolist()))
    sets = problem_sets(evidence)
    return [(name, (each, epochs[epochs["model"] == each.arms[0]["model"]])) for name, each in sets]


@claim("F9", over=sft_of_problem_sets, columns=(*NEEDED_BY["sft"], *_FIRST_EPOCH), conditions=(LONG_RESPONSES,))
def _fewer_bits_per_token(compared: tuple[Comparison, pd.DataFrame]) -> Finding:
    from scipy.special import entr

    comparison, epochs = compared
    highest = next(reversed(comparison.lora.values()), None)
    [arm] = require(("FullFT or LoRA on all layers", comparison.fullft or highest))
    tokens = tenths(comparison, arm, "response_length").mean(axis=1)
    unjudged_if(tokens.empty, "no response lengths")
    per_episode = mean_over_seeds(tokens, f"tokens of {comparison.label}")
    episodes = f"{per_episode.value:.3g} tokens per episode, at most 1 bit each"
    rewards = curves_near_optimum(comparison, arm, "train", "reward").to_numpy(float)
    if rewards.size:
        bits = float(np.nanmean(entr(rewards) + entr(1 - rewards))) / math.log(2)
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
