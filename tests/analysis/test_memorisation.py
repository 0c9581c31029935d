"""Bits that a dataset holds."""

import math

import pytest

from lorabench.analysis.memorisation import description_lengths

from ..handmade.sft import arm, tables


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
