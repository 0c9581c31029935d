from __future__ import annotations

import math

import pandas as pd
import pytest

from lorabench.analysis.curves import envelopes
from lorabench.analysis.departure import departures
from lorabench.analysis.thresholds import threshold_slope, thresholds

from ..handmade.sft import arm, noise_table, tables


def threshold_rows(sigma=0.01, **changes):
    left = {1: 4, 4: 16, 16: None, 64: 1} | changes
    arms = [arm(optimum=1e-3)]
    arms += [arm(rank, optimum=1e-3, leaves_at=at, trainable_params=1000 * rank) for rank, at in left.items()]
    runs, curves = tables(arms)
    # The gap grows, as that of an arm that runs out of capacity does.
    leaves = curves["run_id"].map(runs.set_index("run_id")["rank"].map(left).astype(float)).fillna(math.inf)
    gone = curves["step"].astype(float) / leaves
    curves["value"] += 0.01 * gone.where(gone >= 1, 1.0).map(math.log2)
    envelope = envelopes(runs, curves)
    return thresholds(runs, envelope, departures(envelope, noise_table(sigma))).set_index("rank")


def test_thresholds_of_ranks_that_leave_stay_or_never_joined():
    table = threshold_rows()
    assert table["status"].to_dict() == {1: "left", 4: "left", 16: "stays", 64: "never joined"}
    assert table["step"].to_dict() == {1: 4, 4: 16, 16: 128, 64: 1}
    assert table["tokens"].to_dict() == {1: 6400.0, 4: 25600.0, 16: 204800.0, 64: 1600.0}
    assert table["tokens_before"].dropna().to_dict() == {1: 3200.0, 4: 12800.0}
    assert table["trainable_params"].to_dict() == {1: 1000, 4: 4000, 16: 16000, 64: 64000}


def test_without_noise_nothing_is_known():
    assert set(threshold_rows(math.nan)["status"]) == {"unknown"}


def test_the_slope_is_no_surer_than_the_points_are_dense():
    points = pd.DataFrame({"trainable_params": [1e3, 1e4, 1e5], "tokens": [1e4, 1e5, 1e6]})
    dense, sparse = (threshold_slope(points.assign(tokens_before=points["tokens"] / ratio)) for ratio in (1.1, 2.0))
    assert (dense.slope, sparse.slope) == pytest.approx((1, 1))
    assert 0 < dense.high - dense.low < sparse.high - sparse.low
    assert sparse.high - sparse.low == pytest.approx((dense.high - dense.low) * math.log(2) / math.log(1.1))


def test_no_departure_no_slope():
    assert math.isnan(threshold_slope(threshold_rows().iloc[:0]).slope)
