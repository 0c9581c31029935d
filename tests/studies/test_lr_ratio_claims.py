"""Claims P1 to P7, measured ratios and their figure in worlds whose LR ratios follow one of the theories."""

import math

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis.arms import with_arm_columns
from lorabench.analysis.comparison import Judging
from studies.lr_ratio.conditions import COLUMNS, measured_ratios, prediction_table
from studies.lr_ratio.predictions import DEFAULT
from studies.lr_ratio.theories import Setting, predicted

from ..claims import judged
from ..handmade.sft import arm, tables

FULLFT_LR = 3e-4
USUAL = (64, 50, 8, 32.0)


def world(ratio, conditions, **settings):
    """Make runs in which the LR ratio of each condition is that of a function of it."""
    arms = []
    for width, steps, batch_size, alpha in conditions:
        about = {"model": f"llama-{width}", "hidden_size": width, "steps": steps, "batch_size": batch_size}
        about |= {"experiments": "lr_ratio"} | settings
        setting = Setting(width, steps, batch_size, alpha)
        for rank in (None, 16) if alpha == 32 else (16,):
            optimum = FULLFT_LR * (1 if rank is None else ratio(setting))
            lrs = [optimum * factor for factor in (1 / 4.64, 1 / 2.15, 1.1, 2.15, 4.64)]
            arms.append(arm(rank, optimum=optimum, lrs=lrs, **about, **({} if rank is None else {"alpha": alpha})))
    return tables(arms)


def following(name):
    def ratio(setting):
        theory = predicted(DEFAULT, setting).get(name)
        return 5.0 if theory is None else float(np.exp(theory(np.asarray(math.log(FULLFT_LR)))))

    return ratio


CONTRADICTED = {
    "P1": ("movement", (64, 50, 2, 32.0), 2.0),
    "P2": ("scale", (64, 400, 8, 32.0), 2.0),
    "P3": ("fixed_lora", (256, 50, 8, 32.0), 0.5),
    "P4": ("constant", (128, 50, 8, 32.0), 0.5),
    "P5": ("naive", (64, 50, 8, 8.0), 0.5),
    "P6": ("mu_a", (64, 50, 8, 8.0), 0.5),
    "P7": ("still", (64, 50, 8, 8.0), 0.5),
}
"""The theory of each claim, and a condition that contradicts it if its ratio is off by a factor."""


@pytest.mark.parametrize("claim_id", CONTRADICTED)
def test_a_theory_is_confirmed_where_all_conditions_follow_it_and_contradicted_by_one(claim_id):
    name, condition, factor = CONTRADICTED[claim_id]
    ratio = following(name)
    row = judged(claim_id, *world(ratio, [USUAL, condition]))
    assert (row["verdict"], row["kind"]) == ("confirmed", "own prediction")
    assert row["estimate"] == pytest.approx(1.0, abs=0.01)
    off = {Setting(*condition): factor}
    row = judged(claim_id, *world(lambda setting: ratio(setting) * off.get(setting, 1.0), [USUAL, condition]))
    assert row["verdict"] == "contradicted"
    assert abs(math.log2(row["estimate"])) == pytest.approx(1.0, abs=0.015)


def conditions(runs, curves):
    return prediction_table(measured_ratios(with_arm_columns(runs), curves, Judging()), DEFAULT)


def test_the_beginnings_of_long_runs_are_conditions_that_count_in_no_verdict():
    runs, curves = world(following("scale"), [(64, 400, 8, 32.0)])
    curves = pd.concat([curves, curves[curves["step"] == 32].assign(step=25)])
    # In the curves of these runs the loss at every step has the optimum of the end.
    every = conditions(runs, curves)
    assert list(every.columns) == COLUMNS
    np.testing.assert_allclose(every["off_by"], every["ratio"] / every["predicted"], rtol=1e-6)
    table = every.query("theory == 'movement'").set_index(["runs", "steps"])
    assert list(table.index) == [("own", 400), ("prefix", 25)]
    np.testing.assert_allclose(table["ratio"], following("scale")(Setting(64, 400, 8, 32.0)), rtol=1e-3)
    # The theory of A's movement predicts other ratios at both lengths from the same optimal LRs.
    assert table.loc[("own", 400), "predicted"] < table.loc[("prefix", 25), "predicted"]
    assert "prefix" not in judged("P1", runs, curves)["reason"]


def test_where_the_lr_falls_a_moves_by_the_mean_and_beginnings_do_not_count():
    condition = (64, 400, 8, 32.0)
    by_mean = predicted(DEFAULT, Setting(*condition))["movement"](np.log([FULLFT_LR / 2]))
    runs, curves = world(lambda setting: float(np.exp(by_mean[0])), [condition], schedule="linear")
    curves = pd.concat([curves, curves[curves["step"] == 32].assign(step=25)])
    [row] = conditions(runs, curves).query("theory == 'movement'").to_dict("records")
    assert (row["runs"], row["mean_lr"]) == ("own", 0.5)
    assert row["off_by"] == pytest.approx(1.0, rel=0.01)


def test_with_a_frozen_a_the_lr_is_that_of_b():
    about = {"model": "llama-64", "hidden_size": 64, "steps": 50, "batch_size": 8, "experiments": "lr_ratio"}
    theory = predicted(DEFAULT, Setting(64, 50, 8, 32.0, frozen=True))["movement"]
    of_b = FULLFT_LR * float(np.exp(theory(np.asarray(0.0))))
    arms = []
    for rank, optimum, adapter in ((None, FULLFT_LR, {}), (16, of_b / 1000, {"alpha": 32.0, "lr_ratio": 1000.0})):
        lrs = [optimum * factor for factor in (1 / 4.64, 1 / 2.15, 1.1, 2.15, 4.64)]
        arms.append(arm(rank, optimum=optimum, lrs=lrs, **about, **adapter))
    [row] = conditions(*tables(arms)).query("theory == 'movement' and runs == 'own'").to_dict("records")
    assert row["frozen"]
    assert row["lora_lr"] == pytest.approx(of_b, rel=0.01)
    assert row["off_by"] == pytest.approx(1.0, rel=0.01)
