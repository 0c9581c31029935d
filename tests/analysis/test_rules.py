"""The decision rules give the verdicts of their definitions, at the stated rates; margins are shares of a gain."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis.comparison import comparisons
from lorabench.analysis.estimate import N_DRAWS, Estimate, exact, student, unknown
from lorabench.analysis.finding import Finding, decide, finding, together, worst
from lorabench.analysis.rules import LEVEL, Above, Problem, Remedy, Within, cheapest, gain_margin

from ..handmade.sft import arm, tables


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


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (0.04, 0.01, "confirmed"),
        (0.029, 0.01, "inconclusive"),
        # Positive for certain, and smaller than the margin: there is no effect of the size that matters.
        (0.011, 0.0055, "contradicted"),
        (0.04, 0.03, "inconclusive"),
        # Whether it is 0 or far below makes no difference to a claim that it is 0.03 or more.
        (-0.05, 0.03, "contradicted"),
        (-0.01, 0.03, "inconclusive"),
    ],
)
def test_a_difference_needs_an_interval_above_0_and_an_estimate_beyond_the_margin(value, error, expected):
    assert verdict(Above(0.03), value, error) == expected


@pytest.mark.parametrize(
    ("wrong", "rule", "truth"),
    [
        ("confirmed", Within.margin(0.03), 0.03),
        ("confirmed", Above(0.03), 0.0),
        ("contradicted", Within.margin(0.03), 0.03),
        ("contradicted", Above(0.03), 0.03),
        ("contradicted", Above(0.0), 0.0),
    ],
)
def test_a_verdict_is_wrong_in_at_most_5_percent(wrong, rule, truth):
    values, base = truth + 0.01 * np.random.default_rng(1).standard_normal(1000), estimate(0.0)
    judge = rule.confirmed if wrong == "confirmed" else lambda number: rule.against(number) <= LEVEL
    share = np.mean([judge(replace(base, value=value)) for value in values])
    assert share <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / len(values))


def test_a_problem_outweighs_the_numbers_and_brings_its_remedy():
    without_error = decide(Within.margin(0.03), unknown(0.001), "text", ["a"])
    assert (without_error.verdict, without_error.remedy.seeds) == ("inconclusive", 3)
    remedy = Remedy("LR 0.01 of FullFT", lrs=(("FullFT", 0.01),))
    judged = decide(Within.margin(0.03), exact(0.0), "text", ["b", "a", "b"], [Problem("at the edge", remedy)], "rule")
    assert (judged.verdict, judged.reason, judged.run_ids) == ("inconclusive", "text; at the edge", ("a", "b"))
    assert (judged.margin_low, judged.margin_high, judged.margin_rule) == (-0.03, 0.03, "rule")
    assert judged.remedy == remedy


def test_seeds_that_would_decide_are_those_of_the_power_and_examples_where_no_number_of_seeds_does():
    # At an estimate of 0, the 90% interval lies inside 0.03 with 80% power if the error is 0.03 / (1.645 + 0.842).
    rule, needed = Within.margin(0.03), 0.03 / 2.487
    remedy = cheapest(rule, estimate(0.0, 0.03))
    assert (remedy.seeds, remedy.test_examples) == (math.ceil(3 * (0.03 / needed) ** 2), None)
    normal = np.random.default_rng(2).standard_normal((2, N_DRAWS))
    remedy = cheapest(rule, Estimate(0.0, 0.001 * normal[0], 0.02 * normal[1], 3, 100))
    assert (remedy.seeds, remedy.test_examples) == (None, pytest.approx(100 * 0.02**2 / needed**2 * 2, rel=0.1))
    assert "margin" in cheapest(rule, estimate(0.03)).text


def test_one_of_several_comparisons_contradicts_at_its_share_of_the_level():
    rule = Within.margin(0.03)
    # The p-value is about 0.03: enough alone, not for one of two.
    weak = decide(rule, estimate(0.03 + 0.0218), "weak", ["a"])
    strong = decide(rule, estimate(0.08), "strong", ["b"])
    good = decide(rule, estimate(0.0), "good", ["c"])
    assert weak.verdict == "contradicted"
    assert worst([weak]).verdict == "contradicted"
    assert worst([weak, good]).verdict == "inconclusive"
    assert together([weak, good]).run_ids == ("a", "c")
    assert worst([strong, good]).verdict == "contradicted"
    # A comparison without a verdict does not count as a chance to fail.
    assert worst([weak, Finding("not tested", "")]).verdict == "contradicted"


def test_what_was_not_tested_decides_only_alone():
    untested, unmet = Finding("not tested", "a"), Finding("setting not met", "b")
    confirmed = finding(["r"], "c", "confirmed")
    assert worst([untested, confirmed, unmet]).verdict == "confirmed"
    assert worst([untested, unmet]).verdict == "setting not met"
    assert worst([untested]).verdict == "not tested"


def test_a_margin_is_a_share_of_the_gain_if_there_is_one():
    margin = gain_margin(0.02, 0.5, "FullFT")
    assert (margin.value, margin.problem) == (pytest.approx(0.01), None)
    assert margin.rule == "2% of the gain from the base to FullFT (0.500 nats)"
    assert gain_margin(0.1, 0.5, "FullFT", rewarded=True).rule.endswith(
        "gain in accuracy from the base to FullFT (0.500)"
    )
    for gain in (-0.2, math.nan):
        assert math.isnan(gain_margin(0.02, gain, "FullFT").value)
        assert "no gain" in gain_margin(0.02, gain, "FullFT").problem


def test_the_gain_is_from_the_base_at_step_0_and_a_share_of_the_loss_stands_in_without_it():
    runs, _ = tables([arm(8, optimum=1e-3), arm(optimum=1e-3)])
    base = {"step": 0, "split": "validation", "metric": "nll"}
    rows = [{"run_id": run_id, "value": 3.0} | base for run_id in runs["run_id"]]
    rows += [
        {"run_id": runs["run_id"].iloc[0], "value": 9.0} | base | {"step": 1},
        {"run_id": "other", "value": 9.0} | base,
    ]
    [known] = comparisons(runs, pd.DataFrame(rows))
    tuned = known.at_optimum(known.fullft)["final_valid_nll"].mean()
    assert known.margin.value == pytest.approx(0.02 * (3.0 - tuned))
    [unknown] = comparisons(runs, pd.DataFrame())
    assert unknown.margin.value == pytest.approx(0.01 * unknown.fit.minima["FullFT"].value)
    assert "the base's loss is not known" in unknown.margin.rule
