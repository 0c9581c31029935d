"""Claims A3 to A5, N1 and N2: where an adapter runs out of capacity, and how many bits its parameters store."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import pandas as pd

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison, require
from lorabench.analysis.curves import PairedCurves
from lorabench.analysis.estimate import Estimate, combined, mean_over_seeds, student, t_quantile
from lorabench.analysis.finding import (
    MIN_SEEDS,
    Finding,
    UnjudgedError,
    decide,
    finding,
    nats,
    together,
    without,
    worst,
)
from lorabench.analysis.memorisation import BITS_PER_PARAMETER, is_memorisation, late_growth, stored
from lorabench.analysis.optima import (
    WINDOWS,
    Departure,
    curves_at_optimum,
    log_threshold,
    off_optimum,
    pair_at_optimum,
    paired_departure,
    runs_at_optimum,
    tokens_at,
)
from lorabench.analysis.rules import Above, Problem, Remedy, Within
from lorabench.analysis.slopes import log_log, slopes_by_seed
from lorabench.claims.claim import SWEEP, Claim, Evidence, margin_problems, over
from lorabench.claims.learning_curves import AT_OPTIMUM, LONG_ONLY, long_claim
from lorabench.claims.scope import (
    NATURAL,
    Scoped,
    every_longest,
    full_runs,
    learning,
    longest_run,
    longest_runs,
    without_facts,
)
from lorabench.utils.formats import fixed_interval

# Bounds whose meaning the criteria say.
FLOOR = 0.05
THRESHOLD_BAND = (0.5, 1.5)
BIT_BAND = (0.3, 1.2)
TWO_BITS_BAND = (1.5, 2.5)
SATURATED = 0.9
MAX_GROWTH = 0.1

MORE_RANKS = Remedy("more ranks that leave the shared curve, which longer runs give")

LEAVES = (
    "A rank leaves the shared curve where its training NLL minus the highest rank's exceeds the margin in each of "
    f"{WINDOWS} windows of log(step) to the end, with an interval above 0 that holds for all windows at once, and from "
    "which on the gap grows with log(step); a gap that shrinks is slow learning. "
)
"""The definition of a departure, for the criteria."""


@dataclass(frozen=True)
class _Rank:
    """A rank below the highest, and where it leaves the curve of the highest."""

    rank: int
    arm: Arm
    curves: PairedCurves
    """Its training NLL minus that of the highest rank."""
    departure: Departure
    problems: list[Problem]
    """What speaks against the departure."""

    @property
    def step(self) -> float:
        """The step of the departure; infinity where the rank stays."""
        return math.inf if self.departure.first is None else self.departure.first

    def __str__(self) -> str:
        """Describe the departure."""
        if self.departure.growth is None:
            return f"r{self.rank} stays"
        verb = f"leaves at step {self.departure.first}" if self.departure.left else "lags without leaving"
        return f"r{self.rank} {verb} (its gap's slope is {nats(self.departure.growth)} per tenfold steps)"


def _ranks(comparison: Comparison) -> list[_Rank]:
    [highest] = require(("LoRA above rank 1", comparison.highest))
    margin = comparison.margin
    ranks = []
    for rank, arm in comparison.lora.items():
        if rank == highest["rank"]:
            continue
        curves, problems = pair_at_optimum(comparison, arm, highest), comparison.problems([arm, highest])
        if not len(curves.by_seed) and not problems:
            raise UnjudgedError("not tested", "no training curves with seeds and steps in common")
        departure = paired_departure(curves, margin.value)
        problems = [*problems, *margin_problems(margin)] or off_optimum(comparison, arm, highest, margin.value)
        ranks.append(_Rank(rank, arm, curves, departure, problems))
    if not ranks:
        raise UnjudgedError("inconclusive", "only one rank")
    return ranks


def _all_problems(ranks: Sequence[_Rank]) -> list[Problem]:
    """Return the problems of ranks, each once."""
    return list({problem.text: problem for rank in ranks for problem in rank.problems}.values())


def _between(comparison: Comparison, lower: _Rank, higher: _Rank) -> Estimate:
    """Return the loss of a rank minus that of a higher rank over the steps between their departures."""
    curves = pair_at_optimum(comparison, lower.arm, higher.arm)
    first, end = sorted((lower.step, higher.step))
    return curves.means([(int(first), int(min(end - 1, curves.last)))])[0]


def departure_grows_with_rank(comparison: Comparison) -> Finding:
    """A3: judge whether rank 1 leaves before the last rank that leaves, and whether any rank leaves before a lower one.

    Between two departures the rank that has left has the higher loss, so the sign of that difference is judged.
    """
    ranks = _ranks(comparison)
    ids = comparison.run_ids(comparison.lora.values())
    text = ", ".join(map(str, ranks))
    problems, gone = _all_problems(ranks), [rank for rank in ranks if rank.departure.left]
    findings = []
    for lower, higher in combinations(ranks, 2):
        if higher.step < lower.step:
            gap, names = _between(comparison, lower, higher), (f"r{lower.rank}", f"r{higher.rank}")
            both = f"{text}; {names[1]} leaves before {names[0]}, {names[0]} - {names[1]} = {nats(gap)} between"
            findings.append(without(decide(Above(0.0), gap, both, ids, problems), "confirmed"))
    if findings:
        return worst(findings)
    if ranks[0].rank != 1:
        problems.append(Problem("no runs of rank 1", Remedy("rank 1")))
    elif not gone:
        problems.append(Problem("no rank surely leaves", Remedy("longer runs")))
    elif len({rank.step for rank in gone}) < 2:
        problems.append(Problem("fewer than two steps of departure", Remedy("longer runs")))
    if problems:
        return finding(ids, text, "inconclusive", problems)
    gap = _between(comparison, gone[0], gone[-1])
    text += f"; r{gone[0].rank} - r{gone[-1].rank} = {nats(gap)} between their departures"
    return decide(Above(0.0), gap, text, ids, margin_rule=f"departures: {comparison.margin.rule}")


A3 = long_claim(
    id="A3",
    statement="Low and medium ranks leave the shared learning curve at a step that grows with rank",
    figure="1",
    criterion=(
        f"{LEAVES}On the longest dataset, rank 1 and one more rank leave at two different steps or more, which do not "
        "fall with rank, and between the first and the last departure rank 1's NLL is above that of the rank that "
        "leaves last (the estimate). Contradicted if some rank leaves before a lower one and its NLL is above the "
        f"lower rank's between their departures. {LONG_ONLY}. {AT_OPTIMUM}"
    ),
    needs=f"{SWEEP}; rank 1 and two more ranks; training losses at every step; {MIN_SEEDS} seeds",
    paper_value="no number",
    judge=over(learning(full_runs(longest_run)), departure_grows_with_rank),
    core=True,
)


def _keeps_falling(comparison: Comparison, rank: _Rank) -> Finding:
    arm, fullft = require((f"LoRA r{rank.rank}", rank.arm), ("FullFT", comparison.fullft))
    past = rank.departure.past
    curves = (curves_at_optimum(comparison, compared) for compared in (arm, fullft))
    slopes = [slopes_by_seed(curve[curve.index >= past]) for curve in curves]
    name = f"{comparison.label} {arm_label(arm)} from {past}"
    own, full = (mean_over_seeds(slope, f"{name} {number}") for number, slope in enumerate(slopes))
    share = mean_over_seeds((slopes[0] / slopes[1]).dropna(), name)
    text = (
        f"{arm_label(arm)} from step {past} on: {nats(own)} per tenfold steps, FullFT {nats(full)}, ratio "
        f"{share.value:.2f} {fixed_interval(*share.interval(), 2)}, {share.n_seeds} seeds"
    )
    problems = [*rank.problems, *comparison.problems([arm, fullft])]
    if not (full.known and full.interval()[1] < 0):
        problems.append(Problem("FullFT's own loss does not surely fall there", Remedy("more seeds")))
    ids = comparison.run_ids([arm, fullft])
    return decide(Within(FLOOR, 1.0), share, text, ids, problems, f"a floor is {FLOOR:.0%} of FullFT's slope")


def no_floor(comparison: Comparison) -> Finding:
    """A4: judge the slope against log(step) of each rank that has left the shared curve, and that of FullFT."""
    ranks = _ranks(comparison)
    gone = [rank for rank in ranks if rank.departure.left]
    if gone:
        return together([_keeps_falling(comparison, rank) for rank in gone])
    departures, problems = ", ".join(map(str, ranks)), _all_problems(ranks)
    if problems:
        return finding(comparison.run_ids(comparison.lora.values()), departures, "inconclusive", problems)
    raise UnjudgedError("not tested", f"no rank leaves the shared curve: {departures}")


A4 = long_claim(
    id="A4",
    statement="Past its capacity LoRA has no floor: it goes on learning, less efficiently",
    criterion=(
        "For each rank that leaves the shared curve (as in A3), from the window of steps after that of its departure "
        "on: the slope of its training NLL against log(step), as a share of FullFT's on the same batches, lies between "
        f"{FLOOR:g} and 1 on average over seeds. That it is below 1 is near to what a departure is; that there is no "
        f"floor is the claim's content. {LONG_ONLY}"
    ),
    needs=f"{SWEEP}; a rank that leaves the shared curve; training losses at every step; {MIN_SEEDS} seeds",
    paper_value="no number",
    unit="share of FullFT's slope",
    judge=over(learning(full_runs(every_longest)), no_floor),
)


def _thresholds(comparison: Comparison) -> tuple[pd.DataFrame, list[str]]:
    """Return the ranks with a threshold and the error of its log10 from seeds, and remarks on the other ranks."""
    rows, left_out = [], []
    for rank in _ranks(comparison):
        name = f"{comparison.label} r{rank.rank}"
        threshold = log_threshold(rank.curves, rank.departure, comparison.margin.value)
        if rank.problems:
            left_out.append(f"{name}: {rank.problems[0].text}")
        elif not rank.departure.left:
            left_out.append(f"{comparison.label} {rank}")
        elif isinstance(threshold, str):
            left_out.append(f"{name} {threshold}")
        else:
            runs = runs_at_optimum(comparison, rank.arm)
            rows.append(
                {
                    "dataset": comparison.runs["dataset"].iloc[0],
                    "name": name,
                    "trainable_params": float(runs["trainable_params"].iloc[0]),
                    "tokens": tokens_at(comparison, rank.arm, 10**threshold.value),
                    "error": threshold.seed_error,
                    "run_ids": list(runs["run_id"]),
                }
            )
    return pd.DataFrame(rows), left_out


def threshold_tied_to_parameters(evidence: Evidence) -> Finding:
    """A5: judge the log-log slope of tokens at departure against parameters, over all models and datasets together."""
    if "tokens" not in evidence.curves:
        raise UnjudgedError("not tested", "the curves table has no column tokens")
    parts, left_out = [], []
    for comparison in longest_runs(without_facts(evidence.comparisons)):
        try:
            part, remarks = _thresholds(comparison)
        except UnjudgedError as unjudged:
            left_out.append(f"{comparison.label}: {unjudged.finding.reason}")
            continue
        parts.append(part)
        left_out += remarks
    if not parts and not left_out:
        raise UnjudgedError("not tested", "no such runs")
    gone = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    tokens = ", ".join(f"{row['name']} {row['tokens']:.3g} tokens" for row in gone.to_dict("records"))
    others = f"; left out: {', '.join(left_out)}" if left_out else ""
    dof = len(gone) - gone["dataset"].nunique() - 1 if len(gone) else 0
    if dof < 1:
        reason = f"{tokens or 'no departures'}: too few for a slope{others}"
        raise UnjudgedError("inconclusive", reason, MORE_RANKS)
    floor = math.sqrt(float((gone["error"] ** 2).mean()))
    line = log_log(gone["trainable_params"], gone["tokens"], floor, gone["dataset"])
    slope = student(line.slope, (line.high - line.slope) / t_quantile(dof), dof, "thresholds")
    interval = fixed_interval(*slope.interval(), 2)
    text = f"slope {slope.value:.2f} {interval} over {line.n} departures ({tokens}){others}"
    run_ids = [run_id for listed in gone["run_ids"] for run_id in listed]
    judged = decide(Within(*THRESHOLD_BAND), slope, text, run_ids, margin_rule="a constant around 1, proportionality")
    return replace(judged, remedy=MORE_RANKS) if judged.verdict == "inconclusive" else judged


A5 = long_claim(
    id="A5",
    statement="An adapter runs out of capacity after an amount of data proportional to its parameters",
    criterion=(
        "The log-log slope of train tokens at departure against adapter parameters lies within "
        f"{THRESHOLD_BAND[0]:g} to {THRESHOLD_BAND[1]:g}. A rank that leaves (as in A3) departs where the line through "
        "its gap against log(step), from the window of steps after that of A3's departure on, reaches the margin. The "
        "line of departures is fitted to all models and datasets together with an intercept per dataset, to each "
        "dataset's longest runs. Its scatter is at least the departures' error from seeds. Ranks that never leave, "
        "that never joined the shared curve, whose line surely reaches the margin before the window before A3's "
        "departure, or that have a problem such as a best LR at the edge of the grid give no point"
    ),
    needs=(
        f"{SWEEP}; four ranks, on one or more datasets, that leave the shared curve; training losses at every step; "
        f"{MIN_SEEDS} seeds"
    ),
    paper_value="proportional; no number",
    unit="log-log slope",
    judge=threshold_tied_to_parameters,
    columns=("trainable_params",),
)


def about_one_bit(comparison: Comparison) -> Finding:
    """N1: judge the first epoch's loss per scored token, of FullFT or else the highest rank."""
    arm = comparison.fullft or comparison.highest
    runs = comparison.at_optimum(arm) if arm else comparison.runs.iloc[:0]
    runs = runs.dropna(subset=["first_epoch_nats", "first_epoch_scored_tokens"])
    if arm is None or runs.empty:
        raise UnjudgedError("not tested", "no run that went through an epoch")
    nats, tokens = runs["first_epoch_nats"].astype(float), runs["first_epoch_scored_tokens"].astype(float)
    mean = mean_over_seeds(nats / tokens, f"{comparison.label} first epoch")
    text = (
        f"first epoch of {arm_label(arm)} {mean.value:.3f} nats {fixed_interval(*mean.interval(), 3)} per scored token "
        f"= {mean.value / math.log(2):.2f} bits, {nats.mean() / math.log(2):.3g} bits in all, {mean.n_seeds} seeds"
    )
    return decide(Within(*BIT_BAND), mean, text, runs["run_id"], margin_rule="a constant around 1 bit")


N1 = Claim(
    id="N1",
    kind="opinion",
    statement="The first epoch of fine-tuning on natural data costs about 1 bit per token",
    criterion=(
        "The first epoch's loss per scored token, of FullFT at the LR nearest to its optimum, lies within "
        f"{BIT_BAND[0]:g} to {BIT_BAND[1]:g} nats on average over seeds"
    ),
    needs="runs of FullFT that go through an epoch; two seeds",
    paper_value="1 bit = 0.69 nats",
    experiments=("rank", "capacity"),
    judge=over(learning(every_longest), about_one_bit),
    columns=("first_epoch_nats", "first_epoch_scored_tokens"),
    conditions=(NATURAL,),
)


def memorising(comparisons: list[Comparison]) -> list[Scoped]:
    """Choose the comparisons on random facts."""
    return [(comparison, "") for comparison in comparisons if is_memorisation(comparison.runs).any()]


@dataclass(frozen=True)
class _Adapter:
    """What one rank stores of the facts."""

    arm: Arm
    share: Estimate
    """The stored share of all bits of the facts."""
    per_parameter: Estimate
    """The bits stored for each trainable parameter."""
    number: str
    """The bits per parameter with their interval."""


def two_bits_per_parameter(comparison: Comparison) -> Finding:
    """N2: judge the bits of random facts stored per trainable parameter by each saturated rank."""
    arms = comparison.lora.values()
    if not arms:
        raise UnjudgedError("inconclusive", "no runs of LoRA on the facts")
    adapters = []
    for arm in arms:
        minimum, first = comparison.fit.minima.get(arm_label(arm)), comparison.rows[arm_label(arm)].iloc[0]
        if minimum is not None:
            entropy, parameters = float(first["entropy_bits"]), float(first["trainable_params"])
            bits = stored(minimum, entropy, float(first["test_scored_tokens"]))
            share, each = (combined(lambda bits, by=by: bits / by, bits) for by in (entropy, parameters))
            number = f"{each.value:.2f} {fixed_interval(*each.interval(), 2)} bits per parameter"
            adapters.append(_Adapter(arm, share, each, number))
    run_ids = tuple(sorted(comparison.run_ids(arms)))
    problems = [problem for arm in arms for problem in comparison.problems([arm])]
    if not adapters:
        return finding(run_ids, "no fitted minimum of a rank", "inconclusive", problems)
    by_rank = "; ".join(
        f"r{adapter.arm['rank']} {adapter.number}, {adapter.share.value:.0%} of the facts" for adapter in adapters
    )
    saturated = []
    for adapter, higher in pairwise(adapters):
        more = stored(comparison.gap(higher.arm, adapter.arm), 0.0, 1.0)
        holds_more = more.known and more.interval()[0] > 0
        if adapter.share.known and adapter.share.interval()[1] < SATURATED and holds_more:
            saturated.append(adapter)
    if not saturated:
        problems = [problem for adapter in adapters for problem in comparison.problems([adapter.arm])]
        return finding(run_ids, by_rank, "inconclusive", problems or [Problem("no rank is saturated")])
    findings = []
    for adapter in saturated:
        problems = comparison.problems([adapter.arm])
        growth = late_growth(comparison.at_optimum(adapter.arm), comparison.curves)
        # More steps can only store more, so a value above the band contradicts all the same.
        if adapter.per_parameter.interval()[0] <= TWO_BITS_BAND[1] and not growth.value < MAX_GROWTH:
            late = "unknown" if math.isnan(growth.value) else f"{growth.value:.0%}"
            text = f"still storing at the end ({late} of it in the second half of the steps)"
            problems.append(Problem(text, Remedy("more epochs")))
        text = f"r{adapter.arm['rank']} is saturated at {adapter.number}"
        rule = Within(*TWO_BITS_BAND)
        findings.append(decide(rule, adapter.per_parameter, text, run_ids, problems, "the numbers that round to 2"))
    decisive = worst(findings)
    return replace(decisive, reason=f"{decisive.reason} ({by_rank})", run_ids=run_ids)


N2 = Claim(
    id="N2",
    kind="prediction",
    statement=f"A parameter stores about {BITS_PER_PARAMETER:g} bits",
    criterion=(
        "On random facts, for each saturated rank: the bits stored per adapter parameter, at the fitted minimum of the "
        f"NLL over LRs, lie within {TWO_BITS_BAND[0]:g} to {TWO_BITS_BAND[1]:g}, the numbers that round to "
        f"{BITS_PER_PARAMETER:g}. A rank is saturated if it stores less than {SATURATED:.0%} of the facts and the next "
        f"rank stores more, both with their 95% intervals. A rank that stored {MAX_GROWTH:.0%} or more of its bits in "
        "the second half of its steps is still storing, so it counts only above the band. The paper cites the number "
        "for whole networks, after long training"
    ),
    needs=f"LoRA on all layers at two or more ranks on a dataset of facts; {MIN_SEEDS} seeds",
    paper_value="2 (cited)",
    unit="bits per parameter",
    experiments=("capacity",),
    judge=over(memorising, two_bits_per_parameter),
    columns=("entropy_bits", "test_scored_tokens", "trainable_params"),
)

CLAIMS = (A3, A4, A5, N1, N2)
