"""How far off the recommended learning rates would have been."""

import math
from dataclasses import replace

import pytest

from advice.benchmarks.lr_left_out import by_source, compared, left_out
from lorabench.sources.lr_optima import AUTHORS, LrOptimum
from studies.lr_ratio.predictions import DEFAULT


def optimum(source, factor, losses=(), lrs=(), method="fullft"):
    """Return one at a factor of the law, at the law's reference."""
    known = LrOptimum(source, "m", "llama", "d", method, None, 2000, 128, 780, 32, False, 5e-5 * factor, 0.05, True)
    return replace(known, log_lrs=tuple(map(math.log, lrs)), losses=tuple(losses))


def test_leaving_one_out_by_hand():
    # Three sources at twice the law, each predicted from the others: pooling is right, the law is off by 2.
    lrs = [1e-5 * 2 ** (n / 4) for n in range(21)]
    losses = [2 + 0.1 * math.log(lr / 1e-4) ** 2 for lr in lrs]
    sources = [optimum("a", 2, losses, lrs), optimum("b", 2), optimum("c", 2)]
    rows = left_out(sources).set_index(["source", "rule"])
    assert rows.loc[("a", "law"), "factor"] == pytest.approx(0.5)
    assert rows.loc[("a", "pooled"), "factor"] == pytest.approx(1, abs=0.03)
    assert rows.loc[("a", "law"), "loss_above_best"] == pytest.approx(0.1 * math.log(2) ** 2, abs=1e-3)
    assert rows.loc[("a", "pooled"), "loss_above_best"] == pytest.approx(0, abs=2e-3)
    assert rows["inside_80"].dropna().eq(1).all()
    table = compared(by_source(rows.reset_index())).set_index("rule")
    assert table.loc["law", "off"] == pytest.approx(2)
    assert table.loc["pooled", "against_law"] == pytest.approx(0.5, abs=0.02)
    assert table.loc["pooled", "closer"] == 3


def test_beyond_its_grid_the_loss_is_at_least_that_of_the_edge():
    rows = left_out([optimum("a", 0.1, (2.1, 2.0, 2.3), (2.5e-6, 5e-6, 1e-5)), optimum("b", 1), optimum("c", 1)])
    law = rows[(rows["source"] == "a") & (rows["rule"] == "law")].iloc[0]
    assert law["loss_above_best"] == pytest.approx(0.3)
    assert law["at_least"]


def test_lora_is_predicted_from_the_full_fine_tuning_of_its_own_source():
    # At width 2000 and alpha 32, 780 steps: the LR of FullFT at which the theory asks for a ratio of 20.
    theory = DEFAULT.movement
    unit = theory.u0 * 128 / 2000 * math.sqrt(50 / 780)
    target = theory.c * 2000 / 32 / (1 + theory.k / 64)
    fullft = unit / 20 * math.sqrt((target / 20) ** 2 - 1)
    errors, optima = {"a": 0.0, "b": 0.3, "c": -0.4}, []
    for source, error in errors.items():
        optima.append(replace(optimum(source, 1), lr=fullft))
        optima.append(replace(optimum(source, 1, method="lora"), rank=64, lr=20 * fullft * math.exp(-error)))
    rows = left_out(optima).set_index(["source", "rule"]).query("method == 'lora'")
    for source, error in errors.items():
        assert rows.loc[(source, "movement_own"), "factor"] == pytest.approx(math.exp(error))
        assert rows.loc[(source, "ten_own"), "factor"] == pytest.approx(math.exp(error) / 2)
    average = math.sqrt(rows.loc[("c", "pooled"), "factor"] * math.exp(-0.4))
    assert rows.loc[("c", "average"), "factor"] == pytest.approx(average)
    # All sources have one LR of FullFT, so that the pooled one is nearly the same.
    assert rows.loc[("b", "movement"), "factor"] == pytest.approx(math.exp(0.3), rel=0.05)
    # The interval is that of the errors on the other sources: t at 90% with two degrees of freedom is 1.8856.
    half = 1.8856 * math.sqrt((0.3**2 + 0.4**2) / 2)
    assert rows.loc[("a", "movement_own"), "high_80"] == pytest.approx(20 * fullft * math.exp(half), rel=1e-3)
    table = compared(by_source(rows.reset_index())).set_index(["without", "rule"])
    assert table.loc[(AUTHORS, "movement_own"), "rms"] == pytest.approx(math.exp(math.sqrt((0.3**2 + 0.4**2) / 3)))
    assert table.loc[(AUTHORS, "movement_own"), "off"] == pytest.approx(math.exp(0.7 / 3))
