"""Theories of the LR ratio: predictions solve the theory's own equation, and the derivation holds for random data."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_advice import theory

from studies.lr_ratio.conditions import rms_factors
from studies.lr_ratio.predictions import DEFAULT
from studies.lr_ratio.theories import Setting, converted_lr, predicted

FULLFT_LR = 3e-4


def ratios(setting, predictions=DEFAULT, lr=FULLFT_LR):
    theories = predicted(predictions, setting)
    return {name: float(np.exp(theory(np.asarray(math.log(lr))))) for name, theory in theories.items()}


@given(
    width=st.floats(64, 8192),
    steps=st.floats(25, 1600),
    alpha=st.sampled_from([8.0, 32.0]),
    init_a=st.sampled_from([0.25, 1.0, 4.0]),
    rank=st.sampled_from([1, 16]),
)
def test_predictions_solve_their_equations(width, steps, alpha, init_a, rank):
    setting = Setting(width, steps, 8, alpha, init_a, rank=rank)
    stated, theories = ratios(setting), DEFAULT
    at_unit = theories.movement.u0 * 128 / width * math.sqrt(50 / steps)
    movement = stated["movement"]
    frozen = ratios(replace(setting, frozen=True))["movement"]
    assert movement * math.hypot(init_a, movement * FULLFT_LR / at_unit) == pytest.approx(frozen * init_a)
    still = theories.movement.c * width / alpha / init_a
    assert frozen == pytest.approx(still / (1 + theories.movement.k / rank))
    assert stated["still"] / still == pytest.approx(theories.still.c / theories.movement.c)
    assert stated["mu_a"] == pytest.approx(theories.mu_a.c * math.sqrt(width / alpha))
    if init_a == 1:
        scale = stated["scale"]
        assert scale * (1 + theories.scale.kappa * scale) == pytest.approx(theories.scale.c * width / alpha)
        assert stated["naive"] == pytest.approx(width / (2 * alpha))


@given(lr=st.floats(1e-6, 1e-1), steps=st.sampled_from([25, 800]), alpha=st.sampled_from([8.0, 128.0]))
def test_a_learning_rate_is_converted_as_the_theory_predicts_both_and_by_lora_advice_alike(lr, steps, alpha):
    conditions = (512, 100, 32.0, 16, 0.5), (512, steps, alpha, 1, 1.0)
    ours = [Setting(width, steps, 8, alpha, rank=rank, mean_lr=mean) for width, steps, alpha, rank, mean in conditions]
    theirs = [theory.LoraSetting(*condition) for condition in conditions]
    lora = []
    # The optimum of full fine-tuning is twice as high in the second.
    for own, shipped, fullft in zip(ours, theirs, (lr, 2 * lr), strict=True):
        ratio = ratios(own, lr=fullft)["movement"]
        assert theory.movement_ratio(shipped, fullft) == pytest.approx(ratio)
        lora.append(fullft * ratio)
    assert converted_lr(lora[0], *ours, DEFAULT.movement, 2.0) == pytest.approx(lora[1])
    assert theory.converted_lr(lora[0], *theirs, 2.0) == pytest.approx(lora[1])


def test_the_factors_by_which_theories_are_off():
    off = {"off_by": [2.0, 0.5, 1.0, None], "off_by_low": [1.7, 0.4, 0.9, None], "off_by_high": [2.2, 0.7, 1.1, None]}
    [row] = rms_factors(pd.DataFrame(off | {"theory": "movement"})).to_dict("records")
    assert row == {
        "theory": "movement",
        "conditions": 3,
        "rms_factor": pytest.approx(math.exp(math.sqrt(2 / 3) * math.log(2))),
        "bias": pytest.approx(1.0),
        "worst": pytest.approx(2.0),
        "beyond": 1,
    }
