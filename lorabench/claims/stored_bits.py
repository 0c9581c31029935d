"""Claims N1 and N2: bits per token of data, and bits that a parameter stores."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pandas as pd

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Comparison
from lorabench.analysis.finding import MIN_SEEDS, Finding, UnjudgedError, finding, within, worst
from lorabench.analysis.gaps import gap
from lorabench.analysis.memorisation import (
    BITS_PER_PARAMETER,
    best_stored,
    description_lengths,
    is_memorisation,
    late_growth,
)
from lorabench.claims.claim import Claim
from lorabench.claims.evidence import over
from lorabench.claims.scopes import Scoped, every_longest, learning
from lorabench.utils.formats import fixed_interval

BIT_BAND = (0.3, 1.2)
"""The losses, in nats per token, that count as about 1 bit."""


def about_one_bit(comparison: Comparison) -> Finding:
    """N1: judge the first epoch's loss per scored token, of FullFT at its best LR."""
    lengths = description_lengths(comparison.runs)
    if lengths.empty:
        raise UnjudgedError("not tested", "no run that went through an epoch")
    row = lengths.iloc[0]
    mean, interval = float(row["nats_per_token"]), (float(row["nats_low"]), float(row["nats_high"]))
    text = (
        f"first epoch of {arm_label(row)} {mean:.3f} nats {fixed_interval(*interval, 3)} per scored token = "
        f"{mean / math.log(2):.2f} bits, {row['bits']:.3g} bits in all, {row['n_seeds']} seeds"
    )
    problems = [] if row["n_seeds"] > 1 else ["one seed gives no interval"]
    strain = abs(math.log(mean / math.log(2))) if mean > 0 else math.nan
    return finding(row["run_ids"], text, within(*interval, BIT_BAND), problems, mean, interval, strain)


N1 = Claim(
    id="N1",
    kind="opinion",
    statement="The first epoch of fine-tuning on natural data costs about 1 bit per token",
    figure="text",
    criterion=(
        "The 95% interval over seeds of the first epoch's loss per scored token, of FullFT at its best LR, lies "
        f"within {BIT_BAND[0]:g} to {BIT_BAND[1]:g} nats. The paper speaks of natural data; a verdict on generated "
        "tasks is about these tasks only"
    ),
    needs="runs of FullFT that go through an epoch; two seeds at the best LR",
    paper_value="1 bit = 0.69 nats",
    unit="nats per token",
    experiments=("rank", "capacity"),
    judge=over(learning(every_longest), about_one_bit),
    columns=("first_epoch_nats", "first_epoch_scored_tokens"),
)

TWO_BITS_BAND = (1.5, 2.5)
"""The bits per parameter that round to 2."""

SATURATED = 0.9
"""The share of the facts above which an adapter may have room for more."""

MAX_GROWTH = 0.1
"""The share stored in the second half of the steps from which an adapter is still storing."""


def memorising(comparisons: list[Comparison]) -> list[Scoped]:
    """Choose the comparisons on random facts."""
    return [(comparison, "") for comparison in comparisons if is_memorisation(comparison.runs).any()]


def _stores_more(comparison: Comparison, higher: int, rank: int) -> bool:
    """Return whether the higher rank stores more than the other with its whole 95% interval."""
    return gap(comparison.runs, comparison.lora[higher], comparison.lora[rank]).ci_high < 0


def _two_bits(comparison: Comparison, rank: int, stored: pd.Series[Any], growth: float) -> Finding:
    """Judge the bits per parameter of one saturated rank."""
    low, high = float(stored["bits_per_parameter_low"]), float(stored["bits_per_parameter_high"])
    problems = comparison.edge_problems([comparison.lora[rank]])
    if stored["n_seeds"] < MIN_SEEDS:
        problems.append(f"{stored['n_seeds']} seeds, {MIN_SEEDS} needed")
    if stored["n_diverged"]:
        problems.append(f"{stored['n_diverged']} repeats at the best LR diverged")
    # More steps can only store more, so a value above the band contradicts all the same.
    if low <= TWO_BITS_BAND[1] and not growth < MAX_GROWTH:
        late = "unknown" if math.isnan(growth) else f"{growth:.0%}"
        problems.append(f"still storing at the end ({late} of it in the second half of the steps)")
    estimate = float(stored["bits_per_parameter"])
    text = f"r{rank} is saturated at {estimate:.2f} {fixed_interval(low, high, 2)} bits per parameter"
    verdict = within(low, high, TWO_BITS_BAND)
    return finding(
        stored["run_ids"], text, verdict, problems, estimate, (low, high), abs(estimate - BITS_PER_PARAMETER)
    )


def two_bits_per_parameter(comparison: Comparison) -> Finding:
    """N2: judge the bits of random facts stored per trainable parameter by each saturated rank."""
    stored = best_stored(comparison.of(comparison.lora.values())) if comparison.lora else pd.DataFrame()
    if stored.empty:
        raise UnjudgedError("inconclusive", "no finished LoRA run on the facts")
    stored = stored.set_index("rank")
    by_rank = ", ".join(
        f"r{rank} {row['bits_per_parameter']:.2f} "
        f"{fixed_interval(row['bits_per_parameter_low'], row['bits_per_parameter_high'], 2)} bits per parameter, "
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
        return finding(run_ids, by_rank, "inconclusive", [reason])
    growth = late_growth(comparison.of(comparison.lora.values()), comparison.curves).set_index("rank")["growth"]
    findings = [_two_bits(comparison, rank, stored.loc[rank], float(growth[rank])) for rank in full]
    decisive = worst(findings)
    return replace(decisive, reason=f"{decisive.reason} ({by_rank})", run_ids=tuple(sorted(run_ids)))


N2 = Claim(
    id="N2",
    kind="prediction",
    statement=f"A parameter stores about {BITS_PER_PARAMETER:g} bits",
    figure="text",
    criterion=(
        "On random facts, for each saturated rank: the 95% interval over seeds of the bits stored per adapter "
        f"parameter lies within {TWO_BITS_BAND[0]:g} to {TWO_BITS_BAND[1]:g}, the numbers that round to "
        f"{BITS_PER_PARAMETER:g}. A rank is saturated if it stores less than {SATURATED:.0%} of the facts and the next "
        f"rank stores more, both with their intervals. A rank that stored {MAX_GROWTH:.0%} or more in the second half "
        "of its steps is still storing, so it counts only above the band. The paper cites the number for whole "
        "networks, after long training"
    ),
    needs=f"LoRA on all layers at two or more ranks on a dataset of facts; {MIN_SEEDS} seeds at the best LRs",
    paper_value="2 (cited)",
    unit="bits per parameter",
    experiments=("capacity",),
    judge=over(memorising, two_bits_per_parameter),
    columns=("entropy_bits", "test_scored_tokens", "trainable_params"),
)

CLAIMS = (N1, N2)
