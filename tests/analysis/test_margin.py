"""Margins follow from the gain from the base to full fine-tuning, or from the loss where the base is not known."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from lorabench.analysis.comparison import comparisons
from lorabench.analysis.rules import gain_margin

from ..handmade.sft import arm, tables


def test_a_margin_is_a_share_of_the_gain_if_there_is_one():
    margin = gain_margin(0.02, 0.5, "FullFT")
    assert (margin.value, margin.problem) == (pytest.approx(0.01), None)
    assert margin.rule == "2% of the gain from the base to FullFT (0.500 nats)"
    assert gain_margin(0.1, 0.5, "FullFT", rewarded=True).rule.endswith(
        "gain in accuracy from the base to FullFT (0.500)"
    )
    for gain in (-0.2, math.nan):
        assert math.isnan(gain_margin(0.02, gain, "FullFT").value)
        assert "no gain" in gain_margin(0.02, gain, "FullFT").problem


def test_the_gain_is_from_the_base_at_step_0_and_a_share_of_the_loss_stands_in_without_it():
    runs, _ = tables([arm(8, optimum=1e-3), arm(optimum=1e-3)])
    base = {"step": 0, "split": "validation", "metric": "nll"}
    rows = [{"run_id": run_id, "value": 3.0} | base for run_id in runs["run_id"]]
    rows += [
        {"run_id": runs["run_id"].iloc[0], "value": 9.0} | base | {"step": 1},
        {"run_id": "other", "value": 9.0} | base,
    ]
    [known] = comparisons(runs, pd.DataFrame(rows))
    tuned = known.at_optimum(known.fullft)["final_valid_nll"].mean()
    assert known.margin.value == pytest.approx(0.02 * (3.0 - tuned))
    [unknown] = comparisons(runs, pd.DataFrame())
    assert unknown.margin.value == pytest.approx(0.01 * unknown.fit.minima["FullFT"].value)
    assert "the base's loss is not known" in unknown.margin.rule
