"""Estimates have the intervals of Student's t, and functions of estimates keep what their errors have in common."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lorabench.analysis.estimate import (
    N_DRAWS,
    Estimate,
    ExampleLosses,
    combined,
    exact,
    example_draws,
    mean_interval,
    mean_over_seeds,
    multivariate_student,
    ratio_of_means,
    student,
    without_run_noise,
)


def test_the_mean_over_seeds_has_the_interval_of_scipy_and_leaves_out_missing_values():
    values = [0.2, 0.5, 0.3, math.nan]
    estimate = mean_over_seeds(values, "b")
    known = stats.ttest_1samp(values[:3], 0.0).confidence_interval(0.95)
    assert estimate.interval() == pytest.approx((known.low, known.high), abs=0.005 * (known.high - known.low))
    assert (estimate.value, estimate.n_seeds) == (pytest.approx(1 / 3), 3)
    assert mean_interval(values[:3]) == pytest.approx((1 / 3, known.low, known.high))


def test_errors_go_through_a_function_and_cancel_only_within_one_fit():
    first, second = student(1.0, 0.3, 20, "e"), student(2.0, 0.3, 20, "f")
    assert combined(np.subtract, first, first).interval() == (0.0, 0.0)
    assert combined(np.subtract, second, first).seed_error == pytest.approx(0.3 * math.sqrt(2), rel=0.08)
    random = np.random.default_rng(0)
    number = Estimate(0.0, 0.1 * random.standard_normal(N_DRAWS), 0.2 * random.standard_normal(N_DRAWS), 3, 120, 20)
    ratio = combined(np.exp, number)
    assert ratio.seed_error == pytest.approx(0.1, rel=0.1)
    assert ratio.example_error == pytest.approx(0.2, rel=0.1)
    assert (ratio.n_seeds, ratio.n_examples, ratio.n_groups) == (3, 120, 20)
    # The error from test examples is known only if it is known for all.
    assert combined(np.subtract, number, exact(1.0)).example_part is None


@pytest.mark.slow
@pytest.mark.parametrize(("numbers", "dof"), [(9, 2), (25, 10)])
def test_ends_of_sums_of_errors_are_those_of_student_within_1_percent_of_the_width(numbers, dof):
    random = np.random.default_rng(0)
    factor = random.standard_normal((numbers, numbers)) * np.exp(random.standard_normal(numbers))[:, None]
    covariance = factor @ factor.T
    draws = multivariate_student(covariance, dof, "g")
    shares = []
    for weights in random.standard_normal((50, numbers)):
        expected = np.array(stats.t.interval(0.95, dof, 0.0, math.sqrt(weights @ covariance @ weights)))
        shares.append(np.abs(np.array(Estimate(0.0, draws @ weights).interval()) - expected) / np.ptp(expected))
    assert np.sqrt(np.mean(np.square(shares))) < 0.005
    assert np.max(shares) < 0.015


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 300])
def test_draws_of_the_error_from_examples_are_those_of_student(n):
    random = np.random.default_rng(n)
    influences = random.normal(0, 1, (2, n)) / math.sqrt(n)
    draws = example_draws(influences, "split")
    for part, error in zip(draws.T, np.sqrt((influences**2).sum(1)), strict=True):
        expected = np.array(stats.t.interval(0.95, n - 1, 0, error))
        assert Estimate(0.0, part).interval() == pytest.approx(expected, rel=0.04)
    # Numbers of one split have their draws in common, so that equal influences cancel.
    np.testing.assert_allclose(example_draws(influences[:1], "split")[:, 0], draws[:, 0], atol=1e-4)
    assert abs(np.corrcoef(draws[:, 0], example_draws(influences[:1], "other")[:, 0])[0, 1]) < 0.05


def test_groups_are_read_from_the_table_and_those_of_one_group_have_no_error():
    losses = np.array([1.0, 2.0, 4.0, 9.0])
    table = pd.DataFrame({"run_id": "a", "example": range(4), "loss": losses, "tokens": 2})

    def covariance(groups):
        examples = ExampleLosses.of(table if groups is None else table.assign(group=groups))
        return float((examples.influences(["a"]) ** 2).sum())

    own = np.var(losses / 2, ddof=1) / 4
    assert [covariance(groups) for groups in (None, [None] * 4, list("wxyz"))] == pytest.approx([own] * 3)
    # The means of two groups of two are 0.75 and 3.25.
    assert covariance(list("ppqq")) == pytest.approx(np.var([0.75, 3.25], ddof=1) / 2)
    assert covariance(["p", "p", None, None]) == pytest.approx(covariance(list("ppqr")))
    assert math.isnan(covariance(["p"] * 4))
    assert ExampleLosses.of(table).influences(["a", "b"]) is None


def test_the_error_from_test_examples_is_averaged_over_splits_and_that_of_a_shared_split_is_not():
    losses, ids = np.array([1.0, 2.0, 4.0, 9.0]), ["a", "b"]
    runs = [{"run_id": run, "example": n, "loss": loss, "tokens": 2} for run in ids for n, loss in enumerate(losses)]
    table, one = pd.DataFrame(runs), np.var(losses / 2, ddof=1) / 4

    def of_mean(test_data, groups=None):
        examples = ExampleLosses.of(table.assign(test_data=np.repeat(test_data, 4), group=groups))
        assert examples.n_examples(ids) == 4 * len(examples.splits(ids))
        return float((examples.influences(ids).mean(0) ** 2).sum())

    assert of_mean(["x@100", "x@200"]) == pytest.approx(one / 2)
    # Groups of the same name in two splits are others.
    assert of_mean(["x@100", "x@200"], ["p", "p", "q", "q"] * 2) == pytest.approx(np.var([0.75, 3.25], ddof=1) / 4)
    # The same examples err together, and so may those of which it is not known.
    assert [of_mean(same) for same in (["x", "x"], [None, "x"])] == pytest.approx([one] * 2)
    other = table.assign(test_data=np.repeat(["x", "x@100"], 4), tokens=[2] * 4 + [3] * 4)
    assert ExampleLosses.of(other).influences(ids).shape == (2, 8)
    assert ExampleLosses.of(other.drop(columns="test_data")).influences(ids) is None


def test_only_what_all_runs_of_an_arm_share_is_left():
    random, n = np.random.default_rng(0), 400
    design = np.kron(np.eye(2), np.ones((6, 1)))  # the means of two arms of six runs
    hat = np.linalg.pinv(design)
    arm_part, run_part = random.normal(0, 0.1, (2, n)), random.normal(0, 0.3, (12, n))
    influences = (design @ arm_part + run_part) / n
    # The runs' own parts have twice the variance of the arms' when they are averaged over six runs.
    assert np.linalg.norm(hat @ influences) == pytest.approx(np.sqrt(2 * (0.1**2 + 0.3**2 / 6) / n), rel=0.1)
    left = without_run_noise(influences, design, hat, np.eye(12))
    assert np.linalg.norm(left) == pytest.approx(np.sqrt(2) * 0.1 / np.sqrt(n), rel=0.15)
    assert np.corrcoef(left[0], (hat @ influences)[0])[0, 1] > 0.95
    # With one group nothing breaks.
    assert np.isnan(without_run_noise(np.full((12, 1), math.nan), design, hat, np.eye(12))).all()


def test_ratio_of_means():
    ratio = ratio_of_means(np.array([1.0, 2.0, 3.5]), np.array([2.0, 4.0, 6.0]), "ratio")
    assert ratio.value == pytest.approx(6.5 / 12)
    residual = np.array([1.0, 2.0, 3.5]) - ratio.value * np.array([2.0, 4.0, 6.0])
    half = 4.302652729911275 * residual.std(ddof=1) / math.sqrt(3) / 4
    assert ratio.interval() == pytest.approx((ratio.value - half, ratio.value + half), rel=0.01)
    single = ratio_of_means(np.array([1.0]), np.array([2.0]), "ratio")
    assert (single.value, single.known) == (0.5, False)
    assert math.isnan(ratio_of_means(np.ones(2), np.array([1.0, -1.0]), "ratio").value)
