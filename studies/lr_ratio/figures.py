"""The LR ratio, LoRA over FullFT: by length of a run, and against what theories predict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lorabench.analysis.alpha_rules import judged_arms
from lorabench.analysis.arms import ALPHA, arm_label
from lorabench.analysis.comparison import Judging, comparisons
from lorabench.analysis.estimate import ExampleLosses
from lorabench.analysis.lr_law import PUBLISHED, predict_lr
from lorabench.analysis.lr_ratio import (
    BATCH_SIZE,
    COLUMNS,
    OFF_BY,
    Setting,
    at_end,
    at_step,
    measured_ratios,
    predicted,
    prediction_table,
    rms_factors,
)
from lorabench.analysis.published import paper_numbers, published_ratios
from lorabench.claims.learning_rate import SHORT_STEPS
from lorabench.config.margins import DEFAULT_PREDICTIONS
from lorabench.figures import grid, style
from lorabench.figures.by_lr import LR_COLUMNS, STRIP, draw_lr_panel, lr_marks, lr_rows
from lorabench.figures.grid import Styles, only
from lorabench.store.tables import Tables

_BY_LENGTH = [*LR_COLUMNS, "full_steps", "ratio", "ratio_low", "ratio_high"]
# Ratios are drawn from this step on: earlier, the optimum of LoRA is beyond any grid, since B starts at zero.
_FIRST_STEP = 10
# The paper's numbers that the ratio is compared with, by their key in the table of the paper's numbers.
_REFERENCES = {"lr_ratio_lora_over_fullft": "long runs", "lr_ratio_short_runs": "short runs"}


def draw_by_length(tables: Tables) -> style.Drawn:
    """Draw losses by LR, and the LR ratio, had runs ended at several steps; return what is plotted, too.

    The columns and elements are those of `lr_rows`, with losses on the validation split at step `steps` of runs of
    `full_steps` steps. Further elements are `ratio` (of an arm's optimal LR to that of FullFT, with its 95% interval)
    and `reference` (the paper's ratios).
    """
    groups = grid.titled(tables.runs[judged_arms(tables.runs)])
    parts = [_rows_by_length(runs, tables.curves) for _, runs in groups]
    lengths = [sorted(int(step) for step in rows.loc[rows["element"] != "ratio", "steps"].unique()) for rows in parts]
    heights = [math.ceil((len(steps) + 1) / 2) for steps in lengths]
    ratios = [paper_numbers()[key] for key in _REFERENCES if any(len(only(rows, "ratio")) for rows in parts)]
    plotted = grid.tidy({"reference": pd.DataFrame({"ratio": ratios})}, _BY_LENGTH, *parts)
    figure = style.new_figure(style.PANEL_HEIGHT * sum(heights))
    styles = style.arm_styles(plotted)
    for place, ((title, _), rows, steps) in enumerate(zip(groups, parts, lengths, strict=True)):
        for column, what in enumerate([*(f"at step {step}" for step in steps), "LR ratio"], start=1):
            axes = figure.add_subplot(sum(heights), 2, 2 * sum(heights[:place]) + column)
            axes.set_title(f"{title} · {what}", pad=STRIP + 18, parse_math=False)
            if column > len(steps):
                _draw_ratio(axes, only(rows, "ratio"), styles)
            else:
                draw_lr_panel(axes, rows[rows["steps"] == steps[column - 1]], styles)
                axes.set_ylabel("validation NLL (nats / token)")
        if len(steps) > 1:
            axes.set_xticks(steps)
    known = only(plotted, "ratio").dropna(subset=["ratio"])
    unresolved = style.mark("ratio, not resolved", "o", mfc="white", mew=1.2)
    style.legends(figure, styles, [*lr_marks(plotted), (not known["resolved"].astype(bool).all(), unresolved)])
    return figure, plotted


def _rows_by_length(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    own = curves[curves["run_id"].isin(runs["run_id"]) & (curves["split"] == "validation")]
    evaluated = sorted(int(step) for step in own.loc[own["step"] >= _FIRST_STEP, "step"].unique())
    steps = runs["steps"].iloc[0]
    # A table without the length of its runs holds runs of one length.
    full = max(evaluated, default=0) if pd.isna(steps) else int(steps)
    by_step = {step: at_step(runs, curves, step) for step in evaluated if step < full}
    by_step[full] = at_end(runs).assign(steps=full)
    by_length = {step: comparisons(as_of, curves)[0] for step, as_of in by_step.items() if len(as_of)}
    parts = [lr_rows([by_length[step]]) for step in (*SHORT_STEPS, full) if step in by_length]
    ratios = []
    for comparison in by_length.values():
        for arm in comparison.arms:
            if arm["method"] == "lora" and comparison.fullft:
                ratio = grid.lr_ratio(comparison.fit.log_ratio(arm_label(arm), "FullFT"))
                resolved = not comparison.problems([arm, comparison.fullft], resolved=True)
                ratios.append(arm | ratio | {"resolved": resolved})
    return grid.tidy({"ratio": pd.DataFrame(ratios)}, _BY_LENGTH, *parts).assign(full_steps=full)


def _draw_ratio(axes: Axes, rows: pd.DataFrame, styles: Styles) -> None:
    printed = paper_numbers()
    small: dict[str, Any] = {"textcoords": "offset points", "color": style.MUTED, "fontsize": 7.5}
    for key, length in _REFERENCES.items():
        if len(rows):
            axes.axhline(printed[key], color="0.6", linewidth=0.9, linestyle="--", zorder=1)
            text = f"paper, {length}: {printed[key]:g}"
            axes.annotate(text, (0, printed[key]), (2, 3), ("axes fraction", "data"), **small)
    known = rows[rows["ratio"].notna() & (rows["steps"] > 0)].sort_values("steps")
    grid.lines(axes, known[["arm", "steps", "ratio"]], "steps", "ratio", styles)
    grid.points(axes, known.assign(filled=known["resolved"]), "steps", "ratio", styles, 4.5)
    style.ratio_axes(axes, "training step")


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
    conditions = prediction_table(measured_ratios(tables.runs, tables.curves, judging), DEFAULT_PREDICTIONS.lr_ratio)
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
    style.legends(figure, {}, entries)
    return figure, plotted


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
    numbers = rows[["width", "steps", "alpha", "fullft_lr"]].astype(float).itertuples(index=False)
    return rows.assign(theory=_SHOWN, predicted=[_ratio(*row) for row in numbers])


def _ratio(width: float, steps: float, alpha: float, fullft_lr: float) -> float:
    predict = predicted(DEFAULT_PREDICTIONS.lr_ratio, Setting(width, steps, BATCH_SIZE, alpha))[_SHOWN]
    return float(np.exp(predict(np.asarray(math.log(fullft_lr)))))


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
