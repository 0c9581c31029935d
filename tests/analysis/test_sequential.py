"""Tests that are repeated after each batch keep their level over all looks."""

from dataclasses import replace

import numpy as np
import pytest

from lorabench.analysis.estimate import student
from lorabench.analysis.rules import LEVEL, Above, NewRuns, Within
from lorabench.analysis.sequential import level, overall, spent

# Computed by a program of its own.
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


def ever(rule, truth: float, looks: int, guarded: bool, worlds: int = 10_000) -> tuple[float, float]:
    """Return the shares of worlds in which a look confirms, and in which one contradicts, with normal estimates of
    batches whose error is known."""
    batches = truth + 0.2 * np.random.default_rng(looks).standard_normal((worlds, looks))
    confirmed, contradicted = np.zeros((2, worlds), bool)
    for look in range(1, looks + 1):
        error, widths = 0.2 / np.sqrt(look), np.ones(worlds)
        if guarded and look > 1:
            widths = np.maximum(1, batches[:, :look].std(1, ddof=1) / np.sqrt(look) / error)
        estimate = replace(student(0.0, error, 1e6, "x", 3), looks=look)
        answers = rule.answers(estimate, NewRuns(batches[:, :look].mean(1), widths))
        confirmed |= answers.confirmed
        contradicted |= ~answers.confirmed & (answers.against <= LEVEL)
    return float(confirmed.mean()), float(contradicted.mean())


@pytest.mark.parametrize("looks", [10, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("guarded", [False, True])
def test_estimates_at_the_margin_are_wrongly_decided_in_at_most_5_percent_over_all_looks(looks, guarded):
    # Without the guard all that was spent is used; an equality may be wrongly confirmed at either margin.
    most, least = spent(LEVEL, looks) + 0.006, 0.0 if guarded else spent(LEVEL, looks) - 0.006
    within, above = Within.margin(1.0), Above(1.0)
    of_equality = ever(within, 1.0, looks, guarded)
    assert least <= of_equality[0] <= most
    assert least / 2 <= of_equality[1] <= most / 2 + 0.003
    assert ever(above, 0.5, looks, guarded)[0] <= most
    assert least <= ever(above, 1.0, looks, guarded)[1] <= most
