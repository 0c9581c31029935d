"""The reinforcement-learning part of the paper's figure 5: it is drawn as figure 4, with accuracies."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from lorabench.analysis.rewards import with_error_rates
from lorabench.figures import style
from lorabench.figures.fig4_placement import COLUMNS, best_rows, draw_placement
from lorabench.figures.lr_panel import ACCURACY, accuracy_columns, accuracy_rows, as_accuracies
from lorabench.store.tables import Tables

_COLUMNS = accuracy_columns(COLUMNS)


@style.applied()
def draw(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw the figure; return it, and what it plots as one tidy table.

    The column `element` says what a row is: one of `accuracy_rows`, or `best` or `margin_band` as in figure 4, but in
    accuracies from 0 to 1, with the band below the highest accuracy.
    """
    parts = [accuracy_rows(tables.runs), as_accuracies(best_rows(tables, with_error_rates(tables.runs)))]
    plotted = pd.concat([part.reindex(columns=_COLUMNS) for part in parts if len(part)], ignore_index=True)
    return draw_placement(plotted, ACCURACY), plotted
