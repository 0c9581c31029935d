"""The panel of final loss against learning rate, by arm: the rows that it plots, and its marks.

Figures 2, 4, 5, 6 and 7 and the figure of short runs have it. In RL it shows the final accuracy: the rows are made from
error rates as if these were losses, and `as_accuracies` turns them into accuracies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter
from matplotlib.transforms import ScaledTranslation, blended_transform_factory

from lorabench.analysis.arms import ARM, arm_label, with_losses
from lorabench.analysis.optima import lr_optima
from lorabench.analysis.rewards import with_error_rates
from lorabench.figures import style

LR_COLUMNS = [
    *("model", "dataset", "batch_size", "steps", "arm", "method", "rank", "placement"),
    *("element", "lr", "lr_low", "lr_high"),
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

# The distance in points between the arms of one LR in the strip.
_DODGE = 4.5

# The marks in the strip of runs that diverged, and of runs that never got a reward.
DIVERGED, UNREWARDED = "x", "$0$"

BASE: dict[str, Any] = {"color": "0.6", "linewidth": 1.2, "zorder": 1}
"""The look of the line at the accuracy of the base model."""

LEVELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "base": ("base_reward", "before training", BASE),
    "constant": ("constant_reward", "best constant answer", {**BASE, "linestyle": ":"}),
    "rule": ("rule_reward", "best cheap rule", {**BASE, "linestyle": "--"}),
}
"""The lines at accuracies without learning the task, by element: the column of `runs`, the entry of the legend, the
look of the line."""


def lr_rows(runs: pd.DataFrame) -> pd.DataFrame:
    """Return what the panels plot, with the columns LR_COLUMNS.

    The column `element` says what a row is: `loss` (the mean over the seeds of one arm and LR; `above_range` where it
    is drawn as a triangle above the panel), `optimum` (interpolated, with the interval of the LR) or `diverged` (one
    run). Losses are the final test NLL in nats per scored token.
    """
    finished = with_losses(runs).dropna(subset=["test_loss"])
    loss = finished.groupby([*ARM, "lr"], dropna=False, as_index=False).agg(
        nll=("test_loss", "mean"), nll_sd=("test_loss", "std"), n_seeds=("seed", "nunique")
    )
    loss["above_range"] = False
    for _, panel in loss.groupby(style.PANEL, dropna=False):
        loss.loc[panel.index, "above_range"] = _above_range(panel)
    optimum = lr_optima(runs).dropna(subset=["lr_opt", "loss_opt"])
    optimum = optimum.rename(columns={"lr_opt": "lr", "loss_opt": "nll"})
    diverged = runs[runs["status"] == "diverged"]
    parts = []
    for element, part in {"loss": loss, "optimum": optimum, "diverged": diverged}.items():
        labels = [arm_label(row) for _, row in part.iterrows()]
        parts.append(part.assign(arm=labels, element=element).reindex(columns=LR_COLUMNS))
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def accuracy_rows(runs: pd.DataFrame) -> pd.DataFrame:
    """Return what the panels plot of RL runs, with the columns ACCURACY_COLUMNS.

    The column `element` says what a row is: `accuracy` (the mean over the seeds of one arm and LR), `optimum` and
    `diverged` as in `lr_rows`, `unrewarded` (a run that never got a reward; the means count it with the accuracy of
    the base model), `base` (the model before training), `constant` (the most frequent answer to all problems) or
    `rule` (the best cheap rule, see `lorabench.data.controls`). Accuracies are of greedy answers to the test split,
    from 0 to 1.
    """
    unrewarded = runs[runs["status"] == "unrewarded"].assign(element="unrewarded")
    unrewarded["arm"] = [arm_label(run) for _, run in unrewarded.iterrows()]
    parts = [as_accuracies(lr_rows(with_error_rates(runs))), unrewarded]
    for element, (column, _, _) in LEVELS.items():
        if column in runs:
            level = runs.groupby(style.PANEL, dropna=False, as_index=False).agg(accuracy=(column, "median"))
            parts.append(level.dropna(subset=["accuracy"]).assign(element=element))
    return pd.concat([part.reindex(columns=ACCURACY_COLUMNS) for part in parts if len(part)], ignore_index=True)


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


def draw_lr_panel(
    axes: Axes, rows: pd.DataFrame, styles: dict[str, style.ArmStyle], measure: FinalResult = LOSS
) -> None:
    """Draw the rows of one panel; it needs STRIP points of free height above it."""
    means, optimum, diverged, unrewarded = (
        rows[rows["element"] == element] for element in (measure.element, "optimum", "diverged", "unrewarded")
    )
    above, value = means[_is_above(means)], measure.column
    axes.set(xscale="log", xlabel="learning rate", ylabel=measure.final)
    # The labels of minor ticks would overlap.
    axes.xaxis.set_minor_formatter(NullFormatter())
    draw_levels(axes, rows, value)
    for arm, points in means.groupby("arm"):
        arm_style = styles[str(arm)]
        colour = arm_style.colour
        axes.plot(points["lr"], points[value], **arm_style.line)
        inside = points.drop(above.index, errors="ignore")
        axes.plot(inside["lr"], inside[value], arm_style.marker, color=colour, ms=3.5, zorder=arm_style.zorder)
        repeated = inside[inside["n_seeds"] > 1]
        bars: dict[str, Any] = {"fmt": "none", "ecolor": colour, "capsize": 2.5, "zorder": 4}
        axes.errorbar(repeated["lr"], repeated[value], repeated[f"{value}_sd"], **bars)
    for best in optimum.to_dict("records"):
        colour = styles[best["arm"]].colour
        axes.hlines(best[value], best["lr_low"], best["lr_high"], color=colour, linewidth=1.2, zorder=5)
        face, edge = (colour, "white") if best["resolved"] else ("white", colour)
        axes.plot(best["lr"], best[value], "D", ms=5.5, mfc=face, mec=edge, mew=1.0, zorder=6)
    _limit(axes, rows, measure)
    outside = [above.assign(marker="^"), diverged.assign(marker=DIVERGED), unrewarded.assign(marker=UNREWARDED)]
    _marks_above(axes, pd.concat(outside), styles)
    style.note(axes, _facts(rows, measure), STRIP)


def draw_levels(axes: Axes, rows: pd.DataFrame, column: str) -> None:
    """Draw the lines at accuracies without learning the task, those of LEVELS that are in the rows."""
    for element, (_, _, look) in LEVELS.items():
        for level in rows.loc[rows["element"] == element, column]:
            axes.axhline(level, **look)


def _is_above(rows: pd.DataFrame) -> pd.Series[bool]:
    """Return which rows are losses above the range; rows of accuracies have no such column."""
    above: pd.Series[bool] = rows.get("above_range", pd.Series(False, index=rows.index)).eq(True)
    return above


def _limit(axes: Axes, rows: pd.DataFrame, measure: FinalResult) -> None:
    """Set the range of the axes to all LRs, and to all losses but the rows `above_range`."""
    lowest, highest = rows["lr"].min(), rows["lr"].max()
    beside = max(1.3, (highest / lowest) ** 0.1)
    axes.set_xlim(lowest / beside, highest * beside)
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


def _marks_above(axes: Axes, rows: pd.DataFrame, styles: dict[str, style.ArmStyle]) -> None:
    """Draw one mark per arm and LR above the panel, side by side where several arms share an LR."""
    data_by_height = blended_transform_factory(axes.transData, axes.transAxes)
    for _, at_lr in rows.drop_duplicates(["arm", "lr", "marker"]).groupby("lr"):
        ordered = sorted(at_lr.to_dict("records"), key=lambda row: list(styles).index(row["arm"]))
        for place, row in enumerate(ordered):
            points = ((place - (len(ordered) - 1) / 2) * _DODGE, STRIP / 2)
            shift = ScaledTranslation(points[0] / 72, points[1] / 72, axes.figure.dpi_scale_trans)
            size, edge = (5.5, 0.6) if row["marker"] == UNREWARDED else (4.5, 1.4)
            look: dict[str, Any] = {"ms": size, "mew": edge, "color": styles[row["arm"]].colour, "clip_on": False}
            axes.plot(row["lr"], 1, ls="none", marker=row["marker"], transform=data_by_height + shift, **look)


def _facts(rows: pd.DataFrame, measure: FinalResult) -> str:
    diverged, unrewarded = rows[rows["element"] == "diverged"], rows[rows["element"] == "unrewarded"]
    facts = [f"{len(diverged)} diverged"]
    facts.append(f"{_is_above(rows).sum()} above the range" if measure is LOSS else f"{len(unrewarded)} unrewarded")
    lost = sorted(set(diverged["arm"]) - set(rows.loc[rows["element"] == measure.element, "arm"]))
    return " · ".join(facts + ([f"no {measure.element}: {', '.join(lost)}"] if lost else []))


def lr_marks(plotted: pd.DataFrame) -> list[Artist]:
    """Return the legend entries of the marks that occur."""
    optimum = plotted[plotted["element"] == "optimum"]
    resolved = optimum["resolved"].astype(bool)
    elements = set(plotted["element"])
    entries = [
        (resolved.any(), style.mark("optimum, interval", "D", linestyle="-", linewidth=1.2)),
        ((~resolved).any(), style.mark("optimum, not resolved", "D", markerfacecolor="white", markeredgewidth=1.2)),
        (_is_above(plotted).any(), style.mark("above the range", "^")),
        ("diverged" in elements, style.mark("diverged", DIVERGED, markeredgewidth=1.5)),
        ("unrewarded" in elements, style.mark("never rewarded", UNREWARDED, markeredgewidth=0.6)),
        *((level in elements, Line2D([], [], label=label, **look)) for level, (_, label, look) in LEVELS.items()),
    ]
    return [entry for occurs, entry in entries if occurs]
