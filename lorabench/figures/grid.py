"""What figures are made of: panels, the rows that they plot, and lines, marks and bands in the look of their arms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorabench.analysis.arms import arm_label
from lorabench.figures.style import PANEL_HEIGHT, SIGMA, ArmStyle, new_figure

PANEL = ["model", "dataset", "batch_size", "steps"]
"""The columns of a panel: losses of different models, data, batch sizes or lengths are never drawn together."""

ARM_COLUMNS = [*PANEL, "arm", "method", "rank", "placement"]
"""The first columns of what a figure plots."""

Styles = Mapping[str, ArmStyle]
"""The look of each arm, by its label."""


def tidy(parts: Mapping[str, pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    """Join what a figure plots into one table.

    Args:
        parts: rows by what they are, which becomes the column `element`. Rows that have a method get the label of their
            arm as `arm`.
        columns: the columns of the table.
    """
    kept = []
    for element, rows in parts.items():
        if len(rows):
            if "method" in rows and "arm" not in rows:
                rows = rows.assign(arm=[arm_label(row) for _, row in rows.iterrows()])
            kept.append(rows.assign(element=element).reindex(columns=columns))
    return pd.concat(kept, ignore_index=True) if kept else pd.DataFrame(columns=columns)


def only(rows: pd.DataFrame, element: str) -> pd.DataFrame:
    """Return the rows of one element."""
    chosen: pd.DataFrame = rows[rows["element"] == element]
    return chosen


def diverged_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that diverged, which every figure lists in what it plots."""
    diverged: pd.DataFrame = runs[runs["status"] == "diverged"]
    return diverged


def titled(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return a title and the rows of each panel; the title names what distinguishes the panel from the others."""
    several_batch_sizes = frame["batch_size"].nunique() > 1
    several_lengths = (frame.groupby(PANEL[:-1], dropna=False)["steps"].nunique() > 1).any()
    titles = []
    for (model, dataset, batch_size, steps), rows in frame.groupby(PANEL, dropna=False):
        title = f"{model} · {dataset}" + (f" · batch {batch_size}" if several_batch_sizes else "")
        titles.append((title + (f" · {steps} steps" if several_lengths else ""), rows))
    return titles


def panels(
    frame: pd.DataFrame, each: int = 1, strip: float = 0.0
) -> tuple[Figure, list[tuple[pd.DataFrame, list[Axes]]]]:
    """Make a figure with one panel, or two side by side, for each model, dataset, batch size and length of a table.

    Args:
        frame: columns PANEL and others.
        each: the number of panels of each group of rows: 1 or 2. The first has the title.
        strip: the height in points to keep free above a panel with a title, for marks.

    Returns:
        The figure, and for each group its rows and its panels.
    """
    groups = titled(frame)
    columns = 2 if each == 2 else min(2, len(groups))
    rows = math.ceil(each * len(groups) / columns)
    figure = new_figure((PANEL_HEIGHT + (0.4 if each == 2 else 0.0)) * rows)
    drawn = []
    for place, (title, part) in enumerate(groups):
        axes = [figure.add_subplot(rows, columns, place * each + number) for number in range(1, each + 1)]
        axes[0].set_title(title, pad=strip + 18, parse_math=False)
        drawn.append((part, axes))
    return figure, drawn


def lines(axes: Axes, rows: pd.DataFrame, x: str, y: str, styles: Styles, **look: Any) -> None:
    """Draw a line for each arm through its rows, in their order."""
    for arm, points in rows.groupby("arm"):
        axes.plot(points[x].astype(float), points[y].astype(float), **{**styles[str(arm)].line, **look})


def points(
    axes: Axes,
    rows: pd.DataFrame,
    x: str,
    y: str,
    styles: Styles,
    filled: str | bool = True,
    marker: str | Callable[[dict[Any, Any]], str] | None = None,
    size: float = 5.5,
) -> None:
    """Draw a mark for each row, with a vertical line from `<y>_low` to `<y>_high` where the rows have these columns.

    Args:
        axes: the panel.
        rows: columns arm, x and y.
        x: the column of the positions.
        y: the column of the heights.
        styles: the look of each arm.
        filled: whether marks are filled, or the column that says so.
        marker: the mark, or what returns that of a row; by default that of the arm.
        size: the size of a mark in points.
    """
    for row in rows.dropna(subset=[x, y]).to_dict("records"):
        look = styles[row["arm"]]
        if f"{y}_low" in row:
            axes.vlines(row[x], row[f"{y}_low"], row[f"{y}_high"], color=look.colour, linewidth=1.3, zorder=4)
        face = look.colour if (row[filled] if isinstance(filled, str) else filled) else "white"
        kind = marker(row) if callable(marker) else marker or look.marker
        axes.plot(row[x], row[y], kind, ms=size, mfc=face, mec=look.colour, mew=1.3, zorder=5)


def bars(
    axes: Axes, rows: pd.DataFrame, x: str, y: str, look: ArmStyle, size: float = 4.5, label: str | None = None
) -> None:
    """Draw one arm's marks with bars from `<y>_low` to `<y>_high`; a mark is open where the best LR is `at_edge`."""
    for row in rows.to_dict("records"):
        # An end may be beyond the value by rounding.
        half = [[max(row[y] - row[f"{y}_low"], 0.0)], [max(row[f"{y}_high"] - row[y], 0.0)]]
        face = "white" if row["at_edge"] else look.colour
        shape: dict[str, Any] = {"fmt": look.marker, "color": look.colour, "mfc": face, "mec": look.colour, "mew": 1.2}
        axes.errorbar(float(row[x]), row[y], half, capsize=2.5, ms=size, label=label, zorder=look.zorder + 2, **shape)


def band(axes: Axes, rows: pd.DataFrame, x: str, low: str, high: str, colour: str = "0.85") -> None:
    """Fill the area between two columns."""
    axes.fill_between(
        rows[x].astype(float),
        rows[low].astype(float),
        rows[high].astype(float),
        color=colour,
        linewidth=0,
        zorder=1,
        label="_",
    )


def occurring(entries: Iterable[tuple[Any, Artist]]) -> list[Artist]:
    """Return the legend entries of the marks that occur, from pairs of whether a mark does and its entry."""
    return [entry for occurs, entry in entries if occurs]


def sigma_text(sigma: float) -> str:
    """Write the standard deviation between seeds for the note above a panel; NaN is unknown."""
    return f"{SIGMA} unknown" if math.isnan(sigma) else f"{SIGMA} {sigma:.2g}"


def seeds_text(counts: pd.Series[int]) -> str:
    """Write over how many seeds the means of a panel are taken: `3 seeds`, or `2 to 3 seeds` where they differ."""
    fewest, most = int(counts.min()), int(counts.max())
    return f"{most if fewest == most else f'{fewest} to {most}'} seed{'s' if most > 1 else ''}"


def diverged_facts(rows: pd.DataFrame, drawn: pd.DataFrame, lack: str) -> list[str]:
    """Write how many runs of a panel diverged, and which arms therefore lack what is drawn; nothing if none did.

    Args:
        rows: the rows of a panel.
        drawn: those of them that are drawn.
        lack: what an arm without drawn rows lacks, such as `no curve`.
    """
    diverged = only(rows, "diverged")
    if diverged.empty:
        return []
    lost = sorted(set(diverged["arm"]) - set(drawn["arm"]))
    return [f"{len(diverged)} diverged", *([f"{lack}: {', '.join(lost)}"] if lost else [])]
