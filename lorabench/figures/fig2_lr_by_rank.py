"""Figure 2 of the paper: final loss against learning rate, by rank."""

from __future__ import annotations

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorabench.analysis.arms import arm_label, with_arm_columns
from lorabench.analysis.published import sweep_of
from lorabench.figures import style
from lorabench.figures.lr_panel import LR_COLUMNS, STRIP, draw_lr_panel, lr_marks, lr_rows
from lorabench.store.tables import Tables


@style.applied()
def draw(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw the figure; return it, and what it plots as one tidy table, whose columns are those of `lr_rows`.

    Rows of the element `published` are losses that others published for a panel's model and dataset, in the place
    that `source` names; their data order, chat template and schedule may differ.
    """
    ours = lr_rows(with_arm_columns(tables.runs))
    plotted = pd.concat([part for part in (ours, _published(ours)) if len(part)], ignore_index=True)
    plotted = plotted.reindex(columns=[*LR_COLUMNS, "source"])
    figure, panels = style.panels(plotted, STRIP)
    styles = style.arm_styles(ours)
    for rows, axes in panels:
        _draw_published(axes, rows[rows["element"] == "published"])
        draw_lr_panel(axes, rows, styles)
    style.legends(figure, styles, [*lr_marks(plotted), *_published_marks(plotted)])
    return figure, plotted


def _published(ours: pd.DataFrame) -> pd.DataFrame:
    """Return the published losses of full fine-tuning, and of LoRA on all layers, for each panel that has some."""
    parts = []
    for _, panel in ours[style.PANEL].drop_duplicates().iterrows():
        rows = sweep_of(panel["model"], panel["dataset"])
        rows = rows[(rows["method"] == "fullft") | (rows["placement"] == "all")]
        labels = [arm_label(row) for _, row in rows.iterrows()]
        parts.append(rows.assign(**dict(panel), arm=labels, element="published"))
    return pd.concat(parts, ignore_index=True)


def _draw_published(axes: Axes, rows: pd.DataFrame) -> None:
    """Draw published losses in grey, darker at higher ranks; squares are full fine-tuning."""
    ranks = sorted(rows["rank"].dropna().unique())
    for _, points in rows.sort_values("lr").groupby("arm"):
        rank = points["rank"].iloc[0]
        grey = 0.5 if pd.isna(rank) else 0.78 - 0.28 * (ranks.index(rank) + 1) / len(ranks)
        marker = "s" if pd.isna(rank) else "o"
        axes.plot(points["lr"], points["nll"], marker, ls="-", color=str(grey), lw=0.9, ms=3, zorder=1.5)


def _published_marks(plotted: pd.DataFrame) -> list[Artist]:
    """Return a legend entry for each source that occurs."""
    sources = sorted(plotted.loc[plotted["element"] == "published", "source"].unique())
    return [style.mark(f"published ({source})", "o", color="0.6", linestyle="-", markersize=3) for source in sources]
