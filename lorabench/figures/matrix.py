"""The matrix of claims by scale as a picture: a row for each core claim, a column for each size of model."""

from __future__ import annotations

import textwrap
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lorabench.figures import style
from lorabench.figures.short_names import SHORT_NAMES
from lorabench.figures.verdicts import LOOKS
from lorabench.utils.formats import number

_ROW, _COLUMN, _NAMES = 0.42, 0.98, 2.75  # inches
_PAPER = "paper"


@style.applied()
def draw_matrix(cells: pd.DataFrame) -> Figure:
    """Draw the matrix.

    Args:
        cells: as from `lorabench.sources.matrix.matrix`.
    """
    sizes = list(dict.fromkeys(cells.sort_values("parameters", kind="stable")["scale"]))
    scales = [_PAPER, *sizes]
    claims = list(dict.fromkeys(cells["claim_id"]))
    paper = cells.drop_duplicates("claim_id").set_index("claim_id")["paper_value"]
    width, height = _NAMES + _COLUMN * len(scales) + 0.1, _ROW * (len(claims) + 1) + 0.55
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((_NAMES / width, 0.5 / height, _COLUMN * len(scales) / width, 1 - 0.52 / height))
    axes.set(xlim=(-0.5, len(scales) - 0.5), ylim=(len(claims) - 0.5, -1.5), xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for column, scale in enumerate(scales):
        axes.text(column, -0.95, scale, ha="center", va="center", weight="bold", fontsize=10)
    axes.axhline(-0.5, color="0.4", linewidth=0.8)
    at = {(cell["claim_id"], cell["scale"]): cell for cell in cells.to_dict("records")}
    for row, claim_id in enumerate(claims):
        left = -0.5 - _NAMES / _COLUMN + 0.06
        colour = "0.1"
        axes.text(left, row, claim_id, weight="bold", va="center", color=colour, clip_on=False)
        axes.text(left + 0.36, row, SHORT_NAMES.get(claim_id, ""), va="center", color=colour, clip_on=False, fontsize=8)
        if row:
            axes.axhline(row - 0.5, color="0.9", linewidth=0.6)
        axes.text(0, row, _of_paper(str(paper[claim_id])), ha="center", va="center", fontsize=6.5, color="0.25")
        for column, scale in enumerate(sizes, start=1):
            cell = at.get((claim_id, scale))
            if cell is None or cell["verdict"] == "not tested":
                axes.text(column, row, "\N{EN DASH}", ha="center", va="center", color="0.7")
            else:
                _cell(axes, column, row, cell)
    handles = [
        Line2D(
            [],
            [],
            marker=mark,
            color=colour,
            linestyle="none",
            markersize=6,
            label=verdict,
            markerfacecolor=colour if filled else "white",
        )
        for verdict, (colour, mark, filled) in LOOKS.items()
        if verdict != "not tested"
    ]
    figure.legend(handles=handles, loc="lower left", ncols=4, handletextpad=0.2, columnspacing=1.0, borderaxespad=0.3)
    return figure


def _of_paper(value: str) -> str:
    """Return the paper's number or statement in at most three short lines."""
    said = value.partition(";")[0].partition(" (")[0]
    said = "says so" if said in ("no number", "lower", "wider") else said
    return "\n".join(textwrap.wrap(textwrap.shorten(said, 42, placeholder="..."), 17))


def _cell(axes: Axes, column: int, row: int, cell: dict[Any, Any]) -> None:
    colour, mark, filled = LOOKS[str(cell["verdict"])]
    known = not pd.isna(cell["estimate"])
    height = row - 0.14 if known else row
    axes.plot(column, height, mark, color=colour, markersize=7, markerfacecolor=colour if filled else "white")
    if known:
        axes.text(column, row + 0.26, number(cell["estimate"]), ha="center", va="center", color=colour, fontsize=7)
