"""Figure 4 of the paper: final loss by the layers that carry LoRA, against learning rate and parameter count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from lorabench.analysis.arms import rows_of
from lorabench.figures import lr_panel, style
from lorabench.figures.fitted import fitted_comparisons, fitted_rows, margin_band
from lorabench.store.tables import Tables
from lorabench.utils import formats

COLUMNS = [*lr_panel.LR_COLUMNS, "nll_low", "nll_high", "at_edge", "trainable_params", "parameters"]

# The height in points of the x-axis with its labels.
_AXIS_POINTS = 30


@style.applied()
def draw(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw the figure; return it, and what it plots as one tidy table.

    The column `element` says what a row is: one of `lr_rows`, `best` (an arm's fitted minimum of the test NLL with its
    95% interval, the count `trainable_params`, and in `parameters` the same as text) or `margin_band` (from the lowest
    of these up by the margin). Losses are in nats per scored token.
    """
    parts = [lr_panel.lr_rows(tables.runs), best_rows(tables, tables.runs)]
    plotted = pd.concat([part.reindex(columns=COLUMNS) for part in parts if len(part)], ignore_index=True)
    return draw_placement(plotted, lr_panel.LOSS), plotted


def draw_placement(plotted: pd.DataFrame, measure: lr_panel.FinalResult) -> Figure:
    """Draw the figure from the rows that it plots: of `best_rows`, and of the panels by LR, in the given measure."""
    figure, panels = style.panel_pairs(plotted, lr_panel.STRIP)
    styles = style.arm_styles(plotted.dropna(subset=["arm"]))
    for rows, by_lr, by_count in panels:
        lr_panel.draw_lr_panel(by_lr, rows[~rows["element"].isin(["best", "margin_band"])], styles, measure)
        _draw_by_count(by_count, rows, styles, measure)
    band = Patch(label="within the margin of the best", facecolor="0.85")
    marks = lr_panel.lr_marks(plotted) + ([band] if (plotted["element"] == "margin_band").any() else [])
    style.legends(figure, styles, marks)
    return figure


def best_rows(tables: Tables, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the rows `best` and `margin_band` of the figure, in losses.

    Args:
        tables: the tables of the figure.
        runs: its runs, in RL with error rates as losses.
    """
    rows = []
    for comparison in fitted_comparisons(tables, runs):
        of_arms = fitted_rows([comparison])
        for _, arm in of_arms.iterrows():
            own = rows_of(comparison.runs, arm)
            counts = own["trainable_params"].dropna() if "trainable_params" in own else pd.Series(dtype=float)
            count = counts.max() if len(counts) else None
            named = {"trainable_params": count, "parameters": None if count is None else formats.parameters(count)}
            rows.append(dict(arm) | {"element": "best"} | named)
        if band := margin_band(comparison, of_arms):
            rows.append(band)
    return pd.DataFrame(rows, columns=COLUMNS)


def _draw_by_count(
    axes: Axes, rows: pd.DataFrame, styles: dict[str, style.ArmStyle], measure: lr_panel.FinalResult
) -> None:
    """Draw what each arm reaches at its best LR against its trainable parameters, and list these below the panel."""
    value, lower, upper = measure.column, f"{measure.column}_low", f"{measure.column}_high"
    for band in rows[rows["element"] == "margin_band"].to_dict("records"):
        axes.axhspan(band[lower], band[upper], color="0.85", linewidth=0, zorder=0)
    best = rows[rows["element"] == "best"]
    placed = best.dropna(subset=["trainable_params"]).sort_values("trainable_params")
    for _, of_placement in placed.groupby("placement"):
        line: dict[str, Any] = {
            "color": style.MUTED,
            "linestyle": styles[of_placement["arm"].iloc[0]].linestyle,
            "linewidth": 0.8,
        }
        axes.plot(of_placement["trainable_params"].astype(float), of_placement[value], zorder=1, **line)
    for row in placed.to_dict("records"):
        look = styles[row["arm"]]
        half = np.maximum([[row[value] - row[lower]], [row[upper] - row[value]]], 0.0)
        face: dict[str, Any] = {"mfc": "white" if row["at_edge"] else look.colour, "mec": look.colour}
        bar: dict[str, Any] = {"fmt": look.marker, "color": look.colour, "capsize": 2.5, "ms": 6, **face}
        layers = "FullFT" if row["method"] == "fullft" else f"{row['placement'] or 'all'} r{int(row['rank'])}"
        axes.errorbar(
            float(row["trainable_params"]),
            row[value],
            half,
            label=f"{layers}  {row['parameters']}",
            zorder=look.zorder,
            **bar,
        )
    axes.set(xscale="log", xlabel="trainable parameters", ylabel=measure.best)
    if placed.empty:
        axes.set(xticks=[], yticks=[])
    else:
        _list_counts(axes, placed["trainable_params"].astype(float))
    lost = sorted(set(best["arm"]) - set(placed["arm"]))
    style.note(axes, f"no parameter count: {', '.join(lost)}" if lost else "")


def _list_counts(axes: Axes, counts: pd.Series[float]) -> None:
    """Label the x-axis with counts as the paper's table writes them, and list the count of each arm below the panel."""
    wide = counts.max() > 100 * counts.min()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 3.0, 6.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.parameters(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    below = axes.transAxes + ScaledTranslation(0, -_AXIS_POINTS / 72, axes.figure.dpi_scale_trans)
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, ncols=2, handletextpad=0.3)
