"""Figure 7 of the paper: accuracy over RL training near each arm's optimal learning rate, and by learning rate."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorabench.figures import style
from lorabench.figures.lr_panel import (
    ACCURACY,
    ACCURACY_COLUMNS,
    STRIP,
    accuracy_rows,
    draw_levels,
    draw_lr_panel,
    lr_marks,
)
from lorabench.figures.rl_curves import curve_rows, draw_curves
from lorabench.store.tables import Tables

_COLUMNS = [*ACCURACY_COLUMNS, "step", "episodes"]


@style.applied()
def draw(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw the figure; return it, and what it plots as one tidy table.

    The column `element` says what a row is: `curve` (greedy test accuracy of an arm near its optimal LR after a step,
    its mean and standard deviation over seeds), or one of `accuracy_rows`.
    """
    curves = curve_rows(tables.runs, tables.curves, "test", "accuracy").assign(element="curve")
    curves = curves.rename(columns={"mean": "accuracy", "sd": "accuracy_sd"})
    parts = [curves, accuracy_rows(tables.runs)]
    plotted = pd.concat([part.reindex(columns=_COLUMNS) for part in parts if len(part)], ignore_index=True)
    figure, panels = style.panel_pairs(plotted, STRIP)
    styles = style.arm_styles(plotted.dropna(subset=["arm"]))
    for rows, over_time, by_lr in panels:
        of_curves = rows["element"] == "curve"
        _draw_curves(over_time, rows, styles)
        draw_lr_panel(by_lr, rows[~of_curves], styles, ACCURACY)
    style.legends(figure, styles, lr_marks(plotted))
    return figure, plotted


def _draw_curves(axes: Axes, rows: pd.DataFrame, styles: dict[str, style.ArmStyle]) -> None:
    curves = rows[rows["element"] == "curve"].rename(columns={"accuracy": "mean", "accuracy_sd": "sd"})
    if curves.empty:
        style.say(axes, "There are no test accuracies over training.")
        return
    draw_levels(axes, rows, "accuracy")
    draw_curves(axes, curves, styles)
    axes.set_ylabel("test accuracy at the best LR")
    style.note(axes, style.seeds_text(curves["n_seeds"]), STRIP)
