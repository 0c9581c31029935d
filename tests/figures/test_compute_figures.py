"""The figures about compute: they draw what the tables say, and odd tables do not break them."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis.step_flops import loss_by_flops
from lorabench.errors import UserError
from lorabench.figures.style import arm_styles
from lorabench.store.tables import Tables

from ..claims.test_compute import compute_table
from ..handmade import curves_of, make_sweep, runs_table
from .layout import draw, lines, only

NOTHING = pd.DataFrame()


def draw_compute(compute: pd.DataFrame):
    return draw("compute", Tables(NOTHING, NOTHING, compute=compute))


def test_compute_draws_the_ratios_of_the_table_and_the_formula():
    figure, plotted = draw_compute(compute_table(step_s=[2.0, 1.0, 1.4, 3.0]))
    flops, measured = figure.axes
    wanted = {"counted": [0.68, 2 / 3 + 16 / 150, 2 / 3 + 128 / 150]}
    wanted |= {"step_time": [0.5, 0.7, 1.5], "memory": [0.5, 0.5, 0.5]}
    for axes, marker, element in ((flops, "o", "counted"), (measured, "s", "step_time"), (measured, "^", "memory")):
        [line] = lines(axes, marker=marker)
        rows = only(plotted, element)
        np.testing.assert_array_equal(line.get_xydata(), rows[["rank", "ratio"]].to_numpy(float))
        assert rows["rank"].tolist() == [1, 8, 64]
        np.testing.assert_allclose(rows["ratio"], wanted[element])
    formula = only(plotted, "formula")
    np.testing.assert_allclose(formula["ratio"], 2 / 3 + 2 * formula["rank"] / 150)


def test_odd_compute_tables_are_drawn():
    nothing = dict.fromkeys(("linear_flops", "effective_width", "step_s", "peak_mem_bytes"), math.nan)
    for compute in (compute_table().iloc[1:], compute_table(**nothing, model="<b>$x^$&", device="$_{$")):
        draw_compute(compute)
    for compute, message in ((NOTHING, "no table compute"), (compute_table().iloc[:1], "no LoRA")):
        with pytest.raises(UserError, match=message):
            draw_compute(compute)


def test_loss_by_flops_draws_each_envelope_over_its_flops():
    runs = runs_table(make_sweep(None, train_flops=3e12) + make_sweep(8, train_flops=2.1e12))
    figure, plotted = draw("loss_by_flops", Tables(runs, curves_of(runs)))
    wanted = loss_by_flops(runs, curves_of(runs))
    for label, style in arm_styles(plotted).items():
        points = wanted[wanted["method"] == ("fullft" if label == "FullFT" else "lora")]
        [line] = lines(figure.axes[0], color=style.colour)
        np.testing.assert_array_equal(line.get_xydata(), points[["flops", "value"]].to_numpy(float))
        rows = only(plotted, "envelope", arm=label)
        np.testing.assert_array_equal(rows["flops"].astype(float), points["flops"])
        # At the last step, the FLOPs are those of the whole run.
        assert rows["flops"].max() == {"FullFT": 3e12, "LoRA r8": 2.1e12}[label]
    unknown = runs[runs["status"] == "done"].drop(columns="train_flops")
    with pytest.raises(UserError, match="no validation curves of runs whose training FLOPs are known"):
        draw("loss_by_flops", Tables(unknown, curves_of(unknown)))
