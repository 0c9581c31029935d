"""The figures about compute: they draw what the tables say, and odd tables do not break them."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis.step_flops import loss_by_flops
from lorabench.errors import UserError
from lorabench.figures.style import arm_styles
from lorabench.store.io import with_all_columns
from lorabench.store.tables import Tables

from ..claims.test_compute import compute_table
from ..handmade import curves_of, make_sweep, runs_table
from .layout import draw

NOTHING = pd.DataFrame()


def draw_compute(compute: pd.DataFrame):
    return draw("compute", Tables(NOTHING, NOTHING, compute=compute))


def draw_loss(rows: list[dict]):
    runs = runs_table(rows)
    return draw("loss_by_flops", Tables(runs, curves_of(runs)))


def drawn(axes, marker: str):
    """Return the data of the only line with a marker."""
    [line] = [line for line in axes.get_lines() if line.get_marker() == marker and len(line.get_xdata()) != 2]
    return line.get_xdata(), line.get_ydata()


def test_compute_draws_the_ratios_of_the_table():
    times = [2.0, 1.0, 1.4, 3.0]
    figure, plotted = draw_compute(compute_table(step_s=times))
    flops, measured = figure.axes
    wanted = {"o": [0.68, 2 / 3 + 16 / 150, 2 / 3 + 128 / 150], "s": [0.5, 0.7, 1.5], "^": [0.5, 0.5, 0.5]}
    for axes, marker, element in ((flops, "o", "counted"), (measured, "s", "step_time"), (measured, "^", "memory")):
        ranks, ratios = drawn(axes, marker)
        assert list(ranks) == [1, 8, 64]
        np.testing.assert_allclose(ratios, wanted[marker])
        of_element = plotted[plotted["element"] == element]
        assert list(of_element["rank"]) == [1, 8, 64]
        np.testing.assert_allclose(of_element["ratio"], wanted[marker])
    assert flops.get_ylim() == measured.get_ylim()
    assert flops.get_ylim()[0] == 0
    assert flops.get_ylim()[1] > 1.52


def test_the_line_is_the_formula():
    figure, plotted = draw_compute(compute_table())
    line = plotted[plotted["element"] == "formula"]
    np.testing.assert_allclose(line["ratio"], 2 / 3 + 2 * line["rank"] / 150)
    assert line["rank"].min() < 1
    assert line["rank"].max() > 64
    lines = [drawn.get_xydata().tolist() for drawn in figure.axes[0].get_lines()]
    assert line[["rank", "ratio"]].to_numpy().tolist() in lines
    heights = {points[0][1] for points in lines if len(points) == 2}
    assert heights == {2 / 3, 1.0}


def test_each_model_and_setting_has_a_row_of_panels():
    tables = [compute_table(), compute_table(model="other"), compute_table(model="other", batch_size=16)]
    figure, plotted = draw_compute(pd.concat(tables))
    assert [axes.get_title(loc="left") for axes in figure.axes[::2]] == [
        "other batch_size 8",
        "other batch_size 16",
        "tiny",
    ]
    assert len(figure.axes) == 6
    assert plotted.groupby(["model", "batch_size"]).ngroups == 3


def test_odd_compute_tables_are_drawn():
    nothing = dict.fromkeys(("linear_flops", "effective_width", "step_s", "peak_mem_bytes"), math.nan)
    odd = [
        compute_table().iloc[1:],
        compute_table(step_s=math.nan, peak_mem_bytes=math.nan),
        compute_table(**nothing),
        compute_table(model="<b>$x^$&", device="$_{$"),
        compute_table()[["model", "method", "rank", "effective_width", "linear_flops"]],
    ]
    for compute in odd:
        draw_compute(with_all_columns(compute, "compute"))


def test_compute_tables_without_anything_to_draw_are_refused():
    for compute, message in ((NOTHING, "no table compute"), (compute_table().iloc[:1], "no LoRA")):
        with pytest.raises(UserError, match=message):
            draw_compute(compute)


def test_loss_by_flops_draws_each_envelope_over_its_flops():
    rows = make_sweep(None, train_flops=3e12) + make_sweep(8, train_flops=2.1e12)
    figure, plotted = draw_loss(rows)
    runs = runs_table(rows)
    wanted = loss_by_flops(runs, curves_of(runs))
    for label, style in arm_styles(plotted).items():
        method = "fullft" if label == "FullFT" else "lora"
        points = wanted[wanted["method"] == method]
        [line] = [line for line in figure.axes[0].get_lines() if line.get_color() == style.colour]
        np.testing.assert_array_equal(line.get_xdata(), points["flops"])
        np.testing.assert_array_equal(line.get_ydata(), points["value"])
        of_arm = plotted[(plotted["arm"] == label) & (plotted["element"] == "envelope")]
        np.testing.assert_array_equal(of_arm["flops"].astype(float), points["flops"])
        # At the last step, the FLOPs are those of the whole run.
        assert of_arm["flops"].max() == {"FullFT": 3e12, "LoRA r8": 2.1e12}[label]
    assert figure.axes[0].get_xscale() == "log"


def test_loss_by_flops_needs_flops():
    runs = runs_table(make_sweep(None) + make_sweep(8))
    for table, message in (
        (runs.drop(columns="train_flops"), "no column train_flops"),
        (runs[runs["status"] == "done"].assign(train_flops=math.nan), "no validation curves of runs whose training"),
    ):
        with pytest.raises(UserError, match=message):
            draw("loss_by_flops", Tables(table, curves_of(table)))
