"""Made-up sweeps hold the truth that they are made from."""

import numpy as np
import pytest

from benchmarks.calibration.noise import NoiseLevels, measure_noise
from benchmarks.calibration.rl import make_rl_tables, rl
from benchmarks.calibration.scenes import batch_sizes
from benchmarks.calibration.worlds import make_tables
from lorabench.analysis.arms import with_arm_columns
from lorabench.analysis.comparison import Judging, comparisons
from lorabench.analysis.estimate import ExampleLosses
from lorabench.analysis.rewards import with_error_rates

NOISE = NoiseLevels()


def test_error_rates_of_rl_are_shares_of_failed_problems():
    random = np.random.default_rng(3)
    tables = make_rl_tables(rl(0, NOISE, random), NOISE, random)
    failed = tables.test_losses.groupby("run_id")["loss"].mean()
    final = tables.runs.set_index("run_id")["final_reward"]
    assert (1 - failed[final.index]).tolist() == pytest.approx(final.tolist())
    runs, examples = with_error_rates(with_arm_columns(tables.runs)), ExampleLosses.of(tables.test_losses)
    [comparison] = comparisons(runs, tables.curves, Judging(examples=examples))
    assert comparison.fit.minima["FullFT"].value == pytest.approx(1 - NOISE.rl_tuned, abs=0.06)


def test_measured_noise_is_that_of_the_world():
    random = np.random.default_rng(4)
    measured = measure_noise(make_tables(batch_sizes(0, NOISE, random), NOISE, random))
    for name, rel in (("example_common", 0.2), ("example_run", 0.2), ("curvature", 0.4), ("gain", 0.1)):
        assert getattr(measured, name) == pytest.approx(getattr(NOISE, name), rel=rel)
    for name in ("common", "walk", "run"):
        assert 0.3 < getattr(measured.seeds, name) / getattr(NOISE.seeds, name) < 3
    assert measured.rl_base == NOISE.rl_base  # nothing to measure it by
