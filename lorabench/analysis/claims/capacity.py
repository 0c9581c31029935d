"""Claims A and N: learning curves by rank, where an adapter runs out of capacity, and how many bits it holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_label, rows_of
from lorabench.analysis.claims.claim import Claim
from lorabench.analysis.claims.evidence import (
    SWEEP,
    Arm,
    Comparison,
    Evidence,
    Scope,
    Scoped,
    every_dataset,
    longest_dataset,
    over,
    require,
    smallest_dataset,
)
from lorabench.analysis.claims.finding import (
    MIN_SEEDS,
    Finding,
    UnjudgedError,
    Verdict,
    equality_problems,
    exceeds,
    finding,
    interval_text,
    nats,
    noise_problems,
    sigma_text,
    together,
    within,
    worst,
)
from lorabench.analysis.departure import departures
from lorabench.analysis.envelopes import envelopes
from lorabench.analysis.gaps import gap
from lorabench.analysis.memorisation import best_stored, description_lengths, is_memorisation, late_growth
from lorabench.analysis.slopes import against_log
from lorabench.analysis.student import t_quantile
from lorabench.analysis.thresholds import threshold_slope, thresholds

MAX_BEND = 0.1
"""Bend, as a share of the fall, up to which a curve is a straight line: its slope then about doubles at most."""

FLOOR = 0.05
"""A slope shallower than this share of FullFT's is a floor."""

THRESHOLD_BAND = (0.5, 1.5)
BIT_BAND = (0.3, 1.2)
TWO_BITS_BAND = (1.5, 2.5)

SATURATED = 0.9
"""An adapter that stores more than this share of the facts may have room for more facts."""

MAX_GROWTH = 0.1
"""An adapter that stored more than this share in the second half of its steps is still storing."""


def learning(scope: Scope) -> Scope:
    """A scope without the datasets of random facts, from which nothing general is learned."""
    return lambda comparisons: scope(_learning(comparisons))


def _learning(comparisons: list[Comparison]) -> list[Comparison]:
    return [one for one in comparisons if not is_memorisation(one.runs).any()]


def every_longest(comparisons: list[Comparison]) -> list[Scoped]:
    """Per model and dataset, its greatest length."""
    return every_dataset(longest_runs(comparisons))


def memorising(comparisons: list[Comparison]) -> list[Scoped]:
    """Those on random facts."""
    return [(one, "") for one in comparisons if is_memorisation(one.runs).any()]


def longest_run(comparisons: list[Comparison]) -> list[Scoped]:
    """Per model, the dataset with the most examples, at its greatest length."""
    return longest_dataset(longest_runs(comparisons))


def longest_runs(comparisons: list[Comparison]) -> list[Comparison]:
    """Per model and dataset the comparison with the most steps: shorter ones are its beginning."""
    longest: dict[tuple[str, str], Comparison] = {}
    for one in comparisons:
        first = one.runs.iloc[0]
        known = longest.setdefault((first["model"], first["dataset"]), one)
        if one.runs["steps"].fillna(0).max() > known.runs["steps"].fillna(0).max():
            longest[first["model"], first["dataset"]] = one
    return list(longest.values())


def same_curve(comparison: Comparison) -> Finding:
    """A1: envelopes of the highest rank and FullFT, at the step where they are furthest apart for their margin."""
    lora, fullft = require(("LoRA above rank 1", comparison.highest), ("FullFT", comparison.fullft))
    points = envelopes(comparison.of([lora, fullft]), comparison.curves)
    points = points[points["step"] > 0.01 * points["step"].max()]
    both = points[points["method"] == "lora"].merge(points[points["method"] == "fullft"], on="step")
    if both.empty:
        raise UnjudgedError("not tested", "no validation curves with steps in common")
    sigma, dof = comparison.sigma("validation")
    # Two single runs; that they share their data order makes this cautious.
    half = t_quantile(dof) * math.sqrt(2) * sigma if dof else math.nan
    both = both.assign(gap=both["value_x"] - both["value_y"], margin=np.fmax(2 * sigma, 0.01 * both["value_y"]))
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


def linear_in_log_steps(comparison: Comparison) -> Finding:
    """A2: how far the envelopes of FullFT and of the highest rank bend against log(step), late in training."""
    arms = require(("FullFT", comparison.fullft), ("LoRA above rank 1", comparison.highest))
    points = envelopes(comparison.of(arms), comparison.curves)
    if points.empty:
        raise UnjudgedError("not tested", "no validation curves")
    found = [_straight(comparison, arm, rows_of(points, arm)) for arm in arms]
    return together(found)


def _straight(comparison: Comparison, arm: Arm, points: pd.DataFrame) -> Finding:
    """Whether one envelope is straight in the second half of its range of log(step)."""
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
        f"{interval_text(low, high, 3)} of the fall ({line.n} points)"
    )
    problems = noise_problems(sigma, dof) + comparison.edge_problems([arm])
    if math.isnan(low):
        problems.append("too few points in the second half of log(step)")
    verdict = within(low, high, (-MAX_BEND, MAX_BEND))
    if line.low > 0:
        verdict, text = "contradicted", f"{text}; it rises"
    elif not line.high < 0:
        verdict, text = "inconclusive", f"{text}; it may not fall"
    elif verdict == "confirmed" and line.r2 < 0.95:
        verdict = "inconclusive"
    return finding(comparison.rows[arm_label(arm)]["run_id"], text, verdict, problems, bend, (low, high), abs(bend))


def _departures(comparison: Comparison) -> tuple[list[Arm], pd.DataFrame, pd.DataFrame]:
    """FullFT and the LoRA arms, their envelopes, and where each departs."""
    fullft, _ = require(("FullFT", comparison.fullft), ("LoRA", next(iter(comparison.lora.values()), None)))
    arms = [*comparison.lora.values(), fullft]
    points = envelopes(comparison.of(arms), comparison.curves)
    if points.empty:
        raise UnjudgedError("not tested", "no validation curves")
    return arms, points, departures(points, comparison.noise)


def departure_grows_with_rank(comparison: Comparison) -> Finding:
    """A3: rank correlation of rank and departure step; a rank that never leaves counts as leaving last."""
    from scipy import stats

    arms, _, left = _departures(comparison)
    ranks = list(comparison.lora)
    lora = left[left["method"] == "lora"].set_index("rank").reindex(ranks)
    steps = lora["step"].to_numpy(float, na_value=math.inf)
    gone = np.isfinite(steps)
    rho = float(stats.spearmanr(ranks, steps).statistic) if len(ranks) > 1 and len(set(steps)) > 1 else math.nan
    told = ", ".join(
        f"r{rank} {f'at step {step:.0f}' if math.isfinite(step) else 'never'}"
        for rank, step in zip(ranks, steps, strict=True)
    )
    correlation = "no rank correlation" if math.isnan(rho) else f"Spearman rho {rho:.2f}"
    sigma, dof = comparison.sigma("validation")
    text = f"leaves the shared curve: {told}; {correlation}, {sigma_text(sigma)}"
    problems = noise_problems(sigma, dof) + comparison.edge_problems(arms)
    if len(left) < len(arms) or left["departed"].isna().any():
        problems.append("too few points on some curve")
    if ranks[0] != 1 or len(ranks) < 3:
        problems.append("needs rank 1 and at least three ranks")
    elif not gone.any():
        problems.append("no rank leaves, so this data is within the capacity of all")
    verdict: Verdict = "inconclusive"
    if rho < 0 or (gone.any() and not gone[0]):
        verdict = "contradicted"
    elif gone[-1]:
        text += "; the highest rank leaves too"
    elif gone.sum() < 2:
        text += "; fewer than two ranks leave"
    elif rho >= 0.9 or (steps[1:] >= steps[:-1]).all():
        verdict = "confirmed"
    return finding(comparison.of(arms)["run_id"], text, verdict, problems, rho, strain=-rho)


def no_floor(comparison: Comparison) -> Finding:
    """A4: slopes of loss against log(step) of the ranks that have left the shared curve, and of FullFT beside them."""
    arms, points, left = _departures(comparison)
    if left["departed"].isna().any():
        sigma, dof = comparison.sigma("validation")
        problems = noise_problems(sigma, dof) or ["too few points on some curve"]
        return finding(comparison.of(arms)["run_id"], "departures can't be told", "inconclusive", problems)
    gone = thresholds(comparison.of(arms), points, left).query("status == 'left'")
    if gone.empty:
        raise UnjudgedError("not tested", "no rank joins the shared curve and leaves it")
    shared = rows_of(points, arms[-1])
    return together([_keeps_falling(comparison, arm, points, shared) for _, arm in gone.iterrows()])


def _keeps_falling(comparison: Comparison, arm: pd.Series[Any], points: pd.DataFrame, shared: pd.DataFrame) -> Finding:
    """Whether one rank's loss falls after departure, and less steeply than FullFT's at the same steps."""
    own = rows_of(points, arm)
    both = own[own["step"] >= arm["step"]].merge(shared[["step", "value"]], on="step", suffixes=("", "_shared"))
    sigma, dof = comparison.sigma("validation")
    loss = against_log(both["step"], both["value"], sigma)
    fullft = against_log(both["step"], both["value_shared"], sigma)
    # The two curves share their validation data; of single runs, the difference has twice the variance of one.
    lag = against_log(both["step"], both["value"] - both["value_shared"], math.sqrt(2) * sigma)
    text = (
        f"{arm_label(arm)} after step {arm['step']}: {loss.slope:.4f} {interval_text(loss.low, loss.high, 4)} nats per "
        f"tenfold steps, FullFT {fullft.slope:.4f}, difference {lag.slope:.4f} {interval_text(lag.low, lag.high, 4)} "
        f"({loss.n} points)"
    )
    both_arms = [comparison.lora[int(arm["rank"])], comparison.fullft or {}]
    problems = noise_problems(sigma, dof) + comparison.edge_problems(both_arms)
    if not fullft.high < 0:
        problems.append("FullFT's own loss may not fall there")
    verdict: Verdict = "inconclusive"
    if loss.low > FLOOR * fullft.slope:
        verdict, text = "contradicted", f"{text}; a floor"
    elif lag.high < 0:
        verdict, text = "contradicted", f"{text}; steeper than FullFT"
    elif loss.high < 0 and lag.low > 0:
        verdict = "confirmed"
    return finding(
        comparison.of(both_arms)["run_id"], text, verdict, problems, loss.slope, (loss.low, loss.high), loss.slope
    )


def threshold_tied_to_parameters(evidence: Evidence) -> Finding:
    """A5: log-log slope of tokens at departure against adapter parameters, over all models and datasets together."""
    parts, run_ids, told, left_out = [], [], [], []
    for comparison in longest_runs(_learning(evidence.comparisons)):
        try:
            arms, points, left = _departures(comparison)
        except UnjudgedError as unjudged:
            left_out.append(f"{comparison.label}: {unjudged.finding.reason}")
            continue
        sigma, dof = comparison.sigma("validation")
        problems = noise_problems(sigma, dof) + comparison.edge_problems(arms[-1:])
        if problems:
            left_out.append(f"{comparison.label}: {', '.join(problems)}")
            continue
        found = thresholds(comparison.of(arms), points, left)
        edges = np.array([bool(comparison.edge_problems([comparison.lora[rank]])) for rank in found["rank"]], bool)
        found = found.assign(status=found["status"].mask(edges, "at its grid's edge"))
        gone = found[found["status"] == "left"]
        parts.append(gone)
        run_ids += [run_id for rank in gone["rank"] for run_id in comparison.of([comparison.lora[rank]])["run_id"]]
        told += [f"{comparison.label} r{row.rank} {row.tokens:.3g} tokens" for row in gone.itertuples()]
        left_out += [
            f"{comparison.label} r{row.rank} {row.status}" for row in found.itertuples() if row.status != "left"
        ]
    if not parts and not left_out:
        raise UnjudgedError("not tested", "no such runs")
    gone = pd.concat(parts) if parts else pd.DataFrame()
    line = threshold_slope(gone, gone["dataset"]) if len(gone) else None
    others = f"; left out: {', '.join(left_out)}" if left_out else ""
    if line is None or math.isnan(line.low):
        raise UnjudgedError("inconclusive", f"{', '.join(told) or 'no departures'}: too few for a slope{others}")
    text = (
        f"slope {line.slope:.2f} {interval_text(line.low, line.high, 2)} over {line.n} departures ({', '.join(told)})"
    )
    verdict = within(line.low, line.high, THRESHOLD_BAND)
    return finding(run_ids, text + others, verdict, [], line.slope, (line.low, line.high), abs(line.slope - 1))


@dataclass(frozen=True)
class SameModel:
    """The comparisons on one model, a dataset each."""

    label: str
    comparisons: list[Comparison]


def by_model(comparisons: list[Comparison]) -> list[tuple[SameModel, str]]:
    """The datasets of each model, at their greatest length."""
    models: dict[str, list[Comparison]] = {}
    for comparison in longest_runs(_learning(comparisons)):
        models.setdefault(comparison.runs["model"].iloc[0], []).append(comparison)
    return [(SameModel(model, of_model), "") for model, of_model in models.items()]


def better_and_worse(of_model: SameModel) -> Finding:
    """A6: final test NLL of the highest rank minus FullFT's on each dataset, in sigma.

    Of the largest and the smallest of these gaps, that which lies less far from 0 on its own side tells.
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
    # Both sides seen from 0; the claim is as strong as the weaker.
    estimate, low, high = np.minimum(worse, -better[[0, 2, 1]]).tolist()
    verdict = exceeds(estimate, low, high, 2)
    return finding(run_ids, "; ".join(texts), verdict, problems, estimate, (low, high), -estimate)


def same_final_loss(comparison: Comparison) -> Finding:
    """A7, B2: final test NLL of the highest rank and FullFT, each at its best LR."""
    arms = require(("LoRA above rank 1", comparison.highest), ("FullFT", comparison.fullft))
    estimate, interval, text, problems = comparison.final_gap(arms[0], arms[1])
    sigma, dof = comparison.sigma("test")
    loss = float(comparison.losses[arm_label(arms[1])]["loss_mean"])
    margin = float(np.fmax(2 * sigma, 0.005 * loss))
    verdict, text = within(*interval, (-margin, margin)), f"{text}, margin {margin:.4f}, {sigma_text(sigma)}"
    problems += noise_problems(sigma, dof) + equality_problems(verdict, sigma, loss)
    return finding(comparison.of(arms)["run_id"], text, verdict, problems, estimate, interval, abs(estimate) / margin)


def rank_1_worse(comparison: Comparison) -> Finding:
    """A8: final test NLL of rank 1 above that of FullFT, each at its best LR."""
    arms = require(("LoRA r1", comparison.lora.get(1)), ("FullFT", comparison.fullft))
    estimate, interval, text, problems = comparison.final_gap(arms[0], arms[1])
    sigma, dof = comparison.sigma("test")
    problems += noise_problems(sigma, dof)
    verdict = exceeds(estimate, *interval, 2 * sigma)
    return finding(
        comparison.of(arms)["run_id"], f"{text}, {sigma_text(sigma)}", verdict, problems, estimate, interval, -estimate
    )


def about_one_bit(comparison: Comparison) -> Finding:
    """N1: loss of the first epoch per scored token, of FullFT at its best LR."""
    found = description_lengths(comparison.runs)
    if found.empty:
        raise UnjudgedError("not tested", "no run that went through an epoch")
    row = found.iloc[0]
    mean, interval = float(row["nats_per_token"]), (float(row["nats_low"]), float(row["nats_high"]))
    text = (
        f"first epoch of {arm_label(row)} {mean:.3f} nats {interval_text(*interval, 3)} per scored token = "
        f"{mean / math.log(2):.2f} bits, {row['bits']:.3g} bits in all, {row['n_seeds']} seeds"
    )
    problems = [] if row["n_seeds"] > 1 else ["one seed gives no interval"]
    strain = abs(math.log(mean / math.log(2))) if mean > 0 else math.nan
    return finding(row["run_ids"], text, within(*interval, BIT_BAND), problems, mean, interval, strain)


def two_bits_per_parameter(comparison: Comparison) -> Finding:
    """N2: bits of random facts stored per trainable parameter, of the ranks that are saturated."""
    stored = best_stored(comparison.of(comparison.lora.values())) if comparison.lora else pd.DataFrame()
    if stored.empty:
        raise UnjudgedError("inconclusive", "no finished LoRA run on the facts")
    stored = stored.set_index("rank")
    told = ", ".join(
        f"r{rank} {row['bits_per_parameter']:.2f} "
        f"{interval_text(row['bits_per_parameter_low'], row['bits_per_parameter_high'], 2)} bits per parameter, "
        f"{row['share']:.0%} of the facts"
        for rank, row in stored.iterrows()
    )
    full = [
        rank
        for rank, higher in pairwise(stored.index)
        if stored["share_high"][rank] < SATURATED and _stores_more(comparison, higher, rank)
    ]
    run_ids = [run_id for listed in stored["run_ids"] for run_id in listed]
    if not full:
        few = [f"r{rank}" for rank, row in stored.iterrows() if row["n_seeds"] < MIN_SEEDS]
        reason = f"fewer than {MIN_SEEDS} seeds of {', '.join(few)}" if few else "no rank is saturated"
        return finding(run_ids, told, "inconclusive", [reason])
    growth = late_growth(comparison.of(comparison.lora.values()), comparison.curves).set_index("rank")["growth"]
    found = [_two_bits(comparison, rank, stored.loc[rank], float(growth[rank])) for rank in full]
    decisive = worst(found)
    return replace(decisive, reason=f"{decisive.reason} ({told})", run_ids=tuple(sorted(run_ids)))


def _stores_more(comparison: Comparison, higher: int, rank: int) -> bool:
    """Whether the higher rank stores more for sure."""
    return gap(comparison.runs, comparison.lora[higher], comparison.lora[rank]).ci_high < 0


def _two_bits(comparison: Comparison, rank: int, stored: pd.Series[Any], growth: float) -> Finding:
    """The bits per parameter of one saturated rank."""
    low, high = float(stored["bits_per_parameter_low"]), float(stored["bits_per_parameter_high"])
    problems = comparison.edge_problems([comparison.lora[rank]])
    if stored["n_seeds"] < MIN_SEEDS:
        problems.append(f"{stored['n_seeds']} seeds, {MIN_SEEDS} needed")
    if stored["n_diverged"]:
        problems.append(f"{stored['n_diverged']} repeats at the best LR diverged")
    # More steps can only store more, so a value above the band stands.
    if low <= TWO_BITS_BAND[1] and not growth < MAX_GROWTH:
        late = "unknown" if math.isnan(growth) else f"{growth:.0%}"
        problems.append(f"still storing at the end ({late} of it in the second half of the steps)")
    estimate = float(stored["bits_per_parameter"])
    text = f"r{rank} is saturated at {estimate:.2f} {interval_text(low, high, 2)} bits per parameter"
    verdict = within(low, high, TWO_BITS_BAND)
    return finding(stored["run_ids"], text, verdict, problems, estimate, (low, high), abs(estimate - 2))


CLAIMS = (
    Claim(
        id="A1",
        kind="empirical",
        statement="High-rank LoRA and full fine-tuning have the same learning curve",
        figure="1",
        criterion=(
            "After the first 1% of steps the envelopes of the highest rank and FullFT differ by at most "
            "max(2 sigma, 1% of FullFT's loss), with the 95% interval of a difference of two runs"
        ),
        needs=f"{SWEEP}; validation curves; seeds that give sigma",
        paper_value="similar; no number",
        unit="nats per token",
        experiments=("rank",),
        judge=over(learning(every_dataset), same_curve),
    ),
    Claim(
        id="A2",
        kind="empirical",
        statement="The loss falls linearly with the logarithm of the number of steps",
        figure="1",
        criterion=(
            "In the second half of the range of log(step), for the envelopes of FullFT and of the highest rank: a "
            f"parabola's middle lies within {MAX_BEND:.0%} of the fall from its chord, with its 95% interval, and a "
            "straight line has R2 >= 0.95. The interval is that of the fit, with sigma for the scatter where that of "
            "the points is smaller. Contradicted if the whole interval is outside, or the loss rises"
        ),
        needs=f"{SWEEP}; validation curves with at least 4 points late in training; seeds that give sigma",
        paper_value="linear; no number",
        unit="share of the fall",
        experiments=("rank",),
        judge=over(learning(every_dataset), linear_in_log_steps),
    ),
    Claim(
        id="A3",
        kind="empirical",
        statement="Low and medium ranks leave the shared learning curve at a step that grows with rank",
        figure="1",
        criterion=(
            "On the longest dataset, the step from which a rank stays more than 2 sigma above the lowest envelope to "
            "the end, at least 3 points: rank 1 has one, the highest rank has none, at least two ranks do, and steps "
            "do not fall with rank or Spearman rho >= 0.9. Contradicted if rho < 0 or a rank leaves while rank 1 stays"
        ),
        needs=f"{SWEEP}; rank 1 and two more ranks; validation curves; seeds that give sigma",
        paper_value="no number",
        unit="Spearman rho",
        experiments=("rank", "capacity"),
        judge=over(learning(longest_run), departure_grows_with_rank),
    ),
    Claim(
        id="A4",
        kind="empirical",
        statement="Past its capacity LoRA has no floor: it learns on, less efficiently",
        figure="text",
        criterion=(
            "For each rank that joins the shared curve and leaves it (as in A3), from departure on: the 95% interval "
            "of the slope of its envelope against log(step) is below 0, and that of its slope minus FullFT's, at the "
            f"same steps, above 0. Contradicted if the slope's whole interval is shallower than {FLOOR:.0%} of "
            "FullFT's, or the difference's below 0"
        ),
        needs=f"{SWEEP}; a rank that leaves the shared curve; validation curves; seeds that give sigma",
        paper_value="no number",
        unit="nats per tenfold steps",
        experiments=("rank", "capacity"),
        judge=over(learning(every_longest), no_floor),
        columns=("trainable_params",),
    ),
    Claim(
        id="A5",
        kind="empirical",
        statement="An adapter runs out of capacity after an amount of data proportional to its parameters",
        figure="text",
        criterion=(
            "The 95% interval of the log-log slope of train tokens at departure (as in A3) against adapter parameters "
            f"lies within {THRESHOLD_BAND[0]:g} to {THRESHOLD_BAND[1]:g}. All models and datasets together, an "
            "intercept per dataset, its longest runs; the interval assumes at least the scatter that comes from the "
            "spacing of the points. Ranks that never leave, never joined the shared curve, or have their best LR at "
            "the edge of its grid give no point"
        ),
        needs=(
            f"{SWEEP}; four ranks, on one or more datasets, that leave the shared curve; validation curves; seeds that "
            "give sigma"
        ),
        paper_value="proportional; no number",
        unit="log-log slope",
        experiments=("rank", "capacity"),
        judge=threshold_tied_to_parameters,
        columns=("trainable_params",),
    ),
    Claim(
        id="A6",
        kind="empirical",
        statement="On one dataset high-rank LoRA is better than full fine-tuning, on another it is worse",
        figure="1",
        criterion=(
            "Of one model, the highest rank's test NLL minus FullFT's, in sigma: on one dataset above 2 and on another "
            "below -2, both with 95% intervals on that side of 0. The estimate is the smaller distance. Contradicted "
            "if its whole interval is below 2. The paper holds it possible that what it saw is noise"
        ),
        needs=f"{SWEEP}; two datasets; {MIN_SEEDS} seeds at the best LRs",
        paper_value="no number; possibly random variation",
        unit="sigma",
        experiments=("rank",),
        judge=over(by_model, better_and_worse),
    ),
    Claim(
        id="A7",
        kind="empirical",
        statement="On a small dataset, LoRA and full fine-tuning reach the same final loss",
        figure="1, 2",
        criterion=(
            "On the dataset with the fewest train tokens, the 95% interval of the highest rank's test NLL minus "
            "FullFT's lies within max(2 sigma, 0.5% of the loss)"
        ),
        needs=f"{SWEEP}; {MIN_SEEDS} seeds at the best LRs",
        paper_value="approximately the same; no number",
        unit="nats per token",
        experiments=("rank",),
        judge=over(learning(smallest_dataset), same_final_loss),
    ),
    Claim(
        id="A8",
        kind="empirical",
        statement="On a dataset beyond its capacity, LoRA is worse than full fine-tuning",
        figure="1",
        criterion=(
            "On the longest dataset, rank 1's test NLL minus FullFT's is more than 2 sigma with its 95% interval "
            "above 0. Contradicted if the whole interval is below 2 sigma"
        ),
        needs=f"{SWEEP}; rank 1; {MIN_SEEDS} seeds at the best LRs",
        paper_value="no number",
        unit="nats per token",
        experiments=("rank", "capacity"),
        judge=over(learning(longest_run), rank_1_worse),
    ),
    Claim(
        id="N1",
        kind="opinion",
        statement="The first epoch of fine-tuning on natural data costs about 1 bit per token",
        figure="text",
        criterion=(
            "The 95% interval over seeds of the first epoch's loss per scored token, of FullFT at its best LR, lies "
            f"within {BIT_BAND[0]:g} to {BIT_BAND[1]:g} nats. The paper speaks of natural data; generated tasks may be "
            "elsewhere, and then the verdict is about them"
        ),
        needs="runs of FullFT that go through an epoch; two seeds at the best LR",
        paper_value="1 bit = 0.69 nats",
        unit="nats per token",
        experiments=("rank", "capacity"),
        judge=over(learning(every_longest), about_one_bit),
        columns=("first_epoch_nats", "first_epoch_scored_tokens"),
    ),
    Claim(
        id="N2",
        kind="prediction",
        statement="A parameter stores about 2 bits",
        figure="text",
        criterion=(
            "On random facts, for each saturated rank: the 95% interval over seeds of the bits stored per adapter "
            f"parameter lies within {TWO_BITS_BAND[0]:g} to {TWO_BITS_BAND[1]:g}, what rounds to 2. Saturated: it "
            f"stores less than {SATURATED:.0%} of the facts and the next rank stores more, both with their intervals. "
            f"A rank that stored {MAX_GROWTH:.0%} or more in the second half of its steps is still storing and only "
            "tells if it is above. The paper cites the number for whole networks, after long training"
        ),
        needs=f"LoRA on all layers at two or more ranks on a dataset of facts; {MIN_SEEDS} seeds at the best LRs",
        paper_value="2 (cited)",
        unit="bits per parameter",
        experiments=("capacity",),
        judge=over(memorising, two_bits_per_parameter),
        columns=("entropy_bits", "test_scored_tokens", "trainable_params"),
    ),
)
