"""Leads over the controls, and runs of RL that ended sick, on tables whose answers are known."""

from __future__ import annotations

import pandas as pd
import pytest

from lorabench.analysis.rewards import with_error_rates
from lorabench.analysis.rl_health import beyond_controls, is_sick, leads


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


@pytest.mark.parametrize(
    ("columns", "sick"),
    [
        ({"final_truncated": [0.0, 0.2, 0.1, 0.0]}, "b"),
        # A policy without entropy is sick only where it does no better than the controls.
        ({"final_entropy": 0.01}, "d"),
        ({"final_entropy": None, "final_truncated": None}, ""),
        # A run that ends below its base is sick where it does no better than the controls, and loses 5 points or more.
        ({"base_reward": 0.55}, "d"),
        ({"base_reward": 0.24}, ""),
        ({"base_reward": 0.55, "rule_reward": 0.1}, ""),
        # The second run and the fourth end as they began, which no optimum does.
        ({"final_truncated": 1.0, "base_reward": [0.1, 0.7, 0.1, 0.2]}, "ac"),
    ],
)
def test_sick_runs_are_those_cut_off_or_collapsed_below_the_controls(columns, sick):
    table = runs(**columns)
    assert "".join(table.loc[is_sick(table), "run_id"]) == sick


def test_a_sick_run_is_never_an_optimum():
    table = runs(final_truncated=[0.0, 0.9, 0.0, 0.0])
    assert leads(table).set_index("method")["accuracy"].to_dict() == {"fullft": 0.5, "lora": 0.6}
    errors = with_error_rates(table).set_index("run_id")
    assert errors["status"].to_dict() == {"a": "done", "b": "diverged", "c": "done", "d": "done"}
    assert errors.loc["b", ["test_loss", "validation_loss"]].isna().all()
    pd.testing.assert_frame_equal(with_error_rates(errors), errors)
