"""Margins follow from the gain from the base to full fine-tuning, or from the loss where the base is not known."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from lorabench.analysis.margin import base_loss, loss_margin, reward_margin
from lorabench.config.margins import Margins

MARGINS = Margins(loss=0.02, reward=0.1, lr_factor=1.6)


def test_the_margin_of_a_loss_is_a_share_of_the_gain():
    margin = loss_margin(MARGINS, base=1.5, tuned=1.0, tuned_arm="FullFT", loss=0.9)
    assert margin.value == pytest.approx(0.01)
    assert margin.rule == "2% of the gain from the base to FullFT (0.500 nats)"
    assert margin.problem is None


def test_without_the_base_a_share_of_the_loss_stands_in_and_is_named():
    margin = loss_margin(MARGINS, base=math.nan, tuned=1.0, tuned_arm="FullFT", loss=0.9)
    assert margin.value == pytest.approx(0.009)
    assert "the base's loss is not known" in margin.rule


def test_the_margin_of_an_accuracy_is_a_share_of_its_gain():
    assert reward_margin(MARGINS, base=0.2, tuned=0.7, tuned_arm="FullFT").value == pytest.approx(0.05)


@pytest.mark.parametrize(
    "margin", [loss_margin(MARGINS, 1.0, 1.2, "FullFT", 1.0), reward_margin(MARGINS, 0.5, 0.5, "FullFT")]
)
def test_an_arm_that_gains_nothing_gives_no_margin(margin):
    assert math.isnan(margin.value)
    assert "no gain" in margin.problem


def test_the_loss_of_the_base_is_that_at_step_0():
    curves = pd.DataFrame(
        {
            "run_id": ["a", "a", "b", "z"],
            "step": [0, 1, 0, 0],
            "split": "validation",
            "metric": "nll",
            "value": [1.5, 1.0, 1.5, 9.0],
        }
    )
    runs = pd.DataFrame({"run_id": ["a", "b"]})
    assert base_loss(runs, curves) == 1.5
    assert math.isnan(base_loss(runs, curves.iloc[:0]))
    assert math.isnan(base_loss(pd.DataFrame({"run_id": ["c"]}), curves))
