"""Bits that are stored of random facts, and that a dataset holds."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from lorabench.analysis.comparison import comparisons
from lorabench.analysis.memorisation import best_stored, description_lengths

from ..handmade.sft import arm, tables

TOKENS, ENTROPY = 1000, 4000.0


def test_best_stored_is_that_of_the_fitted_minimum():
    facts = {"optimum": 1e-3, "dataset": "facts", "entropy_bits": ENTROPY, "test_scored_tokens": TOKENS}
    per_nat = TOKENS / math.log(2)
    fullft = arm(floor=100 / per_nat, trainable_params=10**6, **facts)
    runs, _ = tables([fullft, arm(4, floor=1000 / per_nat, trainable_params=2000, **facts)])
    stored = best_stored(runs).set_index("method")
    assert stored[["lr_best", "n_seeds"]].values.tolist() == [[1e-3, 3]] * 2
    [comparison] = comparisons(runs, pd.DataFrame())
    low, high = comparison.fit.minima["LoRA r4"].interval()
    lora = stored.loc["lora"]
    assert lora["bits_stored"] == pytest.approx(3000, abs=60)
    assert lora["bits_stored_high"] == pytest.approx(ENTROPY - low * per_nat)
    assert lora["bits_stored_low"] == pytest.approx(ENTROPY - high * per_nat)
    assert lora["bits_per_parameter"] == pytest.approx(lora["bits_stored"] / 2000)


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
