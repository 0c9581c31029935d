"""Claims D1 to D5: the gap between LoRA and full fine-tuning (FullFT) at several batch sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison, require
from lorabench.analysis.curves import mean_between
from lorabench.analysis.estimate import Estimate, combined, mean_over_seeds
from lorabench.analysis.finding import Finding, UnjudgedError, decide, nats, together
from lorabench.analysis.optima import off_optimum, pair_at_optimum
from lorabench.analysis.rules import Above, Margin, Problem, Rule, Within
from lorabench.claims.claim import Evidence, claim, condition, few_seeds, named_problems, unjudged_if
from lorabench.claims.scope import HIGH_RANK

# Bounds whose meaning the criteria say.
MIN_BATCH_SIZES = 3
LARGE_FACTOR, LARGE_SIZE = 16, 32
PARTS = (0.25, 0.5), (0.75, 1.0)

MAX_DATA_RATIO = 1.1
"""The largest ratio of examples seen between batch sizes: one pass over the same data, in whole steps."""

LARGE_STEPS = 19
"""The number of steps at the largest batch size: that of one pass over the paper's 10,000 examples at batch 512."""


@condition(
    f"batch sizes over a factor of {LARGE_FACTOR:g}, the largest {LARGE_SIZE} or more with {LARGE_STEPS} steps or more",
    *("laptop_more", "smollm2", "first_gpu", "core", "paper"),
)
def large_batches(evidence: Evidence) -> str | None:
    known = evidence.runs.dropna(subset=["batch_size", "steps"]) if "steps" in evidence.runs else pd.DataFrame()
    if known.empty:
        return "batch sizes and steps are not known"
    sizes = known["batch_size"].astype(float)
    at_largest = known.loc[sizes == sizes.max(), "steps"].astype(float).max()
    if sizes.max() / sizes.min() >= LARGE_FACTOR and sizes.max() >= LARGE_SIZE and at_largest >= LARGE_STEPS:
        return None
    return f"{sizes.min():.0f} to {sizes.max():.0f}, with {at_largest:.0f} steps at {sizes.max():.0f}"


ArmBySize = dict[int, Arm]
"""An arm by batch size: the same method and rank at each."""


@dataclass(frozen=True)
class BatchSizes:
    """The comparisons on one model and dataset by batch size, ascending, each with a fit of its own. The errors of a
    seed are alike at all batch sizes, if anything, but are drawn independently for each, so that intervals of
    differences are rather too wide. The test examples are the same."""

    by_size: dict[int, Comparison]

    @cached_property
    def ends(self) -> tuple[int, int]:
        """The smallest and the largest batch size."""
        return min(self.by_size), max(self.by_size)

    @cached_property
    def ranks(self) -> list[int]:
        """The LoRA ranks that are judged, ascending: low ones may lack capacity, which is another effect. An
        UnjudgedError says if the runs are too few, or more than the batch size differs between them."""
        compared = self.by_size.values()
        listed = " and ".join(map(str, self.by_size))
        unjudged_if(len(compared) < MIN_BATCH_SIZES, f"only batch {listed}, {MIN_BATCH_SIZES} batch sizes needed")
        highest = next((comparison.highest for comparison in compared if comparison.highest), None)
        fullft = next((comparison.fullft for comparison in compared if comparison.fullft), None)
        require(("LoRA above rank 1", highest), ("FullFT", fullft))
        steps = {size: comparison.runs["steps"].iloc[0] for size, comparison in self.by_size.items()}
        text = "the runs table has no steps, which say how much data each batch size saw"
        unjudged_if(any(map(pd.isna, steps.values())), text)
        examples = {size: int(steps[size] * size) for size in steps}
        seen = ", ".join(f"batch {size} {number:,.0f}" for size, number in examples.items())
        text = f"examples seen differ ({seen}), so more than batch size does"
        unjudged_if(max(examples.values()) > MAX_DATA_RATIO * min(examples.values()), text, "inconclusive")
        above_1 = sorted({rank for comparison in compared for rank in comparison.lora if rank > 1})
        high = [rank for rank in above_1 if rank >= HIGH_RANK]
        return high if len(high) > 1 else above_1

    def arms(self, rank: int | None = None) -> ArmBySize:
        """Return LoRA of a rank, or FullFT without one, at each batch size; raise UnjudgedError if one lacks it."""
        arms = {}
        for size, comparison in self.by_size.items():
            arm = comparison.fullft if rank is None else comparison.lora.get(rank)
            if arm is None:
                name = "FullFT" if rank is None else f"LoRA r{rank}"
                raise UnjudgedError("inconclusive", f"no runs of {name} at batch {size}")
            arms[size] = arm
        return arms

    def margin(self, sizes: Iterable[int]) -> Margin:
        """Return the largest margin of several batch sizes; of those without a margin, the first."""
        margins = {size: self.by_size[size].margin for size in sizes}
        unknown = [size for size, margin in margins.items() if margin.problem]
        size = unknown[0] if unknown else max(margins, key=lambda size: margins[size].value)
        margin = margins[size]
        problem = f"batch {size}: {margin.problem}" if margin.problem else None
        return Margin(margin.value, f"{margin.rule} at batch {size}", problem)

    def problems(self, sizes: Iterable[int], margin: Margin, *arms: ArmBySize) -> list[Problem]:
        """Return what speaks against a verdict on the fitted minima of arms at several batch sizes."""
        problems = []
        for size in sizes:
            at_size = self.by_size[size].problems([arm[size] for arm in arms])
            problems += named_problems(at_size, f"batch {size}:", f" at batch {size}")
        return problems + margin.problems

    def run_ids(self, *arms: ArmBySize) -> list[str]:
        """Return the ids of all runs of several arms."""
        by_size = self.by_size.items()
        return [run_id for size, comparison in by_size for run_id in comparison.run_ids([arm[size] for arm in arms])]

    def decide(
        self,
        rule: Callable[[float], Rule],
        estimate: Estimate,
        text: str,
        arms: Sequence[ArmBySize],
        problems: Sequence[Problem] = (),
    ) -> Finding:
        """Judge a number that follows from fitted minima at both ends, by the rule that a function makes of the margin;
        `problems` are added."""
        margin = self.margin(self.ends)
        problems = [*self.problems(self.ends, margin, *arms), *problems]
        ids = self.run_ids(*arms)
        return decide(rule(margin.value), estimate, text, ids, problems, margin.rule)

    def judge_growth(self, rule: Callable[[float], Rule], arm: ArmBySize, other: ArmBySize) -> Finding:
        """Judge what the gap of an arm to another grows by, from the smallest to the largest batch size."""
        small, large = self.ends
        gaps = {size: comparison.gap(arm[size], other[size]) for size, comparison in self.by_size.items()}
        growth = combined(np.subtract, gaps[large], gaps[small])
        by_size = ", ".join(f"{gap.value:.4f} at batch {size}" for size, gap in gaps.items())
        text = (
            f"{arm_label(arm[small])} - {arm_label(other[small])} at the fitted minima = {by_size}; from batch {small} "
            f"to {large} it grows by {nats(growth)}, {growth.n_seeds} seeds"
        )
        return self.decide(rule, growth, text, [arm, other])


def batch_sizes(evidence: Evidence) -> list[tuple[str, BatchSizes]]:
    """Return the batch sizes on each model and dataset; of several lengths at one batch size, the longest counts."""
    datasets: dict[str, dict[int, Comparison]] = {}
    for comparison in evidence.comparisons:  # ascending in batch size and length
        run = comparison.runs.iloc[0]
        if not pd.isna(run["batch_size"]):
            datasets.setdefault(f"{run['model']}/{run['dataset']}", {})[int(run["batch_size"])] = comparison
    return [(name, BatchSizes(by_size)) for name, by_size in datasets.items()]


_claim = partial(claim, over=batch_sizes, conditions=(large_batches,))


@_claim("D1")
def _gap_grows(sizes: BatchSizes) -> Iterator[Finding]:
    for rank in sizes.ranks:
        yield sizes.judge_growth(Above, sizes.arms(rank), sizes.arms())


@_claim("D2")
def _gap_persists(sizes: BatchSizes) -> Iterator[Finding]:
    margin, fullft = sizes.margin(sizes.ends), sizes.arms()
    for lora in [sizes.arms(rank) for rank in reversed(sizes.ranks)]:
        (small, large), label = sizes.ends, arm_label(lora[sizes.ends[0]])
        texts, run_ids, grown, lr_errors = [], set[str](), {}, {}
        for size in sizes.ends:
            curves = pair_at_optimum(sizes.by_size[size], lora[size], fullft[size])
            # A part begins after the step at which the one before it ends.
            ends = [(math.floor(start * curves.last) + 1, end * curves.last) for start, end in PARTS]
            halfway, at_end = (partial(mean_between, *part) for part in ends)
            gaps = [part(curves.by_seed.astype(float)) for part in (halfway, at_end)]
            grown[size] = gaps[1] - gaps[0]
            unjudged_if(grown[size].isna().all(), f"no training losses of paired seeds along the runs at batch {size}")
            lr_errors[size] = sum((error.of(at_end) - error.of(halfway) for error in curves.lr_errors), np.zeros(1))
            run_ids.update(curves.run_ids)
            texts.append(f"{gaps[0].mean():.4f} halfway and {gaps[1].mean():.4f} at the end at batch {size}")
        paired = (grown[large] - grown[small]).dropna()
        more = mean_over_seeds(paired, f"{sizes.by_size[small].label} {label} up to batch {large}")
        more = replace(more, seed_part=more.seed_part + lr_errors[large] - lr_errors[small])
        known = sizes.problems(sizes.ends, margin, lora, fullft)
        what = f"seeds with training losses at batch {small} and {large}"
        problems = [] if known else few_seeds(len(paired), what)
        for size in [] if known or problems else sizes.ends:
            off = off_optimum(sizes.by_size[size], lora[size], fullft[size], margin.value)
            problems += named_problems(off, f"batch {size}:", f" at batch {size}")
        text = (
            f"{label} - FullFT = {', '.join(texts)}; from halfway to the end it grows by {nats(more)} more at batch "
            f"{large} than at batch {small}, {len(paired)} seeds"
        )
        judged = sizes.decide(Above, more, text, [lora, fullft], problems)
        yield replace(judged, run_ids=tuple(sorted(run_ids)))


@_claim("D3")
def _gap_independent_of_rank(sizes: BatchSizes) -> Finding:
    lowest, *higher = sizes.ranks
    unjudged_if(not higher, "fewer than two LoRA ranks above 1")
    return sizes.judge_growth(Within.margin, sizes.arms(higher[-1]), sizes.arms(lowest))


@_claim("D4")
def _best_at_small_batch(sizes: BatchSizes) -> Iterator[Finding]:
    # FullFT comes first, which has no rank.
    for arm in [sizes.arms(rank) for rank in (None, *sizes.ranks)]:
        first, second, *larger = sizes.by_size
        minima = {size: comparison.fit.minima.get(arm_label(arm[size])) for size, comparison in sizes.by_size.items()}
        known = {size: minimum for size, minimum in minima.items() if minimum}
        by_size = ", ".join(f"{loss.value:.4f} at batch {size}" for size, loss in known.items())
        at_larger = []
        for size in larger:
            margin = sizes.margin((first, second, size))
            problems = sizes.problems(sizes.by_size, margin, arm)
            unjudged_if(len(known) < len(minima), "; ".join(problem.text for problem in problems), "inconclusive")
            smaller = known[first], known[second]
            excess = combined(lambda loss, *smaller: loss - np.minimum(*smaller), known[size], *smaller)
            text = (
                f"{arm_label(arm[first])}, batch {size} - the better of batch {first} and {second} = {nats(excess)} "
                f"({by_size} at the fitted minima)"
            )
            at_larger.append(decide(Above(margin.value), excess, text, sizes.run_ids(arm), problems, margin.rule))
        yield together(at_larger)


@claim("D5")
def _product_causes_the_gap(evidence: Evidence) -> Finding:
    reason = "needs a control that trains the update of the weights without a product; no such runs exist"
    return Finding("not tested", reason)
