"""Leads over the controls, sick runs, and the distance of the sampler, on tables whose answers are known."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from lorabench.analysis.rewards import beyond_controls, is_sick, leads, sampler_mismatch, with_error_rates


def runs(**columns):
    table = pd.DataFrame(
        {
            "run_id": list("abcd"),
            "task": "rl",
            "model": "tiny",
            "dataset": "sums",
            "method": ["fullft", "fullft", "lora", "lora"],
            "rank": [None, None, 8, 8],
            "placement": [None, None, "all", "all"],
            "lr": [1e-4, 1e-3, 1e-3, 1e-2],
            "status": "done",
            "final_reward": [0.5, 0.7, 0.6, 0.2],
            "final_valid_reward": [0.5, 0.7, 0.6, 0.2],
            "constant_reward": 0.1,
            "rule_reward": 0.4,
            "final_entropy": 0.1,
            "final_truncated": 0.0,
        }
    )
    return table.assign(**columns)


def test_each_method_is_compared_with_the_higher_control():
    table = leads(runs()).set_index("method")
    assert table["accuracy"].to_dict() == {"fullft": 0.7, "lora": 0.6}
    assert table["lead"].to_dict() == pytest.approx({"fullft": 0.3, "lora": 0.2})
    assert beyond_controls(runs()).tolist() == [True]
    assert beyond_controls(runs(rule_reward=0.5)).tolist() == [False], "LoRA is ahead by 10 points only"
    assert beyond_controls(runs(rule_reward=None, constant_reward=None)).tolist() == [False]


def test_sick_runs_are_those_cut_off_or_collapsed_below_the_controls():
    def sick(**columns):
        table = runs(**columns)
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
    table = runs(final_truncated=[0.0, 0.9, 0.0, 0.0])
    assert leads(table).set_index("method")["accuracy"].to_dict() == {"fullft": 0.5, "lora": 0.6}
    errors = with_error_rates(table).set_index("run_id")
    assert errors["status"].to_dict() == {"a": "done", "b": "diverged", "c": "done", "d": "done"}
    assert errors.loc["b", ["test_loss", "validation_loss"]].isna().all()
    pd.testing.assert_frame_equal(with_error_rates(errors), errors)


KL = {"a": [0.002, -0.02], "b": [0.004, 0.01], "c": [0.0, 0.0]}
RATIOS = {"a": [1.5, 3.0], "b": [1.2, 1.1]}


def test_measures_are_over_steps_and_runs_and_absent_ones_stay_absent():
    columns = {"task": ["rl", "rl", "rl", "sft"], "method": ["lora", "lora", "fullft", "lora"]}
    settings = {"model": "tiny", "dataset": "sums", "rank": [8, 8, None, 8], "placement": "all", "batch_size": 64}
    runs = pd.DataFrame({"run_id": list("abcd"), **columns, **settings})
    points = [
        (run_id, step, "train", metric, value)
        for metric, of_runs in (("kl", KL), ("ratio_max", RATIOS), ("ratio_above_2", {"a": [0.1, 0.3]}))
        for run_id, values in of_runs.items()
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
    assert math.isnan(without["kl_max"])
    assert (without["n_above"], without["n_measured"]) == (0, 0)
