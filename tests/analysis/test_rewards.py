"""Rewards of RL as losses, health of runs, what a missed LR costs and flat tops."""

import math

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis import rewards
from lorabench.analysis.arms import with_arm_columns
from lorabench.analysis.comparison import Comparison, Judging, comparisons
from lorabench.analysis.estimate import ExampleLosses

from ..handmade.rl import BASE, arm
from ..handmade.sft import arm as sft_arm
from ..handmade.sft import tables

LRS = [10**-4, 10**-3.5, 10**-3, 10**-2.5, 10**-2]  # half a decade apart


def compared(accuracies, noise=0.0, seeds=3, statuses=None, losses=None, lrs=LRS) -> Comparison:
    """Make FullFT with the given accuracies by LR, with noise in each of its seeds, which may differ by LR."""
    rng, rows = np.random.default_rng(0), []
    for lr, accuracy, sd in zip(lrs, accuracies, np.broadcast_to(noise, len(lrs)), strict=True):
        status = (statuses or {}).get(lr, "done")
        for seed in range(seeds):
            reward = accuracy + sd * rng.standard_normal() if status == "done" else math.nan
            rows.append({"run_id": f"{lr:g}-{seed}", "lr": lr, "seed": seed, "status": status, "final_reward": reward})
    about = {"task": "rl", "model": "m", "dataset": "d", "method": "fullft", "placement": None, "batch_size": 8}
    runs = pd.DataFrame(rows).assign(**about, steps=10, final_valid_reward=lambda table: table["final_reward"])
    runs["rank"] = pd.array([None] * len(runs), dtype="Int64")
    examples = ExampleLosses.of(pd.DataFrame() if losses is None else losses(runs))
    [comparison] = comparisons(
        with_arm_columns(rewards.with_error_rates(runs)), pd.DataFrame(), Judging(examples=examples)
    )
    return comparison


def test_error_rates_are_losses_of_rl_runs_alone():
    runs, _ = tables([arm(optimum=1e-4, best_gain=0.05, diverges_from=1e-2)])
    sft, _ = tables([sft_arm(optimum=3e-4)])
    runs.loc[0, ["status", "final_reward", "final_valid_reward", "best_reward"]] = ["unrewarded", BASE, BASE, BASE]
    both = pd.concat([runs, sft])
    for reward in ("final_reward", "best_reward"):
        table = rewards.with_error_rates(both, reward)
        assert list(table["run_id"]) == list(runs["run_id"])
        done = table["status"] == "done"
        assert (bool(done.iloc[0]), (table["status"] == "diverged").sum()) == (True, 1)
        assert table.loc[done, "test_loss"].tolist() == pytest.approx((1 - runs.loc[done, reward]).tolist())
        assert table.loc[~done, "test_loss"].isna().all()


def cost_of(*args, **settings):
    comparison = compared(*args, **settings)
    return rewards.cost_of_a_miss(comparison, comparison.arms[0])


THIRDS = [10 ** (-3 + k / 3) for k in (-2, -1, 0, 1, 2)]  # a third of a decade apart
PEAK = [0.6, 0.75, 0.8, 0.75, 0.6]
NEAR_PEAK = 0.8 * 5 / 8 + 0.75 * 3 / 8  # the mean up to a quarter of a decade from the third LR
LAST = 1 / 12 / NEAR_PEAK  # the cost of losing the whole accuracy at the last LR


def test_a_breakdown_costs_what_it_loses_and_a_run_without_an_accuracy_all():
    last = {THIRDS[4]: "diverged"}
    whole, broken, lost = (
        cost_of([*PEAK[:4], accuracy], noise=1e-5, statuses=statuses, lrs=THIRDS).value
        for accuracy, statuses in ((0.6, None), (0.3, None), (0.3, last))
    )
    assert (broken - whole, lost - whole) == pytest.approx((0.3 * LAST, 0.6 * LAST), rel=0.01)


def test_the_error_of_a_cost_is_that_of_the_lr_that_is_noisy():
    deviation = 0.05 * np.random.default_rng(0).standard_normal(15)[12:].std(ddof=1)
    low, high = cost_of(PEAK, noise=[1e-6, 1e-6, 1e-6, 1e-6, 0.05], lrs=THIRDS).interval()
    # t with 2 degrees of freedom
    assert (high - low) / 2 == pytest.approx(4.303 * LAST * deviation / math.sqrt(3), rel=0.03)
    # Without repeated runs no error is known.
    assert not cost_of(PEAK, noise=0.01, seeds=1, lrs=THIRDS).known


def test_test_problems_are_resampled_for_the_cost():
    def losses(runs):
        solved = zip(runs["run_id"], (100 * runs["final_reward"]).round(), strict=True)
        parts = [
            pd.DataFrame({"run_id": run, "example": range(100), "loss": np.arange(100.0) >= n}) for run, n in solved
        ]
        return pd.concat(parts).assign(tokens=1)

    cost = cost_of([0.2, 0.79, 0.8, 0.79, 0.2], noise=1e-3, losses=losses)
    # Problems that one run solves by chance are part of the noise between seeds already.
    assert (cost.n_examples, 0 < float(np.std(cost.example_part)) < 0.02) == (100, True)


def test_the_lrs_that_a_cost_lacks_are_named():
    def lacking(*accuracies, lrs):
        comparison = compared(accuracies, lrs=lrs, noise=1e-5)
        return rewards.missing_lrs(comparison, comparison.arms[0])

    assert lacking(*PEAK[1:4], lrs=THIRDS[1:4]) == [], "a third of a decade to both sides is enough"
    assert lacking(0.79, 0.8, 0.79, lrs=[9e-4, 1e-3, 1.1e-3]) == pytest.approx([10**-3.5, 10**-2.5], rel=0.1)
    assert lacking(0.1, 0.75, 0.8, 0.75, lrs=[1e-5, 5e-4, 1e-3, 2e-3]) == pytest.approx([(1e-5 * 5e-4) ** 0.5])


def test_lrs_with_one_accuracy_are_a_flat_top():
    def top(*accuracies, **settings):
        comparison = compared(accuracies, **settings)
        return rewards.flat_top(comparison, comparison.arms[0])

    assert top(0.2, 0.8, 0.8, 0.4, 0.2) == pytest.approx(LRS[1:3])
    assert top(0.2, 0.2, 0.8, 0.7, 0.2) == []
    # Two LRs within the noise are no flat top, but three are.
    assert top(0.5, 0.8, 0.8, 0.5, 0.2, noise=0.01) == []
    assert len(top(0.5, 0.8, 0.8, 0.8, 0.2, noise=0.01)) >= 3


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
    table = rewards.leads(healthy()).set_index("method")
    assert table["accuracy"].to_dict() == {"fullft": 0.7, "lora": 0.6}
    assert table["lead"].to_dict() == pytest.approx({"fullft": 0.3, "lora": 0.2})
    assert rewards.beyond_controls(healthy()).tolist() == [True]
    assert rewards.beyond_controls(healthy(rule_reward=0.5)).tolist() == [False], "LoRA is ahead by 10 points only"


def test_sick_runs_are_those_cut_off_or_collapsed_below_the_controls():
    def sick(**columns):
        table = healthy(**columns)
        return "".join(table.loc[rewards.is_sick(table), "run_id"])

    assert sick(final_truncated=[0.0, 0.2, 0.1, 0.0]) == "b"
    # A policy without entropy is sick only where it does no better than the controls.
    assert sick(final_entropy=0.01) == "d"
    assert sick(final_entropy=None, final_truncated=None) == ""
    # A run that ends below its base is sick where it does no better than the controls, and loses 5 points or more.
    assert sick(base_reward=0.55) == "d"
    assert sick(base_reward=0.24) == sick(base_reward=0.55, rule_reward=0.1) == ""
    # The second run and the fourth end as they began, which no optimum does.
    assert sick(final_truncated=1.0, base_reward=[0.1, 0.7, 0.1, 0.2]) == "ac"
