from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lorabench.analysis.curves import PairedCurves, envelopes
from lorabench.analysis.departure import departures
from lorabench.analysis.estimate import generator
from lorabench.analysis.optimal_curves import paired_departure

from ..handmade.sft import noise_table


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
            # The arm is above once, then not, and then above for good, by ever more.
            envelope(8, [3.0, 2.5, 1.01, 1.03, 1.04, 1.07]),
            # The arm is above at the end, but only at two points.
            envelope(4, [3.0, 2.0, 1.0, 1.0, 1.5, 1.6]),
            # The arm comes nearer, and departs where it is nearest.
            envelope(2, [3.5, 2.4, 1.3, 1.2, 1.3, 1.4]),
            # The arm comes nearer to the end, or keeps its distance: it learns slowly.
            envelope(1, [3.5, 2.5, 1.4, 1.3, 1.2, 1.2]),
            envelope(16, [3.5, 2.5, 1.5, 1.5, 1.5, 1.51]),
        ]
    )
    found = departures(table, noise_table(0.01)).set_index("rank")
    assert found.loc[found["departed"], "step"].to_dict() == {2: 8, 8: 8}
    assert found["departed"].notna().all()
    # With more noise, a small excess is not a departure.
    assert departures(table, noise_table(0.02))["departed"].sum() == 1


def test_step_zero_is_ignored():
    table = pd.concat([envelope(None, [1.0] * 4), envelope(1, [1.2, 1.3, 1.4, 1.5])])
    at_start = pd.concat([envelope(None, [1.0]), envelope(1, [1.1])]).assign(step=0)
    assert departures(pd.concat([at_start, table]), noise_table(0.01))["step"].tolist() == [pd.NA, 1]


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
    values = [value + 0.3 * (place == len(values) - 1) for place, value in enumerate(values)]
    found = departures(pd.concat([envelope(None, low), envelope(1, values)]), noise)
    lifted = [value + shift for value in values]
    moved = departures(pd.concat([envelope(None, [1.0 + shift] * len(low)), envelope(1, lifted)]), noise)
    pd.testing.assert_frame_equal(found, moved)
    assert found["departed"].iloc[-1] == (values[-3:] == [1.5, 1.5, 1.8])


STEPS = np.arange(1, 1001)


def gaps(shape, spread=0.002) -> PairedCurves:
    """Make the gap of two arms by step, with three seeds that differ by the given spread."""
    gap = np.array([shape(step) for step in STEPS])
    by_seed = pd.DataFrame({seed: gap + spread * (seed - 1) for seed in range(3)}, index=STEPS)
    return PairedCurves(by_seed, ("a", "b"), "test")


def grows_from(left: float):
    return lambda step: 0.05 + 0.1 * np.log10(step / left) if step >= left else 0.0


def test_a_paired_gap_departs_where_it_stays_above_the_margin_and_grows():
    curves = gaps(grows_from(45))
    departure = paired_departure(curves, margin=0.02)
    assert (departure.first, departure.before, departure.past) == (45, 21, 98)
    assert departure.growth.value == pytest.approx(0.1)
    # With seeds that differ by much, the gap may be noise.
    assert not paired_departure(gaps(grows_from(45), spread=0.05), 0.02).left
    assert not paired_departure(gaps(grows_from(45)), margin=0.3).left


def test_a_departure_within_a_window_leaves_that_window_out():
    """The window that holds a departure begins before it, so what comes after starts with the next window."""
    departure = paired_departure(gaps(lambda step: 0.3 * np.log10(max(step / 50, 1))), 0.02)
    assert departure.first < 50 < departure.past


@pytest.mark.parametrize("level", [0.0, 0.02])
def test_the_crossing_of_a_line_is_exact_and_lies_before_its_first_step(level):
    # The seeds' gaps lie 0.03 apart, at a slope of 0.3 per tenfold steps.
    crossing = gaps(lambda step: 0.3 * np.log10(step / 50), spread=0.03).crossing(98, level)
    assert crossing.value == pytest.approx(np.log10(50) + level / 0.3)
    assert crossing.seed_error == pytest.approx(0.1 / np.sqrt(3) * 1.32, rel=0.02)  # t with 2 degrees of freedom
    assert not gaps(lambda step: 0.3 - 0.1 * np.log10(step)).crossing(98, level).known


def test_a_gap_that_shrinks_is_slow_learning():
    departure = paired_departure(gaps(lambda step: 0.5 / step**0.3), 0.02)
    assert not departure.left
    assert departure.growth.value < 0
    # It departs where the gap is smallest, after which it grows.
    late = paired_departure(gaps(lambda step: 0.5 / step**0.5 + grows_from(100)(step)), 0.02)
    assert late.first == 45


def test_a_gap_that_comes_last_or_at_once():
    # The last window alone shows no growth.
    assert paired_departure(gaps(grows_from(600)), 0.02).first is None
    at_once = paired_departure(gaps(grows_from(1)), 0.02)
    assert (at_once.first, at_once.before) == (2, None)


def test_noise_rarely_departs():
    random = generator("departures")
    left = 0
    for _ in range(200):
        drift = np.log10(STEPS)[:, None] / 3 * random.standard_normal(3) * 0.01
        by_seed = pd.DataFrame(drift + 0.02 * random.standard_normal((1000, 3)), index=STEPS)
        left += paired_departure(PairedCurves(by_seed, ("a", "b"), "noise"), 0.005).left
    assert left <= 4
