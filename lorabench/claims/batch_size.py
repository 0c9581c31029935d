"""Claims D1 to D5: the gap between LoRA and full fine-tuning (FullFT) at several batch sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison, require
from lorabench.analysis.finding import (
    MIN_SEEDS,
    SIGMAS,
    Finding,
    UnjudgedError,
    Verdict,
    exceeds,
    finding,
    nats,
    noise_problems,
    sigma_text,
    together,
    worst,
)
from lorabench.analysis.gap_curve import envelope_gap, gap_at, gap_curve
from lorabench.analysis.gaps import mean_interval
from lorabench.claims.claim import Claim, untestable
from lorabench.claims.evidence import SWEEP, Evidence, judge_each, over

MIN_BATCH_SIZES = 3
"""The number of batch sizes that a claim about their effect needs."""

MAX_DATA_RATIO = 1.1
"""The largest ratio of examples seen between batch sizes: one pass over the same data, in whole steps."""

HALFWAY = 0.5
"""The share of the data at which D2 compares the gap with that at the end."""

ABOUT_HALFWAY = (0.25, 0.75)
"""The range of shares of the data that must have validation losses, for the gap halfway to be interpolated."""

_NEEDS = f"{SWEEP}, at {MIN_BATCH_SIZES} or more batch sizes on one pass over the same data"

ArmBySize = dict[int, Arm]
"""An arm by batch size: the same method and rank at each."""


def _present(size: int, name: str, arm: Arm | None) -> Arm:
    if arm is None:
        raise UnjudgedError("inconclusive", f"no runs of {name} at batch {size}")
    return arm


@dataclass(frozen=True)
class BatchSizes:
    """The comparisons on one model and dataset by batch size, ascending."""

    label: str
    by_size: dict[int, Comparison]

    @cached_property
    def ranks(self) -> list[int]:
        """The LoRA ranks above 1; rank 1 may lack capacity, which is another effect."""
        return sorted({rank for comparison in self.by_size.values() for rank in comparison.lora if rank > 1})

    @cached_property
    def fullft(self) -> ArmBySize:
        """FullFT at each batch size."""
        return {size: _present(size, "FullFT", comparison.fullft) for size, comparison in self.by_size.items()}

    def lora(self, rank: int) -> ArmBySize:
        """Return LoRA of a rank at each batch size."""
        arms = {size: comparison.lora.get(rank) for size, comparison in self.by_size.items()}
        return {size: _present(size, f"LoRA r{rank}", arm) for size, arm in arms.items()}

    def losses(self, arm: ArmBySize) -> dict[int, pd.Series[float]]:
        """Return the final test NLL by batch size and seed, at the best LRs."""
        best = {size: comparison.losses[arm_label(arm[size])] for size, comparison in self.by_size.items()}
        return {size: pd.Series(row["losses"], row["seeds"], float) for size, row in best.items()}

    def run_ids(self, *arms: ArmBySize) -> list[str]:
        """Return the ids of all runs of several arms."""
        runs = [comparison.of([arm[size] for arm in arms]) for size, comparison in self.by_size.items()]
        return list(pd.concat(runs)["run_id"])


def _examples(comparison: Comparison) -> int:
    run = comparison.runs.iloc[0]
    if pd.isna(run["steps"]):
        raise UnjudgedError("not tested", "the runs table has no steps, which say how much data each batch size saw")
    return int(run["steps"] * run["batch_size"])


def _by_batch_size(comparisons: list[Comparison]) -> list[tuple[BatchSizes, str]]:
    """Return the comparisons of each model and dataset; of several lengths at one batch size, the longest."""
    datasets: dict[str, dict[int, Comparison]] = {}
    for comparison in comparisons:  # ascending in batch size and length
        run = comparison.runs.iloc[0]
        datasets.setdefault(f"{run['model']}/{run['dataset']}", {})[int(run["batch_size"])] = comparison
    return [(BatchSizes(label, by_size), "") for label, by_size in datasets.items()]


def across_batch_sizes(judge: Callable[[BatchSizes], Finding]) -> Callable[[Evidence], Finding]:
    """Return a judge of each model and dataset that has enough batch sizes with the same amount of data seen."""

    def judge_checked(sizes: BatchSizes) -> Finding:
        by_size = sizes.by_size
        if len(by_size) < MIN_BATCH_SIZES:
            listed = " and ".join(map(str, by_size))
            raise UnjudgedError("not tested", f"only batch {listed}, {MIN_BATCH_SIZES} batch sizes needed")
        highest = next((comparison.highest for comparison in by_size.values() if comparison.highest), None)
        fullft = next((comparison.fullft for comparison in by_size.values() if comparison.fullft), None)
        require(("LoRA above rank 1", highest), ("FullFT", fullft))
        examples = {size: _examples(comparison) for size, comparison in by_size.items()}
        if not max(examples.values()) <= MAX_DATA_RATIO * min(examples.values()):
            seen_text = ", ".join(f"batch {size} {seen:,.0f}" for size, seen in examples.items())
            raise UnjudgedError("inconclusive", f"examples seen differ ({seen_text}), so more than batch size does")
        return judge(sizes)

    return over(_by_batch_size, judge_checked)


def _gap_problems(sizes: BatchSizes, lora: ArmBySize, n_seeds: int) -> list[str]:
    """Return what speaks against a verdict on a rank's gaps with `n_seeds` seeds paired over batch sizes."""
    problems = [
        f"batch {size}: {problem}"
        for size, comparison in sizes.by_size.items()
        for problem in comparison.final_gap(lora[size], sizes.fullft[size])[3]
    ]
    if not problems and n_seeds < MIN_SEEDS:
        problems.append(f"{n_seeds} seeds at all batch sizes, {MIN_SEEDS} needed")
    return problems


def _gap_grows(sizes: BatchSizes, lora: ArmBySize) -> Finding:
    smallest, *_, largest = sizes.by_size
    of_lora, of_fullft = sizes.losses(lora), sizes.losses(sizes.fullft)
    gaps = {size: (of_lora[size] - of_fullft[size]).dropna() for size in sizes.by_size}
    growth = (gaps[largest] - gaps[smallest]).dropna()
    estimate, low, high = mean_interval(growth)
    noise = [sizes.by_size[size].sigma("test") for size in (smallest, largest)]
    sigma, dof = float(np.max([sigma for sigma, _ in noise])), min(dof for _, dof in noise)
    rises = [mean_interval((gaps[after] - gaps[before]).dropna()) for before, after in pairwise(gaps)]
    verdict: Verdict = exceeds(estimate, low, high, SIGMAS * sigma)
    if any(rise_high < 0 for _, _, rise_high in rises):
        verdict = "contradicted"
    elif verdict == "confirmed" and not all(rise > 0 for rise, _, _ in rises):
        verdict = "inconclusive"
    by_size = ", ".join(f"{gap.mean():.4f} at batch {size}" for size, gap in gaps.items())
    text = (
        f"{arm_label(lora[smallest])} - FullFT = {by_size}; from batch {smallest} to {largest} it grows by "
        f"{nats(estimate, low, high)} over {len(growth)} seeds, {sigma_text(sigma)}"
    )
    problems = noise_problems(sigma, dof) + _gap_problems(sizes, lora, len(growth))
    run_ids = sizes.run_ids(lora, sizes.fullft)
    return finding(run_ids, text, verdict, problems, estimate, (low, high), -estimate)


def gap_grows(sizes: BatchSizes) -> Finding:
    """D1: judge the gap at the largest batch size minus that at the smallest, for every rank."""
    return together([_gap_grows(sizes, sizes.lora(rank)) for rank in sizes.ranks])


D1 = Claim(
    id="D1",
    kind="empirical",
    statement="The gap between LoRA and full fine-tuning grows with batch size",
    figure="3",
    criterion=(
        "For every rank above 1, test NLL minus FullFT's rises from each batch size to the next, and from the "
        f"smallest to the largest by more than {SIGMAS} sigma, the larger of the sigmas at the two, with the 95% "
        f"interval, paired by seed, above 0. Contradicted if that whole interval is below {SIGMAS} sigma, or if the "
        "interval of one of the steps is below 0"
    ),
    needs=f"{_NEEDS}; {MIN_SEEDS} seeds at the best LRs",
    paper_value="grows from batch 32; no number",
    unit="nats per token",
    experiments=("batch_size",),
    judge=across_batch_sizes(gap_grows),
    core=True,
)


def _contrasts(curves: dict[int, pd.DataFrame]) -> dict[str, pd.Series[float]]:
    """Return the differences that D2 claims to be above 0, in nats per token and by seed.

    Args:
        curves: the gap curves of the smallest and of the largest batch size.
    """
    small, large = curves
    half, end = ({size: gap_at(curve, share) for size, curve in curves.items()} for share in (HALFWAY, 1.0))
    contrasts = {
        f"gap at the end at batch {large}": end[large],
        "less half of its value halfway": end[large] - half[large] / 2,
        f"less that at batch {small}": end[large] - end[small],
        f"fall from halfway to the end at batch {small}": half[small] - end[small],
    }
    return {what: values.dropna() for what, values in contrasts.items()}


def _gap_persists(sizes: BatchSizes, lora: ArmBySize) -> Finding:
    small, *_, large = sizes.by_size
    ends = BatchSizes(sizes.label, {size: sizes.by_size[size] for size in (small, large)})
    curves, of_envelopes = {}, {}
    for size, comparison in ends.by_size.items():
        arms = (comparison.runs, comparison.curves, lora[size], sizes.fullft[size])
        curves[size], of_envelopes[size] = gap_curve(*arms), envelope_gap(*arms)
        share = curves[size]["share"]
        if not (share.between(*ABOUT_HALFWAY).any() and share.min() <= HALFWAY):
            raise UnjudgedError("not tested", f"no validation losses about halfway through the runs at batch {size}")
    by_seed, by_envelope = _contrasts(curves), _contrasts(of_envelopes)
    n_seeds = min(len(values) for values in by_seed.values())
    problems = _gap_problems(ends, lora, n_seeds)
    run_ids = ends.run_ids(lora, sizes.fullft)
    parts = []
    for what, values in by_seed.items():
        estimate, low, high = mean_interval(values)
        envelope = float(by_envelope[what].mean())
        verdict = exceeds(estimate, low, high, 0.0)
        differ = ["the envelopes say otherwise"] if verdict != "inconclusive" and not envelope * estimate > 0 else []
        text = f"{what}: {nats(estimate, low, high)}, of envelopes {envelope:.4f}"
        parts.append(finding(run_ids, text, verdict, differ, estimate, (low, high), -estimate))
    decisive = worst(parts)
    text = f"{arm_label(lora[small])} - FullFT, {'; '.join(part.reason for part in parts)}; over {n_seeds} seeds"
    interval = (decisive.ci_low, decisive.ci_high)
    return finding(run_ids, text, decisive.verdict, problems, decisive.estimate, interval, decisive.strain)


def gap_persists_at_large_batch(sizes: BatchSizes) -> Finding:
    """D2: judge the gap along the run at the largest and the smallest batch size, for every rank."""
    return together([_gap_persists(sizes, sizes.lora(rank)) for rank in sizes.ranks])


D2 = Claim(
    id="D2",
    kind="empirical",
    statement="At a large batch size the gap persists along the run; at a small one it is smaller and shrinks",
    figure="3",
    criterion=(
        "For every rank above 1, on validation NLL at the best LRs, paired by seed: at the largest batch size the gap "
        "at the end is above 0, above half of its value halfway through the data, and above the gap at the end at the "
        "smallest batch size; at the smallest batch size it falls from halfway to the end. Each difference has its "
        "whole 95% interval on that side of 0, and the gap between the envelopes has the same sign"
    ),
    needs=f"{_NEEDS}; validation curves; {MIN_SEEDS} seeds at the best LRs",
    paper_value="persistent; at batch 32 smaller and shrinking; no number",
    unit="nats per token",
    experiments=("batch_size",),
    judge=across_batch_sizes(gap_persists_at_large_batch),
    core=True,
)


def gap_independent_of_rank(sizes: BatchSizes) -> Finding:
    """D3: judge the gap of the highest rank minus that of the lowest above 1 at every batch size; FullFT cancels."""
    if len(sizes.ranks) < 2:
        raise UnjudgedError("not tested", "fewer than two LoRA ranks above 1")
    lowest, *_, highest = sizes.ranks
    low_rank, high_rank = sizes.lora(lowest), sizes.lora(highest)
    return judge_each(
        (f"batch {size}", partial(comparison.equal_losses, high_rank[size], low_rank[size]))
        for size, comparison in sizes.by_size.items()
    )


D3 = Claim(
    id="D3",
    kind="empirical",
    statement="The gap at a batch size does not depend on the rank",
    figure="3",
    criterion=(
        "At every batch size, the 95% interval of the highest rank's gap minus that of the lowest rank above 1 (test "
        f"NLL, paired by seed, so that FullFT cancels) lies within {SIGMAS} sigma"
    ),
    needs=f"{_NEEDS}; two ranks above 1; {MIN_SEEDS} seeds at the best LRs",
    paper_value="does not seem to depend on rank; no number",
    unit="nats per token",
    experiments=("batch_size",),
    judge=across_batch_sizes(gap_independent_of_rank),
    core=True,
)


def _best_at_small_batch(sizes: BatchSizes, arm: ArmBySize) -> Finding:
    losses = sizes.losses(arm)
    first, second, *larger = losses
    best = min((first, second), key=lambda size: float(losses[size].mean()))
    by_size = ", ".join(f"{loss.mean():.4f} at batch {size}" for size, loss in losses.items())
    problems = [
        f"batch {size}: {problem}"
        for size, comparison in sizes.by_size.items()
        for problem in comparison.edge_problems([arm[size]])
    ]
    diverged = sum(int(sizes.by_size[size].losses[arm_label(of_size)]["n_diverged"]) for size, of_size in arm.items())
    if diverged:
        problems.append(f"{diverged} repeats at the best LR diverged")
    differences = {size: (losses[size] - losses[best]).dropna() for size in larger}
    n_seeds = min(len(values) for values in differences.values())
    if n_seeds < MIN_SEEDS:
        problems.append(f"{n_seeds} seeds at all batch sizes, {MIN_SEEDS} needed")
    parts = []
    for size, values in differences.items():
        estimate, low, high = mean_interval(values)
        text = f"batch {size} - batch {best} = {nats(estimate, low, high)}"
        verdict = exceeds(estimate, low, high, 0.0)
        parts.append(finding(sizes.run_ids(arm), text, verdict, problems, estimate, (low, high), -estimate))
    decisive = worst(parts)
    return replace(decisive, reason=f"{arm_label(arm[first])}: {by_size}; {decisive.reason}")


def best_at_small_batch(sizes: BatchSizes) -> Finding:
    """D4: judge, for FullFT and every rank, each larger batch size against the better of the two smallest."""
    return together([_best_at_small_batch(sizes, arm) for arm in (sizes.fullft, *map(sizes.lora, sizes.ranks))])


D4 = Claim(
    id="D4",
    kind="empirical",
    statement="LoRA and full fine-tuning both reach their lowest loss at a small batch size",
    figure="3",
    criterion=(
        "For FullFT and every rank above 1, the 95% interval of the test NLL at each larger batch size minus that at "
        "the better of the two smallest, paired by seed, is above 0. Contradicted if one such interval is below 0"
    ),
    needs=f"{_NEEDS}; {MIN_SEEDS} seeds at the best LRs",
    paper_value="the smallest; no number",
    unit="nats per token",
    experiments=("batch_size",),
    judge=across_batch_sizes(best_at_small_batch),
)


D5 = Claim(
    id="D5",
    kind="opinion",
    statement="The gap at large batch sizes comes from training a product of two matrices",
    figure="text",
    criterion="Training the same update of the weights without a product, at an LR of its own, shows no gap",
    needs="a control that trains W itself at the scale of LoRA's update",
    paper_value="an interpretation; no number",
    unit="nats per token",
    experiments=("batch_size",),
    judge=untestable("needs a control that trains the update of the weights without a product; no such runs exist"),
)

CLAIMS = (D1, D2, D3, D4, D5)
