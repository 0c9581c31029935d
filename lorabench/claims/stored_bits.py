"""Claims N1 and N2: bits per token of data, and bits that a parameter stores."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Comparison
from lorabench.analysis.estimate import Estimate, combined, mean_over_seeds
from lorabench.analysis.finding import MIN_SEEDS, Finding, UnjudgedError, decide, finding, worst
from lorabench.analysis.memorisation import BITS_PER_PARAMETER, is_memorisation, late_growth, stored
from lorabench.analysis.rules import Problem, Remedy, Within
from lorabench.claims.claim import Claim
from lorabench.claims.conditions import natural_text
from lorabench.claims.evidence import over
from lorabench.claims.scopes import Scoped, every_longest, learning
from lorabench.utils.formats import fixed_interval

BIT_BAND = (0.3, 1.2)
"""The losses, in nats per token, that count as about 1 bit."""


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
    figure="text",
    criterion=(
        "The first epoch's loss per scored token, of FullFT at the LR nearest to its optimum, lies within "
        f"{BIT_BAND[0]:g} to {BIT_BAND[1]:g} nats on average over seeds"
    ),
    needs="runs of FullFT that go through an epoch; two seeds",
    paper_value="1 bit = 0.69 nats",
    unit="nats per token",
    experiments=("rank", "capacity"),
    judge=over(learning(every_longest), about_one_bit),
    columns=("first_epoch_nats", "first_epoch_scored_tokens"),
    conditions=(natural_text(("overnight", "core", "paper")),),
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


@dataclass(frozen=True)
class _Adapter:
    """What one rank stores of the facts."""

    rank: int
    bits: Estimate
    entropy: float
    """Entropy of the facts, in bits."""
    parameters: float
    problems: list[Problem]

    @property
    def per_parameter(self) -> Estimate:
        """The bits stored per trainable parameter."""
        return combined(lambda bits: bits / self.parameters, self.bits)

    @property
    def share(self) -> Estimate:
        """The share of the facts that is stored."""
        return combined(lambda bits: bits / self.entropy, self.bits)

    @property
    def text(self) -> str:
        """What is stored, in words."""
        interval = fixed_interval(*self.per_parameter.interval(), 2)
        return (
            f"r{self.rank} {self.per_parameter.value:.2f} {interval} bits per parameter, {self.share.value:.0%} of the "
            "facts"
        )


def _adapters(comparison: Comparison) -> list[_Adapter]:
    """Return what each rank with a fitted minimum stores, by rank."""
    adapters = []
    for rank, arm in comparison.lora.items():
        minimum, rows = comparison.fit.minima.get(arm_label(arm)), comparison.rows[arm_label(arm)]
        if minimum is not None:
            entropy, tokens, parameters = (
                float(rows[name].iloc[0]) for name in ("entropy_bits", "test_scored_tokens", "trainable_params")
            )
            bits = stored(minimum, entropy, tokens)
            adapters.append(_Adapter(rank, bits, entropy, parameters, comparison.problems([arm])))
    return adapters


def _saturated(comparison: Comparison, adapter: _Adapter, higher: _Adapter) -> bool:
    """Return whether a rank stores less than all facts, and the next rank stores more."""
    gap = comparison.gap(comparison.lora[higher.rank], comparison.lora[adapter.rank])
    more = stored(gap, 0.0, 1.0)
    return adapter.bits.known and more.known and adapter.share.interval()[1] < SATURATED and more.interval()[0] > 0


def _two_bits(comparison: Comparison, adapter: _Adapter) -> Finding:
    """Judge the bits per parameter of one saturated rank."""
    arm, estimate = comparison.lora[adapter.rank], adapter.per_parameter
    problems = list(adapter.problems)
    growth = late_growth(comparison.at_optimum(arm), comparison.curves)
    # More steps can only store more, so a value above the band contradicts all the same.
    if estimate.interval()[0] <= TWO_BITS_BAND[1] and not growth.value < MAX_GROWTH:
        late = "unknown" if math.isnan(growth.value) else f"{growth.value:.0%}"
        text = f"still storing at the end ({late} of it in the second half of the steps)"
        problems.append(Problem(text, Remedy("more epochs")))
    interval = fixed_interval(*estimate.interval(), 2)
    text = f"r{adapter.rank} is saturated at {estimate.value:.2f} {interval} bits per parameter"
    ids = comparison.of([arm])["run_id"]
    return decide(Within(*TWO_BITS_BAND), estimate, text, ids, problems, "the numbers that round to 2")


def two_bits_per_parameter(comparison: Comparison) -> Finding:
    """N2: judge the bits of random facts stored per trainable parameter by each saturated rank."""
    adapters = _adapters(comparison)
    if not comparison.lora:
        raise UnjudgedError("inconclusive", "no runs of LoRA on the facts")
    run_ids = tuple(sorted(comparison.of(comparison.lora.values())["run_id"]))
    if not adapters:
        problems = [problem for arm in comparison.lora.values() for problem in comparison.problems([arm])]
        return finding(run_ids, "no fitted minimum of a rank", "inconclusive", problems)
    by_rank = "; ".join(adapter.text for adapter in adapters)
    full = [adapter for adapter, higher in pairwise(adapters) if _saturated(comparison, adapter, higher)]
    if not full:
        problems = [problem for adapter in adapters for problem in adapter.problems]
        return finding(run_ids, by_rank, "inconclusive", problems or [Problem("no rank is saturated")])
    decisive = worst([_two_bits(comparison, adapter) for adapter in full])
    return replace(decisive, reason=f"{decisive.reason} ({by_rank})", run_ids=run_ids)


N2 = Claim(
    id="N2",
    kind="prediction",
    statement=f"A parameter stores about {BITS_PER_PARAMETER:g} bits",
    figure="text",
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

CLAIMS = (N1, N2)
