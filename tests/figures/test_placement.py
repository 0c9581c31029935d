"""Figures 4 and 5 from tables made by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis.comparison import comparisons
from lorabench.store.tables import Tables

from ..handmade import make_sweep, runs_table
from .layout import draw, only, texts

PER_RANK = {"attn": 5_500, "mlp": 9_000, "all": 14_000}


def sweeps(arms=(("attn", 16), ("attn", 27), ("mlp", 16), ("all", 16)), fullft=True, **changes):
    rows = make_sweep(None, **changes) if fullft else []
    for placement, rank in arms:
        sweep = make_sweep(rank, placement=placement, trainable_params=PER_RANK[placement] * rank, **changes)
        rows += [row | {"run_id": f"{row['run_id']}-{placement}"} for row in sweep]
    return rows


def drawn(rows, name="fig4_placement"):
    return draw(name, Tables(runs_table(rows), pd.DataFrame()))


def test_numbers_are_those_of_the_tables():
    rows = sweeps()
    figure, plotted = drawn(rows)
    runs = runs_table(rows)
    [comparison] = comparisons(runs, pd.DataFrame())
    best = only(plotted, "best")
    expected = [[minimum.value, *minimum.interval()] for minimum in map(comparison.fit.minima.get, best["arm"])]
    np.testing.assert_allclose(best[["nll", "nll_low", "nll_high"]].astype(float), expected)
    counts = best.set_index("arm")["parameters"].to_dict()
    assert counts == {
        "FullFT": "0.83M",
        "LoRA r16": "0.22M",
        "LoRA r16 attn": "88.0K",
        "LoRA r16 mlp": "0.14M",
        "LoRA r27 attn": "0.15M",
    }
    band = only(plotted, "margin_band").iloc[0]
    assert band["nll_low"] == pytest.approx(best["nll"].min())
    assert band["nll_high"] - band["nll_low"] == pytest.approx(comparison.margin.value)
    listed = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert listed == ["attn r16  88.0K", "mlp r16  0.14M", "attn r27  0.15M", "all r16  0.22M", "FullFT  0.83M"]


def test_placement_is_line_style_and_marker_and_rank_is_colour():
    figure, _ = drawn(sweeps())
    lines = [line for line in figure.axes[0].get_lines() if line.get_linestyle() != "None"]
    assert {line.get_linestyle() for line in lines} == {"-", "--", ":"}
    assert {"o", "P", "v", "s"} <= {line.get_marker() for line in figure.axes[0].get_lines()}
    assert len({line.get_color() for line in lines if line.get_linestyle() == ":"}) == 2


def test_a_best_lr_at_the_edge_is_open():
    figure, plotted = drawn(sweeps(lrs=[3e-4, 1e-3, 3e-3], diverged_from=1.0))
    assert plotted.loc[plotted["element"].eq("best") & plotted["method"].eq("lora"), "at_edge"].all()
    faces = {line.get_markerfacecolor() for line in figure.axes[1].get_lines() if line.get_marker() in ("o", "P", "v")}
    assert faces == {"white"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(sweeps((("mlp", 16),), diverged_from=0.0), id="every run diverged"),
        pytest.param([row | {"trainable_params": None} for row in sweeps()], id="no parameter counts"),
        pytest.param([row | {"placement": None} for row in sweeps((("all", 16),))], id="placement not given"),
    ],
)
def test_odd_tables_are_drawn(rows):
    _, plotted = drawn(rows)
    assert len(plotted)


def test_arms_without_a_parameter_count_are_named():
    rows = [row | ({"trainable_params": None} if row["placement"] == "attn" else {}) for row in sweeps()]
    figure, _ = drawn(rows)
    assert [text.get_text() for text in figure.axes[1].texts] == ["no parameter count: LoRA r16 attn, LoRA r27 attn"]
    without = runs_table(sweeps()).drop(columns="trainable_params")
    figure, _ = draw("fig4_placement", Tables(without, pd.DataFrame()))
    assert "FullFT" in texts(figure, 1)
