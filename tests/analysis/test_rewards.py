from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabench.analysis.arms import rows_of
from lorabench.analysis.noise import seed_noise
from lorabench.analysis.rewards import GOOD, good_bands, reward_curves, reward_optima, with_error_rates
from lorabench.errors import UserError
from lorabench.tables.checks import check_table

from ..handmade.rl import BASE, CURVATURE, LRS, OFFSETS, STEPS, arm
from ..handmade.sft import arm as sft_arm
from ..handmade.sft import tables
from ..handmade.sft import tables as sft_tables


def grid(lrs, accuracies, statuses=None, repeats=(-0.001, 0.001)):
    """Return FullFT runs with accuracies by LR, equal on both splits, and two more seeds at the best LR."""
    best = int(np.argmax(accuracies))
    cells = [(lr, 0, accuracy) for lr, accuracy in zip(lrs, accuracies, strict=True)]
    cells += [(lrs[best], seed, min(1.0, accuracies[best] + offset)) for seed, offset in enumerate(repeats, start=1)]
    runs = pd.DataFrame(cells, columns=["lr", "seed", "final_reward"]).assign(
        run_id=lambda rows: [f"r{place}" for place in range(len(rows))],
        final_valid_reward=lambda rows: rows["final_reward"],
        status="done",
        task="rl",
        model="m",
        dataset="d",
        method="fullft",
        placement=None,
        batch_size=8,
    )
    runs["rank"] = pd.array([None] * len(runs), dtype="Int64")
    for place, status in (statuses or {}).items():
        runs.loc[place, "status"] = status
        if status == "diverged":
            runs.loc[place, ["final_reward", "final_valid_reward"]] = math.nan
    return runs


def band(*args, **changes):
    return good_bands(grid(*args, **changes)).iloc[0]


def test_error_rates_are_losses_of_rl_runs_alone():
    runs, _ = tables([arm(optimum=1e-4, best_gain=0.05, diverges_from=1e-2)])
    sft, _ = sft_tables([sft_arm(optimum=3e-4)])
    runs.loc[0, ["status", "final_reward", "final_valid_reward", "best_reward"]] = ["unrewarded", BASE, BASE, BASE]
    both = pd.concat([runs, sft])
    table = with_error_rates(both)
    assert list(table["run_id"]) == list(runs["run_id"])
    done = table["status"] == "done"
    assert table["status"].iloc[0] == "done"
    assert (table["status"] == "diverged").sum() == 1
    assert table.loc[done, "test_loss"].tolist() == pytest.approx((1 - runs.loc[done, "final_reward"]).tolist())
    assert table.loc[~done, "test_loss"].isna().all()
    best = with_error_rates(both, "best_reward")[done]
    assert best["test_loss"].tolist() == pytest.approx((1 - runs.loc[done, "best_reward"]).tolist())
    assert best["validation_loss"].tolist() == table.loc[done, "validation_loss"].tolist()
    assert table[["final_valid_nll", "final_test_nll"]].isna().all(axis=None)
    pd.testing.assert_frame_equal(with_error_rates(table), table)
    assert with_error_rates(sft.assign(final_reward=0.0, final_valid_reward=0.0)).empty
    assert seed_noise(table)["sigma"].item() == pytest.approx(OFFSETS[1])


def test_the_optimum_of_accuracy_is_interpolated():
    table = reward_optima(tables([arm(optimum=2e-4), arm(8, optimum=2e-3)])[0])
    assert table["lr_opt"].tolist() == pytest.approx([2e-4, 2e-3])
    assert table["reward_opt"].tolist() == pytest.approx([0.8, 0.8])
    assert table["resolved"].all()
    assert table["n_runs"].tolist() == [len(LRS)] * 2


def test_a_flat_top_has_an_interval_as_wide_as_itself_and_none_without_noise():
    lrs = [1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    flat = [0.2, 0.9, 0.9, 0.9, 0.9, 0.2]
    table = reward_optima(grid(lrs, flat, repeats=(0.01, -0.01))).iloc[0]
    assert table["lr_low"] < 2e-4
    assert table["lr_high"] > 1.5e-3
    assert table["lr_best"] == 1e-4
    # The accuracy is 1 with every seed at several LRs, any of which may be the best.
    certain = grid(lrs, [0.2, 1, 1, 1, 1, 0.2], repeats=(0, 0))
    for optimum in (reward_optima(certain).iloc[0], reward_optima(grid(lrs, flat, repeats=())).iloc[0]):
        assert not optimum["resolved"]
        assert math.isnan(optimum["lr_low"])
        assert optimum["reward_opt"] <= 1
    assert math.isnan(good_bands(certain)["width_low"].item())


def test_a_triangle_has_a_known_band():
    # 0.95 of the peak 0.8 is 0.76: a tenth of the way down on both sides.
    good_range = band([1e-5, 1e-4, 1e-3], [0.4, 0.8, 0.4])
    assert good_range["peak"] == pytest.approx(0.8)
    assert good_range["threshold"] == pytest.approx(0.76)
    assert good_range["width"] == pytest.approx(0.2)
    assert good_range["step"] == pytest.approx(1.0)
    assert (good_range["lr_low"], good_range["lr_high"]) == pytest.approx((10**-4.1, 10**-3.9))
    assert not good_range["open_low"]
    assert not good_range["open_high"]
    assert good_range["width_low"] < 0.2 < good_range["width_high"]


def test_a_band_that_reaches_the_edge_is_open_there():
    good_range = band([1e-5, 1e-4, 1e-3], [0.8, 0.8, 0.4])
    assert (good_range["width"], good_range["open_low"], good_range["open_high"]) == (pytest.approx(1.1), True, False)
    good_range = band([1e-5, 1e-4, 1e-3], [0.4, 0.8, 0.77])
    assert (good_range["open_low"], good_range["open_high"], good_range["lr_high"]) == (
        False,
        True,
        pytest.approx(1e-3),
    )


def test_one_unlucky_run_does_not_cut_off_what_lies_beyond():
    lrs = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]
    good_range = band(lrs, [0.0, 0.8, 0.72, 0.8, 0.0])
    whole = band(lrs, [0.0, 0.8, 0.8, 0.8, 0.0])
    assert good_range["width"] == pytest.approx(whole["width"] - 1.0)
    assert good_range["lr_high"] == pytest.approx(whole["lr_high"])


def test_a_diverged_run_has_no_reward():
    good_range = band([1e-5, 1e-4, 1e-3], [0.4, 0.8, 0.8], statuses={2: "diverged"})
    assert good_range["width"] == pytest.approx(0.1 + 0.05)
    assert good_range["n_diverged"] == 1


def test_without_a_peak_or_noise_there_is_no_band_or_no_interval():
    assert math.isnan(band([1e-5, 1e-4], [0.0, 0.0], repeats=(0, 0))["width"])
    alone = band([1e-5, 1e-4, 1e-3], [0.4, 0.8, 0.4], repeats=())
    assert alone["width"] == pytest.approx(0.2)
    assert math.isnan(alone["width_low"])
    nothing = band([1e-5], [0.5], statuses=dict.fromkeys(range(3), "diverged"))
    assert math.isnan(nothing["peak"])


FEW = settings(deadline=None, max_examples=15)
ACCURACIES = st.lists(st.floats(0.05, 1.0), min_size=2, max_size=6)


@FEW
@given(ACCURACIES, st.floats(-3, 3))
def test_the_width_does_not_depend_on_the_unit_of_lr(accuracies, shift):
    lrs = np.geomspace(1e-5, 1e-2, len(accuracies))
    repeats = (-0.01, -0.02)
    original, shifted = band(lrs, accuracies, repeats=repeats), band(lrs * 10**shift, accuracies, repeats=repeats)
    for name in ("width", "width_low", "width_high", "peak"):
        assert shifted[name] == pytest.approx(original[name], abs=1e-9)


@FEW
@given(ACCURACIES)
def test_a_run_on_the_line_between_two_lrs_changes_nothing(accuracies):
    lrs = np.geomspace(1e-5, 1e-2, len(accuracies))
    finer = np.geomspace(1e-5, 1e-2, 2 * len(accuracies) - 1)
    between = np.interp(np.log(finer), np.log(lrs), accuracies)
    width = band(lrs, accuracies)["width"]
    assert band(finer, between)["width"] == pytest.approx(width, abs=1e-6)
    assert 0 <= width <= 3 + 1e-9


def test_the_band_of_a_parabola_is_about_that_of_its_formula():
    lrs = np.geomspace(1e-5, 1e-2, 25)
    good_range = good_bands(tables([arm(optimum=lrs[12], lrs=lrs)])[0]).iloc[0]
    exact = 2 * math.sqrt((1 - GOOD) * 0.8 / CURVATURE) / math.log(10)
    assert good_range["width"] == pytest.approx(exact, rel=0.02)


def test_curves_at_the_best_lr_are_averaged_over_seeds():
    runs, curves = tables([arm(optimum=1e-4), arm(8, optimum=1e-3, peak=0.7)])
    table = reward_curves(runs, curves)
    fullft, lora = (rows_of(table, {"method": method}, ["method"]) for method in ("fullft", "lora"))
    assert list(fullft["step"]) == list(range(1, STEPS + 1))
    assert set(lora["lr"]) == {1e-3}
    last = lora.iloc[-1]
    assert (last["episodes"], last["n_seeds"], len(last["run_ids"])) == (64 * STEPS, len(OFFSETS), len(OFFSETS))
    assert last["mean"] == pytest.approx(0.7)
    assert last["sd"] == pytest.approx(OFFSETS[1])
    test = reward_curves(runs, curves, "aime24", "accuracy")
    assert test.groupby("method")["mean"].agg(["first", "last"]).loc["lora"].tolist() == pytest.approx([0.02, 0.3])


def test_no_curves_give_empty_tables():
    runs, curves = tables([arm(optimum=1e-4)])
    for none in (pd.DataFrame(), curves.iloc[:0], curves[curves["split"] == "test"]):
        assert reward_curves(runs, none).empty
    assert reward_curves(runs.iloc[:0], curves).empty
    assert good_bands(runs.iloc[:0]).empty
    assert len(reward_curves(runs, curves.drop(columns=["examples", "tokens"]))) == STEPS


@pytest.mark.parametrize(
    ("column", "value", "shown"),
    [
        ("final_reward", None, "missing; allowed: a share of 0 to 1 where RL finished"),
        ("final_valid_reward", 1.5, "1.5; allowed: a share of 0 to 1 where RL finished"),
        ("base_reward", -0.5, "-0.5; allowed: a share of 0 to 1"),
        ("best_reward", math.inf, "inf; allowed: a share of 0 to 1"),
        ("status", "stopped", "'stopped'; allowed: done, diverged, and unrewarded in RL"),
        ("task", "dpo", "'dpo'; allowed: sft, rl"),
    ],
)
def test_rl_runs_need_rewards_and_no_losses(column, value, shown):
    runs, _ = tables([arm(optimum=1e-4, final_valid_nll=None, final_test_nll=None)])
    check_table(runs)
    check_table(runs.assign(status="unrewarded"))
    runs.loc[1, column] = value
    with pytest.raises(UserError, match=f"run_id {runs.loc[1, 'run_id']}: {column} = {shown}"):
        check_table(runs)


def test_supervised_runs_are_never_unrewarded():
    runs, _ = sft_tables([sft_arm(optimum=3e-4)])
    for task in ({}, {"task": "sft"}, {"task": None}):
        check_table(runs.assign(**task))
        with pytest.raises(UserError, match="status = 'unrewarded'"):
            check_table(runs.assign(status="unrewarded", **task))
        with pytest.raises(UserError, match="final_test_nll = missing"):
            check_table(runs.assign(final_test_nll=None, **task))
