"""Figures 4 and 5 of the paper: the result by the layers that carry LoRA, against learning rate and parameters."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from lorabench.analysis.arms import rows_of
from lorabench.analysis.rewards import with_error_rates
from lorabench.figures import style
from lorabench.figures.by_lr import (
    ACCURACY,
    LOSS,
    LR_COLUMNS,
    STRIP,
    FinalResult,
    accuracy_columns,
    accuracy_rows,
    as_accuracies,
    draw_lr_panel,
    lr_marks,
    lr_rows,
)
from lorabench.figures.fits import compared, fitted_minima, margin_band
from lorabench.figures.grid import Styles, bars, only, panels, tidy
from lorabench.store.tables import Tables
from lorabench.utils import formats

_COLUMNS = [*LR_COLUMNS, "nll_low", "nll_high", "at_edge", "trainable_params", "parameters"]

# The height in points of the x-axis with its labels.
_AXIS_POINTS = 30


def draw_losses(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw figure 4, or the supervised part of figure 5; return it, and what it plots as one tidy table.

    The column `element` says what a row is: one of `lr_rows`, `best` (an arm's fitted minimum of the test NLL with its
    95% interval, the count `trainable_params`, and in `parameters` the same as text) or `margin_band` (from the lowest
    of these up by the margin). Losses are in nats per scored token.
    """
    parts = [lr_rows(compared(tables)), _best_rows(tables, tables.runs)]
    plotted = pd.concat([part.reindex(columns=_COLUMNS) for part in parts if len(part)], ignore_index=True)
    return _draw(plotted, LOSS), plotted


def draw_accuracies(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw the part of figure 5 on reinforcement learning; return it, and what it plots as one tidy table.

    The column `element` says what a row is: one of `accuracy_rows`, or `best` or `margin_band` as for `draw_losses`,
    but in accuracies from 0 to 1, with the band below the highest accuracy.
    """
    columns = accuracy_columns(_COLUMNS)
    parts = [accuracy_rows(tables), as_accuracies(_best_rows(tables, with_error_rates(tables.runs)))]
    plotted = pd.concat([part.reindex(columns=columns) for part in parts if len(part)], ignore_index=True)
    return _draw(plotted, ACCURACY), plotted


def _draw(plotted: pd.DataFrame, measure: FinalResult) -> Figure:
    figure, drawn = panels(plotted, each=2, strip=STRIP)
    styles = style.arm_styles(plotted)
    for rows, (by_lr, by_count) in drawn:
        draw_lr_panel(by_lr, rows[~rows["element"].isin(["best", "margin_band"])], styles, measure)
        _draw_by_count(by_count, rows, styles, measure)
    shade = Patch(label="within the margin of the best", facecolor="0.85")
    marks = lr_marks(plotted) + ([shade] if (plotted["element"] == "margin_band").any() else [])
    style.legends(figure, styles, marks)
    return figure


def _best_rows(tables: Tables, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the rows `best` and `margin_band` of the figure, in losses; runs of RL have error rates as losses."""
    parts = []
    for comparison in compared(tables, runs):
        best = fitted_minima([comparison])
        counts = []
        for _, arm in best.iterrows():
            own = rows_of(comparison.runs, arm)
            known = own["trainable_params"].dropna() if "trainable_params" in own else pd.Series(dtype=float)
            counts.append(known.max() if len(known) else None)
        texts = pd.Series([None if count is None else formats.parameters(count) for count in counts], best.index)
        best = best.assign(trainable_params=pd.Series(counts, best.index, dtype="Int64"), parameters=texts)
        parts.append(tidy({"best": best, "margin_band": margin_band(comparison, best)}, _COLUMNS))
    return pd.concat(parts, ignore_index=True)


def _draw_by_count(axes: Axes, rows: pd.DataFrame, styles: Styles, measure: FinalResult) -> None:
    """Draw what each arm reaches at its best LR against its trainable parameters, and list these below the panel."""
    value = measure.column
    for band in only(rows, "margin_band").to_dict("records"):
        axes.axhspan(band[f"{value}_low"], band[f"{value}_high"], color="0.85", linewidth=0, zorder=0)
    best = only(rows, "best")
    placed = best.dropna(subset=["trainable_params"]).sort_values("trainable_params")
    for _, arms in placed.groupby("placement"):
        look: dict[str, Any] = {"color": style.MUTED, "linestyle": styles[arms["arm"].iloc[0]].linestyle}
        axes.plot(arms["trainable_params"].astype(float), arms[value], linewidth=0.8, zorder=1, **look)
    for place, row in enumerate(placed.to_dict("records")):
        layers = "FullFT" if row["method"] == "fullft" else f"{row['placement'] or 'all'} r{int(row['rank'])}"
        label = f"{layers}  {row['parameters']}"
        bars(axes, placed.iloc[[place]], "trainable_params", value, styles[row["arm"]], 6, label)
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
