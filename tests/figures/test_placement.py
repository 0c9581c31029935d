"""Figures 3, 4 and 5 from tables made by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis.comparison import comparisons

from ..handmade import curves_of, make_sweep, runs_table
from .layout import draw, lines, only, titles

PER_RANK = {"attn": 5_500, "mlp": 9_000, "all": 14_000}


def by_size(sizes=(4, 16, 64), **changes):
    rows = []
    for size in sizes:
        for rank in (None, 8):
            sweep = make_sweep(rank, batch_size=size, steps=640 // size, **changes)
            rows += [row | {"run_id": f"{row['run_id']}-b{size}"} for row in sweep]
    return rows


def drawn_by_size(rows):
    runs = runs_table(rows)
    return draw("fig3_batch_size", runs, curves_of(runs))


def test_losses_and_gaps_by_batch_size_are_those_of_the_fits():
    rows = by_size()
    figure, plotted = drawn_by_size(rows)
    final = only(plotted, "final").set_index(["batch_size", "arm"])
    gaps = only(plotted, "gap").set_index("batch_size")
    for comparison in comparisons(runs_table(rows), pd.DataFrame()):
        size = comparison.arms[0]["batch_size"]
        expected = comparison.fit.gap("LoRA r8", "FullFT")
        numbers = gaps.loc[size, ["gap", "low", "high"]].astype(float)
        np.testing.assert_allclose(numbers, [expected.value, *expected.interval()])
        for label, minimum in comparison.fit.minima.items():
            numbers = final.loc[(size, label), ["nll", "low", "high"]].astype(float)
            np.testing.assert_allclose(numbers, [minimum.value, *minimum.interval()])
    [line] = lines(figure.axes[4], linestyle="--")
    np.testing.assert_allclose(line.get_ydata(), gaps["gap"].astype(float))
    points = only(plotted, "envelope", arm="LoRA r8", batch_size=64)
    [line] = lines(figure.axes[2], linestyle="--")
    np.testing.assert_allclose(line.get_xydata(), points[["examples", "nll"]].to_numpy(float))


def test_each_model_and_dataset_has_its_block():
    figure, _ = drawn_by_size(by_size(sizes=(4, 16)) + by_size(sizes=(4,), dataset="$worked$"))
    assert [place.get_suptitle() for place in figure.subfigs] == ["tiny · $worked$", "tiny · instruct"]
    assert titles(figure) == ["batch 4", "", "", "batch 4", "batch 16", "", ""]


def test_losses_by_parameters_are_those_of_the_fit():
    rows = make_sweep(None)
    for placement, rank in (("attn", 16), ("attn", 27), ("mlp", 16), ("all", 16)):
        sweep = make_sweep(rank, placement=placement, trainable_params=PER_RANK[placement] * rank)
        rows += [row | {"run_id": f"{row['run_id']}-{placement}"} for row in sweep]
    figure, plotted = draw("fig4_placement", runs_table(rows))
    [comparison] = comparisons(runs_table(rows), pd.DataFrame())
    best = only(plotted, "best")
    expected = [[minimum.value, *minimum.interval()] for minimum in map(comparison.fit.minima.get, best["arm"])]
    np.testing.assert_allclose(best[["nll", "nll_low", "nll_high"]].astype(float), expected)
    band = only(plotted, "margin_band").iloc[0]
    assert band["nll_low"] == pytest.approx(best["nll"].min())
    assert band["nll_high"] - band["nll_low"] == pytest.approx(comparison.margin.value)
    # Placement is line style, and rank is colour.
    assert len({line.get_color() for line in lines(figure.axes[0], linestyle=":")}) == 2
