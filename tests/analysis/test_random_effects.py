"""The random-effects summary is that of statsmodels, and a further source lies in its prediction interval."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lorabench.analysis.random_effects import p_of_groups, random_effects

VALUES, ERRORS = [1.2, 0.3, 2.5, 1.9, 0.8], [0.3, 0.2, 0.4, 0.5, 0.25]


def test_mean_variance_and_interval_are_those_of_statsmodels():
    from statsmodels.stats.meta_analysis import combine_effects

    theirs = combine_effects(np.array(VALUES), np.array(ERRORS) ** 2, method_re="iterated", use_t=True)
    ours = random_effects(VALUES, ERRORS)
    assert ours.between**2 == pytest.approx(theirs.tau2, rel=1e-4)
    assert ours.mean == pytest.approx(theirs.mean_effect_re, rel=1e-4)
    assert ours.error == pytest.approx(theirs.sd_eff_w_re_hksj, rel=1e-3)
    assert (ours.low, ours.high) == pytest.approx(theirs.conf_int()[3], rel=1e-3)
    assert ours.share == pytest.approx(theirs.i2)


def test_equal_sources_do_not_vary():
    same = random_effects([1.0, 1.0, 1.0], [0.1, 0.1, 0.1])
    assert (same.mean, same.between, same.share) == (1.0, 0.0, 0.0)
    # Their interval is not shorter than the error of their mean, though they agree by chance.
    assert same.error == pytest.approx(0.1 / math.sqrt(3))
    assert same.predicted_low < same.low < 1.0


def test_a_further_source_lies_in_the_prediction_interval():
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        truths = random.normal(1.0, 0.5, 9)
        summary = random_effects((truths[:8] + random.normal(0, 0.2, 8)).tolist(), [0.2] * 8)
        inside += summary.predicted_low <= truths[8] <= summary.predicted_high
    assert 0.92 <= inside / 400 <= 0.98


def test_groups_far_apart_are_told_by_their_means():
    near, far = random_effects([0.0, 0.1], [0.1, 0.1]), random_effects([3.0, 3.1], [0.1, 0.1])
    assert p_of_groups([near, far]) < 1e-6 < 0.3 < p_of_groups([near, near])


def test_one_source_has_no_interval_and_an_error_of_0_is_refused():
    one = random_effects([1.0], [0.1])
    assert (one.mean, one.k) == (1.0, 1)
    assert math.isnan(one.low)
    with pytest.raises(ValueError, match="above 0"):
        random_effects([1.0], [0.0])
