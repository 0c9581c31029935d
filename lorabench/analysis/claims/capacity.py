"""Claims A: learning curves by rank, and what happens where an adapter runs out of capacity."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from lorabench.analysis.arms import arm_label
from lorabench.analysis.claims.claim import Claim
from lorabench.analysis.claims.evidence import (
    SWEEP,
    Comparison,
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
    finding,
    nats,
    noise_problems,
    sigma_text,
    within,
)
from lorabench.analysis.departure import departures
from lorabench.analysis.envelopes import envelopes


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
    half = float(stats.t.ppf(0.975, dof)) * math.sqrt(2) * sigma if dof else math.nan
    both = both.assign(gap=both["value_x"] - both["value_y"], margin=np.fmax(2 * sigma, 0.01 * both["value_y"]))
    both = both.assign(strain=(both["gap"].abs() + np.nan_to_num(half)) / both["margin"])
    furthest = both.loc[both["strain"].idxmax()]
    difference, margin = float(furthest["gap"]), float(furthest["margin"])
    interval = (difference - half, difference + half)
    text = (
        f"{arm_label(lora)} - FullFT at most {nats(difference, *interval)} (step {furthest['step']} of "
        f"{len(both)} points), margin {margin:.4f}, {sigma_text(sigma)}"
    )
    problems = noise_problems(sigma, dof, furthest["value_y"]) + comparison.edge_problems([lora, fullft])
    verdict = within(*interval, (-margin, margin))
    return finding(
        comparison.of([lora, fullft])["run_id"], text, verdict, problems, difference, interval, furthest["strain"]
    )


def departure_grows_with_rank(comparison: Comparison) -> Finding:
    """A3: rank correlation of rank and departure step; a rank that never leaves counts as leaving last."""
    fullft, _ = require(("FullFT", comparison.fullft), ("LoRA", next(iter(comparison.lora.values()), None)))
    ranks, arms = list(comparison.lora), [*comparison.lora.values(), fullft]
    points = envelopes(comparison.of(arms), comparison.curves)
    if points.empty:
        raise UnjudgedError("not tested", "no validation curves")
    left = departures(points, comparison.noise)
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


def same_final_loss(comparison: Comparison) -> Finding:
    """A7, B2: final test NLL of the highest rank and FullFT, each at its best LR."""
    arms = require(("LoRA above rank 1", comparison.highest), ("FullFT", comparison.fullft))
    estimate, interval, text, problems = comparison.final_gap(arms[0], arms[1])
    sigma, dof = comparison.sigma("test")
    loss = float(comparison.losses[arm_label(arms[1])]["nll_mean"])
    margin = float(np.fmax(2 * sigma, 0.005 * loss))
    problems += noise_problems(sigma, dof, loss)
    verdict, text = within(*interval, (-margin, margin)), f"{text}, margin {margin:.4f}, {sigma_text(sigma)}"
    return finding(comparison.of(arms)["run_id"], text, verdict, problems, estimate, interval, abs(estimate) / margin)


def rank_1_worse(comparison: Comparison) -> Finding:
    """A8: final test NLL of rank 1 above that of FullFT, each at its best LR."""
    arms = require(("LoRA r1", comparison.lora.get(1)), ("FullFT", comparison.fullft))
    estimate, interval, text, problems = comparison.final_gap(arms[0], arms[1])
    sigma, dof = comparison.sigma("test")
    problems += noise_problems(sigma, dof)
    verdict: Verdict = "inconclusive"
    if estimate > 2 * sigma and interval[0] > 0:
        verdict = "confirmed"
    elif interval[1] < 2 * sigma:
        verdict = "contradicted"
    return finding(
        comparison.of(arms)["run_id"], f"{text}, {sigma_text(sigma)}", verdict, problems, estimate, interval, -estimate
    )


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
        judge=over(every_dataset, same_curve),
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
        experiments=("rank",),
        judge=over(longest_dataset, departure_grows_with_rank),
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
        judge=over(smallest_dataset, same_final_loss),
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
        experiments=("rank",),
        judge=over(longest_dataset, rank_1_worse),
    ),
)
