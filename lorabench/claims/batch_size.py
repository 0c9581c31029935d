"""Claims D1 to D5: the gap between LoRA and full fine-tuning (FullFT) at several batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison, require
from lorabench.analysis.estimate import Estimate, combined
from lorabench.analysis.finding import MIN_SEEDS, Finding, UnjudgedError, decide, nats, together
from lorabench.analysis.optima import off_optimum, pair_at_optimum
from lorabench.analysis.rules import Above, Margin, Problem
from lorabench.claims.claim import SWEEP, Claim, Evidence, doubted, judge_each, margin_problems, named_problems
from lorabench.claims.learning_curves import AT_OPTIMUM
from lorabench.claims.scope import batch_sizes

MIN_BATCH_SIZES = 3
"""The number of batch sizes that a claim about their effect needs."""

MAX_DATA_RATIO = 1.1
"""The largest ratio of examples seen between batch sizes: one pass over the same data, in whole steps."""

EARLY = (0.25, 0.5)
"""The part of the steps in which D2 takes the gap halfway: the second quarter of a run."""

LATE = (0.75, 1.0)
"""The part of the steps in which D2 takes the gap at the end: the last quarter of a run."""

LARGE_FACTOR = 16
"""The ratio of the largest to the smallest batch size from which the claims are about large batches."""

LARGE_STEPS = 19
"""The number of steps at the largest batch size: that of one pass over the paper's 10,000 examples at batch 512."""

_CONDITIONS = (batch_sizes(LARGE_FACTOR, LARGE_STEPS, presets=("laptop", "overnight", "smollm2", "core", "paper")),)

_NEEDS = (
    f"{SWEEP}, at {MIN_BATCH_SIZES} or more batch sizes on one pass over the same data; {MIN_SEEDS} seeds at the LRs "
    "around each optimum"
)

_MARGIN = "The margin is the larger one of the batch sizes compared"

ArmBySize = dict[int, Arm]
"""An arm by batch size: the same method and rank at each."""


@dataclass(frozen=True)
class BatchSizes:
    """The comparisons on one model and dataset by batch size, ascending.

    Each has a fit of its own. The errors from seeds are independent between batch sizes, since a seed gives other
    batches at each; the test examples are the same.
    """

    by_size: dict[int, Comparison]

    @property
    def ends(self) -> tuple[int, int]:
        """The smallest and the largest batch size."""
        return min(self.by_size), max(self.by_size)

    @cached_property
    def ranks(self) -> list[int]:
        """The LoRA ranks above 1; rank 1 may lack capacity, which is another effect."""
        return sorted({rank for comparison in self.by_size.values() for rank in comparison.lora if rank > 1})

    @cached_property
    def fullft(self) -> ArmBySize:
        """FullFT at each batch size."""
        return self._present("FullFT", lambda comparison: comparison.fullft)

    def lora(self, rank: int) -> ArmBySize:
        """Return LoRA of a rank at each batch size."""
        return self._present(f"LoRA r{rank}", lambda comparison: comparison.lora.get(rank))

    def _present(self, name: str, arm_in: Callable[[Comparison], Arm | None]) -> ArmBySize:
        arms = {}
        for size, comparison in self.by_size.items():
            arm = arm_in(comparison)
            if arm is None:
                raise UnjudgedError("inconclusive", f"no runs of {name} at batch {size}")
            arms[size] = arm
        return arms

    def margin(self, sizes: Iterable[int]) -> Margin:
        """Return the largest margin of several batch sizes; of those without a margin, the first."""
        margins = {size: self.by_size[size].margin for size in sizes}
        without_margin = [size for size in margins if margins[size].problem]
        size = without_margin[0] if without_margin else max(margins, key=lambda size: margins[size].value)
        margin = margins[size]
        problem = f"batch {size}: {margin.problem}" if margin.problem else None
        return Margin(margin.value, f"{margin.rule} at batch {size}", problem)

    def problems(self, sizes: Iterable[int], *arms: ArmBySize) -> list[Problem]:
        """Return what speaks against a verdict on the fitted minima of arms at several batch sizes."""
        by_size = {size: self.by_size[size].problems([arm[size] for arm in arms]) for size in sizes}
        return [problem for size, problems in by_size.items() for problem in _at_batch(size, problems)]

    def run_ids(self, *arms: ArmBySize) -> list[str]:
        """Return the ids of all runs of several arms."""
        return [
            run_id
            for size, comparison in self.by_size.items()
            for run_id in comparison.run_ids([arm[size] for arm in arms])
        ]


def _at_batch(size: int, problems: Iterable[Problem]) -> list[Problem]:
    return named_problems(problems, f"batch {size}:", f" at batch {size}")


def across_batch_sizes(judge: Callable[[BatchSizes], Finding]) -> Callable[[Evidence], Finding]:
    """Return a judge of each model and dataset that has enough batch sizes with the same amount of data seen.

    Of several lengths at one batch size, the longest counts.
    """

    def judge_checked(by_size: dict[int, Comparison]) -> Finding:
        if len(by_size) < MIN_BATCH_SIZES:
            listed = " and ".join(map(str, by_size))
            raise UnjudgedError("not tested", f"only batch {listed}, {MIN_BATCH_SIZES} batch sizes needed")
        highest = next((comparison.highest for comparison in by_size.values() if comparison.highest), None)
        fullft = next((comparison.fullft for comparison in by_size.values() if comparison.fullft), None)
        require(("LoRA above rank 1", highest), ("FullFT", fullft))
        steps = {size: comparison.runs["steps"].iloc[0] for size, comparison in by_size.items()}
        if any(map(pd.isna, steps.values())):
            text = "the runs table has no steps, which say how much data each batch size saw"
            raise UnjudgedError("not tested", text)
        examples = {size: int(steps[size] * size) for size in by_size}
        if not max(examples.values()) <= MAX_DATA_RATIO * min(examples.values()):
            seen = ", ".join(f"batch {size} {number:,.0f}" for size, number in examples.items())
            raise UnjudgedError("inconclusive", f"examples seen differ ({seen}), so more than batch size does")
        return judge(BatchSizes(by_size))

    def judge_all(evidence: Evidence) -> Finding:
        datasets: dict[str, dict[int, Comparison]] = {}
        for comparison in evidence.comparisons:  # ascending in batch size and length
            run = comparison.runs.iloc[0]
            if not pd.isna(run["batch_size"]):
                datasets.setdefault(f"{run['model']}/{run['dataset']}", {})[int(run["batch_size"])] = comparison
        return judge_each(datasets.items(), judge_checked)

    return judge_all


def _gap_grows(sizes: BatchSizes, lora: ArmBySize) -> Finding:
    small, large = sizes.ends
    gaps = {size: comparison.gap(lora[size], sizes.fullft[size]) for size, comparison in sizes.by_size.items()}
    growth = combined(np.subtract, gaps[large], gaps[small])
    by_size = ", ".join(f"{gap.value:.4f} at batch {size}" for size, gap in gaps.items())
    text = (
        f"{arm_label(lora[small])} - FullFT at the fitted minima = {by_size}; from batch {small} to {large} it grows "
        f"by {nats(growth)}, {growth.n_seeds} seeds"
    )
    margin = sizes.margin(sizes.ends)
    problems = [*sizes.problems(sizes.ends, lora, sizes.fullft), *margin_problems(margin)]
    return decide(Above(margin.value), growth, text, sizes.run_ids(lora, sizes.fullft), problems, margin.rule)


def gap_grows(sizes: BatchSizes) -> Finding:
    """D1: judge the gap at the largest batch size minus that at the smallest, for every rank."""
    return together([_gap_grows(sizes, sizes.lora(rank)) for rank in sizes.ranks])


D1 = Claim(
    id="D1",
    statement="The gap between LoRA and full fine-tuning grows with batch size",
    figure="3",
    criterion=(
        "For every rank above 1, the gap is the fitted minimum of LoRA's test NLL minus that of FullFT's, with a fit "
        "for each batch size. The gap at the largest batch size minus that at the smallest is above 0 by the margin. "
        f"{_MARGIN}"
    ),
    needs=_NEEDS,
    paper_value="grows from batch 32; no number",
    experiments=("batch_size",),
    judge=across_batch_sizes(gap_grows),
    conditions=_CONDITIONS,
    core=True,
)


def _halfway_and_end(sizes: BatchSizes, size: int, lora: ArmBySize) -> tuple[Estimate, Estimate, tuple[str, ...]]:
    """Return the gap of training NLL at one batch size halfway and at the end of the runs, and the ids of the runs."""
    curves = pair_at_optimum(sizes.by_size[size], lora[size], sizes.fullft[size])
    windows = []
    for start, end in (EARLY, LATE):
        steps = [step for step in curves.by_seed.index if start * curves.last < step <= end * curves.last]
        if not steps:
            raise UnjudgedError("not tested", f"no training losses of paired seeds along the runs at batch {size}")
        windows.append((steps[0], steps[-1]))
    halfway, at_end = curves.means(windows)
    return halfway, at_end, curves.run_ids


def _gap_persists(sizes: BatchSizes, lora: ArmBySize) -> Finding:
    small, large = sizes.ends
    (small_halfway, small_end, small_ids), (large_halfway, large_end, large_ids) = (
        _halfway_and_end(sizes, size, lora) for size in sizes.ends
    )
    margin = sizes.margin(sizes.ends)
    problems = [*sizes.problems(sizes.ends, lora, sizes.fullft), *margin_problems(margin)]
    n_seeds = min(small_end.n_seeds, large_end.n_seeds)
    if not problems and n_seeds < MIN_SEEDS:
        problems.append(Problem(f"training losses of {n_seeds} paired seeds, {MIN_SEEDS} needed"))
    for size in [] if problems else sizes.ends:
        arms = (lora[size], sizes.fullft[size])
        problems += _at_batch(size, off_optimum(sizes.by_size[size], *arms, margin.value))
    over_half = combined(lambda late, early: late - early / 2, large_end, large_halfway)
    above, half = (Above(margin.value), margin.rule), (Above(0.0), "half of the gap halfway")
    parts = [
        (f"gap at the end at batch {large}", large_end, *above),
        (f"gap at the end at batch {large} less half of that halfway", over_half, *half),
        (
            f"gap at the end at batch {large} less that at batch {small}",
            combined(np.subtract, large_end, small_end),
            *above,
        ),
        (
            f"fall of the gap from halfway to the end at batch {small}",
            combined(np.subtract, small_halfway, small_end),
            *above,
        ),
    ]
    judged = together(
        [
            decide(
                rule,
                estimate,
                f"{name}, {arm_label(lora[small])} - FullFT: {nats(estimate)}",
                (*small_ids, *large_ids),
                margin_rule=margin_rule,
            )
            for name, estimate, rule, margin_rule in parts
        ]
    )
    return replace(doubted(judged, problems), remedy=problems[0].remedy) if problems else judged


def gap_persists_at_large_batch(sizes: BatchSizes) -> Finding:
    """D2: judge the gap along the run at the largest and the smallest batch size, for every rank."""
    return together([_gap_persists(sizes, sizes.lora(rank)) for rank in sizes.ranks])


D2 = Claim(
    id="D2",
    statement="At a large batch size the gap persists along the run; at a small one it is smaller and shrinks",
    figure="3",
    criterion=(
        "For every rank above 1, the gap is LoRA's training NLL minus FullFT's, as a mean over the second quarter of "
        "the steps (halfway) and over the last quarter (the end). At the largest batch size the gap at the end is "
        "above 0 by the margin, above half of the gap halfway, and above the gap at the end at the smallest batch size "
        f"by the margin; at the smallest, it falls from halfway to the end by the margin. {_MARGIN}. {AT_OPTIMUM}"
    ),
    needs=f"{_NEEDS}; training curves",
    paper_value="persistent; at batch 32 smaller and shrinking; no number",
    experiments=("batch_size",),
    judge=across_batch_sizes(gap_persists_at_large_batch),
    conditions=_CONDITIONS,
    core=True,
)


def gap_independent_of_rank(sizes: BatchSizes) -> Finding:
    """D3: judge the gap of the highest rank minus that of the lowest above 1 at every batch size; FullFT cancels."""
    if len(sizes.ranks) < 2:
        raise UnjudgedError("not tested", "fewer than two LoRA ranks above 1")
    low, high = sizes.lora(sizes.ranks[0]), sizes.lora(sizes.ranks[-1])
    named = ((f"batch {size}", size) for size in sizes.by_size)
    return judge_each(named, lambda size: sizes.by_size[size].equal_losses(high[size], low[size]))


D3 = Claim(
    id="D3",
    statement="The gap at a batch size does not depend on the rank",
    figure="3",
    criterion=(
        "At every batch size, the gap of the highest rank and that of the lowest rank above 1 are the same within the "
        "margin: the fitted minima of their test NLL, from which FullFT's cancels"
    ),
    needs=f"{_NEEDS}; two ranks above 1",
    paper_value="does not seem to depend on rank; no number",
    experiments=("batch_size",),
    judge=across_batch_sizes(gap_independent_of_rank),
    conditions=_CONDITIONS,
    core=True,
)


def _best_at_small_batch(sizes: BatchSizes, arm: ArmBySize) -> Finding:
    first, second, *larger = sizes.by_size
    problems = sizes.problems(sizes.by_size, arm)
    minima = {size: comparison.fit.minima.get(arm_label(arm[size])) for size, comparison in sizes.by_size.items()}
    known = {size: minimum for size, minimum in minima.items() if minimum}
    if len(known) < len(minima):
        raise UnjudgedError("inconclusive", "; ".join(problem.text for problem in problems))
    by_size = ", ".join(f"{loss.value:.4f} at batch {size}" for size, loss in known.items())
    findings = []
    for size in larger:
        margin = sizes.margin((first, second, size))
        excess = combined(lambda loss, *smaller: loss - np.minimum(*smaller), known[size], known[first], known[second])
        text = (
            f"{arm_label(arm[first])}, batch {size} - the better of batch {first} and {second} = {nats(excess)} "
            f"({by_size} at the fitted minima)"
        )
        against = [*problems, *margin_problems(margin)]
        findings.append(decide(Above(margin.value), excess, text, sizes.run_ids(arm), against, margin.rule))
    return together(findings)


def best_at_small_batch(sizes: BatchSizes) -> Finding:
    """D4: judge, for FullFT and every rank, each larger batch size against the better of the two smallest."""
    return together([_best_at_small_batch(sizes, arm) for arm in (sizes.fullft, *map(sizes.lora, sizes.ranks))])


D4 = Claim(
    id="D4",
    statement="LoRA and full fine-tuning both reach their lowest loss at a small batch size",
    figure="3",
    criterion=(
        "For FullFT and every rank above 1, the fitted minimum of the test NLL at each larger batch size is above the "
        f"lower one of the minima at the two smallest, by the margin. {_MARGIN}"
    ),
    needs=_NEEDS,
    paper_value="the smallest; no number",
    experiments=("batch_size",),
    judge=across_batch_sizes(best_at_small_batch),
    conditions=_CONDITIONS,
)

D5 = Claim(
    id="D5",
    kind="opinion",
    statement="The gap at large batch sizes comes from training a product of two matrices",
    criterion="Training the same update of the weights without a product, at an LR of its own, shows no gap",
    needs="a control that trains W itself at the scale of LoRA's update",
    paper_value="an interpretation; no number",
    experiments=("batch_size",),
    judge=lambda _: Finding(
        "not tested", "needs a control that trains the update of the weights without a product; no such runs exist"
    ),
)

CLAIMS = (D1, D2, D3, D4, D5)
