"""How far the sampler is from the learner, on curves whose answer is known."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from lorabench.analysis.rl_health import sampler_mismatch

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
