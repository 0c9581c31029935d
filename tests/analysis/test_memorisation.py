"""Bits that are stored of random facts, and that a dataset holds."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from lorabench.analysis.comparison import comparisons
from lorabench.analysis.memorisation import best_stored, description_lengths, late_growth, stored_bits

from ..handmade.sft import arm, tables

TOKENS, ENTROPY = 1000, 4000.0


def nll_of(bits: float) -> float:
    """Return the NLL at which the given number of bits is stored."""
    return (ENTROPY - bits) * math.log(2) / TOKENS


def facts(bits_by_rank, params=lambda rank: 500 * rank, **changes):
    """Return arms on random facts that store the given bits, by rank, at their optimal LR."""
    return tables(
        arm(
            rank,
            optimum=1e-3,
            floor=nll_of(bits),
            dataset="facts",
            entropy_bits=ENTROPY,
            test_scored_tokens=TOKENS,
            trainable_params=10**6 if rank is None else params(rank),
            **changes,
        )
        for rank, bits in bits_by_rank.items()
    )


def test_stored_bits_are_the_entropy_less_what_is_left_to_tell():
    runs, _ = facts({1: 1000.0}, offsets=(0.0,), diverges_from=1e-2)
    stored = stored_bits(runs).set_index("lr")
    assert stored.loc[1e-3, ["bits_stored", "bits_per_parameter"]].tolist() == pytest.approx([1000, 2])
    # Away from the optimum the loss is 0.1 ln(3)^2 nats higher.
    lost = 0.1 * math.log(3) ** 2 * TOKENS / math.log(2)
    assert stored.loc[3e-3, "bits_stored"] == pytest.approx(1000 - lost)
    assert len(stored) == len(runs)
    # Diverged runs store nothing known, and less than nothing can be stored.
    assert stored.loc[[1e-2, 3e-2], "bits_stored"].isna().all()
    less = stored_bits(facts({1: -200.0}, offsets=(0.0,))[0]).set_index("lr")
    assert less.loc[1e-3, "bits_stored"] == pytest.approx(-200)


def test_best_stored_is_that_of_the_fitted_minimum():
    runs, _ = facts({None: 3900.0, 4: 3000.0})
    stored = best_stored(runs).set_index("method")
    assert stored["lr_best"].tolist() == [1e-3, 1e-3]
    assert stored["n_seeds"].tolist() == [3, 3]
    [comparison] = comparisons(runs, pd.DataFrame())
    low, high = comparison.fit.minima["LoRA r4"].interval()
    per_nat = TOKENS / math.log(2)
    lora = stored.loc["lora"]
    assert lora["bits_stored"] == pytest.approx(ENTROPY - comparison.fit.minima["LoRA r4"].value * per_nat)
    assert lora["bits_stored"] == pytest.approx(3000, abs=60)
    assert lora["bits_stored_high"] == pytest.approx(ENTROPY - low * per_nat)
    assert lora["bits_stored_low"] == pytest.approx(ENTROPY - high * per_nat)
    assert lora["bits_per_parameter"] == pytest.approx(lora["bits_stored"] / 2000)
    assert stored.loc["fullft", "trainable_params"] == 10**6


def test_description_length_is_full_fine_tunings_first_epoch():
    epoch = {"first_epoch_nats": 70.0, "first_epoch_scored_tokens": 100}
    arms = [arm(optimum=1e-3, **epoch), arm(1, optimum=1e-3, first_epoch_nats=1.0, first_epoch_scored_tokens=100)]
    runs, _ = tables(arms)
    runs.loc[runs["method"].eq("fullft") & runs["seed"].eq(1), "first_epoch_nats"] = 76.0
    [row] = description_lengths(runs).to_dict("records")
    assert (row["method"], len(row["run_ids"])) == ("fullft", 3)
    assert row["bits"] == pytest.approx(72 / math.log(2))
    [without] = description_lengths(runs[runs["method"] == "lora"]).to_dict("records")
    assert (without["rank"], without["bits"]) == (1, pytest.approx(1 / math.log(2)))
    # Runs that are shorter than an epoch have none.
    assert description_lengths(runs.assign(first_epoch_nats=math.nan)).empty


def test_late_growth_is_what_the_second_half_of_the_steps_added():
    runs, curves = facts({1: 1000.0})
    # 900 of 1000 bits at step 64 of 128.
    curves["value"] = curves["step"].map(lambda step: nll_of(900.0 if step == 64 else 1000.0 if step == 128 else 0.0))
    at_best = runs[runs["lr"] == 1e-3]
    growth = late_growth(at_best, curves)
    assert (growth.value, growth.n_seeds) == (pytest.approx(0.1, abs=1e-3), 3)
    assert math.isnan(late_growth(at_best, pd.DataFrame()).value)
