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
from lorabench.analysis.curves import train_curves
from lorabench.analysis.early import early_difference
from lorabench.figures import style
from lorabench.store.tables import Tables

_COLUMNS = [
    *("model", "dataset", "batch_size", "steps", "arm", "method", "rank", "placement"),
    *("element", "lr", "step", "nll", "difference", "half_width", "n_seeds", "other_rank", "run_id"),
]


@style.applied()
def draw(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw the figure; return it, and what it plots as one tidy table.

    The column `element` says what a row is: `curve` (one step of a rank; `nll` is its training loss), `difference`
    (the loss of `rank` minus that of `other_rank` on the same batches, with the `half_width` of its 95% interval;
    differences of zero are left out), `sigma` (twice the standard deviation of the training loss over batches, in
    `difference`) or `diverged` (one run). Losses are means over `n_seeds` seeds, in nats per scored token.
    """
    runs = with_arm_columns(tables.runs)
    groups = style.titled(runs[(runs["method"] == "lora") & is_standard(runs)])
    if not groups:
        return style.empty_figure("There are no LoRA runs."), pd.DataFrame(columns=_COLUMNS)
    plotted = pd.concat([_rows(rows, tables.curves) for _, rows in groups], ignore_index=True)
    figure, panels = style.panel_pairs(plotted)
    styles = style.arm_styles(plotted.dropna(subset=["arm"]))
    for rows, left, right in panels:
        _draw_curves(left, rows, styles)
        _draw_difference(right, rows)
    style.legends(figure, styles, _marks(plotted))
    return figure, plotted


def _rows(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Return what is plotted of one panel at one LR: the LR of the difference of two ranks, or else the commonest."""
    panel: dict[str, Any] = {name: runs[name].iloc[0] for name in style.PANEL}
    early = early_difference(runs, curves)
    lr = early.lr if early else float(runs["lr"].mode().iloc[0])
    at_lr = runs[runs["lr"] == lr]
    at_lr = at_lr.assign(arm=[arm_label(run) for _, run in at_lr.iterrows()])
    losses = train_curves(at_lr[at_lr["status"] == "done"], curves)
    # The mean of a rank that lacks a seed would be over other batches than the means of the other ranks.
    by_rank = [set(seeds) for _, seeds in losses.groupby("arm")["seed"]]
    common = set.intersection(*by_rank) if by_rank else set()
    if common:
        losses = losses[losses["seed"].isin(common)]
    curve = losses.groupby(["arm", "method", "rank", "placement", "step"], dropna=False, as_index=False).agg(
        nll=("value", "mean"), n_seeds=("seed", "nunique")
    )
    parts = [curve.assign(element="curve"), at_lr[at_lr["status"] == "diverged"].assign(element="diverged")]
    if early:
        by_step = early.over_seeds()
        difference = pd.DataFrame(
            {"step": by_step.index, "difference": by_step["mean"], "half_width": by_step["high"] - by_step["mean"]}
        )
        ranks = {"rank": early.low, "other_rank": early.high, "n_seeds": early.n_seeds}
        parts.append(difference[difference["difference"] != 0].assign(element="difference", **ranks))
        parts.append(pd.DataFrame([{"element": "sigma", "difference": 2 * early.sigma_batch, **ranks}]).dropna())
    kept = [part.reindex(columns=_COLUMNS).assign(lr=lr, **panel) for part in parts if len(part)]
    if not kept:
        return pd.DataFrame([{"element": "nothing", "lr": lr, **panel}], columns=_COLUMNS)
    whole = dict.fromkeys(("rank", "other_rank", "n_seeds", "step"), "Int64")
    rows = pd.concat([part.dropna(axis=1, how="all") for part in kept], ignore_index=True)
    return rows.reindex(columns=_COLUMNS).astype(whole)


def _draw_curves(axes: Axes, rows: pd.DataFrame, styles: dict[str, style.ArmStyle]) -> None:
    curve = rows[rows["element"] == "curve"]
    if curve.empty:
        style.say(axes, "There are no training losses.")
    for arm, points in curve.groupby("arm"):
        axes.plot(points["step"].astype(float), points["nll"].astype(float), **styles[str(arm)].line)
    axes.set(xscale="log", xlabel="training step", ylabel="training NLL (nats / token)")
    style.plain_log_ticks(axes)
    facts = [f"LR {rows['lr'].iloc[0]:g}"]
    if len(curve):
        facts.append(f"mean of {style.seeds_text(curve['n_seeds'])}")
    diverged = int((rows["element"] == "diverged").sum())
    style.note(axes, " · ".join([*facts, *([f"{diverged} diverged"] if diverged else [])]))


def _draw_difference(axes: Axes, rows: pd.DataFrame) -> None:
    points = rows[rows["element"] == "difference"]
    if points.empty:
        style.say(axes, "No two ranks above 1 with the same seeds\nhave losses that differ.")
        return
    steps, difference = points["step"].astype(float), points["difference"].astype(float)
    size, negative = difference.abs(), difference < 0
    # Marks are large enough to distinguish open ones from filled ones.
    for below in (False, True):
        face = "white" if below else style.MUTED
        chosen = negative == below
        axes.plot(steps[chosen], size[chosen], "o", ms=3.8, mfc=face, mec=style.MUTED, mew=0.9, zorder=3)
    axes.plot(steps, points["half_width"].astype(float), color="0.6", linewidth=1.1, zorder=2)
    for level in rows.loc[rows["element"] == "sigma", "difference"]:
        axes.axhline(level, color="black", linestyle="--", linewidth=1.1, zorder=1)
    axes.set(xscale="log", yscale="log", xlabel="training step", ylabel="|difference of NLL| (nats / token)")
    axes.set_xlim(1, max(10.0, float(steps.max()) * 1.15))
    shown = np.concatenate([size, points["half_width"].dropna().astype(float)])
    top = float(max([*shown, *rows.loc[rows["element"] == "sigma", "difference"]]))
    # A difference that happens to be close to zero would stretch a log axis.
    floor = max(float(shown[shown > 0].min()), top / 3e4)
    axes.set_ylim(floor / 1.6, top * 1.8)
    style.plain_log_ticks(axes)
    first = points.iloc[0]
    hidden = int((size < floor / 1.6).sum())
    facts = [f"r{first['rank']} minus r{first['other_rank']}", style.seeds_text(points["n_seeds"])]
    style.note(axes, " · ".join([*facts, *([f"{hidden} below the range"] if hidden else [])]))


def _marks(plotted: pd.DataFrame) -> list[Artist]:
    """Return the legend entries of the marks that occur."""
    difference = plotted.loc[plotted["element"] == "difference", "difference"].astype(float)
    has_interval = plotted["half_width"].notna().any()
    entries: list[tuple[bool, Artist]] = [
        (bool((difference > 0).any()), style.mark("higher loss at the lower rank", "o", markersize=4)),
        (
            bool((difference < 0).any()),
            style.mark("lower loss at the lower rank", "o", markersize=4, markerfacecolor="white"),
        ),
        (bool(has_interval), Line2D([], [], color="0.6", linewidth=1.1, label="half width of its 95% interval")),
        (
            bool((plotted["element"] == "sigma").any()),
            Line2D([], [], color="black", linestyle="--", linewidth=1.1, label=f"2{style.SIGMA} of batches"),
        ),
    ]
    return [entry for occurs, entry in entries if occurs]
