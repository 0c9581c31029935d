"""Made-up sweeps hold the truth that they are made from."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.calibration.made import MadeArm, MadeSweep
from benchmarks.calibration.noise import NoiseLevels, measure_noise
from benchmarks.calibration.rl import make_rl_tables, rl
from benchmarks.calibration.scenes import FULLFT, RUN, batch_sizes, lora
from benchmarks.calibration.worlds import grid, make_tables
from lorabench.analysis.arms import with_arm_columns
from lorabench.analysis.comparison import Judging, comparisons
from lorabench.analysis.estimate import ExampleLosses
from lorabench.analysis.rewards import with_error_rates

NOISE = NoiseLevels()
QUIET = replace(
    NOISE,
    asymmetry=0.0,
    **dict.fromkeys(("shared_seed", "arm_seed", "run", "example_common", "example_arm", "example_run"), 1e-9),
)


def compared(tables, runs=None):
    runs = with_arm_columns(tables.runs if runs is None else runs)
    [comparison] = comparisons(runs, tables.curves, Judging(examples=ExampleLosses.of(tables.test_losses)))
    return comparison


def test_the_fit_finds_made_up_optima_and_minima():
    random = np.random.default_rng(1)
    arms = [
        MadeArm(FULLFT, math.log(7e-4), 0.2, grid(math.log(7e-4), random)),
        MadeArm(lora(64), math.log(6e-3), 0.23, grid(math.log(6e-3), random)),
    ]
    comparison = compared(make_tables([MadeSweep(arms, RUN)], QUIET, random))
    fit = comparison.fit
    assert fit.minima["FullFT"].value == pytest.approx(0.2, abs=1e-6)
    assert fit.gap("LoRA r64", "FullFT").value == pytest.approx(0.03, abs=1e-6)
    assert fit.log_ratio("LoRA r64", "FullFT").value == pytest.approx(math.log(6e-3 / 7e-4), abs=1e-4)
    assert fit.curvature["FullFT"] == pytest.approx(NOISE.curvature, rel=1e-3)
    # The margin follows from the base's loss before training, less what half a step of the grid costs.
    assert comparison.margin.value == pytest.approx(NOISE.margin, rel=0.03)


def test_error_rates_of_rl_are_shares_of_failed_problems():
    random = np.random.default_rng(3)
    tables = make_rl_tables(rl(0, NOISE, random), NOISE, random)
    failed = tables.test_losses.groupby("run_id")["loss"].mean()
    final = tables.runs.set_index("run_id")["final_reward"]
    assert (1 - failed[final.index]).tolist() == pytest.approx(final.tolist())
    comparison = compared(tables, with_error_rates(with_arm_columns(tables.runs)))
    assert comparison.fit.minima["FullFT"].value == pytest.approx(1 - NOISE.rl_tuned, abs=0.06)


def test_measured_noise_is_that_of_the_world():
    random = np.random.default_rng(4)
    measured = measure_noise(make_tables(batch_sizes(0, NOISE, random), NOISE, random))
    for name, rel in (("example_common", 0.2), ("example_run", 0.2), ("curvature", 0.4), ("gain", 0.1)):
        assert getattr(measured, name) == pytest.approx(getattr(NOISE, name), rel=rel)
    assert 0.3 * NOISE.shared_seed < measured.shared_seed < 2 * NOISE.shared_seed
    assert measured.rl_base == NOISE.rl_base  # nothing to measure it by
