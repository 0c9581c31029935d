"""Figure 6 of the paper: final accuracy of reinforcement learning against learning rate, by rank."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from lorabench.figures import style
from lorabench.figures.lr_panel import ACCURACY, STRIP, accuracy_rows, draw_lr_panel, lr_marks
from lorabench.store.tables import Tables


@style.applied()
def draw(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw the figure; return it, and what it plots as one tidy table, which `accuracy_rows` describes."""
    plotted = accuracy_rows(tables.runs)
    figure, panels = style.panels(plotted, STRIP)
    styles = style.arm_styles(plotted.dropna(subset=["arm"]))
    for rows, axes in panels:
        draw_lr_panel(axes, rows, styles, ACCURACY)
    style.legends(figure, styles, lr_marks(plotted))
    return figure, plotted
