"""Claims A3 to A5: where an adapter runs out of capacity, and what it learns from there on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Comparison, require
from lorabench.analysis.estimate import Estimate, mean_over_seeds, student, t_quantile
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
from lorabench.analysis.optimal_curves import (
    WINDOWS,
    Departure,
    curves_at_optimum,
    off_optimum,
    pair_at_optimum,
    paired_departure,
    runs_at_optimum,
)
from lorabench.analysis.rules import Above, Problem, Remedy, Within
from lorabench.analysis.slopes import log_log, slopes_by_seed
from lorabench.claims.claim import Claim
from lorabench.claims.evidence import SWEEP, Evidence, over
from lorabench.claims.learning_curves import AT_OPTIMUM, LONG, LONG_ONLY, margin_problems
from lorabench.claims.scopes import every_longest, full_runs, learning, longest_run, longest_runs, without_facts
from lorabench.utils.formats import fixed_interval

FLOOR = 0.05
"""A slope shallower than this share of FullFT's is a floor."""

THRESHOLD_BAND = (0.5, 1.5)
"""The log-log slopes of tokens at departure against parameters that count as proportional."""

MORE_RANKS = Remedy("more ranks that leave the shared curve, which longer runs give")

LEAVES = (
    "A rank leaves the shared curve where its training NLL minus the highest rank's exceeds the margin in each of "
    f"{WINDOWS} windows of log(step) to the end, with an interval above 0 that holds for all windows at once, and from "
    "which on the gap grows with log(step); a gap that shrinks is slow learning. "
)
"""The definition of a departure, for the criteria."""


@dataclass(frozen=True)
class _Ranks:
    """The ranks of one comparison below the highest, and where they leave its curve."""

    comparison: Comparison
    departures: Mapping[int, Departure]
    """By rank, ascending."""
    problems: Mapping[int, list[Problem]]
    """What speaks against the departure of each rank."""

    @property
    def gone(self) -> list[int]:
        """The ranks that leave."""
        return [rank for rank, departure in self.departures.items() if departure.left]

    def step(self, rank: int) -> float:
        """Return the step of a departure; infinity where the rank stays."""
        first = self.departures[rank].first
        return math.inf if first is None else first

    def text(self, rank: int) -> str:
        """Return the departure of a rank in words."""
        departure = self.departures[rank]
        if departure.growth is None:
            return f"r{rank} stays"
        verb = f"leaves at step {departure.first}" if departure.left else "lags without leaving"
        return f"r{rank} {verb} (its gap's slope is {nats(departure.growth)} per tenfold steps)"

    @property
    def every_problem(self) -> list[Problem]:
        """The problems of all ranks, each once."""
        return list({problem.text: problem for problems in self.problems.values() for problem in problems}.values())


def _ranks(comparison: Comparison) -> _Ranks:
    [highest] = require(("LoRA above rank 1", comparison.highest))
    margin = comparison.margin.value
    departures, problems = {}, {}
    for rank, arm in comparison.lora.items():
        if rank == highest["rank"]:
            continue
        curves = pair_at_optimum(comparison, arm, highest)
        if not len(curves.by_seed) and not comparison.problems([arm, highest]):
            raise UnjudgedError("not tested", "no training curves with seeds and steps in common")
        departures[rank] = paired_departure(curves, margin)
        problems[rank] = [*comparison.problems([arm, highest]), *margin_problems(comparison)]
        problems[rank] = problems[rank] or off_optimum(comparison, arm, highest, margin)
    if not departures:
        raise UnjudgedError("inconclusive", "only one rank")
    return _Ranks(comparison, departures, problems)


def _between(ranks: _Ranks, lower: int, higher: int) -> Estimate:
    """Return the loss of a rank minus that of a higher rank over the steps between their departures."""
    comparison = ranks.comparison
    curves = pair_at_optimum(comparison, comparison.lora[lower], comparison.lora[higher])
    first, end = sorted((ranks.step(lower), ranks.step(higher)))
    return curves.means([(int(first), int(min(end - 1, curves.last)))])[0]


def departure_grows_with_rank(comparison: Comparison) -> Finding:
    """A3: judge whether rank 1 leaves before the last rank that leaves, and whether any rank leaves before a lower one.

    Between two departures the rank that has left has the higher loss, so the sign of that difference is judged.
    """
    ranks = _ranks(comparison)
    ids = comparison.run_ids(comparison.lora.values())
    text = ", ".join(map(ranks.text, ranks.departures))
    problems, gone = ranks.every_problem, ranks.gone
    reversed_pairs = [pair for pair in combinations(ranks.departures, 2) if ranks.step(pair[1]) < ranks.step(pair[0])]
    if reversed_pairs:
        findings = []
        for lower, higher in reversed_pairs:
            gap = _between(ranks, lower, higher)
            in_words = f"{text}; r{higher} leaves before r{lower}, r{lower} - r{higher} = {nats(gap)} between"
            judged = decide(Above(0.0), gap, in_words, ids, problems)
            findings.append(without(judged, "confirmed"))
        return worst(findings)
    if 1 not in ranks.departures:
        problems.append(Problem("no runs of rank 1", Remedy("rank 1")))
    elif not gone:
        problems.append(Problem("no rank surely leaves", Remedy("longer runs")))
    elif len({ranks.step(rank) for rank in gone}) < 2:
        problems.append(Problem("fewer than two steps of departure", Remedy("longer runs")))
    if problems:
        return finding(ids, text, "inconclusive", problems)
    gap = _between(ranks, gone[0], gone[-1])
    text += f"; r{gone[0]} - r{gone[-1]} = {nats(gap)} between their departures"
    return decide(Above(0.0), gap, text, ids, margin_rule=f"departures: {comparison.margin.rule}")


A3 = Claim(
    id="A3",
    kind="empirical",
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
    unit="nats per token",
    experiments=("rank", "capacity"),
    judge=over(learning(full_runs(longest_run)), departure_grows_with_rank),
    conditions=(LONG,),
    core=True,
)


def _keeps_falling(ranks: _Ranks, rank: int) -> Finding:
    """Judge the slope of one rank's loss after its departure, as a share of FullFT's over the same batches."""
    comparison = ranks.comparison
    arm, fullft = require((f"LoRA r{rank}", comparison.lora[rank]), ("FullFT", comparison.fullft))
    past = ranks.departures[rank].past
    slopes = []
    for of_arm in (arm, fullft):
        curve = curves_at_optimum(comparison, of_arm)
        slopes.append(slopes_by_seed(curve[curve.index >= past]))
    name = f"{comparison.label} {arm_label(arm)} from {past}"
    own, full = (mean_over_seeds(slope, f"{name} {number}") for number, slope in enumerate(slopes))
    share = mean_over_seeds((slopes[0] / slopes[1]).dropna(), name)
    text = (
        f"{arm_label(arm)} from step {past} on: {nats(own)} per tenfold steps, FullFT {nats(full)}, ratio "
        f"{share.value:.2f} {fixed_interval(*share.interval(), 2)}, {share.n_seeds} seeds"
    )
    problems = [*ranks.problems[rank], *comparison.problems([arm, fullft])]
    if not (full.known and full.interval()[1] < 0):
        problems.append(Problem("FullFT's own loss does not surely fall there", Remedy("more seeds")))
    ids = comparison.run_ids([arm, fullft])
    return decide(Within(FLOOR, 1.0), share, text, ids, problems, f"a floor is {FLOOR:.0%} of FullFT's slope")


def no_floor(comparison: Comparison) -> Finding:
    """A4: judge the slope against log(step) of each rank that has left the shared curve, beside FullFT's."""
    ranks = _ranks(comparison)
    if not ranks.gone:
        departures = ", ".join(map(ranks.text, ranks.departures))
        if ranks.every_problem:
            ids = comparison.run_ids(comparison.lora.values())
            return finding(ids, departures, "inconclusive", ranks.every_problem)
        raise UnjudgedError("not tested", f"no rank leaves the shared curve: {departures}")
    return together([_keeps_falling(ranks, rank) for rank in ranks.gone])


A4 = Claim(
    id="A4",
    kind="empirical",
    statement="Past its capacity LoRA has no floor: it goes on learning, less efficiently",
    figure="text",
    criterion=(
        "For each rank that leaves the shared curve (as in A3), from the window of steps after that of its departure "
        "on: the slope of its training NLL against log(step), as a share of FullFT's on the same batches, lies between "
        f"{FLOOR:g} and 1 on average over seeds. That it is below 1 is near to what a departure is; that there is no "
        f"floor is the claim's content. {LONG_ONLY}"
    ),
    needs=f"{SWEEP}; a rank that leaves the shared curve; training losses at every step; {MIN_SEEDS} seeds",
    paper_value="no number",
    unit="share of FullFT's slope",
    experiments=("rank", "capacity"),
    judge=over(learning(full_runs(every_longest)), no_floor),
    conditions=(LONG,),
)


def _thresholds(ranks: _Ranks) -> tuple[pd.DataFrame, list[str]]:
    """Return the ranks with a threshold and the error of its log10 from seeds, and what is left out, in words."""
    comparison = ranks.comparison
    [highest] = require(("LoRA above rank 1", comparison.highest))
    rows, left_out = [], []
    for rank, departure in ranks.departures.items():
        runs = runs_at_optimum(comparison, comparison.lora[rank])
        points = comparison.curves
        points = points[points["run_id"].isin(runs["run_id"]) & (points["split"] == "train")]
        if ranks.problems[rank]:
            left_out.append(f"{comparison.label} r{rank}: {ranks.problems[rank][0].text}")
        elif departure.first is None:
            left_out.append(f"{comparison.label} {ranks.text(rank)}")
        elif departure.before is None or departure.past is None:
            left_out.append(f"{comparison.label} r{rank} never joined")
        else:
            curves = pair_at_optimum(comparison, comparison.lora[rank], highest)
            crossing = curves.crossing(departure.past, comparison.margin.value)
            if not crossing.known:
                left_out.append(f"{comparison.label} r{rank} does not go on leaving after its departure")
                continue
            if crossing.interval()[1] < math.log10(departure.before):
                left_out.append(f"{comparison.label} r{rank} does not leave along a line in log(step)")
                continue
            tokens = points.groupby("step")["tokens"].max().astype(float)
            rows.append(
                {
                    "dataset": comparison.runs["dataset"].iloc[0],
                    "name": f"{comparison.label} r{rank}",
                    "trainable_params": float(runs["trainable_params"].iloc[0]),
                    "tokens": np.interp(10**crossing.value, [0, *tokens.index], [0.0, *tokens]),
                    "error": crossing.seed_error,
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
            part, without = _thresholds(_ranks(comparison))
        except UnjudgedError as unjudged:
            left_out.append(f"{comparison.label}: {unjudged.finding.reason}")
            continue
        parts.append(part)
        left_out += without
    if not parts and not left_out:
        raise UnjudgedError("not tested", "no such runs")
    gone = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    tokens = [f"{row['name']} {row['tokens']:.3g} tokens" for row in gone.to_dict("records")]
    others = f"; left out: {', '.join(left_out)}" if left_out else ""
    dof = len(gone) - gone["dataset"].nunique() - 1 if len(gone) else 0
    if dof < 1:
        reason = f"{', '.join(tokens) or 'no departures'}: too few for a slope{others}"
        raise UnjudgedError("inconclusive", reason, MORE_RANKS)
    floor = math.sqrt(float((gone["error"] ** 2).mean()))
    line = log_log(gone["trainable_params"], gone["tokens"], floor, gone["dataset"])
    slope = student(line.slope, (line.high - line.slope) / t_quantile(dof), dof, "thresholds")
    interval = fixed_interval(*slope.interval(), 2)
    text = f"slope {slope.value:.2f} {interval} over {line.n} departures ({', '.join(tokens)}){others}"
    run_ids = [run_id for listed in gone["run_ids"] for run_id in listed]
    judged = decide(Within(*THRESHOLD_BAND), slope, text, run_ids, margin_rule="a constant around 1, proportionality")
    return replace(judged, remedy=MORE_RANKS) if judged.verdict == "inconclusive" else judged


A5 = Claim(
    id="A5",
    kind="empirical",
    statement="An adapter runs out of capacity after an amount of data proportional to its parameters",
    figure="text",
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
    experiments=("rank", "capacity"),
    judge=threshold_tied_to_parameters,
    columns=("trainable_params",),
    conditions=(LONG,),
)

CLAIMS = (A3, A4, A5)
