"""The numbers of the report's tables are those of the fits by which claims are judged."""

from __future__ import annotations

import math

import pytest

from lorabench.analysis.comparison import Judging, comparisons
from lorabench.analysis.rewards import with_error_rates
from lorabench.report.summary import experiment

from ..handmade import rl
from ..handmade.sft import arm, tables


def described(arms):
    runs, curves = tables(arms)
    runs["experiments"] = [["rank"]] * len(runs)
    summary = experiment("rank", runs, Judging())
    assert summary is not None
    return summary, runs, curves


def test_the_optimum_of_a_row_is_that_of_the_fit():
    summary, runs, curves = described([arm(optimum=3e-4), arm(8, optimum=3e-3, floor=2.1)])
    [comparison] = comparisons(runs, curves)
    for row, label in zip(summary["arms"], ("FullFT", "LoRA r8"), strict=True):
        minimum, optimum = comparison.fit.minima[label], comparison.fit.optima[label]
        assert row["label"] == label
        assert row["lr"] == pytest.approx(math.exp(optimum.value))
        assert [row["best"], row["best_low"], row["best_high"]] == pytest.approx([minimum.value, *minimum.interval()])
        assert row["resolved"]
    [noise] = summary["noise"]
    assert noise["sigma"] == comparison.fit.sigma
    [ratio] = summary["ratios"]
    assert ratio["ratio"] == pytest.approx(math.exp(comparison.fit.log_ratio("LoRA r8", "FullFT").value))


def test_results_of_rl_are_accuracies():
    summary, runs, curves = described([rl.arm(None, optimum=1e-4), rl.arm(16, optimum=1e-3)])
    [comparison] = comparisons(with_error_rates(runs), curves)
    row = summary["arms"][1]
    assert row["best"] == pytest.approx(1 - comparison.fit.minima["LoRA r16"].value)
    assert row["best_low"] < row["best"] < row["best_high"]


def test_an_arm_at_the_edge_has_the_best_lr_and_an_arm_that_diverged_has_nothing():
    summary, _, _ = described([arm(optimum=1.0), arm(8, optimum=3e-3)])
    assert summary["arms"][0]["at_edge"]
    assert summary["arms"][0]["lr"] == summary["arms"][0]["lr_best"]
    assert math.isnan(summary["arms"][0]["lr_low"])
    runs, _ = tables([arm(8, optimum=3e-3)])
    lost = {"status": "diverged", "final_valid_nll": math.nan, "final_test_nll": math.nan}
    summary = experiment("rank", runs.assign(experiments=[["rank"]] * len(runs), **lost), Judging())
    assert summary is not None
    assert math.isnan(summary["arms"][0]["lr"])
    assert summary["arms"][0]["n_diverged"] == summary["arms"][0]["n_runs"]
