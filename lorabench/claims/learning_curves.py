"""Claims A1, A2, A6, A7, A8 and B2: learning curves and final losses by rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_label, rows_of
from lorabench.analysis.comparison import Arm, Comparison, require
from lorabench.analysis.envelopes import envelopes
from lorabench.analysis.finding import (
    MIN_SEEDS,
    SIGMAS,
    Finding,
    UnjudgedError,
    equality_problems,
    exceeds,
    finding,
    nats,
    noise_problems,
    sigma_text,
    together,
    within,
)
from lorabench.analysis.slopes import against_log
from lorabench.analysis.student import t_quantile
from lorabench.claims.claim import Claim
from lorabench.claims.evidence import SWEEP, over
from lorabench.claims.scopes import every_dataset, learning, longest_run, longest_runs, smallest_dataset, without_facts
from lorabench.utils.formats import fixed_interval

MIN_SHARE = 0.01
"""The share of the steps at the start of a run that A1 leaves out."""

MAX_CURVE_GAP = 0.01
"""The share of FullFT's loss up to which two learning curves are the same."""

MAX_BEND = 0.1
"""The bend, as a share of the fall, up to which a curve is straight: its slope then at most about doubles."""

MIN_R2 = 0.95
"""The coefficient of determination from which a line fits a curve."""

MAX_LOSS_GAP = 0.005
"""The share of the loss up to which two final losses are the same."""


def same_curve(comparison: Comparison) -> Finding:
    """A1: judge the envelopes of the highest rank and FullFT where their gap is largest for its margin."""
    lora, fullft = require(("LoRA above rank 1", comparison.highest), ("FullFT", comparison.fullft))
    points = envelopes(comparison.of([lora, fullft]), comparison.curves)
    points = points[points["step"] > MIN_SHARE * points["step"].max()]
    both = points[points["method"] == "lora"].merge(points[points["method"] == "fullft"], on="step")
    if both.empty:
        raise UnjudgedError("not tested", "no validation curves with steps in common")
    sigma, dof = comparison.sigma("validation")
    # The interval is that of two independent runs; it is cautious, since both see the data in the same order.
    half = t_quantile(dof) * math.sqrt(2) * sigma if dof else math.nan
    both = both.assign(gap=both["value_x"] - both["value_y"])
    both = both.assign(margin=np.fmax(SIGMAS * sigma, MAX_CURVE_GAP * both["value_y"]))
    both = both.assign(strain=(both["gap"].abs() + np.nan_to_num(half)) / both["margin"])
    furthest = both.loc[both["strain"].idxmax()]
    difference, margin = float(furthest["gap"]), float(furthest["margin"])
    interval = (difference - half, difference + half)
    text = (
        f"{arm_label(lora)} - FullFT at most {nats(difference, *interval)} (step {furthest['step']} of "
        f"{len(both)} points), margin {margin:.4f}, {sigma_text(sigma)}"
    )
    verdict = within(*interval, (-margin, margin))
    problems = noise_problems(sigma, dof) + equality_problems(verdict, sigma, furthest["value_y"])
    problems += comparison.edge_problems([lora, fullft])
    return finding(
        comparison.of([lora, fullft])["run_id"], text, verdict, problems, difference, interval, furthest["strain"]
    )


A1 = Claim(
    id="A1",
    kind="empirical",
    statement="High-rank LoRA and full fine-tuning have the same learning curve",
    figure="1",
    criterion=(
        f"After the first {MIN_SHARE:.0%} of steps the envelopes of the highest rank and FullFT differ by at most "
        f"max({SIGMAS} sigma, {MAX_CURVE_GAP:.0%} of FullFT's loss), with the 95% interval of a difference of two runs"
    ),
    needs=f"{SWEEP}; validation curves; seeds that give sigma",
    paper_value="similar; no number",
    unit="nats per token",
    experiments=("rank",),
    judge=over(learning(every_dataset), same_curve),
    core=True,
)


def _straight(comparison: Comparison, arm: Arm, points: pd.DataFrame) -> Finding:
    """Judge whether one envelope is straight in the second half of its range of log(step)."""
    points = points[points["step"] > 0]
    steps = points["step"].astype(float)
    late = points[steps >= math.sqrt(steps.min() * steps.max())] if len(points) else points
    sigma, dof = comparison.sigma("validation")
    line = against_log(late["step"], late["value"], sigma)
    width = math.log10(late["step"].max() / late["step"].min()) if len(late) else math.nan
    # The middle of a parabola lies c width^2 / 4 below its chord.
    bend, low, high = (
        float(np.divide(c * width**2 / 4, -line.slope * width))
        for c in (line.quadratic, line.quadratic_low, line.quadratic_high)
    )
    low, high = min(low, high), max(low, high)
    text = (
        f"{arm_label(arm)} falls by {-line.slope:.3g} nats per tenfold steps, R2 {line.r2:.3f}, bend {bend:.3f} "
        f"{fixed_interval(low, high, 3)} of the fall ({line.n} points)"
    )
    problems = noise_problems(sigma, dof) + comparison.edge_problems([arm])
    if math.isnan(low):
        problems.append("too few points in the second half of log(step)")
    verdict = within(low, high, (-MAX_BEND, MAX_BEND))
    if line.low > 0:
        verdict, text = "contradicted", f"{text}; it rises"
    elif not line.high < 0:
        verdict, text = "inconclusive", f"{text}; it does not surely fall"
    elif verdict == "confirmed" and line.r2 < MIN_R2:
        verdict = "inconclusive"
    return finding(comparison.rows[arm_label(arm)]["run_id"], text, verdict, problems, bend, (low, high), abs(bend))


def linear_in_log_steps(comparison: Comparison) -> Finding:
    """A2: judge how far the envelopes of FullFT and of the highest rank bend against log(step), late in training."""
    arms = require(("FullFT", comparison.fullft), ("LoRA above rank 1", comparison.highest))
    points = envelopes(comparison.of(arms), comparison.curves)
    if points.empty:
        raise UnjudgedError("not tested", "no validation curves")
    return together([_straight(comparison, arm, rows_of(points, arm)) for arm in arms])


A2 = Claim(
    id="A2",
    kind="empirical",
    statement="The loss falls linearly with the logarithm of the number of steps",
    figure="1",
    criterion=(
        "For the envelopes of FullFT and of the highest rank in the second half of the range of log(step): the middle "
        f"of a fitted parabola lies within {MAX_BEND:.0%} of the fall from its chord, with its 95% interval, and a "
        f"straight line has R2 >= {MIN_R2:g}. The interval is that of the fit, with sigma for the scatter where the "
        "scatter of the points is smaller. Contradicted if the whole interval is outside, or the loss rises"
    ),
    needs=f"{SWEEP}; validation curves with at least 4 points late in training; seeds that give sigma",
    paper_value="linear; no number",
    unit="share of the fall",
    experiments=("rank",),
    judge=over(learning(every_dataset), linear_in_log_steps),
)


@dataclass(frozen=True)
class SameModel:
    """The comparisons on one model, one per dataset."""

    label: str
    comparisons: list[Comparison]


def by_model(comparisons: list[Comparison]) -> list[tuple[SameModel, str]]:
    """Choose, for each model, all datasets but random facts, each at its greatest length."""
    models: dict[str, list[Comparison]] = {}
    for comparison in longest_runs(without_facts(comparisons)):
        models.setdefault(comparison.runs["model"].iloc[0], []).append(comparison)
    return [(SameModel(model, of_model), "") for model, of_model in models.items()]


def better_and_worse(of_model: SameModel) -> Finding:
    """A6: judge the final test NLL of the highest rank minus FullFT's on each dataset, in sigma.

    The largest gap is seen as a distance above 0, the smallest as one below 0; the smaller distance decides.
    """
    if len(of_model.comparisons) < 2:
        raise UnjudgedError("not tested", "only one dataset")
    gaps, texts, problems, run_ids = [], [], [], []
    for comparison in of_model.comparisons:
        arms = require(("LoRA above rank 1", comparison.highest), ("FullFT", comparison.fullft))
        estimate, interval, text, of_gap = comparison.final_gap(arms[0], arms[1])
        sigma, dof = comparison.sigma("test")
        gaps.append(np.array([estimate, *interval]) / sigma)
        texts.append(f"{comparison.label} {text}, {gaps[-1][0]:.1f} sigma")
        of_gap += noise_problems(sigma, dof)
        problems += [f"{comparison.label}: {problem}" for problem in of_gap]
        run_ids += list(comparison.of(arms)["run_id"])
    worse, better = max(gaps, key=lambda gap: gap[0]), min(gaps, key=lambda gap: gap[0])
    # Both are distances from 0 on their own side; the claim is as strong as the weaker side.
    estimate, low, high = np.minimum(worse, -better[[0, 2, 1]]).tolist()
    verdict = exceeds(estimate, low, high, SIGMAS)
    return finding(run_ids, "; ".join(texts), verdict, problems, estimate, (low, high), -estimate)


A6 = Claim(
    id="A6",
    kind="empirical",
    statement="On one dataset high-rank LoRA is better than full fine-tuning, on another it is worse",
    figure="1",
    criterion=(
        f"For one model, the highest rank's test NLL minus FullFT's, in sigma, is above {SIGMAS} on one dataset and "
        f"below -{SIGMAS} on another, both with 95% intervals on that side of 0. The estimate is the smaller distance "
        f"from 0. Contradicted if its whole interval is below {SIGMAS}. The paper considers its own difference "
        "possibly random"
    ),
    needs=f"{SWEEP}; two datasets; {MIN_SEEDS} seeds at the best LRs",
    paper_value="no number; possibly random variation",
    unit="sigma",
    experiments=("rank",),
    judge=over(by_model, better_and_worse),
)


def same_final_loss(comparison: Comparison) -> Finding:
    """A7, B2: judge the final test NLL of the highest rank minus FullFT's, each at its best LR."""
    arms = require(("LoRA above rank 1", comparison.highest), ("FullFT", comparison.fullft))
    estimate, interval, text, problems = comparison.final_gap(arms[0], arms[1])
    sigma, dof = comparison.sigma("test")
    loss = float(comparison.losses[arm_label(arms[1])]["loss_mean"])
    margin = float(np.fmax(SIGMAS * sigma, MAX_LOSS_GAP * loss))
    verdict, text = within(*interval, (-margin, margin)), f"{text}, margin {margin:.4f}, {sigma_text(sigma)}"
    problems += noise_problems(sigma, dof) + equality_problems(verdict, sigma, loss)
    return finding(comparison.of(arms)["run_id"], text, verdict, problems, estimate, interval, abs(estimate) / margin)


A7 = Claim(
    id="A7",
    kind="empirical",
    statement="On a small dataset, LoRA and full fine-tuning reach the same final loss",
    figure="1, 2",
    criterion=(
        "On the dataset with the fewest train tokens, the 95% interval of the highest rank's test NLL minus FullFT's "
        f"lies within max({SIGMAS} sigma, {MAX_LOSS_GAP:.1%} of the loss)"
    ),
    needs=f"{SWEEP}; {MIN_SEEDS} seeds at the best LRs",
    paper_value="approximately the same; no number",
    unit="nats per token",
    experiments=("rank",),
    judge=over(learning(smallest_dataset), same_final_loss),
)


B2 = Claim(
    id="B2",
    kind="empirical",
    statement="At their optimal LRs, high-rank LoRA and full fine-tuning reach the same loss",
    figure="2",
    criterion=(
        f"On every dataset, the 95% interval of the highest rank's test NLL minus FullFT's lies within max({SIGMAS} "
        f"sigma, {MAX_LOSS_GAP:.1%} of the loss)"
    ),
    needs=f"{SWEEP}; {MIN_SEEDS} seeds at the best LRs",
    paper_value="about the same; no number",
    unit="nats per token",
    experiments=("rank",),
    judge=over(every_dataset, same_final_loss),
    core=True,
)


def rank_1_worse(comparison: Comparison) -> Finding:
    """A8: judge the final test NLL of rank 1 minus FullFT's, each at its best LR."""
    arms = require(("LoRA r1", comparison.lora.get(1)), ("FullFT", comparison.fullft))
    estimate, interval, text, problems = comparison.final_gap(arms[0], arms[1])
    sigma, dof = comparison.sigma("test")
    problems += noise_problems(sigma, dof)
    verdict = exceeds(estimate, *interval, SIGMAS * sigma)
    return finding(
        comparison.of(arms)["run_id"], f"{text}, {sigma_text(sigma)}", verdict, problems, estimate, interval, -estimate
    )


A8 = Claim(
    id="A8",
    kind="empirical",
    statement="On a dataset beyond its capacity, LoRA is worse than full fine-tuning",
    figure="1",
    criterion=(
        f"On the longest dataset, rank 1's test NLL minus FullFT's is more than {SIGMAS} sigma with its 95% interval "
        f"above 0. Contradicted if the whole interval is below {SIGMAS} sigma"
    ),
    needs=f"{SWEEP}; rank 1; {MIN_SEEDS} seeds at the best LRs",
    paper_value="no number",
    unit="nats per token",
    experiments=("rank", "capacity"),
    judge=over(learning(longest_run), rank_1_worse),
)

CLAIMS = (A1, A2, A6, A7, A8, B2)
