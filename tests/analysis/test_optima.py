"""Optima and edges of arms, curves at the optimum, and where one leaves another."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis import optima
from lorabench.analysis.comparison import comparisons
from lorabench.analysis.curves import PairedCurves
from lorabench.analysis.slopes import slopes_by_seed
from lorabench.figures.grid import fitted_noise

from ..handmade.sft import arm, tables
from ..handmade.training import trained


@pytest.mark.slow
def test_seed_noise_is_that_of_each_comparison_without_what_all_arms_share():
    random = np.random.default_rng(0)
    shared = random.normal(0, 0.1, 20)
    noisy = [arm(rank, optimum=1e-3, offsets=shared + random.normal(0, 0.02, 20)) for rank in (None, 8)]
    runs, _ = tables([*noisy, arm(8, optimum=1e-3, offsets=(0.0,), dataset="once")])
    noise = fitted_noise(comparisons(runs, pd.DataFrame())).set_index("dataset")
    assert noise.loc["instruct", "sigma"] == pytest.approx(0.02, rel=0.25)
    assert (noise.loc["instruct", "dof"] >= 15, noise.loc["instruct", "n_runs"]) == (True, 44)
    assert math.isnan(noise.loc["once", "sigma"])


OPTIMUM = 2e-3  # between the LRs 1e-3 and 3e-3


def compared():
    """Make a comparison of FullFT and rank 64, whose three seeds have every LR."""
    runs, curves = tables([trained(None, optimum=3e-4), trained(64, optimum=OPTIMUM)])
    first = runs[(runs["method"] == "lora") & (runs["seed"] == 0)]
    own = curves[curves["run_id"].isin(first["run_id"])]
    again = [first.assign(seed=seed, run_id=first["run_id"] + f"-again{seed}") for seed in (1, 2)]
    copies = [own.assign(run_id=own["run_id"] + f"-again{seed}") for seed in (1, 2)]
    others = runs[(runs["method"] == "fullft") | (runs["seed"] == 0)]
    [comparison] = comparisons(pd.concat([others, *again], ignore_index=True), pd.concat([curves, *copies]))
    return comparison


def test_curves_are_interpolated_at_the_optimum_where_seeds_have_the_lrs_around_it():
    comparison = compared()
    lora, fullft = comparison.lora[64], comparison.fullft
    runs = optima.runs_at_optimum(comparison, lora)
    assert sorted(runs["lr"].unique()) == [1e-3, 3e-3, 1e-2]
    assert runs.groupby("seed")["weight"].sum().tolist() == pytest.approx([1.0] * 3)
    paired = optima.pair_at_optimum(comparison, lora, fullft)
    # The loss is a parabola in ln LR, so nothing is lost.
    assert paired.by_seed[0].loc[2:].abs().max() == pytest.approx(0, abs=1e-9)
    assert optima.off_optimum(comparison, lora, fullft, 1e-6) == []


def test_numbers_of_curves_carry_the_error_of_their_lrs():
    comparison = compared()
    lora, fullft = comparison.lora[64], comparison.fullft
    # Up to step 100, the loss of rank 64 falls by 5 nats per unit of ln LR.
    lr = comparison.rows["LoRA r64"].set_index("run_id")["lr"]
    x = np.log(comparison.curves["run_id"].map(lr) / OPTIMUM).where(comparison.curves["step"].between(2, 100))
    value = comparison.curves["value"] - 5 * x.fillna(0.0)
    steep = replace(comparison, curves=comparison.curves.assign(value=value))
    curves = optima.pair_at_optimum(steep, lora, fullft)
    [early] = curves.means([(2, 100)])
    plain = replace(curves, lr_errors=())
    [without] = plain.means([(2, 100)])
    optimum = steep.fit.optima["LoRA r64"].seed_error
    assert early.value == pytest.approx(without.value)
    assert early.seed_error == pytest.approx(math.hypot(without.seed_error, 5 * optimum), rel=0.1)
    # Steps up to 100 weigh in the slope as they do in that of a curve that falls there.
    steps = curves.by_seed.loc[2:].index
    [fall] = slopes_by_seed(pd.DataFrame({0: np.where(steps <= 100, -5.0, 0.0)}, steps))
    slope, without = curves.slope(2), plain.slope(2)
    assert slope.seed_error == pytest.approx(math.hypot(without.seed_error, fall * optimum), rel=0.1)


GRID = (6e-4, 7.7e-4, 1e-3, 1.3e-3, 1.7e-3)


def test_the_envelope_is_no_lower_with_more_lrs():
    random, gaps = np.random.default_rng(0), []
    runs, _ = tables([arm(rank, optimum=1e-3, lrs=lrs) for rank, lrs in ((None, GRID[1:4]), (64, GRID))])
    first = runs[runs["seed"] == 0]
    runs = pd.concat([first.assign(seed=seed, run_id=first["run_id"] + f"-{seed}") for seed in range(8)])
    for _ in range(5):
        # Two arms alike but for their number of LRs, each run with noise of its own.
        loss = 2 + 0.02 * np.log(runs["lr"] / 1e-3) ** 2 + 0.02 * random.standard_normal(len(runs))
        points = {"step": 2, "split": "train", "metric": "nll", "value": loss}
        [comparison] = comparisons(runs, pd.DataFrame({"run_id": runs["run_id"]} | points))
        window = optima.in_window(comparison, 2, 2)
        gaps.append(window.gap(comparison.lora[64], comparison.fullft).value)
    assert abs(np.mean(gaps)) < 3 * np.std(gaps) / math.sqrt(5)


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
    departure = optima.paired_departure(curves, margin=0.02)
    assert (departure.first, departure.before, departure.past) == (45, 21, 98)
    assert departure.growth.value == pytest.approx(0.1)
    # With seeds that differ by much, the gap may be noise.
    assert not optima.paired_departure(gaps(grows_from(45), spread=0.05), 0.02).left


def test_the_crossing_of_a_line_is_exact_and_lies_before_its_first_step():
    # The seeds' gaps lie 0.03 apart, at a slope of 0.3 per tenfold steps.
    for level in (0.0, 0.02):
        crossing = gaps(lambda step: 0.3 * np.log10(step / 50), spread=0.03).crossing(98, level)
        assert crossing.value == pytest.approx(np.log10(50) + level / 0.3)
        assert crossing.seed_error == pytest.approx(0.1 / np.sqrt(3) * 1.32, rel=0.02)  # t with 2 degrees of freedom
    assert not gaps(lambda step: 0.3 - 0.1 * np.log10(step)).crossing(98, 0.0).known


def test_a_gap_that_shrinks_comes_last_or_at_once():
    # A gap that shrinks is slow learning.
    assert not optima.paired_departure(gaps(lambda step: 0.5 / step**0.3), 0.02).left
    # It departs where the gap is smallest, after which it grows.
    assert optima.paired_departure(gaps(lambda step: 0.5 / step**0.5 + grows_from(100)(step)), 0.02).first == 45
    # The last window alone shows no growth.
    assert optima.paired_departure(gaps(grows_from(600)), 0.02).first is None
    at_once = optima.paired_departure(gaps(grows_from(1)), 0.02)
    assert (at_once.first, at_once.before) == (2, None)
