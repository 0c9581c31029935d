"""Claims A3 to A5, N1 and N2: where an adapter runs out of capacity, and how many bits its parameters store."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, pairwise

import pandas as pd

from lorabench.analysis import optima
from lorabench.analysis.arms import arm_label, kept
from lorabench.analysis.comparison import Arm, Comparison, require
from lorabench.analysis.estimate import Estimate, combined, mean_over_seeds, student, t_quantile
from lorabench.analysis.finding import Finding, UnjudgedError, decide, finding, nats, without, worst
from lorabench.analysis.memorisation import late_growth, stored
from lorabench.analysis.rules import Above, Problem, Remedy, Within
from lorabench.analysis.slopes import log_log, slopes_by_seed
from lorabench.claims import scope
from lorabench.claims.claim import Evidence, claim, number, unjudged_if
from lorabench.claims.learning_curves import long_claim
from lorabench.utils.formats import fixed_interval

# Bounds whose meaning the criteria say.
FLOOR = 0.05
THRESHOLD_BAND = (0.5, 1.5)
BIT_BAND = (0.3, 1.2)
TWO_BITS_BAND = (1.5, 2.5)
SATURATED = 0.9
MAX_GROWTH = 0.1

MORE_RANKS = Remedy("more ranks that leave the shared curve, which longer runs give")


@dataclass(frozen=True)
class _Rank:
    """A rank below the highest, where it leaves the curve of the highest, where the line through its gap reaches the
    margin (log10(step), or why there is no such step), and what speaks against the departure."""

    rank: int
    arm: Arm
    departure: optima.Departure
    threshold: Estimate | str
    problems: list[Problem]

    @property
    def step(self) -> float:
        """The step of the departure; infinity where the rank stays."""
        return math.inf if self.departure.first is None else self.departure.first

    def __str__(self) -> str:
        if self.departure.growth is None:
            return f"r{self.rank} stays"
        slope = f"its gap's slope is {nats(self.departure.growth)} per tenfold steps"
        if not self.departure.left:
            return f"r{self.rank} lags without leaving ({slope})"
        reached = self.threshold
        if isinstance(reached, Estimate):
            step, low, high = (10**end for end in (reached.value, *reached.interval()))
            slope += f", and its line reaches the margin at step {step:.0f} {fixed_interval(low, high, 0)}"
        return f"r{self.rank} leaves at step {self.departure.first} ({slope})"


@kept
def _ranks(comparison: Comparison) -> list[_Rank]:
    [highest] = require(("LoRA above rank 1", comparison.highest))
    margin, ranks = comparison.margin, []
    for rank, arm in comparison.lora.items():
        if rank == highest["rank"]:
            continue
        curves, problems = optima.pair_at_optimum(comparison, arm, highest), comparison.problems([arm, highest])
        unjudged_if(not len(curves.by_seed) and not problems, "no training curves with seeds and steps in common")
        departure = optima.paired_departure(curves, margin.value)
        problems = [*problems, *margin.problems] or optima.off_optimum(comparison, arm, highest, margin.value)
        threshold = optima.log_threshold(curves, departure, margin.value)
        ranks.append(_Rank(rank, arm, departure, threshold, problems))
    unjudged_if(not ranks, "only one rank", "inconclusive")
    return ranks


def _described(ranks: Sequence[_Rank]) -> tuple[str, list[Problem]]:
    """Return the departures of ranks as text, and what speaks against them, each once."""
    problems = {problem.text: problem for rank in ranks for problem in rank.problems}
    return ", ".join(map(str, ranks)), list(problems.values())


def _between(comparison: Comparison, lower: _Rank, higher: _Rank) -> Estimate:
    """Return the loss of a rank minus that of a higher rank over the steps between their departures."""
    curves = optima.pair_at_optimum(comparison, lower.arm, higher.arm)
    first, end = sorted((lower.step, higher.step))
    return curves.means([(int(first), int(min(end - 1, curves.last)))])[0]


@long_claim("A3", over=scope.chosen(scope.learning, scope.full_runs, scope.several_ranks, scope.longest_run))
def _departure_grows_with_rank(comparison: Comparison) -> Finding:
    ranks = _ranks(comparison)
    ids, (text, problems) = comparison.run_ids(comparison.lora.values()), _described(ranks)
    findings = []
    for lower, higher in combinations(ranks, 2):
        if higher.step < lower.step:
            gap, names = _between(comparison, lower, higher), (f"r{lower.rank}", f"r{higher.rank}")
            both = f"{text}; {names[1]} leaves before {names[0]}, {names[0]} - {names[1]} = {nats(gap)} between"
            findings.append(without(decide(Above(0.0), gap, both, ids, problems), "confirmed"))
    if findings:
        return worst(findings)
    gone = [rank for rank in ranks if rank.departure.left]
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


@long_claim("A4", over=scope.chosen(scope.learning, scope.full_runs, scope.several_ranks, scope.longest_runs))
def _no_floor(comparison: Comparison) -> Iterator[Finding]:
    ranks = _ranks(comparison)
    gone = [rank for rank in ranks if rank.departure.left]
    departures, problems = _described(ranks)
    unjudged_if(not gone and not problems, f"no rank leaves the shared curve: {departures}")
    if not gone:
        yield finding(comparison.run_ids(comparison.lora.values()), departures, "inconclusive", problems)
    for rank in gone:
        arm, fullft = require((f"LoRA r{rank.rank}", rank.arm), ("FullFT", comparison.fullft))
        past = rank.departure.past or 0
        curves = (optima.curves_at_optimum(comparison, compared) for compared in (arm, fullft))
        slopes = [slopes_by_seed(curve, past) for curve in curves]
        name = f"{comparison.label} {arm_label(arm)} from {past}"
        own, full = (mean_over_seeds(slope, f"{name} {place}") for place, slope in enumerate(slopes))
        share = mean_over_seeds((slopes[0] / slopes[1]).dropna(), name)
        for compared, weight in ((arm, 1 / full.value), (fullft, -share.value / full.value)):
            if error := optima.lr_error(comparison, compared):
                share = replace(
                    share, seed_part=share.seed_part + weight * error.of(partial(slopes_by_seed, first=past))
                )
        text = (
            f"{arm_label(arm)} from step {past} on: {nats(own)} per tenfold steps, FullFT {nats(full)}, ratio "
            f"{number(share)}, {share.n_seeds} seeds"
        )
        problems = [*rank.problems, *comparison.problems([arm, fullft])]
        if not (full.known and full.interval()[1] < 0):
            problems.append(Problem("FullFT's own loss does not surely fall there", Remedy("more seeds")))
        ids, floor = comparison.run_ids([arm, fullft]), f"a floor is {FLOOR:.0%} of FullFT's slope"
        yield decide(Within(FLOOR, 1.0), share, text, ids, problems, floor)


@long_claim("A5", columns=("trainable_params",))
def _threshold_tied_to_parameters(evidence: Evidence) -> Finding:
    unjudged_if("tokens" not in evidence.curves, "the curves table has no column tokens")
    rows, left_out = [], []
    for label, comparison in scope.chosen(scope.learning, scope.longest_runs)(evidence):
        try:
            ranks = _ranks(comparison)
        except UnjudgedError as unjudged:
            left_out.append(f"{label}: {unjudged.finding.reason}")
            continue
        for rank in ranks:
            name, threshold = f"{label} r{rank.rank}", rank.threshold
            if rank.problems:
                left_out.append(f"{name}: {rank.problems[0].text}")
            elif not rank.departure.left:
                left_out.append(f"{label} {rank}")
            elif isinstance(threshold, str):
                left_out.append(f"{name} {threshold}")
            else:
                tokens = optima.tokens_at(comparison, rank.arm, 10**threshold.value)
                runs = optima.runs_at_optimum(comparison, rank.arm)
                dataset, parameters = runs["dataset"].iloc[0], float(runs["trainable_params"].iloc[0])
                rows.append((dataset, name, parameters, tokens, threshold.seed_error, list(runs["run_id"])))
    unjudged_if(not rows and not left_out, "no such runs")
    gone = pd.DataFrame(rows, columns=["dataset", "name", "parameters", "tokens", "error", "run_ids"])
    at_tokens = ", ".join(f"{name} {tokens:.3g} tokens" for _, name, _, tokens, *_ in rows)
    others = f"; left out: {', '.join(left_out)}" if left_out else ""
    dof = len(gone) - gone["dataset"].nunique() - 1
    unjudged_if(dof < 1, f"{at_tokens or 'no departures'}: too few for a slope{others}", "inconclusive", MORE_RANKS)
    floor = math.sqrt(float((gone["error"] ** 2).mean()))
    line = log_log(gone["parameters"], gone["tokens"], floor, gone["dataset"])
    slope = student(line.slope, (line.high - line.slope) / t_quantile(dof), dof, "thresholds")
    text = f"slope {number(slope)} over {line.n} departures ({at_tokens}){others}"
    margin_rule = "a constant around 1, proportionality"
    judged = decide(Within(*THRESHOLD_BAND), slope, text, gone["run_ids"].explode(), margin_rule=margin_rule)
    return replace(judged, remedy=MORE_RANKS) if judged.verdict == "inconclusive" else judged


@claim(
    "N1",
    over=scope.chosen(scope.learning, scope.longest_runs),
    columns=("first_epoch_nats", "first_epoch_scored_tokens"),
    conditions=(scope.natural_text,),
)
def _about_one_bit(comparison: Comparison) -> Finding:
    arm = comparison.fullft or comparison.highest
    epochs = ["first_epoch_nats", "first_epoch_scored_tokens"]
    if arm is None or (runs := comparison.at_optimum(arm).dropna(subset=epochs)).empty:
        raise UnjudgedError("not tested", "no run that went through an epoch")
    nats, tokens = runs["first_epoch_nats"].astype(float), runs["first_epoch_scored_tokens"].astype(float)
    mean = mean_over_seeds(nats / tokens, f"{comparison.label} first epoch")
    text = (
        f"first epoch of {arm_label(arm)} {mean.value:.3f} nats {fixed_interval(*mean.interval(), 3)} per scored token "
        f"= {mean.value / math.log(2):.2f} bits, {nats.mean() / math.log(2):.3g} bits in all, {mean.n_seeds} seeds"
    )
    return decide(Within(*BIT_BAND), mean, text, runs["run_id"], margin_rule="a constant around 1 bit")


@claim("N2", over=scope.chosen(scope.memorising), columns=("entropy_bits", "test_scored_tokens", "trainable_params"))
def _two_bits_per_parameter(comparison: Comparison) -> Finding:
    arms = list(comparison.lora.values())
    unjudged_if(not arms, "no runs of LoRA on the facts", "inconclusive")
    run_ids = comparison.run_ids(arms)
    stores, saturated, findings, texts = [], [], [], []
    for arm in arms:
        minimum, first = comparison.fit.minima.get(arm_label(arm)), comparison.rows[arm_label(arm)].iloc[0]
        if minimum is not None:
            entropy, parameters = float(first["entropy_bits"]), float(first["trainable_params"])
            bits = stored(minimum, entropy, float(first["test_scored_tokens"]))
            share, per_parameter = (combined(lambda bits, by=by: bits / by, bits) for by in (entropy, parameters))
            stores.append((arm, share, per_parameter))
            texts.append(f"r{arm['rank']} {number(per_parameter)} bits per parameter, {share.value:.0%} of the facts")
    by_rank = "; ".join(texts) or "no fitted minimum of a rank"
    for (arm, share, per_parameter), (higher, *_) in pairwise(stores):
        more = stored(comparison.gap(higher, arm), 0.0, 1.0)
        if share.known and share.interval()[1] < SATURATED and more.known and more.interval()[0] > 0:
            saturated.append((arm, per_parameter))
    if not saturated:
        fitted = [arm for arm, _, _ in stores] or arms
        problems = [problem for arm in fitted for problem in comparison.problems([arm])]
        return finding(run_ids, by_rank, "inconclusive", problems or [Problem("no rank is saturated")])
    for arm, per_parameter in saturated:
        problems = comparison.problems([arm])
        growth = late_growth(comparison.at_optimum(arm), comparison.curves)
        # More steps can only store more, so a value above the band contradicts all the same.
        if per_parameter.interval()[0] <= TWO_BITS_BAND[1] and not growth.value < MAX_GROWTH:
            late = "unknown" if math.isnan(growth.value) else f"{growth.value:.0%}"
            text = f"still storing at the end ({late} of it in the second half of the steps)"
            problems.append(Problem(text, Remedy("more epochs")))
        text = f"r{arm['rank']} is saturated at {number(per_parameter)} bits per parameter"
        rule = Within(*TWO_BITS_BAND)
        findings.append(decide(rule, per_parameter, text, run_ids, problems, "the numbers that round to 2"))
    decisive = worst(findings)
    return replace(decisive, reason=f"{decisive.reason} ({by_rank})")
