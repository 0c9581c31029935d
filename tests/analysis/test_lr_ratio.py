"""Theories of the LR ratio: predictions solve the theory's own equation, and the derivation holds for random data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabench.analysis.lr_ratio import Setting, fitted, predicted
from lorabench.config.margins import DEFAULT_PREDICTIONS, LrRatioPredictions, MovementTheory

FULLFT_LR = 3e-4


def ratios(setting, predictions=DEFAULT_PREDICTIONS.lr_ratio, lr=FULLFT_LR):
    theories = predicted(predictions, setting)
    return {name: float(np.exp(theory(np.asarray(math.log(lr))))) for name, theory in theories.items()}


@given(width=st.floats(64, 8192), steps=st.floats(25, 1600), alpha=st.sampled_from([8.0, 32.0]))
def test_predictions_solve_their_equations(width, steps, alpha):
    setting = Setting(width, steps, 8, alpha)
    stated, theories = ratios(setting), DEFAULT_PREDICTIONS.lr_ratio
    at_unit = theories.movement.u0 * 128 / width * math.sqrt(50 / steps)
    movement = stated["movement"]
    assert movement * (1 + movement * FULLFT_LR / at_unit) == pytest.approx(theories.movement.c * width / alpha)
    scale = stated["scale"]
    assert scale * (1 + theories.scale.kappa * scale) == pytest.approx(theories.scale.c * width / alpha)
    assert stated["naive"] == pytest.approx(width / (2 * alpha))


def test_while_a_stands_still_the_ratio_is_proportional_to_width_over_alpha():
    assert ratios(Setting(64, 25, 8, 32.0), lr=1e-12)["movement"] == pytest.approx(2.83 * 64 / 32)


def test_theories_are_silent_where_they_say_nothing():
    at_reference = set(ratios(Setting(256, 50, 8, 32.0)))
    assert at_reference == {"movement", "scale", "fixed_lora", "constant", "naive"}
    assert "fixed_lora" not in ratios(Setting(256, 100, 8, 32.0))
    assert set(ratios(Setting(256, 50, 8, 8.0))) == {"movement", "scale", "naive"}
    alone = LrRatioPredictions(movement=MovementTheory(c=1.0, u0=1e-3))
    assert set(ratios(Setting(64, 25, 8, 32.0), alone)) == {"movement"}
    # Where parameters were fitted, nothing is tested.
    reference = Setting(128, 50, 8, 8.0)
    assert [fitted(name, reference) for name in ("movement", "scale", "constant")] == [True, True, False]
    assert not fitted("movement", Setting(64, 50, 8, 8.0))


@pytest.mark.parametrize("rank", [4, 64])
def test_first_steps_of_both_methods_learn_equally_fast_at_the_derived_ratio(rank):
    d_in, d_out, alpha = 256, 64, 32.0
    random = np.random.default_rng(0)
    falls = []
    for _ in range(200):
        x, g = random.standard_normal(d_in), random.standard_normal(d_out)
        a = random.uniform(-1, 1, (rank, d_in)) / math.sqrt(d_in)
        falls.append((np.abs(np.outer(g, x)).sum(), alpha / rank * np.abs(np.outer(g, a @ x)).sum()))
    fullft, lora = np.mean(falls, axis=0)
    assert fullft / lora == pytest.approx(math.sqrt(3) * d_in / alpha, rel=0.05)
