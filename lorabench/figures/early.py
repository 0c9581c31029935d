"""The paper's figure of early curves: training loss by rank at one LR, and the difference of two ranks by batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lorabench.analysis.arms import arm_label, is_standard, with_arm_columns
from lorabench.analysis.curves import early_difference, train_curves
from lorabench.figures import style
from lorabench.figures.grid import (
    ARM_COLUMNS,
    PANEL,
    Styles,
    diverged_runs,
    lines,
    occurring,
    only,
    panels,
    seeds_text,
    tidy,
    titled,
)
from lorabench.store.tables import Tables

_COLUMNS = [
    *(*ARM_COLUMNS, "element", "lr", "step", "nll", "difference", "half_width"),
    *("n_seeds", "other_rank", "run_id"),
]


def draw(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw the figure; return it, and what it plots as one tidy table.

    The column `element` says what a row is: `curve` (one step of a rank; `nll` is its training loss), `difference`
    (the loss of `rank` minus that of `other_rank` on the same batches, with the `half_width` of its 95% interval;
    differences of zero are left out), `sigma` (twice the standard deviation of the training loss over batches, in
    `difference`) or `diverged` (one run). Losses are means over `n_seeds` seeds, in nats per scored token.
    """
    runs = with_arm_columns(tables.runs)
    groups = titled(runs[(runs["method"] == "lora") & is_standard(runs)])
    if not groups:
        return style.empty_figure("There are no LoRA runs."), pd.DataFrame(columns=_COLUMNS)
    plotted = pd.concat([_rows(rows, tables.curves) for _, rows in groups], ignore_index=True)
    figure, drawn = panels(plotted, each=2)
    styles = style.arm_styles(plotted)
    for rows, (left, right) in drawn:
        _draw_curves(left, rows, styles)
        _draw_difference(right, rows)
    style.legends(figure, styles, _marks(plotted))
    return figure, plotted


def _rows(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Return what is plotted of one panel at one LR: the LR of the difference of two ranks, or else the commonest."""
    panel: dict[str, Any] = {name: runs[name].iloc[0] for name in PANEL}
    early = early_difference(runs, curves)
    lr = early.lr if early else float(runs["lr"].mode().iloc[0])
    at_lr = runs[runs["lr"] == lr]
    at_lr = at_lr.assign(arm=[arm_label(run) for _, run in at_lr.iterrows()])
    losses = train_curves(at_lr[at_lr["status"] == "done"], curves)
    # The mean of a rank that lacks a seed would be over other batches than the means of the other ranks.
    by_rank = [set(seeds) for _, seeds in losses.groupby("arm")["seed"]]
    if common := set.intersection(*by_rank) if by_rank else set():
        losses = losses[losses["seed"].isin(common)]
    curve = losses.groupby(["arm", "method", "rank", "placement", "step"], dropna=False, as_index=False)
    parts = {
        "curve": curve.agg(nll=("value", "mean"), n_seeds=("seed", "nunique")),
        "diverged": diverged_runs(at_lr),
    }
    if early:
        by_step = early.over_seeds()
        ranks = {"rank": early.low, "other_rank": early.high, "n_seeds": early.n_seeds}
        half = by_step["high"] - by_step["mean"]
        difference = pd.DataFrame({"step": by_step.index, "difference": by_step["mean"], "half_width": half})
        parts["difference"] = difference[difference["difference"] != 0].assign(**ranks)
        parts["sigma"] = pd.DataFrame([{"difference": 2 * early.sigma_batch, **ranks}]).dropna()
    rows = tidy(parts, _COLUMNS)
    if rows.empty:
        rows = pd.DataFrame([{"element": "nothing"}], columns=_COLUMNS)
    whole = dict.fromkeys(("rank", "other_rank", "n_seeds", "step"), "Int64")
    return rows.assign(lr=lr, **panel).astype(whole)


def _draw_curves(axes: Axes, rows: pd.DataFrame, styles: Styles) -> None:
    curve = only(rows, "curve")
    if curve.empty:
        style.say(axes, "There are no training losses.")
    lines(axes, curve, "step", "nll", styles)
    axes.set(xscale="log", xlabel="training step", ylabel="training NLL (nats / token)")
    style.plain_log_ticks(axes)
    facts = [f"LR {rows['lr'].iloc[0]:g}"]
    facts += [f"mean of {seeds_text(curve['n_seeds'])}"] if len(curve) else []
    diverged = len(only(rows, "diverged"))
    style.note(axes, " · ".join([*facts, *([f"{diverged} diverged"] if diverged else [])]))


def _draw_difference(axes: Axes, rows: pd.DataFrame) -> None:
    points, sigma = only(rows, "difference"), only(rows, "sigma")["difference"]
    if points.empty:
        style.say(axes, "No two ranks above 1 with the same seeds\nhave losses that differ.")
        return
    steps, difference = points["step"].astype(float), points["difference"].astype(float)
    size = difference.abs()
    # Marks are large enough to distinguish open ones from filled ones.
    for below, face in ((False, style.MUTED), (True, "white")):
        chosen = (difference < 0) == below
        axes.plot(steps[chosen], size[chosen], "o", ms=3.8, mfc=face, mec=style.MUTED, mew=0.9, zorder=3)
    axes.plot(steps, points["half_width"].astype(float), color="0.6", linewidth=1.1, zorder=2)
    for level in sigma:
        axes.axhline(level, color="black", linestyle="--", linewidth=1.1, zorder=1)
    axes.set(xscale="log", yscale="log", xlabel="training step", ylabel="|difference of NLL| (nats / token)")
    axes.set_xlim(1, max(10.0, float(steps.max()) * 1.15))
    shown = np.concatenate([size, points["half_width"].dropna().astype(float)])
    top = float(max([*shown, *sigma]))
    # A difference that happens to be close to zero would stretch a log axis.
    floor = max(float(shown[shown > 0].min()), top / 3e4)
    axes.set_ylim(floor / 1.6, top * 1.8)
    style.plain_log_ticks(axes)
    first = points.iloc[0]
    hidden = int((size < floor / 1.6).sum())
    facts = [f"r{first['rank']} minus r{first['other_rank']}", seeds_text(points["n_seeds"])]
    style.note(axes, " · ".join([*facts, *([f"{hidden} below the range"] if hidden else [])]))


def _marks(plotted: pd.DataFrame) -> list[Artist]:
    """Return the legend entries of the marks that occur."""
    difference = only(plotted, "difference")["difference"].astype(float)
    has_sigma = len(only(plotted, "sigma")) > 0
    below = style.mark("lower loss at the lower rank", "o", markersize=4, markerfacecolor="white")
    interval = Line2D([], [], color="0.6", linewidth=1.1, label="half width of its 95% interval")
    batches = Line2D([], [], color="black", linestyle="--", linewidth=1.1, label=f"2{style.SIGMA} of batches")
    return occurring(
        [
            ((difference > 0).any(), style.mark("higher loss at the lower rank", "o", markersize=4)),
            ((difference < 0).any(), below),
            (plotted["half_width"].notna().any(), interval),
            (has_sigma, batches),
        ]
    )
