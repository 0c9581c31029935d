"""The LR ratio, LoRA over FullFT: by length of a run, and by width, alpha and batch size with what theories predict."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from lorabench.analysis.arms import ALPHA, arm_label, is_standard
from lorabench.analysis.comparison import Judging, comparisons
from lorabench.analysis.estimate import ExampleLosses
from lorabench.analysis.lr_law import PUBLISHED, predict_lr
from lorabench.analysis.lr_ratio import (
    BATCH_SIZE,
    COLUMNS,
    STEPS,
    Setting,
    at_end,
    at_step,
    measured_ratios,
    predicted,
    prediction_table,
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
    groups = grid.titled(tables.runs[is_standard(tables.runs)])
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


_COLUMNS = ["element", *COLUMNS, "width_low", "width_high", "task", "source", "note"]

# The colour of each theory, and its name in the legend.
_THEORIES = {
    "movement": ("#0072B2", "A moves, given FullFT's LR"),
    "scale": ("#D55E00", "width / alpha alone"),
    "fixed_lora": ("#009E73", "LoRA's LR has no width"),
    "constant": ("0.55", "always 10 (paper)"),
    "naive": ("#CC79A7", "width / (2 alpha)"),
}

# The marks of the widths, ascending, and the columns of the lower panels with the labels of their axes.
_MARKERS = ("o", "s", "^", "D", "P", "X")
_PANELS = {"steps": "steps", "alpha": "alpha", "batch_size": "batch size"}
_CONDITION = ["model", "dataset", "width", "steps", "batch_size", "alpha", "rank", "runs"]
# The paper as a source of ratios, and the length of its authors' published sweeps (100,000 examples in batches of 128).
_PAPER, _PAPER_STEPS = "LoRA Without Regret", 780


def draw(tables: Tables) -> style.Drawn:
    """Draw the LR ratio by condition; return the figure, and what it plots as one tidy table.

    The column `element` says what a row is: `condition` (a measured ratio with what a theory predicts of it, see
    `prediction_table`), `line` (a theory at a width), `paper_law` (the theory `movement` at the optimal LRs that the
    law of the authors' code gives for Llama, after 780 steps) or `published` (a ratio that `source` published, from
    ratio_low to ratio_high, for models from width_low to width_high).
    """
    judging = Judging(examples=ExampleLosses.of(tables.test_losses))
    conditions = prediction_table(measured_ratios(tables.runs, tables.curves, judging), DEFAULT_PREDICTIONS.lr_ratio)
    if not conditions["ratio"].notna().any():
        sentence = "no condition with an LR sweep of both LoRA and full fine-tuning"
        return style.empty_figure(sentence), pd.DataFrame(columns=_COLUMNS)
    published = published_ratios()
    middle = {end: np.sqrt(published[f"{end}_low"] * published[f"{end}_high"]) for end in ("width", "ratio")}
    published = published.drop(columns="steps").assign(element="published", **middle)
    widths = np.geomspace(0.8 * float(conditions["width"].min()), 10_000, 25)
    # The theory `movement` needs a measured LR: it is drawn over the widths of models with published optima only.
    lines = [_predicted(name, width, STEPS) for width in widths for name in _THEORIES if name != "movement"]
    for width in np.geomspace(2048, 8192, 9):
        lr = predict_lr(PUBLISHED, "llama", int(width), "fullft")
        about = {"element": "paper_law", "steps": _PAPER_STEPS, "fullft_lr": lr}
        lines.append(_predicted("movement", width, _PAPER_STEPS, lr) | about)
    parts = [conditions.assign(element="condition"), pd.DataFrame(lines), published]
    plotted = pd.concat(parts, ignore_index=True).reindex(columns=_COLUMNS)
    figure = style.new_figure(2 * style.PANEL_HEIGHT)
    places = figure.add_gridspec(2, len(_PANELS))
    marks = dict(zip(sorted(conditions["width"].unique()), _MARKERS, strict=False))
    _draw_widths(figure.add_subplot(places[0, :]), plotted, marks)
    for place, column in enumerate(_PANELS):
        axes = figure.add_subplot(places[1, place])
        _draw_panel(axes, conditions, column, marks)
        if place:
            axes.set_ylabel("")
    resolved = conditions.loc[conditions["ratio"].notna(), "resolved"].astype(bool)
    # Theories and published ratios always occur.
    entries = [
        *((True, style.line(label, color=colour)) for colour, label in _THEORIES.values()),
        (True, style.line("A moves, the paper's LRs", color=_THEORIES["movement"][0], linestyle="--")),
        *((True, style.mark(f"measured, width {int(width)}", mark, color="black")) for width, mark in marks.items()),
        ((conditions["runs"] == "prefix").any(), style.mark("prefix of longer runs", "o", color="0.45")),
        (not resolved.all(), style.mark("not resolved", "o", mfc="white", mew=1.2)),
        (True, style.mark("published, SFT", "d", color="0.5")),
        (True, style.mark("published, RL", "v", color="0.5")),
        (True, style.mark("published, another alpha", "d", mfc="white", mec="0.5")),
        (True, style.mark("the paper", "*", color="black", ms=10)),
    ]
    style.legends(figure, {}, entries)
    return figure, plotted


def _predicted(theory: str, width: float, steps: int, fullft_lr: float = math.nan) -> dict[str, Any]:
    """Return the ratio that a theory predicts of a width, with the paper's alpha and the batch size of our runs."""
    predict = predicted(DEFAULT_PREDICTIONS.lr_ratio, Setting(width, steps, BATCH_SIZE, ALPHA))[theory]
    ratio = float(np.exp(predict(np.asarray(math.log(fullft_lr)))))
    return {"element": "line", "theory": theory, "width": width, "alpha": ALPHA, "predicted": ratio}


def _draw_widths(axes: Axes, plotted: pd.DataFrame, marks: dict[Any, str]) -> None:
    for name, (colour, _) in _THEORIES.items():
        for element, line in (("line", "-"), ("paper_law", "--")):
            rows = plotted[(plotted["element"] == element) & (plotted["theory"] == name)]
            width, ratio = rows["width"].astype(float), rows["predicted"].astype(float)
            axes.plot(width, ratio, line, color=colour, lw=1.3, zorder=2)
    at_base = "runs == 'own' and alpha == @ALPHA and steps == @STEPS and batch_size == @BATCH_SIZE"
    here = only(plotted, "condition").query(at_base)
    given = here[here["theory"] == "movement"].sort_values("width")
    colour = _THEORIES["movement"][0]
    axes.plot(given["width"].astype(float), given["predicted"], color=colour, lw=1.3, marker="_", ms=9, zorder=3)
    _measured(axes, here, "width", marks)
    for row in only(plotted, "published").dropna(subset=["width"]).to_dict("records"):
        is_paper = row["source"] == _PAPER
        colour = "black" if is_paper else "0.5"
        axes.plot([row["width_low"], row["width_high"]], [row["ratio"]] * 2, color=colour, lw=1.2, zorder=3)
        axes.plot([row["width"]] * 2, [row["ratio_low"], row["ratio_high"]], color=colour, lw=1.2, zorder=3)
        marker = "*" if is_paper else "v" if row["task"] == "rl" else "d"
        face = colour if row["alpha"] == ALPHA else "white"
        axes.plot(row["width"], row["ratio"], marker, mfc=face, mec=colour, ms=11 if is_paper else 5, zorder=4)
    style.ratio_axes(axes, "width of the model (hidden size)")
    axes.set_title("by width", pad=18)
    style.note(axes, f"alpha {ALPHA:g}; measured here after {STEPS} steps of {BATCH_SIZE} examples; grey: published")


def _draw_panel(axes: Axes, conditions: pd.DataFrame, column: str, marks: dict[Any, str]) -> None:
    """Draw the conditions that differ in a column only, and what the theories predict of them."""
    axes.set_title(f"by {_PANELS[column]}", pad=18)
    base = {"steps": STEPS, "alpha": ALPHA, "batch_size": BATCH_SIZE}
    is_base = np.logical_and.reduce([conditions[name] == value for name, value in base.items() if name != column])
    others = [name for name in _CONDITION if name not in (column, "runs")]
    for chosen in (conditions[is_base], conditions):
        # Each group has several values of the column, and one value of everything else.
        shown = [rows for _, rows in chosen.groupby(others, dropna=False) if rows[column].nunique() > 1]
        if shown:
            break
    else:
        style.say(axes, "one value only")
        return
    for rows in shown:
        # A prefix stands in where there are no runs of that length.
        varied = rows if column == "steps" else rows.sort_values("runs").drop_duplicates([*_CONDITION[:-1], "theory"])
        for name, (colour, _) in _THEORIES.items():
            line = varied[varied["theory"] == name].sort_values([column, "runs"]).drop_duplicates(column)
            axes.plot(line[column].astype(float), line["predicted"], color=colour, lw=1.1, zorder=2)
        _measured(axes, varied, column, marks)
    widths = sorted({int(rows["width"].iloc[0]) for rows in shown})
    style.note(axes, f"width {' and '.join(map(str, widths))}")
    style.ratio_axes(axes, _PANELS[column])
    axes.xaxis.set_major_locator(FixedLocator(sorted({float(value) for rows in shown for value in rows[column]})))
    axes.xaxis.set_minor_locator(NullLocator())


def _measured(axes: Axes, rows: pd.DataFrame, column: str, marks: dict[Any, str]) -> None:
    """Draw measured ratios with their intervals; prefixes are blue-grey and a little to the right."""
    for row in rows.drop_duplicates(_CONDITION).dropna(subset=["ratio"]).to_dict("records"):
        is_prefix = row["runs"] == "prefix"
        colour, at = ("0.45", 1.07 * float(row[column])) if is_prefix else ("black", float(row[column]))
        axes.vlines(at, row["ratio_low"], row["ratio_high"], color=colour, lw=1.2, zorder=4)
        face = colour if row["resolved"] else "white"
        axes.plot(at, row["ratio"], marks.get(row["width"], "o"), ms=5, mfc=face, mec=colour, zorder=5)
