"""The random-effects summary of several sources, against statsmodels."""

import math

import numpy as np
import pytest

from lorabench.sources.random_effects import p_of_groups, random_effects

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


def test_groups_far_apart_are_told_by_welchs_test_and_one_source_has_no_interval():
    from statsmodels.stats.oneway import anova_oneway

    # Where the sources have no error of their own, the groups are samples of single values.
    samples = [[1.2, 0.3, 2.5], [2.9, 3.1], [0.1, 1.9, 0.8, 1.4]]
    ours = p_of_groups([random_effects(sample, [1e-4] * len(sample)) for sample in samples])
    assert ours == pytest.approx(anova_oneway(samples, use_var="unequal").pvalue, rel=1e-3)
    single = random_effects([1.0], [0.1])
    assert (single.mean, single.k, math.isnan(single.low)) == (1.0, 1, True)


def test_groups_of_two_or_three_sources_that_are_alike_are_seldom_told_apart():
    # The errors of such means have one or two degrees of freedom; chi-squared gives p < 0.05 in every ninth case.
    rng, worlds = np.random.default_rng(7), 400
    told = 0
    for _ in range(worlds):
        errors = [rng.uniform(0.1, 0.6, k) for k in (2, 3)]
        groups = [random_effects(rng.normal(0, np.hypot(error, 0.5)).tolist(), error.tolist()) for error in errors]
        told += p_of_groups(groups) < 0.05
    assert told / worlds <= 0.05
