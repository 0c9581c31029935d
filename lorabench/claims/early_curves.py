"""Claims C1 to C3: the learning curves of the first steps, by rank."""

from __future__ import annotations

import math
from dataclasses import replace

from lorabench.analysis.comparison import Comparison
from lorabench.analysis.curves import (
    PAPER_RANK,
    EarlyDifference,
    PairedCurves,
    early_difference,
    inverse_rank_fit,
    scan,
)
from lorabench.analysis.estimate import mean_over_seeds
from lorabench.analysis.finding import MIN_SEEDS, Finding, UnjudgedError, decide, nats
from lorabench.analysis.rules import Above, Problem, Remedy, Within
from lorabench.analysis.slopes import slopes_by_seed
from lorabench.claims.claim import Claim, few_seeds, margin_problems, over
from lorabench.claims.scope import every_dataset
from lorabench.utils.formats import fixed_interval

EARLY_STEPS = 100
"""The number of steps that count as early; the paper gives no number."""

WINDOWS = 6
"""The number of windows of steps, equally long on a logarithmic axis, in which the difference is judged."""

MIN_GROWTH = 0.2
"""The least growth per tenfold steps that counts as one, as a share of the mean difference."""

FIRST_STEPS = 10
"""The number of first steps in which the paper sees a negative difference."""

SIGN_SEEDS = 5
"""The number of seeds that a verdict on the sign of this difference needs."""


def _early(
    comparison: Comparison, seeds: int, first_steps: float = math.inf
) -> tuple[EarlyDifference, PairedCurves, str, list[Problem]]:
    """Return the difference of the two ranks that stand for the paper's, over the first steps or the whole run.

    Args:
        comparison: holds the ranks.
        seeds: the number of seeds that a verdict needs.
        first_steps: the number of steps.

    Returns:
        The difference, its curves, what it is a difference of, and what speaks against a verdict.
    """
    if not comparison.lora:
        raise UnjudgedError("not tested", "no LoRA on all layers")
    early = early_difference(comparison.of(comparison.lora.values()), comparison.curves, first_steps)
    if early is None:
        raise UnjudgedError("inconclusive", "no two ranks above 1 with training losses at one LR and seed")
    if early.low < PAPER_RANK:
        ranks = ", ".join(f"r{rank}" for rank in comparison.lora)
        raise UnjudgedError("setting not met", f"it needs two ranks of {PAPER_RANK} or more (here {ranks})")
    ranks = f"r{early.low} - r{early.high}"
    curves = PairedCurves(early.by_seed.rename_axis("step"), early.run_ids, f"{comparison.label} {ranks}")
    problems = few_seeds(early.n_seeds, needed=seeds)
    if early.n_diverged:
        problems.append(Problem(f"{early.n_diverged} runs at that LR diverged"))
    return early, curves, f"training NLL of {ranks} at LR {early.lr:g}", problems


def _by_inverse_rank(early: EarlyDifference) -> str:
    """Return a text on how well the differences of all pairs of ranks go as 1/r1 - 1/r2."""
    factor, explained = inverse_rank_fit(early.by_inverse_rank)
    if math.isnan(factor):
        return ""
    pairs = ", ".join(
        f"r{row['low']:.0f} - r{row['high']:.0f} {row['difference']:.4f}"
        for row in early.by_inverse_rank.to_dict("records")
    )
    return (
        f"; over all pairs of ranks the mean difference is {factor:.3f} nats x (1/r1 - 1/r2), which explains "
        f"{explained:.0%} of its squares ({pairs})"
    )


def same_early_curves(comparison: Comparison) -> Finding:
    """C1: judge the difference of two ranks on the same batches in windows of steps."""
    early, curves, name, problems = _early(comparison, MIN_SEEDS, EARLY_STEPS)
    windows = curves.windows(WINDOWS)
    if not windows:
        raise UnjudgedError("not tested", "no training losses after the first update")
    margin = comparison.margin
    judged = scan(
        lambda _: Within.margin(margin.value),
        curves,
        windows,
        lambda gap: f"{name} = {nats(gap)}, {early.n_seeds} seeds",
        [*problems, *margin_problems(margin)],
        margin.rule,
    )
    return replace(judged, reason=judged.reason + _by_inverse_rank(early))


C1 = Claim(
    id="C1",
    statement="Early in training, learning curves at one LR are the same for all ranks",
    figure="early curves",
    criterion=(
        f"The difference is the training NLL of the lowest rank of {PAPER_RANK} or more minus that of the highest rank "
        "(16 and 256 in the paper), at one LR and on the same batches. Its mean over seeds is 0 within the margin in "
        f"each of {WINDOWS} windows of steps 2 to {EARLY_STEPS}, which are equally long in log(step). The reason also "
        "gives how the differences of all pairs of ranks go with 1/r1 - 1/r2"
    ),
    needs=f"LoRA of two ranks of {PAPER_RANK} or more at one LR; {MIN_SEEDS} seeds; training losses at every step",
    paper_value="nearly on top of each other; no number",
    experiments=("early",),
    judge=over(every_dataset, same_early_curves),
    core=True,
)


def difference_grows(comparison: Comparison) -> Finding:
    """C2: judge the slope of each seed's difference of two ranks against log step, as a share of the mean of all.

    The difference keeps its sign: the absolute value of a difference that is small beside its noise does not grow.
    """
    early, curves, name, problems = _early(comparison, MIN_SEEDS)
    apart = early.by_seed[early.by_seed.index > 1]
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
    return decide(Above(MIN_GROWTH), growth, text, early.run_ids, problems, rule)


C2 = Claim(
    id="C2",
    statement="The difference of early curves grows with time",
    figure="early curves",
    criterion=(
        "For each seed, the slope of the difference (as in C1, at each step from 2 to the end) against log10(step) is "
        "divided by the mean difference of all seeds, which must surely differ from 0. On average over seeds it is "
        f"above 0 by {MIN_GROWTH:g}"
    ),
    needs=f"as C1, over more than {FIRST_STEPS} steps; {MIN_SEEDS} seeds",
    paper_value="grows; no number",
    unit="share of the mean per tenfold steps",
    experiments=("early",),
    judge=over(every_dataset, difference_grows),
)


def difference_negative_at_first(comparison: Comparison) -> Finding:
    """C3: judge the mean difference of two ranks over the first steps, over seeds."""
    early, curves, name, problems = _early(comparison, SIGN_SEEDS, FIRST_STEPS)
    [mean] = curves.means([(2, FIRST_STEPS)])
    text = f"{name} = {nats(mean)} over steps 2 to {FIRST_STEPS} of {early.n_seeds} seeds"
    if early.by_seed.index.max() < FIRST_STEPS:
        problems.append(Problem(f"fewer than {FIRST_STEPS} steps"))
    return decide(Within(-math.inf, 0.0), mean, text, early.run_ids, problems, "0, since the paper calls it tiny")


C3 = Claim(
    id="C3",
    kind="opinion",
    statement="In the first few steps the lower rank has a slightly lower loss",
    figure="early curves",
    criterion=(
        f"The difference as in C1, as a mean over steps 2 to {FIRST_STEPS} and at least {SIGN_SEEDS} seeds, is below "
        "0, within an upper margin of 0"
    ),
    needs=f"as C1; {SIGN_SEEDS} seeds",
    paper_value="negative, tiny; no number",
    experiments=("early",),
    judge=over(every_dataset, difference_negative_at_first),
)

CLAIMS = (C1, C2, C3)
