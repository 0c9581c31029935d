"""Rewards of RL as losses, health of runs, ranges of good LRs, flat tops and curves at the optimum."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis.arms import rows_of, with_arm_columns
from lorabench.analysis.comparison import Comparison, Judging, comparisons
from lorabench.analysis.estimate import ExampleLosses
from lorabench.analysis.rewards import (
    beyond_controls,
    flat_top,
    good_range,
    is_sick,
    leads,
    reward_curves,
    sampler_mismatch,
    with_error_rates,
)
from lorabench.errors import UserError
from lorabench.store.checks import check_table

from ..handmade.rl import BASE, OFFSETS, STEPS, arm
from ..handmade.sft import arm as sft_arm
from ..handmade.sft import tables

LRS = [10**-4, 10**-3.5, 10**-3, 10**-2.5, 10**-2]  # half a decade apart


def compared(accuracies, noise=0.0, seeds=3, statuses=None, losses=None) -> Comparison:
    """Make FullFT with the given accuracies by LR, with noise in each of its seeds."""
    rng, rows = np.random.default_rng(0), []
    for lr, accuracy in zip(LRS, accuracies, strict=True):
        status = (statuses or {}).get(lr, "done")
        for seed in range(seeds):
            reward = accuracy + noise * rng.standard_normal() if status == "done" else math.nan
            rows.append({"run_id": f"{lr:g}-{seed}", "lr": lr, "seed": seed, "status": status, "final_reward": reward})
    about = {"task": "rl", "model": "m", "dataset": "d", "method": "fullft", "placement": None, "batch_size": 8}
    runs = pd.DataFrame(rows).assign(**about, steps=10, final_valid_reward=lambda table: table["final_reward"])
    runs["rank"] = pd.array([None] * len(runs), dtype="Int64")
    examples = ExampleLosses.of(pd.DataFrame() if losses is None else losses(runs))
    [comparison] = comparisons(with_arm_columns(with_error_rates(runs)), pd.DataFrame(), Judging(examples=examples))
    return comparison


def measured(*args, **settings):
    comparison = compared(*args, **settings)
    return good_range(comparison, comparison.arms[0])


def test_error_rates_are_losses_of_rl_runs_alone():
    runs, _ = tables([arm(optimum=1e-4, best_gain=0.05, diverges_from=1e-2)])
    sft, _ = tables([sft_arm(optimum=3e-4)])
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


def test_steps_of_the_grid_in_which_a_range_ends_count_half():
    good = measured([0.2, 0.8, 0.8, 0.8, 0.2], noise=1e-4)
    assert (good.width.value, good.open) == (pytest.approx(1.5), False)
    assert (good.lr_low, good.lr_high, *good.between) == pytest.approx((LRS[1], LRS[3], 10**-3.75, 10**-2.25))
    # The range may end anywhere in these two steps: the sum of two uniform numbers lies within 0.22 to 1.78 of 2.
    assert good.width.interval() == pytest.approx((1 + 0.11, 1 + 0.89), abs=0.03)
    assert good.width.example_part is None
    # One bad LR does not cut off those beyond.
    apart = measured([0.2, 0.8, 0.5, 0.8, 0.2], noise=1e-4)
    assert (apart.width.value, apart.lr_low, apart.lr_high) == pytest.approx((1, LRS[1], LRS[3]))
    # Without noise there is no interval.
    single = measured([0.2, 0.7, 0.8, 0.7, 0.2], seeds=1, noise=0.01)
    assert (single.width.value, single.width.known) == (pytest.approx(0.5), False)


def test_a_range_that_reaches_the_end_of_its_grid_is_open_there():
    good = measured([0.2, 0.7, 0.8, 0.79, 0.79], noise=1e-3)
    assert (good.open_low, good.open_high) == (False, True)
    # The last accuracy is below the threshold of 0.76, but the noise may hide that it is good.
    assert measured([0.2, 0.7, 0.8, 0.79, 0.75], noise=0.02).open_high
    # A diverged run has no reward.
    bounded = measured([0.2, 0.79, 0.8, 0.79, 0.8], noise=1e-3, statuses={LRS[4]: "diverged"})
    assert (bounded.width.value, bounded.open) == (pytest.approx(1.5), False)


def test_test_problems_are_resampled_for_the_range():
    def losses(own):
        rng = np.random.default_rng(1)

        def table(runs):
            orders = [rng.permutation(100) if own else np.arange(100) for _ in runs.index]
            solved = zip(runs["run_id"], orders, (100 * runs["final_reward"]).round(), strict=True)
            parts = [pd.DataFrame({"run_id": run, "loss": (order >= n).astype(float)}) for run, order, n in solved]
            return pd.concat([part.assign(example=range(100), tokens=1) for part in parts])

        return table

    accuracies = [0.2, 0.79, 0.8, 0.79, 0.2]
    same, own = (measured(accuracies, noise=1e-3, losses=losses(own)).width for own in (False, True))
    assert (same.n_examples, same.value) == (100, pytest.approx(1.5))
    # Where all runs solve the same problems, another draw of problems moves all of them alike.
    assert float(np.std(same.example_part)) < 0.5 * float(np.std(own.example_part))


def test_lrs_with_one_accuracy_are_a_flat_top():
    def top(*accuracies, **settings):
        comparison = compared(accuracies, **settings)
        return flat_top(comparison, comparison.arms[0])

    assert top(0.2, 0.8, 0.8, 0.4, 0.2) == pytest.approx(LRS[1:3])
    assert top(0.2, 0.8, 0.8, 0.8, 0.8) == pytest.approx(LRS[1:])
    assert top(0.2, 0.2, 0.8, 0.7, 0.2) == []
    # Two LRs within the noise are no flat top, but three are.
    assert top(0.5, 0.8, 0.8, 0.5, 0.2, noise=0.01) == []
    assert len(top(0.5, 0.8, 0.8, 0.8, 0.2, noise=0.01)) >= 3


def test_curves_near_the_optimal_lr_are_averaged_over_seeds():
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


@pytest.mark.parametrize(
    ("column", "value", "shown"),
    [
        ("final_reward", None, "missing; allowed: a share of 0 to 1 where RL finished"),
        ("best_reward", math.inf, "inf; allowed: a share of 0 to 1"),
        ("status", "stopped", "'stopped'; allowed: done, diverged, and unrewarded in RL"),
    ],
)
def test_rl_runs_need_rewards_and_no_losses(column, value, shown):
    runs, _ = tables([arm(optimum=1e-4, final_valid_nll=None, final_test_nll=None)])
    check_table(runs)
    check_table(runs.assign(status="unrewarded"))
    runs.loc[1, column] = value
    with pytest.raises(UserError, match=f"run_id {runs.loc[1, 'run_id']}: {column} = {shown}"):
        check_table(runs)


def healthy(**columns):
    about = {"task": "rl", "model": "tiny", "dataset": "sums", "status": "done"}
    controls = {"constant_reward": 0.1, "rule_reward": 0.4, "final_entropy": 0.1, "final_truncated": 0.0}
    table = pd.DataFrame(
        {
            "run_id": list("abcd"),
            "method": ["fullft", "fullft", "lora", "lora"],
            "rank": [None, None, 8, 8],
            "placement": [None, None, "all", "all"],
            "lr": [1e-4, 1e-3, 1e-3, 1e-2],
            "final_reward": [0.5, 0.7, 0.6, 0.2],
            "final_valid_reward": [0.5, 0.7, 0.6, 0.2],
        }
    )
    return table.assign(**about | controls | columns)


def test_each_method_is_compared_with_the_higher_control():
    table = leads(healthy()).set_index("method")
    assert table["accuracy"].to_dict() == {"fullft": 0.7, "lora": 0.6}
    assert table["lead"].to_dict() == pytest.approx({"fullft": 0.3, "lora": 0.2})
    assert beyond_controls(healthy()).tolist() == [True]
    assert beyond_controls(healthy(rule_reward=0.5)).tolist() == [False], "LoRA is ahead by 10 points only"
    assert beyond_controls(healthy(rule_reward=None, constant_reward=None)).tolist() == [False]


def test_sick_runs_are_those_cut_off_or_collapsed_below_the_controls():
    def sick(**columns):
        table = healthy(**columns)
        return "".join(table.loc[is_sick(table), "run_id"])

    assert sick(final_truncated=[0.0, 0.2, 0.1, 0.0]) == "b"
    # A policy without entropy is sick only where it does no better than the controls.
    assert sick(final_entropy=0.01) == "d"
    assert sick(final_entropy=None, final_truncated=None) == ""
    # A run that ends below its base is sick where it does no better than the controls, and loses 5 points or more.
    assert sick(base_reward=0.55) == "d"
    assert sick(base_reward=0.24) == sick(base_reward=0.55, rule_reward=0.1) == ""
    # The second run and the fourth end as they began, which no optimum does.
    assert sick(final_truncated=1.0, base_reward=[0.1, 0.7, 0.1, 0.2]) == "ac"


def test_a_sick_run_is_never_an_optimum():
    table = healthy(final_truncated=[0.0, 0.9, 0.0, 0.0])
    assert leads(table).set_index("method")["accuracy"].to_dict() == {"fullft": 0.5, "lora": 0.6}
    errors = with_error_rates(table).set_index("run_id")
    assert errors["status"].to_dict() == {"a": "done", "b": "diverged", "c": "done", "d": "done"}
    assert errors.loc["b", ["test_loss", "validation_loss"]].isna().all()
    pd.testing.assert_frame_equal(with_error_rates(errors), errors)


KL = {"a": [0.002, -0.02], "b": [0.004, 0.01], "c": [0.0, 0.0]}
RATIOS = {"a": [1.5, 3.0], "b": [1.2, 1.1]}


def test_measures_are_over_steps_and_runs_and_absent_ones_stay_absent():
    columns = {"task": ["rl", "rl", "rl", "sft"], "method": ["lora", "lora", "fullft", "lora"], "rank": [8, 8, None, 8]}
    about = {"model": "tiny", "dataset": "sums", "placement": "all", "batch_size": 64}
    runs = pd.DataFrame({"run_id": list("abcd"), **columns}).assign(**about)
    measures = {"kl": KL, "ratio_max": RATIOS, "ratio_above_2": {"a": [0.1, 0.3]}}
    points = [
        (run_id, step, "train", metric, value)
        for metric, by_run in measures.items()
        for run_id, values in by_run.items()
        for step, value in enumerate(values, 1)
    ]
    curves = pd.DataFrame(points, columns=["run_id", "step", "split", "metric", "value"])
    fullft, lora = sampler_mismatch(runs, curves).to_dict("records")
    assert (lora["kl_mean"], lora["kl_max"]) == pytest.approx((-0.001, 0.02))
    # The limit itself is not above the limit, and a negative KL of the same size is.
    assert (lora["n_above"], lora["n_measured"]) == (1, 2)
    assert (lora["ratio_max"], lora["ratio_above_2"]) == pytest.approx((3.0, 0.2))
    assert (fullft["kl_max"], fullft["n_above"], fullft["n_measured"]) == (0, 0, 1)
    assert all(math.isnan(of[name]) for of, name in ((lora, "ratio_mean"), (fullft, "ratio_above_2")))

    [without, _] = sampler_mismatch(runs, pd.DataFrame()).to_dict("records")
    assert (math.isnan(without["kl_max"]), without["n_above"], without["n_measured"]) == (True, 0, 0)
