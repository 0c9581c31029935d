"""The final result against the learning rate, by arm: figures 2 and 6 of the paper, and a panel of several others.

In RL the result is the accuracy: the rows are made from error rates as if these were losses, and `as_accuracies` turns
them into accuracies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter
from matplotlib.transforms import ScaledTranslation, blended_transform_factory

from lorabench.analysis.arms import ARM, arm_label, with_losses
from lorabench.analysis.comparison import Comparison
from lorabench.analysis.published import sweep_of
from lorabench.analysis.rewards import with_error_rates
from lorabench.figures import style
from lorabench.figures.fits import compared, optima
from lorabench.figures.grid import ARM_COLUMNS, PANEL, Styles, diverged_runs, lines, occurring, only, panels, tidy
from lorabench.store.tables import Tables

LR_COLUMNS = [
    *(*ARM_COLUMNS, "element", "lr", "lr_low", "lr_high"),
    *("nll", "nll_sd", "n_seeds", "resolved", "above_range", "run_id", "seed"),
]


def accuracy_columns(columns: Sequence[str]) -> list[str]:
    """Return the columns of accuracies for columns of losses; without `above_range`, since all lie between 0 and 1."""
    return [name.replace("nll", "accuracy") for name in columns if name != "above_range"]


ACCURACY_COLUMNS = accuracy_columns(LR_COLUMNS)


@dataclass(frozen=True)
class FinalResult:
    """The final result of a run that a panel shows: the test loss, or in RL the test accuracy."""

    column: str
    """The column that holds the result."""
    element: str
    """The `element` of rows that are means of the result over seeds."""
    final: str
    """The label of its axis in a panel by learning rate."""
    best: str
    """The label of its axis where arms are shown at their best learning rate."""


LOSS = FinalResult("nll", "loss", "final test NLL (nats / token)", "best test NLL (nats / token)")
ACCURACY = FinalResult("accuracy", "accuracy", "final test accuracy", "accuracy at the best LR")

STRIP = 11.0
"""The height in points of the strip above a panel that holds the marks of runs outside the panel."""

_DODGE = 4.5  # the distance in points between the arms of one LR in the strip

_DIVERGED, _UNREWARDED = "x", "$0$"  # marks in the strip

_LEVEL: dict[str, Any] = {"color": "0.6", "linewidth": 1.2, "zorder": 1}

LEVELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "base": ("base_reward", "before training", _LEVEL),
    "constant": ("constant_reward", "best constant answer", {**_LEVEL, "linestyle": ":"}),
    "rule": ("rule_reward", "best cheap rule", {**_LEVEL, "linestyle": "--"}),
}
"""The lines at accuracies without learning the task, by element: the column of `runs`, the entry of the legend, the
look of the line."""


def draw_losses(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw figure 2; return it, and what it plots as one tidy table, whose columns are those of `lr_rows`.

    Rows of the element `published` are losses that others published for a panel's model and dataset, in the place
    that `source` names; their data order, chat template and schedule may differ.
    """
    ours = lr_rows(compared(tables))
    plotted = pd.concat([part for part in (ours, _published(ours)) if len(part)], ignore_index=True)
    plotted = plotted.reindex(columns=[*LR_COLUMNS, "source"])
    figure, drawn = panels(plotted, strip=STRIP)
    styles = style.arm_styles(ours)
    for rows, (axes,) in drawn:
        published = only(rows, "published").sort_values("lr")
        ranks = sorted(published["rank"].dropna().unique())
        # Published losses are grey, darker at higher ranks; squares are full fine-tuning.
        for _, points in published.groupby("arm"):
            rank = points["rank"].iloc[0]
            grey = 0.5 if pd.isna(rank) else 0.78 - 0.28 * (ranks.index(rank) + 1) / len(ranks)
            marker = "s" if pd.isna(rank) else "o"
            axes.plot(points["lr"], points["nll"], marker, ls="-", color=str(grey), lw=0.9, ms=3, zorder=1.5)
        draw_lr_panel(axes, rows, styles)
    sources = sorted(only(plotted, "published")["source"].unique())
    marks = [style.mark(f"published ({name})", "o", color="0.6", linestyle="-", markersize=3) for name in sources]
    style.legends(figure, styles, [*lr_marks(plotted), *marks])
    return figure, plotted


def _published(ours: pd.DataFrame) -> pd.DataFrame:
    """Return the published losses of full fine-tuning, and of LoRA on all layers, for each panel that has some."""
    parts = []
    for _, panel in ours[PANEL].drop_duplicates().iterrows():
        rows = sweep_of(panel["model"], panel["dataset"])
        rows = rows[(rows["method"] == "fullft") | (rows["placement"] == "all")]
        labels = [arm_label(row) for _, row in rows.iterrows()]
        parts.append(rows.assign(**dict(panel), arm=labels, element="published"))
    return pd.concat(parts, ignore_index=True)


def draw_accuracies(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw figure 6; return it, and what it plots as one tidy table, which `accuracy_rows` describes."""
    plotted = accuracy_rows(tables)
    figure, drawn = panels(plotted, strip=STRIP)
    styles = style.arm_styles(plotted)
    for rows, (axes,) in drawn:
        draw_lr_panel(axes, rows, styles, ACCURACY)
    style.legends(figure, styles, lr_marks(plotted))
    return figure, plotted


def lr_rows(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """Return what the panels plot, with the columns LR_COLUMNS.

    The column `element` says what a row is: `loss` (the mean over the seeds of one arm and LR; `above_range` where it
    is drawn as a triangle above the panel), `optimum` (fitted, with the interval of the LR) or `diverged` (one run).
    Losses are the final test NLL in nats per scored token.
    """
    runs = pd.concat([comparison.runs for comparison in comparisons])
    finished = with_losses(runs).dropna(subset=["test_loss"])
    loss = finished.groupby([*ARM, "lr"], dropna=False, as_index=False).agg(
        nll=("test_loss", "mean"), nll_sd=("test_loss", "std"), n_seeds=("seed", "nunique")
    )
    loss["above_range"] = False
    for _, panel in loss.groupby(PANEL, dropna=False):
        loss.loc[panel.index, "above_range"] = _above_range(panel)
    optimum = optima(comparisons).dropna(subset=["nll"]).drop(columns="n_seeds")
    return tidy({"loss": loss, "optimum": optimum, "diverged": diverged_runs(runs)}, LR_COLUMNS)


def accuracy_rows(tables: Tables) -> pd.DataFrame:
    """Return what the panels plot of RL runs, with the columns ACCURACY_COLUMNS.

    The column `element` says what a row is: `accuracy` (the mean over the seeds of one arm and LR), `optimum` and
    `diverged` as in `lr_rows`, `unrewarded` (a run that never got a reward; the means count it with the accuracy of
    the base model), `base` (the model before training), `constant` (the most frequent answer to all problems) or
    `rule` (the best cheap rule, see `lorabench.data.problems`). Accuracies are of greedy answers to the test split,
    from 0 to 1.
    """
    runs = tables.runs
    parts = {"unrewarded": runs[runs["status"] == "unrewarded"]}
    for element, (column, _, _) in LEVELS.items():
        if column in runs:
            level = runs.groupby(PANEL, dropna=False, as_index=False).agg(accuracy=(column, "median"))
            parts[element] = level.dropna(subset=["accuracy"])
    learned = as_accuracies(lr_rows(compared(tables, with_error_rates(runs))))
    other = tidy(parts, ACCURACY_COLUMNS)
    return pd.concat(
        [part for part in (learned.reindex(columns=ACCURACY_COLUMNS), other) if len(part)], ignore_index=True
    )


def as_accuracies(rows: pd.DataFrame) -> pd.DataFrame:
    """Turn rows of error rates into rows of accuracies: 1 minus the rate, with the ends of its interval exchanged."""
    names = {"nll": "accuracy", "nll_sd": "accuracy_sd", "nll_low": "accuracy_high", "nll_high": "accuracy_low"}
    turned = rows.rename(columns=names)
    turned["element"] = turned["element"].replace(LOSS.element, ACCURACY.element)
    # The parabola of an optimum may pass below an error of 0.
    turned["accuracy"] = (1 - turned["accuracy"].astype(float)).clip(0, 1)
    for end in {"accuracy_low", "accuracy_high"} & set(turned.columns):
        turned[end] = 1 - turned[end].astype(float)
    return turned


def _above_range(loss: pd.DataFrame) -> pd.Series[bool]:
    """Return which losses of a panel are so high that showing them would flatten the others; never an arm's best."""
    nll = loss["nll"]
    lowest, worst_best = nll.min(), loss.groupby(ARM, dropna=False)["nll"].min().max()
    top = max(worst_best, nll.quantile(0.75))
    top += 0.25 * (top - lowest)
    is_stretched = nll.max() - lowest > 1.6 * (top - lowest)
    above: pd.Series[bool] = (nll > top) & is_stretched
    return above


def draw_lr_panel(axes: Axes, rows: pd.DataFrame, styles: Styles, measure: FinalResult = LOSS) -> None:
    """Draw the rows of one panel; it needs STRIP points of free height above it."""
    means, value = only(rows, measure.element), measure.column
    axes.set(xscale="log", xlabel="learning rate", ylabel=measure.final)
    # The labels of minor ticks would overlap.
    axes.xaxis.set_minor_formatter(NullFormatter())
    draw_levels(axes, rows, value)
    lines(axes, means, "lr", value, styles)
    inside = means[~_is_above(means)]
    for arm, points in inside.groupby("arm"):
        look = styles[str(arm)]
        axes.plot(points["lr"], points[value], look.marker, color=look.colour, ms=3.5, zorder=look.zorder)
        repeated = points[points["n_seeds"] > 1]
        bars: dict[str, Any] = {"fmt": "none", "ecolor": look.colour, "capsize": 2.5, "zorder": 4}
        axes.errorbar(repeated["lr"], repeated[value], repeated[f"{value}_sd"], **bars)
    for best in only(rows, "optimum").to_dict("records"):
        colour = styles[best["arm"]].colour
        axes.hlines(best[value], best["lr_low"], best["lr_high"], color=colour, linewidth=1.2, zorder=5)
        face, edge = (colour, "white") if best["resolved"] else ("white", colour)
        axes.plot(best["lr"], best[value], "D", ms=5.5, mfc=face, mec=edge, mew=1.0, zorder=6)
    _limit(axes, rows, measure)
    above, diverged, unrewarded = means[_is_above(means)], only(rows, "diverged"), only(rows, "unrewarded")
    outside = {"^": above, _DIVERGED: diverged, _UNREWARDED: unrewarded}
    _marks_above(axes, pd.concat([part.assign(marker=marker) for marker, part in outside.items()]), styles)
    facts = [f"{len(diverged)} diverged"]
    facts.append(f"{len(above)} above the range" if measure is LOSS else f"{len(unrewarded)} unrewarded")
    lost = sorted(set(diverged["arm"]) - set(means["arm"]))
    style.note(axes, " · ".join(facts + ([f"no {measure.element}: {', '.join(lost)}"] if lost else [])), STRIP)


def draw_levels(axes: Axes, rows: pd.DataFrame, column: str) -> None:
    """Draw the lines at accuracies without learning the task, those of LEVELS that are in the rows."""
    for element, (_, _, look) in LEVELS.items():
        for level in only(rows, element)[column]:
            axes.axhline(level, **look)


def _is_above(rows: pd.DataFrame) -> pd.Series[bool]:
    """Return which rows are losses above the range; rows of accuracies have no such column."""
    above: pd.Series[bool] = rows.get("above_range", pd.Series(False, index=rows.index)).eq(True)
    return above


def _limit(axes: Axes, rows: pd.DataFrame, measure: FinalResult) -> None:
    """Set the range of the axes to all LRs, and to all losses but the rows `above_range`."""
    lowest, highest = rows["lr"].min(), rows["lr"].max()
    margin = max(1.3, (highest / lowest) ** 0.1)
    axes.set_xlim(lowest / margin, highest * margin)
    value = measure.column
    shown = rows[rows[value].notna() & ~_is_above(rows)]
    if shown.empty:
        axes.set(ylim=(0, 1), yticks=[])
        return
    spread = shown[f"{value}_sd"].astype(float).fillna(0.0)
    low, high = (shown[value] - spread).min(), (shown[value] + spread).max()
    if measure is ACCURACY:
        # The range is not empty even where all accuracies are 0, or all are 1.
        low, high = min(low, 0.95), max(high, 0.05)
    pad = 0.04 * (high - low) or 0.04 * abs(high)
    axes.set_ylim(low - pad, high + pad)


def _marks_above(axes: Axes, rows: pd.DataFrame, styles: Styles) -> None:
    """Draw one mark per arm and LR above the panel, side by side where several arms share an LR."""
    data_by_height = blended_transform_factory(axes.transData, axes.transAxes)
    for _, at_lr in rows.drop_duplicates(["arm", "lr", "marker"]).groupby("lr"):
        ordered = sorted(at_lr.to_dict("records"), key=lambda row: list(styles).index(row["arm"]))
        for place, row in enumerate(ordered):
            across, up = (place - (len(ordered) - 1) / 2) * _DODGE, STRIP / 2
            shift = ScaledTranslation(across / 72, up / 72, axes.figure.dpi_scale_trans)
            size, edge = (5.5, 0.6) if row["marker"] == _UNREWARDED else (4.5, 1.4)
            look: dict[str, Any] = {"ms": size, "mew": edge, "color": styles[row["arm"]].colour, "clip_on": False}
            axes.plot(row["lr"], 1, ls="none", marker=row["marker"], transform=data_by_height + shift, **look)


def lr_marks(plotted: pd.DataFrame) -> list[Artist]:
    """Return the legend entries of the marks that occur."""
    resolved = only(plotted, "optimum")["resolved"].astype(bool)
    elements = set(plotted["element"])
    return occurring(
        [
            (resolved.any(), style.mark("optimum, interval", "D", linestyle="-", linewidth=1.2)),
            ((~resolved).any(), style.mark("optimum, not resolved", "D", markerfacecolor="white", markeredgewidth=1.2)),
            (_is_above(plotted).any(), style.mark("above the range", "^")),
            ("diverged" in elements, style.mark("diverged", _DIVERGED, markeredgewidth=1.5)),
            ("unrewarded" in elements, style.mark("never rewarded", _UNREWARDED, markeredgewidth=0.6)),
            *((level in elements, Line2D([], [], label=label, **look)) for level, (_, label, look) in LEVELS.items()),
        ]
    )
