"""The LR ratio, LoRA over FullFT, by the length of a run: what it would be had runs ended at several steps."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from lorabench.analysis.alpha_rules import judged_arms
from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import comparisons
from lorabench.analysis.curves import at_end, at_step
from lorabench.analysis.published import paper_numbers
from lorabench.claims.learning_rate import SHORT_STEPS
from lorabench.figures import grid, style
from lorabench.figures.by_lr import LR_COLUMNS, STRIP, draw_lr_panel, lr_marks, lr_rows
from lorabench.figures.grid import Styles, only
from lorabench.store.tables import Tables

_BY_LENGTH = [*LR_COLUMNS, "full_steps", "ratio", "ratio_low", "ratio_high"]
# Ratios are drawn from this step on: earlier, the optimum of LoRA is beyond any grid, since B starts at zero.
_FIRST_STEP = 10
# The paper's numbers that the ratio is compared with, by their key in the table of the paper's numbers.
_REFERENCES = {"lr_ratio_lora_over_fullft": "long runs", "lr_ratio_short_runs": "short runs"}


def draw(tables: Tables) -> style.Drawn:
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
