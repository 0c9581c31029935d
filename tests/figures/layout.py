"""Draw a figure without its pictures, which take most of the time, and look into it."""

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lorabench.figures.catalog import FIGURES
from lorabench.figures.style import applied
from lorabench.store.tables import Tables

DIVERGED = {"status": "diverged", "final_valid_nll": math.nan, "final_test_nll": math.nan}
"""What a run that diverged has in place of a result."""


def draw(name: str, runs: Tables | pd.DataFrame, curves: pd.DataFrame | None = None) -> tuple[Figure, pd.DataFrame]:
    """Draw a figure of tables, or of runs and curves; it is never blank, and the limits of its panels are numbers."""
    tables = runs if isinstance(runs, Tables) else Tables(runs, pd.DataFrame() if curves is None else curves)
    figure, plotted = FIGURES[name].draw(tables)
    assert any(axes.has_data() or axes.texts for axes in figure.axes)
    assert all(np.isfinite([*axes.get_xlim(), *axes.get_ylim()]).all() for axes in figure.axes)
    return figure, plotted


def lay_out(name: str, runs: Tables | pd.DataFrame, curves: pd.DataFrame | None = None) -> None:
    """Draw a figure and compute its layout, which takes seconds: bad texts raise here."""
    figure, _ = draw(name, runs, curves)
    with applied():
        figure.draw_without_rendering()


def only(plotted: pd.DataFrame, element: str, **values: Any) -> pd.DataFrame:
    rows = plotted[plotted["element"] == element]
    for column, value in values.items():
        rows = rows[rows[column] == value]
    return rows


def lines(axes: Axes, **properties: Any) -> list[Line2D]:
    return [line for line in axes.get_lines() if all(getattr(line, f"get_{k}")() == v for k, v in properties.items())]


def texts(figure: Figure, panel: int | None = None) -> str:
    panels = figure.axes if panel is None else [figure.axes[panel]]
    return " ".join(text.get_text() for axes in panels for text in axes.texts)


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]
