"""Claims C1 to C3: the learning curves of the first steps, by rank."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lorabench.analysis.comparison import Comparison
from lorabench.analysis.early import EarlyDifference, early_difference
from lorabench.analysis.finding import (
    MIN_SEEDS,
    SIGMAS,
    Finding,
    UnjudgedError,
    Verdict,
    all_of,
    finding,
    nats,
    sigma_text,
    within,
)
from lorabench.analysis.gaps import mean_interval
from lorabench.analysis.slopes import against_log
from lorabench.claims.claim import Claim
from lorabench.claims.evidence import over
from lorabench.claims.scopes import every_dataset

EARLY_STEPS = 100
"""The number of steps that count as early; the paper gives no number."""

FIRST_EARLY_STEPS = 20
"""The steps up to which the difference of two curves has the further limit MAX_FIRST_GAP."""

MAX_FIRST_GAP = 0.01
"""The share of the loss up to which two curves are the same over FIRST_EARLY_STEPS."""

FIRST_STEPS = 10
"""The number of first steps in which the paper sees a negative difference."""

SIGN_SEEDS = 5
"""The number of seeds that a verdict on the sign of this difference needs."""


def _early(comparison: Comparison, first_steps: int | None = None) -> EarlyDifference:
    """Return the difference of the lowest rank above 1 and the highest, over the first steps or the whole run."""
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


def same_early_curves(comparison: Comparison) -> Finding:
    """C1: judge the difference of two ranks on the same batches at the step where it is largest for its margin."""
    early = _early(comparison, EARLY_STEPS)
    steps = (
        early.over_seeds().assign(loss=early.loss, margin=SIGMAS * early.sigma_batch).rename_axis("step").reset_index()
    )
    tighter = np.fmin(steps["margin"], MAX_FIRST_GAP * steps["loss"])
    steps["margin"] = steps["margin"].mask(steps["step"] <= FIRST_EARLY_STEPS, tighter)
    bounds = steps[["low", "high", "margin"]].to_numpy(float)
    verdicts: list[Verdict] = [within(low, high, (-margin, margin)) for low, high, margin in bounds]
    half = (steps["high"] - steps["mean"]).fillna(0.0)
    steps["strain"] = ((steps["mean"].abs() + half) / steps["margin"]).fillna(0.0)
    verdict = all_of(verdicts)
    furthest = steps[[at_step == verdict for at_step in verdicts]].sort_values("strain").iloc[-1]
    mean, interval = float(furthest["mean"]), (float(furthest["low"]), float(furthest["high"]))
    text = (
        f"{_compared(early)} at most {nats(mean, *interval)}, margin {furthest['margin']:.4f} (step "
        f"{furthest['step']:.0f} of {len(steps)}), loss {furthest['loss']:.3f}, batches: "
        f"{sigma_text(early.sigma_batch)}"
    )
    problems = _seed_problems(early, MIN_SEEDS)
    return finding(early.run_ids, text, verdict, problems, mean, interval, float(furthest["strain"]))


C1 = Claim(
    id="C1",
    kind="empirical",
    statement="Early in training, learning curves at one LR are the same for all ranks",
    figure="early curves",
    criterion=(
        "The difference is the training NLL of the lowest rank above 1 minus that of the highest (16 and 256 in the "
        f"paper) on the same batches, as a mean over seeds. At every step up to {EARLY_STEPS} its 95% interval lies "
        f"within {SIGMAS} sigma of batches, the standard deviation over seeds, pooled over both ranks and these steps; "
        f"up to step {FIRST_EARLY_STEPS} it lies within {MAX_FIRST_GAP:.0%} of the loss too. Contradicted if the whole "
        "interval is outside at some step"
    ),
    needs=f"LoRA of two ranks above 1 at one LR, {MIN_SEEDS} seeds, training losses at every step",
    paper_value="nearly on top of each other; no number",
    unit="nats per token",
    experiments=("early",),
    judge=over(every_dataset, same_early_curves),
    core=True,
)


def difference_grows(comparison: Comparison) -> Finding:
    """C2: judge the slope of each seed's |difference| of two ranks against log step, and its mean by decade."""
    early = _early(comparison)
    apart = early.by_seed[early.by_seed.index > 1].abs()
    slopes = pd.Series([against_log(apart.index, apart[seed]).slope for seed in apart], dtype=float)
    slope, low, high = mean_interval(slopes)
    # The first decade is steps 2 to 10, the second 11 to 100.
    decade = np.ceil(np.log10(apart.index.to_numpy(float)) - 1e-9).astype(int)
    means = apart.mean(axis=1).groupby(decade).mean()
    ends = np.minimum(10.0 ** means.index.to_numpy(float), apart.index.max())
    by_decade = ", ".join(f"{value:.4f} up to step {end:.0f}" for end, value in zip(ends, means, strict=True))
    text = (
        f"{_compared(early)}, |difference| grows by {nats(slope, low, high)} per decade of steps over {early.n_seeds} "
        f"seeds; mean {by_decade}"
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


C2 = Claim(
    id="C2",
    kind="empirical",
    statement="The difference of early curves grows with time",
    figure="early curves",
    criterion=(
        "The slope of each seed's |difference| (as in C1) against log step, from step 2 to the end, has a 95% "
        "interval over seeds above 0, and the mean |difference| rises from decade to decade of steps. Contradicted if "
        "the interval is below 0"
    ),
    needs=f"as C1, over 10 steps and more; {MIN_SEEDS} seeds",
    paper_value="grows; no number",
    unit="nats per token and decade",
    experiments=("early",),
    judge=over(every_dataset, difference_grows),
)


def difference_negative_at_first(comparison: Comparison) -> Finding:
    """C3: judge the mean difference of two ranks over the first steps, over seeds."""
    early = _early(comparison, FIRST_STEPS)
    # Before the first update all ranks have the loss of the base model.
    first = early.by_seed[early.by_seed.index > 1]
    mean, low, high = mean_interval(first.mean())
    text = f"{_compared(early)} = {nats(mean, low, high)} over steps 2 to {FIRST_STEPS} of {early.n_seeds} seeds"
    problems = _seed_problems(early, SIGN_SEEDS)
    if first.empty or first.index.max() < FIRST_STEPS:
        problems.append(f"fewer than {FIRST_STEPS} steps")
    verdict: Verdict = "confirmed" if high < 0 else "contradicted" if low > 0 else "inconclusive"
    return finding(early.run_ids, text, verdict, problems, mean, (low, high), mean)


C3 = Claim(
    id="C3",
    kind="opinion",
    statement="In the first few steps the lower rank has a slightly lower loss",
    figure="early curves",
    criterion=(
        f"The difference as in C1, as a mean over steps 2 to {FIRST_STEPS}, has a 95% interval over at least "
        f"{SIGN_SEEDS} seeds below 0. Contradicted if the interval is above 0"
    ),
    needs=f"as C1; {SIGN_SEEDS} seeds",
    paper_value="negative, tiny; no number",
    unit="nats per token",
    experiments=("early",),
    judge=over(every_dataset, difference_negative_at_first),
)

CLAIMS = (C1, C2, C3)
