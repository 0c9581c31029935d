"""Claims A1, A2, A6, A7, A8 and B2 on learning curves and final losses by rank, and C1 to C3 on the first steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pandas as pd

from lorabench.analysis import optima
from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Comparison, highest_and_full, require
from lorabench.analysis.curves import PAPER_RANK, EarlyDifference, early_difference, inverse_rank_fit, log_windows, scan
from lorabench.analysis.estimate import Estimate, combined, mean_over_seeds
from lorabench.analysis.finding import MIN_SEEDS, Finding, UnjudgedError, decide, nats, worst
from lorabench.analysis.rules import Above, Problem, Remedy, Within
from lorabench.analysis.slopes import slopes_by_seed
from lorabench.claims import scope
from lorabench.claims.claim import Evidence, claim, few_seeds, judge_each, named_problems, number, unjudged_if
from lorabench.utils.formats import fixed_interval

long_claim = partial(claim, conditions=(scope.whole_runs,))
"""A claim on whole learning curves."""

# Bounds whose meaning the criteria say.
LEFT_OUT = 100
MIN_GROWTH = 0.2
FIRST_STEPS = 10
SIGN_SEEDS = 5
WINDOWS = 6

MAX_BEND = 0.1
"""The bend, as a share of the fall, up to which a curve is straight: its slope then at most about doubles."""


@long_claim("A1", over=scope.chosen(scope.learning, scope.full_runs))
def _same_curve(comparison: Comparison) -> Finding:
    lora, fullft = arms = highest_and_full(comparison)
    points = comparison.points("train", "nll")
    steps = [set(points.loc[points["run_id"].isin(comparison.run_ids([arm])), "step"]) for arm in arms]
    common = sorted(steps[0] & steps[1])
    unjudged_if(not common, "no training curves with steps in common")
    left_out = min(LEFT_OUT, common[-1] // 10)
    early = log_windows([step for step in common if step <= left_out], WINDOWS // 2)
    windows = log_windows(common, WINDOWS, max(2, left_out + 1))
    unjudged_if(not windows, "too few steps")
    margin, ids = comparison.margin, comparison.run_ids(arms)
    rule = Within.margin(margin.value)

    @cache
    def envelope_gap(low: int, high: int) -> tuple[Estimate, list[Problem]]:
        """Return the gap of the envelopes in a window of steps, and what speaks against it."""
        envelopes = optima.in_window(comparison, low, high)
        problems = envelopes.problems(arms) or optima.seeds_at_best(envelopes, arms)
        problems = named_problems(problems, f"steps {low} to {high}:")
        return envelopes.gap(lora, fullft), problems

    findings, by_window = [], []
    for low, high in windows:
        gap, problems = envelope_gap(low, high)
        text = f"envelope of {arm_label(lora)} - FullFT = {nats(gap)}, {gap.n_seeds} seeds, in steps {low} to {high}"
        problems = [*problems, *margin.problems]
        findings.append(decide(rule, gap, text, ids, problems, margin.rule))
        by_window.append(f"{'unknown' if math.isnan(gap.value) else f'{gap.value:+.4f}'} from {low}")
    agree: int | str = "none"
    for window in [] if margin.problem else reversed([*early, *windows]):
        gap, problems = envelope_gap(*window)
        if problems or not rule.answers(gap).confirmed:
            break
        agree = window[0]
    decisive = worst(findings)
    text = f"in the {len(windows)} windows {', '.join(by_window)}; step from which on they agree to the end: {agree}"
    return replace(decisive, reason=f"{decisive.reason} ({text})")


@long_claim("A2", over=scope.chosen(scope.learning, scope.full_runs))
def _linear_in_log_steps(comparison: Comparison) -> Iterator[Finding]:
    for arm in reversed(highest_and_full(comparison)):
        label, runs = arm_label(arm), optima.runs_at_optimum(comparison, arm)
        curve = optima.curves_at_optimum(comparison, arm).dropna()
        unjudged_if(curve.empty, f"no training curves of {label}")
        windows = log_windows(curve.index, WINDOWS, max(2, math.ceil(math.sqrt(curve.index.max()))))
        unjudged_if(len(windows) < 4, f"{label} has too few steps", "inconclusive")
        # Each window counts at its geometric middle.
        means = pd.DataFrame({math.sqrt(low * high): curve.loc[low:high].mean() for low, high in windows}).T
        slope = mean_over_seeds(slopes_by_seed(means), f"{comparison.label} {label} slope")
        x = np.log10(means.index.to_numpy(float))
        # The windows reach half of their width beyond the first and the last middle.
        width = float(np.ptp(x)) * len(x) / (len(x) - 1)

        def bends(losses: np.ndarray, x: np.ndarray = x, width: float = width) -> np.ndarray:
            curvature, slope_at_middle, _ = np.polyfit(x - (x.min() + x.max()) / 2, losses, 2)
            # The middle of a parabola lies c width^2 / 4 below its chord.
            return np.asarray(curvature * width**2 / 4 / (-slope_at_middle * width))

        bend = mean_over_seeds(bends(means.to_numpy(float)), f"{comparison.label} {label} bend")
        if (error := optima.lr_error(comparison, arm)) is not None:
            by_power = np.array([error.by_power.loc[low:high].mean() for low, high in windows])
            mean = means.to_numpy(float).mean(1, keepdims=True)
            off = mean + by_power[:, :1] * error.draws + by_power[:, 1:] * error.draws**2
            bend = replace(bend, seed_part=bend.seed_part + bends(off) - bends(mean))
        text = (
            f"{label} falls by {-slope.value:.3g} nats per tenfold steps from step {math.ceil(means.index.min())} on, "
            f"its middle lies {number(bend, 3)} of the fall below the chord, {bend.n_seeds} seeds"
        )
        problems, rises = comparison.problems([arm]), slope.known and slope.interval()[0] > 0
        if slope.known and not rises and not slope.interval()[1] < 0:
            problems.append(Problem("it does not surely fall", Remedy(f"{bend.n_seeds + 1} seeds", bend.n_seeds + 1)))
        rule, margin_rule = Within(-MAX_BEND, MAX_BEND), f"{MAX_BEND:.0%} of the fall"
        judged = decide(rule, bend, text, runs["run_id"], problems, margin_rule)
        if rises and not problems:
            falls = decide(Above(0.0), combined(np.negative, slope), f"{text}; it rises", runs["run_id"])
            judged = replace(judged, reason=falls.reason).with_outcomes(falls.outcomes)
        yield judged


def datasets_by_model(evidence: Evidence) -> list[tuple[str, list[Comparison]]]:
    """Return all datasets of each model except random facts, each at its greatest length."""
    by_model: dict[str, list[Comparison]] = {}
    for _, comparison in scope.chosen(scope.learning, scope.longest_runs)(evidence):
        by_model.setdefault(comparison.runs["model"].iloc[0], []).append(comparison)
    return list(by_model.items())


@claim("A6", over=datasets_by_model, conditions=(scope.natural_text,))
def _better_and_worse(datasets: list[Comparison]) -> Finding:
    unjudged_if(len(datasets) < 2, "only one dataset")
    gaps: list[Estimate] = []
    texts, problems, run_ids = [], [], []
    for comparison in datasets:
        arms = highest_and_full(comparison)
        margin = comparison.margin.value
        gaps.append(combined(lambda nats_per_token, margin=margin: nats_per_token / margin, comparison.gap(*arms)))
        texts.append(f"{comparison.label}: {comparison.gap_text(*arms)}, {gaps[-1].value:+.1f} margins")
        own_problems = [*comparison.problems(arms), *comparison.margin.problems]
        problems += named_problems(own_problems, f"{comparison.label}:")
        run_ids += comparison.run_ids(arms)
    # The largest gap is seen as a distance above 0, the smallest as one below 0; the smaller distance decides.
    weaker_side = combined(lambda *both: np.minimum(np.array(both).max(0), -np.array(both).min(0)), *gaps)
    rule = "1 margin: " + " and ".join(comparison.margin.rule for comparison in datasets)
    return decide(Above(1.0), weaker_side, "; ".join(texts), run_ids, problems, rule)


@claim("A7", over=scope.chosen(scope.learning, scope.smallest_dataset))
@claim("B2", over=scope.chosen(scope.learning))
def _same_final_loss(comparison: Comparison) -> Finding:
    return comparison.equal_losses(*highest_and_full(comparison))


@claim("A8", over=scope.chosen(scope.learning, scope.with_rank_1, scope.longest_run))
def _rank_1_worse(comparison: Comparison) -> Finding:
    lora, fullft = require(("LoRA r1", comparison.lora.get(1)), ("FullFT", comparison.fullft))
    judged = comparison.worse(lora, fullft)
    curves = optima.pair_at_optimum(comparison, lora, fullft)
    late = max(2, math.ceil(math.sqrt(curves.last)))
    growth = curves.slope(late)
    text = f"from step {late} on the gap of the training NLLs has a slope of {nats(growth)} per tenfold steps"
    problems = optima.off_optimum(comparison, lora, fullft, judged.estimate)
    if not (growth.known and growth.interval()[0] > 0):
        slow = "the gap does not surely grow late, so it may be slow learning and no lack of capacity"
        problems.append(Problem(slow, Remedy("longer runs")))
    grows = decide(Above(0.0), growth, text, judged.run_ids, problems)
    both = judge_each([("worse than FullFT", judged), ("the gap grows late", grows)], lambda statement: statement)
    if judged.verdict == "confirmed":
        judged = replace(judged.with_outcomes(both.outcomes), remedy=both.remedy)
    return replace(judged, reason=both.reason)


EARLY_STEPS = 100
"""The number of steps that count as early; the paper gives no number."""

_early_claim = partial(claim, over=scope.chosen(scope.at_one_alpha), conditions=(scope.one_alpha,))


def _early(
    comparison: Comparison, seeds: int, first_steps: float = math.inf
) -> tuple[EarlyDifference, str, list[Problem]]:
    """Return the difference of the ranks that stand for the paper's, its name, and what speaks against it."""
    unjudged_if(not comparison.lora, "no LoRA on all layers")
    early = early_difference(comparison.of(comparison.lora.values()), comparison.curves, first_steps)
    if early is None:
        raise UnjudgedError("inconclusive", "no two ranks above 1 with training losses at one LR and seed")
    ranks = f"it needs two ranks of {PAPER_RANK} or more (here {', '.join(f'r{rank}' for rank in comparison.lora)})"
    unjudged_if(early.low < PAPER_RANK, ranks, "setting not met")
    ranks = f"r{early.low} - r{early.high}"
    early = replace(early, curves=replace(early.curves, name=f"{comparison.label} {ranks}"))
    problems = few_seeds(early.curves.n_seeds, needed=seeds)
    if early.n_diverged:
        problems.append(Problem(f"{early.n_diverged} runs at that LR diverged"))
    return early, f"training NLL of {ranks} at LR {early.lr:g}", problems


@_early_claim("C1")
def _same_early_curves(comparison: Comparison) -> Finding:
    early, name, problems = _early(comparison, MIN_SEEDS, EARLY_STEPS)
    curves, margin = early.curves, comparison.margin
    windows = log_windows(curves.by_seed.index, WINDOWS)
    unjudged_if(not windows, "no training losses after the first update")
    text = f"{name} = {{}}, {curves.n_seeds} seeds"
    judged = scan(Within.margin(margin.value), curves, windows, text, [*problems, *margin.problems], margin.rule)
    factor, explained = inverse_rank_fit(early.by_inverse_rank)
    if math.isnan(factor):
        return judged
    rows = early.by_inverse_rank.to_dict("records")
    pairs = ", ".join(f"r{row['low']:.0f} - r{row['high']:.0f} {row['difference']:.4f}" for row in rows)
    by_rank = (
        f"over all pairs of ranks the mean difference is {factor:.3f} nats x (1/r1 - 1/r2), which explains "
        f"{explained:.0%} of its squares ({pairs})"
    )
    return replace(judged, reason=f"{judged.reason}; {by_rank}")


@_early_claim("C2")
def _difference_grows(comparison: Comparison) -> Finding:
    early, name, problems = _early(comparison, MIN_SEEDS)
    curves = early.curves
    apart = curves.by_seed[curves.by_seed.index > 1]
    # The difference keeps its sign: the absolute value of one that is small compared with its noise does not grow.
    mean = mean_over_seeds(apart.mean(), f"{curves.name} growth mean")
    growth = mean_over_seeds(slopes_by_seed(apart) / (mean.value or math.nan), f"{curves.name} growth")
    text = (
        f"{name}, {nats(mean)} on average, grows by {growth.value:.0%} "
        f"{fixed_interval(*growth.interval(), 2)} of that per tenfold steps, {growth.n_seeds} seeds"
    )
    if mean.known and mean.interval()[0] <= 0 <= mean.interval()[1]:
        problems.append(Problem("no difference that surely is one, which could grow", Remedy("more seeds")))
    if apart.empty or apart.index.max() <= FIRST_STEPS:
        problems.append(Problem(f"no more than {FIRST_STEPS} steps", Remedy("longer runs")))
    rule = f"{MIN_GROWTH:.0%} of the mean difference per tenfold steps"
    return decide(Above(MIN_GROWTH), growth, text, curves.run_ids, problems, rule)


@_early_claim("C3")
def _difference_negative_at_first(comparison: Comparison) -> Finding:
    early, name, problems = _early(comparison, SIGN_SEEDS, FIRST_STEPS)
    curves = early.curves
    [mean] = curves.means([(2, FIRST_STEPS)])
    text = f"{name} = {nats(mean)} over steps 2 to {FIRST_STEPS} of {curves.n_seeds} seeds"
    if curves.by_seed.index.max() < FIRST_STEPS:
        problems.append(Problem(f"fewer than {FIRST_STEPS} steps"))
    return decide(Within(-math.inf, 0.0), mean, text, curves.run_ids, problems, "0, since the paper calls it tiny")
