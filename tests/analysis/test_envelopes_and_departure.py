from __future__ import annotations

import math

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lorabench.analysis.departure import departures
from lorabench.analysis.envelopes import envelopes

from ..handmade.sft import arm, noise_table, tables


def by_hand(values: dict[str, list[float]], steps=(0, 1, 2, 4)) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make a LoRA arm with runs `a`, `b`, ... at LRs 1, 2, ... that have the given validation losses."""
    lrs = {run_id: float(index) for index, run_id in enumerate(values, start=1)}
    runs = pd.DataFrame(
        {
            "run_id": list(values),
            "model": "tiny",
            "dataset": "instruct",
            "method": "lora",
            "rank": pd.array([8] * len(values), dtype="Int64"),
            "placement": "all",
            "batch_size": 16,
            "lr": list(lrs.values()),
            "seed": 0,
        }
    )
    curves = pd.DataFrame(
        [
            (run_id, step, 16 * step, 100 * step, "validation", "nll", value)
            for run_id, of_run in values.items()
            for step, value in zip(steps, of_run, strict=True)
        ],
        columns=["run_id", "step", "examples", "tokens", "split", "metric", "value"],
    )
    return runs, curves


def test_the_envelope_is_the_lowest_loss_at_each_step():
    runs, curves = by_hand({"a": [5.0, 4.0, 3.0, 2.5], "b": [5.0, 3.5, 3.2, 2.4], "c": [5.0, 3.0, math.nan, math.nan]})
    found = envelopes(runs, curves)
    assert found["value"].tolist() == [5.0, 3.0, 3.0, 2.4]
    assert found["run_id"].tolist() == ["a", "c", "a", "b"]
    assert found["lr"].tolist() == [1.0, 3.0, 1.0, 2.0]
    assert found["n_runs"].tolist() == [3, 3, 2, 2]
    assert found["tokens"].tolist() == [0, 100, 200, 400]
    assert found["rank"].tolist() == [8] * 4


def test_repeats_and_other_splits_and_metrics_are_not_in_the_envelope():
    runs, curves = by_hand({"a": [5.0, 4.0, 3.0, 2.5], "b": [0.0, 0.0, 0.0, 0.0]})
    runs["lr"], runs["seed"] = 1.0, [0, 1]
    noise = curves.assign(value=-1.0)
    curves = pd.concat([curves, noise.assign(split="train"), noise.assign(metric="grad_norm")])
    assert envelopes(runs, curves)["value"].tolist() == [5.0, 4.0, 3.0, 2.5]
    assert envelopes(runs, curves, split="train")["value"].tolist() == [-1.0] * 4


def test_no_curves_no_envelope():
    runs, curves = by_hand({"a": [5.0, 4.0, 3.0, 2.5]})
    for empty in (curves.iloc[:0], pd.DataFrame()):
        assert envelopes(runs, empty).empty
    assert departures(envelopes(runs, curves.iloc[:0]), noise_table(0.01)).empty


@settings(max_examples=10, deadline=None)
@given(arrays(float, (3, 4), elements=st.floats(0, 10)))
def test_an_envelope_is_below_every_run_and_touches_one(values):
    runs, curves = by_hand({name: list(of_run) for name, of_run in zip("abc", values, strict=True)})
    assert np.array_equal(envelopes(runs, curves)["value"], values.min(axis=0))


def envelope(rank: int | None, values: list[float], dataset: str = "instruct") -> pd.DataFrame:
    steps = [2**i for i in range(len(values))]
    return pd.DataFrame(
        {
            "model": "tiny",
            "dataset": dataset,
            "method": "fullft" if rank is None else "lora",
            "rank": pd.array([rank] * len(values), dtype="Int64"),
            "placement": None if rank is None else "all",
            "batch_size": 16,
            "step": steps,
            "value": values,
        }
    )


def test_departure_is_where_an_arm_stays_above_two_sigma_to_the_end():
    table = pd.concat(
        [
            envelope(None, [3.0, 2.0, 1.0, 1.0, 1.0, 1.0]),
            # The arm is above for long, as LoRA is at first, but not at the end.
            envelope(64, [3.5, 2.5, 1.5, 1.5, 1.5, 1.0]),
            # The arm is above once, then not, and then above for good.
            envelope(8, [3.0, 2.5, 1.01, 1.03, 1.03, 1.03]),
            # The arm is above at the end, but only at two points.
            envelope(4, [3.0, 2.0, 1.0, 1.0, 1.5, 1.5]),
            envelope(1, [3.5, 2.5, 1.5, 1.5, 1.5, 1.5]),
        ]
    )
    found = departures(table, noise_table(0.01)).set_index("rank")
    assert found["departed"].tolist() == [False, True, False, True, False]
    assert found["step"].tolist() == [pd.NA, 1, pd.NA, 8, pd.NA]
    # With more noise, a small excess is not a departure.
    assert departures(table, noise_table(0.02))["departed"].sum() == 1


def test_step_zero_is_ignored():
    runs, curves = tables([arm(optimum=3e-4), arm(1, optimum=1e-3, leaves_at=0)])
    assert departures(envelopes(runs, curves), noise_table(0.01))["step"].tolist() == [pd.NA, 1]


def test_departure_is_unknown_without_sigma_or_with_few_points():
    table = pd.concat([envelope(None, [1.0, 1.0, 1.0]), envelope(1, [2.0, 2.0, 2.0])])
    assert departures(table, noise_table(math.nan))["departed"].isna().all()
    assert departures(table[table["step"] < 4], noise_table(0.01))["departed"].isna().all()


def test_arms_of_other_data_are_not_compared():
    table = pd.concat([envelope(None, [1.0] * 3, "other"), envelope(1, [2.0] * 3)])
    noise = pd.concat([noise_table(0.01), noise_table(0.01, dataset="other")])
    assert departures(table, noise)["departed"].tolist() == [False, False]


@settings(max_examples=10, deadline=None)
@given(st.floats(0.5, 2.0), st.lists(st.sampled_from([1.0, 1.5]), min_size=3, max_size=8))
def test_departure_does_not_change_when_all_losses_shift(shift, values):
    noise = noise_table(0.1)
    low = [1.0] * len(values)
    found = departures(pd.concat([envelope(None, low), envelope(1, values)]), noise)
    lifted = [value + shift for value in values]
    moved = departures(pd.concat([envelope(None, [1.0 + shift] * len(low)), envelope(1, lifted)]), noise)
    pd.testing.assert_frame_equal(found, moved)
    assert found["departed"].iloc[-1] == (values[-3:] == [1.5] * 3)
