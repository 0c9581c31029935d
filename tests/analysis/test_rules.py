"""The decision rules give the verdicts of their definitions, at the stated rates; margins are shares of a gain."""

import math

import numpy as np
import pytest
from scipy.stats import t

from lorabench.analysis.estimate import N_DRAWS, Estimate, student
from lorabench.analysis.finding import Finding, decide, together, worst
from lorabench.analysis.rules import LEVEL, Above, NewRuns, Problem, Within, cheapest


def estimate(value: float, error: float = 0.01, dof: float = 1e6) -> Estimate:
    return student(value, error, dof, "x", 3)


def verdict(rule, value, error=0.01):
    return decide(rule, estimate(value, error), "text", ["a"]).verdict


def test_an_equality_is_confirmed_by_two_one_sided_tests_and_contradicted_outside_of_the_margin():
    # The 90% interval is the value plus and minus 0.0164, the 95% interval plus and minus 0.0196.
    rule, better_too = Within.margin(0.03), Within.margin(0.03, better_too=True)
    assert [verdict(rule, value) for value in (0.012, 0.015, 0.048)] == ["confirmed", "inconclusive", "inconclusive"]
    assert [verdict(rule, value) for value in (0.052, -0.052)] == ["contradicted"] * 2
    assert [verdict(better_too, value) for value in (-0.2, 0.052)] == ["confirmed", "contradicted"]


def test_a_bound_decides_what_holds_for_all_numbers_beyond_it():
    problem, sides = Problem("best LR at the edge"), ("above", "below")

    def verdicts(rule, *values):
        return [
            tuple(decide(rule, estimate(value), "x", ["a"], [problem], bound=side).verdict for side in sides)
            for value in values
        ]

    open_, yes, no = "inconclusive", "confirmed", "contradicted"
    # From above, a number may be as low as it likes: it is below a margin, and never above one.
    assert verdicts(Within.margin(0.03), 0.0, 0.1, -0.1) == [(open_, open_), (open_, no), (no, open_)]
    assert verdicts(Within.margin(0.03, better_too=True), 0.0, 0.1) == [(yes, open_), (open_, no)]
    assert verdicts(Above(0.03), 0.1, -0.1) == [(open_, yes), (no, open_)]
    judged = decide(Above(0.03), estimate(0.1), "x", ["a"], [problem], bound="below")
    assert judged.reason == "x; best LR at the edge, so that it is at least this"
    assert decide(Above(0.03), estimate(0.1), "x", ["a"], [problem]).verdict == open_


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (0.04, 0.01, "confirmed"),
        # The 95% interval starts at 0.006 and the one-sided one at 0.0117, below half of the margin.
        (0.0336, 0.0133, "inconclusive"),
        # The one-sided interval starts at 0.018, above half of the margin, and the 95% interval at -0.0015.
        (0.12, 0.062, "inconclusive"),
        # Positive and below the margin: the sign is right, and there is no effect of the size that matters.
        (0.012, 0.0055, "right sign, below the margin"),
        (0.008, 0.0055, "contradicted"),
        # Whether it is 0 or far below makes no difference to a claim that it is 0.03 or more.
        (-0.05, 0.03, "contradicted"),
        (-0.01, 0.03, "inconclusive"),
    ],
)
def test_a_difference_needs_an_interval_above_half_of_the_margin_and_an_estimate_beyond_it(value, error, expected):
    assert verdict(Above(0.03), value, error) == expected


def verdicts_on(rule, truth, error, dof=1e6, worlds=20_000):
    """Return the verdicts on worlds with a truth, whose estimates have a normal error that is known."""
    shifts = truth + error * np.random.default_rng(1).standard_normal(worlds)
    base = estimate(0.0, error, dof)
    runs = NewRuns(shifts, np.ones(worlds))
    confirmed, against, right_sign = rule.answers(base, runs)
    fails = ~confirmed & (against <= LEVEL)
    return confirmed, fails, fails & right_sign


@pytest.mark.parametrize("error", [0.003, 0.1])
@pytest.mark.parametrize(
    ("verdict", "rule", "truth"),
    [
        ("confirmed", Within.margin(0.03), 0.03),
        ("confirmed", Above(0.03), 0.0),
        ("confirmed", Above(0.03), 0.015),
        ("fails", Within.margin(0.03), 0.03),
        ("fails", Above(0.03), 0.03),
        ("right sign", Above(0.03), 0.0),
    ],
)
def test_a_verdict_is_wrong_in_at_most_5_percent(verdict, rule, truth, error):
    shares = dict(zip(("confirmed", "fails", "right sign"), verdicts_on(rule, truth, error), strict=True))
    assert shares[verdict].mean() <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 20_000)


SEED_NOISE = 0.05
"""The standard deviation of one seed in the worlds of remedies."""


def worlds_with(seeds: int, truth: float, worlds: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Return means over seeds, and their standard errors, of many new runs with some number of seeds."""
    runs = truth + SEED_NOISE * np.random.default_rng(seeds).standard_normal((worlds, seeds))
    return runs.mean(1), runs.std(1, ddof=1) / math.sqrt(seeds)


@pytest.mark.parametrize(("truth", "comparisons"), [(0.0, 1), (0.02, 8), (0.16, 8)])
def test_the_seeds_of_a_remedy_decide_with_the_power_that_they_promise_if_the_estimate_is_the_truth(truth, comparisons):
    # Of eight comparisons with this truth either all must hold, or one must fail at the eighth part of the level.
    margin = 0.06
    open_one = decide(Within.margin(margin), student(truth, SEED_NOISE / math.sqrt(3), 2, "x", 3), "text", ["a"])
    assert open_one.verdict == "inconclusive"
    powers = []
    seeds = together([open_one] * comparisons).remedy.seeds
    for number in (seeds, seeds - 1):
        means, errors = worlds_with(number, truth)
        one_sided, level = t.ppf(0.95, number - 1), t.ppf(1 - 0.025 / comparisons, number - 1)
        holds = (np.abs(means) + one_sided * errors < margin).mean() ** comparisons
        fails = (np.abs(means) - level * errors > margin).mean()
        powers.append(max(holds, fails))
    assert powers[0] > 0.77
    assert powers[1] < 0.83


def test_examples_are_asked_for_where_no_number_of_seeds_decides():
    # At an estimate of 0, the 90% interval lies inside 0.03 with 80% power if the error is 0.03 / (1.645 + 1.282).
    rule, needed = Within.margin(0.03), 0.03 / 2.927
    normal = np.random.default_rng(2).standard_normal((2, N_DRAWS))
    remedy = cheapest(rule, Estimate(0.0, 0.001 * normal[0], 0.02 * normal[1], 3, 100))
    assert (remedy.seeds, remedy.test_examples) == (None, pytest.approx(100 * 0.02**2 / needed**2 * 2, rel=0.05))
    assert "at the margin" in cheapest(rule, estimate(0.03)).text


def test_one_of_several_comparisons_contradicts_at_its_share_of_the_level():
    rule = Within.margin(0.03)
    # The p-value is about 0.03: enough alone, not for one of two.
    weak = decide(rule, estimate(0.03 + 0.0218), "weak", ["a"])
    strong = decide(rule, estimate(0.08), "strong", ["b"])
    good = decide(rule, estimate(0.0), "good", ["c"])
    assert worst([weak]).verdict == "contradicted"
    assert worst([weak, good]).verdict == "inconclusive"
    assert together([weak, good]).run_ids == ("a", "c")
    assert worst([strong, good]).verdict == "contradicted"
    # A comparison without a verdict does not count as a chance to fail.
    assert worst([weak, Finding("not tested", "")]).verdict == "contradicted"
