"""Measured against predicted LR ratios, LoRA over FullFT, and how far off each theory is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lorabench.analysis.arms import ALPHA
from lorabench.analysis.comparison import Judging
from lorabench.analysis.estimate import ExampleLosses
from lorabench.analysis.lr_law import PUBLISHED, predict_lr
from lorabench.analysis.published import published_ratios
from lorabench.figures import style
from lorabench.figures.grid import only
from lorabench.store.tables import Tables
from studies.lr_ratio.conditions import COLUMNS, OFF_BY, measured_ratios, prediction_table, rms_factors
from studies.lr_ratio.predictions import DEFAULT
from studies.lr_ratio.theories import BATCH_SIZE, Setting, predicted

_COLUMNS = ["element", *COLUMNS, "conditions", "rms_factor", "bias", "worst", "beyond", "task", "source", "note"]

# The theories by the names in the picture.
_THEORIES = {
    "movement": "A moves, given FullFT's LR",
    "still": "A stands still",
    "mu_a": "root of width / alpha",
    "scale": "width / alpha alone",
    "fixed_lora": "LoRA's LR has no width",
    "constant": "always 10 (paper)",
    "naive": "width / (2 alpha) (paper)",
}
_SHOWN = "movement"

# Colours of LoRA with a trained A, with a frozen one, and at rank 1, and the marks of the widths, ascending.
_COLOURS = {"A is trained": "black", "A is frozen": "#D55E00", "rank 1": "#0072B2"}
_MARKERS = ("o", "s", "^", "D", "P", "X")


def draw(tables: Tables) -> style.Drawn:
    """Draw measured against predicted LR ratios, and by how much each theory is off; return what is plotted, too.

    The column `element` says what a row is: `condition` (a measured ratio with what a theory predicts of it, see
    `prediction_table`), `theory` (see `rms_factors`; of runs of their own length), or `published` (a ratio of `source`
    that was published with the LR, the length and the width that the theory `movement` asks for, and what it says).
    """
    judging = Judging(examples=ExampleLosses.of(tables.test_losses))
    conditions = prediction_table(measured_ratios(tables.runs, tables.curves, judging), DEFAULT)
    if not conditions["ratio"].notna().any():
        sentence = "no condition with an LR sweep of both LoRA and full fine-tuning"
        return style.empty_figure(sentence), pd.DataFrame(columns=_COLUMNS)
    factors = rms_factors(conditions[conditions["runs"] == "own"])
    parts = {"condition": conditions, "theory": factors, "published": _published()}
    plotted = pd.concat([part.assign(element=name) for name, part in parts.items()], ignore_index=True)
    plotted = plotted.reindex(columns=_COLUMNS)
    figure = style.new_figure(1.4 * style.PANEL_HEIGHT)
    places = figure.add_gridspec(1, 2, width_ratios=[1.5, 1])
    marks = dict(zip(sorted(conditions["width"].unique()), _MARKERS, strict=False))
    shown = conditions[conditions["theory"].eq(_SHOWN) & conditions["ratio"].notna()]
    _draw_measured(figure.add_subplot(places[0]), shown, only(plotted, "published"), marks)
    _draw_factors(figure.add_subplot(places[1]), factors)
    kinds = set(map(_kind, shown.to_dict("records")))
    entries = [
        *((kind in kinds, style.mark(kind, "o", color=colour)) for kind, colour in _COLOURS.items()),
        *((True, style.mark(f"width {int(width)}", mark)) for width, mark in marks.items()),
        (not shown["resolved"].astype(bool).all(), style.mark("not resolved", "o", mfc="white", mew=1.2)),
        ((shown["runs"] == "prefix").any(), style.mark("beginning of longer runs", "o", alpha=0.4, ms=4)),
        (True, style.mark("published, SFT", "d", color="#CC79A7")),
        (True, style.mark("published, RL", "v", color="#CC79A7")),
    ]
    return style.legends(figure, {}, plotted, entries)


def _kind(row: Mapping[Any, Any]) -> str:
    return "A is frozen" if row["frozen"] else "rank 1" if row["rank"] == 1 else "A is trained"


def _published() -> pd.DataFrame:
    """Return published ratios whose source states all that the theory asks for, with what it predicts."""
    rows = published_ratios()
    widths = [2048, 8192]
    lrs = [predict_lr(PUBLISHED, "llama", width, "fullft") for width in widths]
    of_paper = pd.DataFrame({"width_low": widths, "width_high": widths, "fullft_lr_low": lrs, "fullft_lr_high": lrs})
    of_paper = of_paper.assign(steps=_PAPER_STEPS, task="sft", alpha=ALPHA, source=_PAPER, ratio_low=9.8, ratio_high=10)
    of_paper["note"] = "LRs of the authors' law for Llama"
    rows = pd.concat([rows[rows["source"] != _PAPER], of_paper], ignore_index=True)
    for name in ("width", "fullft_lr", "ratio"):
        rows[name] = np.sqrt(rows[f"{name}_low"].astype(float) * rows[f"{name}_high"].astype(float))
    rows = rows.dropna(subset=["width", "steps", "alpha", "fullft_lr", "ratio"])
    ratios = []
    for width, steps, alpha, lr in rows[["width", "steps", "alpha", "fullft_lr"]].astype(float).to_numpy().tolist():
        predict = predicted(DEFAULT, Setting(width, steps, BATCH_SIZE, alpha))[_SHOWN]
        ratios.append(float(np.exp(predict(np.asarray(math.log(lr))))))
    return rows.assign(theory=_SHOWN, predicted=ratios)


def _draw_measured(axes: Axes, shown: pd.DataFrame, published: pd.DataFrame, marks: dict[Any, str]) -> None:
    """Draw measured ratios with their intervals over predicted ones; beginnings of longer runs are pale."""
    every = pd.concat([shown[["predicted", "ratio"]], published[["predicted", "ratio"]]])
    ends = np.array([0.7 * float(every.min().min()), 1.5 * float(every.max().max())])
    axes.fill_between(ends, ends / OFF_BY, ends * OFF_BY, color="0.92", zorder=0)
    axes.plot(ends, ends, color="0.6", lw=0.9, zorder=1)
    for row in shown.to_dict("records"):
        colour, place = _COLOURS[_kind(row)], (row["predicted"], row["ratio"])
        pale = row["runs"] == "prefix"
        look: dict[str, Any] = {"alpha": 0.35 if pale else 1.0, "zorder": 3 if pale else 4}
        if not pale:
            axes.vlines(place[0], row["ratio_low"], row["ratio_high"], color=colour, lw=1.0, zorder=4)
        face = colour if row["resolved"] else "white"
        axes.plot(*place, marks.get(row["width"], "o"), ms=3.5 if pale else 5, mfc=face, mec=colour, **look)
    for row in published.to_dict("records"):
        axes.plot(row["predicted"], row["ratio"], "v" if row["task"] == "rl" else "d", color="#CC79A7", ms=5, zorder=3)
    style.ratio_axes(axes, "predicted ratio")
    style.log_ticks(axes.xaxis, subs=(1.0, 2.0, 5.0))
    axes.set(xlim=ends, ylabel="measured ratio of optimal LRs, LoRA / FullFT")
    axes.set_title(f"measured against predicted: {_THEORIES[_SHOWN]}", pad=18)
    style.note(axes, f"band: a factor of {OFF_BY:g}; bars: 95% intervals")


def _draw_factors(axes: Axes, factors: pd.DataFrame) -> None:
    """Draw by how much each theory is off, the best one at the top."""
    ordered = factors.sort_values("rms_factor", ascending=False)
    places = np.arange(len(ordered))
    axes.hlines(places, 1, ordered["rms_factor"], color="0.8", lw=4, zorder=1)
    axes.plot(ordered["rms_factor"], places, "o", color="black", zorder=2)
    for place, row in zip(places, ordered.to_dict("records"), strict=True):
        text = f"{row['rms_factor']:.2f} in {row['conditions']}"
        axes.annotate(text, (row["rms_factor"], place), (6, -3), textcoords="offset points", fontsize=7.5)
    style.log_axes(axes, "measured / predicted,\nroot mean square")
    style.log_ticks(axes.xaxis, subs=(1.0, 2.0, 5.0))
    axes.set(xlim=(1, 1.8 * float(ordered["rms_factor"].max())), yticks=places, ylim=(-0.6, len(ordered) - 0.4))
    axes.set_yticklabels([_THEORIES[name] for name in ordered["theory"]])
    axes.set_title("how far off each theory is", pad=18)
    style.note(axes, "and in how many conditions")


# The paper as a source of ratios, and the length of its authors' published sweeps (100,000 examples in batches of 128).
_PAPER, _PAPER_STEPS = "LoRA Without Regret", 780
