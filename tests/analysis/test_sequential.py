"""Tests that are repeated after each batch keep their level over all looks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import ndtri

from lorabench.analysis.sequential import level, overall, spent

# Of an independent simulation.
KNOWN = {
    0.05: [0.01667, 0.01263, 0.01025, 0.00858, 0.00735, 0.00640, 0.00564, 0.00503, 0.00452, 0.00410],
    0.025: [0.00833, 0.00593, 0.00465, 0.00381, 0.00321, 0.00276, 0.00241, 0.00214, 0.00191, 0.00172],
}


@pytest.mark.parametrize("alpha", KNOWN)
def test_the_level_of_each_look_is_that_of_lan_and_demets(alpha):
    levels = [level(alpha, look) for look in range(1, 11)]
    assert levels == pytest.approx(KNOWN[alpha], abs=1e-5)
    for look, own in enumerate(levels, 1):
        # What the look rejects at its level, all looks together reject at theirs.
        assert overall(np.array([own, 0.5]), look) == pytest.approx([alpha, 1.0])
    assert (level(alpha, 0), overall(np.array([alpha]), 0).tolist()) == (alpha, [alpha])


@pytest.mark.parametrize("looks", [10, 30])
def test_an_estimate_at_the_margin_crosses_in_at_most_as_many_worlds_as_was_spent(looks):
    worlds = np.random.default_rng(looks).standard_normal((20_000, looks)).cumsum(1) / np.sqrt(np.arange(1, looks + 1))
    limits = -ndtri([level(0.05, look) for look in range(1, looks + 1)])
    crossed = (worlds > limits).any(1).mean()
    assert crossed == pytest.approx(spent(0.05, looks), abs=0.005)
    assert crossed < 0.05
