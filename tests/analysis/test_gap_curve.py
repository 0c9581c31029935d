from __future__ import annotations

import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabench.analysis.arms import each_arm
from lorabench.analysis.gap_curve import envelope_gap, gap_at, gap_curve

from ..handmade.sft import arm, tables


def arms_of(runs):
    fullft, lora = (arm for arm, _ in each_arm(runs))
    return lora, fullft


def test_the_gap_is_between_runs_at_the_best_lrs_of_one_seed():
    runs, curves = tables(
        [arm(optimum=3e-4, offsets=(0.0, 0.4, -0.3)), arm(8, optimum=3e-3, offsets=(0.01, 0.43, -0.3), leaves_at=64)]
    )
    gaps = gap_curve(runs, curves, *arms_of(runs))
    assert sorted(gaps["seed"].unique()) == [0, 1, 2]
    assert gaps["step"].min() == 1
    early = gaps[gaps["step"] < 64].groupby("seed")["gap"]
    for seed, gap in enumerate((0.01, 0.03, 0.0)):
        assert early.get_group(seed).tolist() == pytest.approx([gap] * 6)
    assert gap_at(gaps, 1.0).tolist() == pytest.approx([0.21, 0.23, 0.2])
    assert gap_at(gaps, 0.25).tolist() == pytest.approx([0.01, 0.03, 0.0])


def test_seeds_without_a_partner_and_missing_values_are_left_out():
    runs, curves = tables([arm(optimum=3e-4), arm(8, optimum=3e-3, offsets=(0.0, 0.004))])
    curves.loc[curves["step"] == 16, "value"] = math.nan
    gaps = gap_curve(runs, curves, *arms_of(runs))
    assert sorted(gaps["seed"].unique()) == [0, 1]
    assert 16 not in set(gaps["step"])


def test_the_gap_of_envelopes_follows_the_lowest_lr_at_each_step():
    runs, curves = tables([arm(optimum=3e-4), arm(8, optimum=3e-3)])
    other_lr = runs.loc[runs["rank"].eq(8) & runs["lr"].eq(1e-2), "run_id"]
    curves.loc[curves["run_id"].isin(other_lr) & (curves["step"] == 8), "value"] = 1.0
    lora, fullft = arms_of(runs)
    gaps = envelope_gap(runs, curves, lora, fullft).set_index("step")["gap"]
    assert gaps[8] == pytest.approx(1.0 - (2.0 + 1 / 8))
    assert gaps.drop(8).tolist() == pytest.approx([0.0] * 7)
    at_best = gap_curve(runs, curves, lora, fullft)
    assert at_best["gap"].tolist() == pytest.approx([0.0] * len(at_best))


def test_no_curves_are_no_gap():
    runs, curves = tables([arm(optimum=3e-4), arm(8, optimum=3e-3)])
    for none in (curves.iloc[:0], pd.DataFrame()):
        for gaps in (gap_curve(runs, none, *arms_of(runs)), envelope_gap(runs, none, *arms_of(runs))):
            assert gaps.empty
            assert list(gaps.columns) == ["seed", "step", "share", "gap"]
            assert gap_at(gaps, 1.0).empty


@given(share=st.floats(0.1, 1.0), slope=st.floats(-1, 1))
def test_between_points_the_gap_is_linear_in_log_step(share, slope):
    shares = [0.1, 0.3, 1.0]
    curve = pd.DataFrame({"seed": 0, "share": shares, "gap": [slope * math.log(share) for share in shares]})
    assert gap_at(curve, share)[0] == pytest.approx(slope * math.log(share), abs=1e-9)


def test_before_the_first_point_nothing_is_known():
    curve = pd.DataFrame({"seed": 0, "share": [0.6, 1.0], "gap": [0.1, 0.2]})
    assert math.isnan(gap_at(curve, 0.5)[0])
