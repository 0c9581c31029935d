"""Curves of a metric: by seed, and paired by seed."""

import math

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis.curves import PairedCurves, curves_by_seed, log_windows, metric_points, paired

from ..handmade.lora import lora_run, lora_tables, nll

SEEDS = (0, 1, 2)


def paired_of(runs, others, curves):
    points = metric_points(curves, "train", "nll")
    return paired(runs, others, curves_by_seed(runs, points), curves_by_seed(others, points), "pair")


def test_the_batches_of_a_seed_cancel():
    def loss(run, step):
        return nll(run, step) + (0.1 * (1 + run["seed"]) if run["rank"] == 1 else 0.0)

    both, curves = lora_tables([lora_run(rank, seed=seed) for rank in (1, 64) for seed in SEEDS], nll=loss)
    runs, others = both[both["rank"] == 1], both[both["rank"] == 64]
    apart = paired_of(runs, others, curves)
    assert (apart.n_seeds, apart.last) == (3, 64)
    for seed in SEEDS:
        np.testing.assert_allclose(apart.by_seed[seed], 0.1 * (1 + seed))
    assert set(apart.run_ids) == set(runs["run_id"]) | set(others["run_id"])
    # Seeds and steps without a partner are left out.
    lost = curves["run_id"].eq(others["run_id"].iloc[0]) & curves["step"].eq(5)
    apart = paired_of(runs[runs["seed"] < 2], others, curves.assign(value=curves["value"].mask(lost)))
    assert (list(apart.by_seed), 5 in apart.by_seed.index, len(apart.run_ids)) == ([0, 1], False, 4)


def of(by_seed):
    frame = pd.DataFrame(by_seed)
    frame.index = range(1, len(frame) + 1)
    return PairedCurves(frame, ("a", "b"), "test")


def test_windows_are_equally_long_in_log_step():
    assert log_windows(range(1, 201), 6) == [(2, 4), (5, 9), (10, 20), (21, 43), (44, 93), (94, 200)]
    assert log_windows(range(1, 201), 6, first=150)[0][0] == 150
    # With fewer steps than windows, each step is one.
    assert log_windows(range(1, 5), 6) == [(2, 2), (3, 3), (4, 4)]


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
