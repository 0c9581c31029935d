"""Seeds of made-up sweeps do what their sizes say, by moments over many seeds; fits of such sweeps are counted."""

import math

import numpy as np
import pytest

from benchmarks.calibration.intervals import errors_of
from benchmarks.calibration.scenes import lora
from benchmarks.calibration.seeds import SeedEffects, SeedNoise

SIZES = SeedNoise(common=1.0, walk=2.0, arm=0.5, fullft=0.7, run=0.3, share=0.6, growth=0.5)
SEEDS = 4000
FULLFT, LORA, ATTENTION = {"method": "fullft"}, lora(16), lora(64, "attn")


@pytest.fixture(scope="module")
def losses():
    """Return the losses of arms by distance from their optima, (seeds,) each."""
    effects = SeedEffects(SIZES, SEEDS, np.random.default_rng(0))

    def of_arm(arm, *distances):
        x, seed = np.repeat(distances, SEEDS), np.tile(np.arange(SEEDS), len(distances))
        return dict(zip(distances, np.split(effects.of_arm(arm, x, seed), len(distances)), strict=True))

    arms = {"lora": LORA, "other": LORA, "fullft": FULLFT, "attention": ATTENTION}
    return {name: of_arm(arm, -1.0, 0.0, 1.0, 2.0) for name, arm in arms.items()}


def covariance(one, other):
    return float(np.cov(one, other)[0, 1])


def test_levels_are_of_a_seed_of_an_arm_and_of_full_fine_tuning(losses):
    first, other, fullft = (losses[name][0.0] for name in ("lora", "other", "fullft"))
    assert covariance(first, other) == pytest.approx(1.0, rel=0.1)
    assert covariance(first, fullft) == pytest.approx(1.0, rel=0.1)
    assert np.var(first - other) == pytest.approx(2 * (0.5**2 + 0.3**2), rel=0.1)
    assert np.var(fullft - first) - np.var(first - other) == pytest.approx(0.7**2, rel=0.15)


def test_walks_start_at_the_optimum_grow_and_are_shared_by_kinds(losses):
    away = {name: {x: own[x] - own[0.0] for x in (-1.0, 1.0, 2.0)} for name, own in losses.items()}
    first, other = away["lora"], away["other"]
    for x in (-1.0, 1.0, 2.0):
        assert covariance(first[x], other[x]) == pytest.approx(4 * abs(x) * math.exp(x), rel=0.12)
    # A walk's steps are independent, and so are its sides.
    assert covariance(first[1.0], other[2.0]) == pytest.approx(4 * math.exp(1.5), rel=0.12)
    assert abs(covariance(first[-1.0], other[1.0])) < 0.4
    for one, two in (("fullft", "lora"), ("attention", "lora"), ("fullft", "attention")):
        assert covariance(away[one][1.0], away[two][1.0]) == pytest.approx(0.6 * 4 * math.e, rel=0.15)
    # What is left of a single run grows, too.
    assert np.var(first[1.0] - other[1.0]) == pytest.approx(2 * 0.3**2 * (1 + math.e), rel=0.1)


def test_noise_follows_the_curvature_of_an_arm():
    effects = SeedEffects(SeedNoise(0.0, 0.0, 0.0, 0.0, run=0.3, steepness=0.5), SEEDS, np.random.default_rng(0))
    steep = effects.of_arm(LORA, np.zeros(SEEDS), np.arange(SEEDS), curvature=4.0)
    assert steep.std() == pytest.approx(2 * 0.3, rel=0.05)


def test_a_world_is_fitted_and_its_truth_is_near():
    found = errors_of("none of it", 0).set_index("claim_id")
    assert found.index.tolist() == ["B1", "B2", "B3", "E1", "E2"]
    assert found.loc[["B1", "B3"], "error"].abs().max() < 0.2
    assert found.loc[["B2", "E1", "E2"], "error"].abs().max() < 0.006
    assert (found["low"] < found["error"]).all()
    assert (found["error"] < found["high"]).all()
