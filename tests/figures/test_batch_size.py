"""Figure 3 from tables made by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis.comparison import comparisons
from lorabench.figures.style import arm_styles
from lorabench.store.tables import Tables

from ..handmade import curves_of, make_sweep, runs_table
from .layout import draw, only


def sweeps(ranks=(None, 8), sizes=(4, 16, 64), **changes):
    rows = []
    for size in sizes:
        for rank in ranks:
            sweep = make_sweep(rank, batch_size=size, steps=640 // size, **changes)
            rows += [row | {"run_id": f"{row['run_id']}-b{size}"} for row in sweep]
    return rows


def drawn(rows):
    runs = runs_table(rows)
    return draw("fig3_batch_size", Tables(runs, curves_of(runs)))


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_numbers_are_those_of_the_tables():
    rows = sweeps()
    figure, plotted = drawn(rows)
    assert titles(figure) == ["batch 4", "batch 16", "batch 64", "", ""]
    assert {text.get_text() for text in figure.axes[0].texts} == {"160 steps · 2 diverged"}
    runs = runs_table(rows)
    final = only(plotted, "final").set_index(["batch_size", "arm"])
    gaps = only(plotted, "gap").set_index("batch_size")
    for comparison in comparisons(runs, pd.DataFrame()):
        size = comparison.arms[0]["batch_size"]
        expected = comparison.fit.gap("LoRA r8", "FullFT")
        numbers = gaps.loc[size, ["gap", "low", "high"]].astype(float)
        np.testing.assert_allclose(numbers, [expected.value, *expected.interval()])
        for label, minimum in comparison.fit.minima.items():
            numbers = final.loc[(size, label), ["nll", "low", "high"]].astype(float)
            np.testing.assert_allclose(numbers, [minimum.value, *minimum.interval()])
    lora = arm_styles(plotted.dropna(subset=["arm"]))["LoRA r8"]
    by_size = [line for line in figure.axes[4].get_lines() if line.get_linestyle() == "--"]
    assert [line.get_color() for line in by_size] == [lora.colour]
    np.testing.assert_allclose(by_size[0].get_ydata(), gaps["gap"].astype(float))


def test_curves_are_envelopes_fullft_solid_and_lora_dashed():
    figure, plotted = drawn(sweeps())
    for arm, linestyle, size, axes in (("FullFT", "-", 4, 0), ("LoRA r8", "--", 64, 2)):
        points = plotted[plotted["element"].eq("envelope") & plotted["arm"].eq(arm) & plotted["batch_size"].eq(size)]
        [line] = [line for line in figure.axes[axes].get_lines() if line.get_linestyle() == linestyle]
        np.testing.assert_allclose(line.get_xdata(), points["examples"].astype(float))
        np.testing.assert_allclose(line.get_ydata(), points["nll"].astype(float))


def test_of_several_lengths_the_longest_is_compared():
    short = [row | {"steps": 20, "run_id": row["run_id"] + "s"} for row in sweeps(sizes=(64,))]
    figure, _ = drawn(sweeps() + short)
    assert titles(figure)[:4] == ["batch 4", "batch 16", "batch 64", "batch 64"]
    [line] = [line for line in figure.axes[-1].get_lines() if line.get_linestyle() == "--"]
    assert len(line.get_xdata()) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(sweeps((None,)), id="no LoRA"),
        pytest.param(sweeps(diverged_from=0.0), id="every run diverged"),
        pytest.param(sweeps((None,), sizes=(4,)) + sweeps((8,), sizes=(16,)), id="no batch size in common"),
    ],
)
def test_odd_tables_are_drawn(rows):
    _, plotted = drawn(rows)
    assert len(plotted)


def test_each_model_and_dataset_has_its_block():
    figure, _ = drawn(sweeps(sizes=(4, 16)) + sweeps(sizes=(4,), dataset="$worked$"))
    assert [place.get_suptitle() for place in figure.subfigs] == ["tiny · $worked$", "tiny · instruct"]
    assert titles(figure) == ["batch 4", "", "", "batch 4", "batch 16", "", ""]
