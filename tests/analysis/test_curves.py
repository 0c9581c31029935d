"""Curves of a metric: the lowest over LRs, by seed, and paired by seed."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis.curves import PairedCurves, curves_by_seed, envelopes, log_windows, metric_points, paired, scan
from lorabench.analysis.rules import Within

from ..handmade.lora import lora_run, lora_tables, nll


def by_hand(values: dict[str, list[float]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make a LoRA arm with runs `a`, `b`, ... at LRs 1, 2, ... that have the given validation losses."""
    runs = pd.DataFrame([lora_run(lr=float(lr)) | {"run_id": run_id} for lr, run_id in enumerate(values, start=1)])
    curves = pd.DataFrame(
        [
            (run_id, step, 16 * step, 100 * step, "validation", "nll", value)
            for run_id, losses in values.items()
            for step, value in zip((0, 1, 2, 4), losses, strict=True)
        ],
        columns=["run_id", "step", "examples", "tokens", "split", "metric", "value"],
    )
    return runs, curves


def test_the_envelope_is_the_lowest_loss_at_each_step():
    runs, curves = by_hand({"a": [5.0, 4.0, 3.0, 2.5], "b": [5.0, 3.5, 3.2, 2.4], "c": [5.0, 3.0, math.nan, math.nan]})
    lowest = envelopes(runs, curves)
    assert lowest["value"].tolist() == [5.0, 3.0, 3.0, 2.4]
    assert lowest["run_id"].tolist() == ["a", "c", "a", "b"]
    assert lowest["lr"].tolist() == [1.0, 3.0, 1.0, 2.0]
    assert lowest["n_runs"].tolist() == [3, 3, 2, 2]
    assert lowest["tokens"].tolist() == [0, 100, 200, 400]
    assert lowest["rank"].tolist() == [8] * 4
    assert envelopes(runs, pd.DataFrame()).empty


SEEDS = (0, 1, 2)


def pair(low=1, high=64, seeds=SEEDS, lift=0.1):
    """Make the tables of two ranks, the lower of which lies above by `lift` * (1 + seed) at each step."""

    def loss(run, step):
        return nll(run, step) + (lift * (1 + run["seed"]) if run["rank"] == low else 0.0)

    runs, curves = lora_tables([lora_run(rank, seed=seed) for rank in (low, high) for seed in seeds], nll=loss)
    return runs[runs["rank"] == low], runs[runs["rank"] == high], curves


def paired_of(runs, others, curves):
    points = metric_points(curves, "train", "nll")
    return paired(runs, others, curves_by_seed(runs, points), curves_by_seed(others, points), "pair")


def test_the_batches_of_a_seed_cancel():
    runs, others, curves = pair()
    apart = paired_of(runs, others, curves)
    assert (apart.n_seeds, apart.last) == (3, 64)
    for seed in SEEDS:
        np.testing.assert_allclose(apart.by_seed[seed], 0.1 * (1 + seed))
    assert set(apart.run_ids) == set(runs["run_id"]) | set(others["run_id"])
    # Seeds and steps without a partner are left out.
    lost = curves["run_id"].eq(others["run_id"].iloc[0]) & curves["step"].eq(5)
    apart = paired_of(runs[runs["seed"] < 2], others, curves.assign(value=curves["value"].mask(lost)))
    assert (list(apart.by_seed), 5 in apart.by_seed.index, len(apart.run_ids)) == ([0, 1], False, 4)
    nothing = paired_of(runs, others, pd.DataFrame())
    assert (nothing.n_seeds, nothing.last) == (0, 0)


def of(by_seed, name="test"):
    frame = pd.DataFrame(by_seed)
    frame.index = range(1, len(frame) + 1)
    return PairedCurves(frame, ("a", "b"), name)


def test_windows_are_equally_long_in_log_step():
    curves = of({0: np.zeros(200)})
    windows = log_windows(curves.by_seed.index, 6)
    assert windows == [(2, 4), (5, 9), (10, 20), (21, 43), (44, 93), (94, 200)]
    assert log_windows(curves.by_seed.index, 6, first=150)[0][0] == 150
    # With fewer steps than windows, each step is one.
    assert log_windows(range(1, 5), 6) == [(2, 2), (3, 3), (4, 4)]
    assert log_windows([1], 6) == []


def test_means_and_slopes_are_over_seeds():
    steps = np.arange(1, 101)
    curves = of({seed: seed * np.log10(steps) for seed in (1, 2, 3)})
    [mean] = curves.means([(10, 20)])
    assert mean.value == pytest.approx(2 * np.log10(steps[9:20]).mean())
    assert mean.n_seeds == 3
    slope = curves.slope(10)
    assert slope.value == pytest.approx(2)
    half = 4.302653 / math.sqrt(3)  # the standard deviation over seeds is 1
    assert slope.interval() == pytest.approx((2 - half, 2 + half), rel=0.02)
    assert not of({0: np.zeros(9)}).means([(2, 9)])[0].known


@pytest.mark.parametrize(
    ("lift", "verdict"),
    [((0, 0, 0, 0), "confirmed"), ((0, 0, 0, 0.1), "contradicted"), ((0, 0, 0, 0.02), "inconclusive")],
)
def test_a_scan_needs_every_window(lift, verdict):
    lifted = np.repeat(lift, 50)
    curves = of({seed: lifted + 0.002 * (seed - 1) for seed in SEEDS})
    windows = [(1, 50), (51, 100), (101, 150), (151, 200)]
    judged = scan(Within.margin(0.02), curves, windows, "{}")
    assert judged.verdict == verdict
    assert judged.estimate == pytest.approx(max(lift))
    assert f"in steps {'1 to 50' if not any(lift) else '151 to 200'} (one of 4 windows" in judged.reason
