"""Variants of LoRA's parametrization: the loss that each reaches at its best learning rate, and that learning rate."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lorabench.analysis.arms import arm_label, each_arm, is_standard
from lorabench.analysis.invariances import PAIR_SETTING, with_lr_grid
from lorabench.figures import style
from lorabench.figures.fitted import fitted_comparisons, fitted_rows, margin_band
from lorabench.store.tables import Tables

_COLUMNS = [
    *("model", "dataset", "batch_size", "steps", "arm", "method", "rank", "placement"),
    *("alpha", "init_a", "lr_ratio", "eps", "element", "nll", "nll_low", "nll_high", "n_seeds", "at_edge"),
    *("lr", "lr_low", "lr_high", "resolved", "n_diverged", "run_id"),
]

# The height in inches of the row of one variant.
_ROW = 0.27


@style.applied()
def draw(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw the figure; return it, and what it plots as one tidy table.

    The column `element` says what a row is: `variant` (`nll` is the fitted minimum of the test loss, in nats per scored
    token, with its 95% interval; `lr` is the fitted optimum of LR_A with its 95% interval), `margin_band` (from the
    standard's loss down by the margin, from `nll_low` to `nll_high`) or `diverged` (one run).
    """
    settings = _settings(tables.runs)
    if not settings:
        sentence = "There are no LR-tuned variants of the standard parametrization."
        return style.empty_figure(sentence), pd.DataFrame(columns=_COLUMNS)
    parts = [_rows(tables, runs) for _, runs in settings]
    figure = style.new_figure(sum(_ROW * int((part["element"] == "variant").sum()) + 1.2 for part in parts))
    heights = [_ROW * int((part["element"] == "variant").sum()) + 1.2 for part in parts]
    axes = figure.subplots(len(parts), 2, squeeze=False, sharey="row", gridspec_kw={"height_ratios": heights})
    for (title, _), rows, (left, right) in zip(settings, parts, axes, strict=True):
        left.set_title(title, pad=18, parse_math=False)
        _draw_losses(left, rows)
        _draw_rates(right, rows)
    plotted = pd.concat(parts, ignore_index=True)
    style.legends(figure, {}, _marks(plotted))
    return figure, plotted


def _settings(runs: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return a title and the runs of each setting that has the standard parametrization and a variant of it."""
    if runs.empty:
        return []
    lora = with_lr_grid(runs)
    lora = lora[lora["method"] == "lora"]
    titles = []
    for title, of_panel in style.titled(lora):
        settings = [rows for _, rows in of_panel.groupby(PAIR_SETTING, dropna=False)]
        for rows in settings:
            standard = is_standard(rows)
            if standard.any() and not standard.all():
                rank, eps = rows["rank"].iloc[0], rows["eps"].iloc[0]
                words = f"{title} · r{rank}" + (f" · eps {eps:g}" if of_panel["eps"].nunique() > 1 else "")
                titles.append((words, rows))
    return titles


def _rows(tables: Tables, runs: pd.DataFrame) -> pd.DataFrame:
    """Return what is plotted of one setting."""
    rows = []
    for comparison in fitted_comparisons(tables, runs):
        fitted = fitted_rows([comparison])
        variants = {row["arm"]: row for row in fitted.to_dict("records")}
        for arm, of_arm in each_arm(comparison.runs):
            label, n_diverged = arm_label(arm), int((of_arm["status"] == "diverged").sum())
            without: dict[Any, Any] = {"arm": label, "at_edge": False, "resolved": False}
            rows.append(arm | variants.get(label, without) | {"element": "variant", "n_diverged": n_diverged})
        standard = fitted[is_standard(fitted)]
        if band := margin_band(comparison, standard):
            margin = band["nll_high"] - band["nll_low"]
            rows.append(band | {"nll_low": band["nll"] - margin, "nll_high": band["nll"]})
    variants_first = [row for row in rows if row["element"] == "variant"]
    variants_first.sort(key=lambda row: (row["alpha"], row["lr_ratio"]), reverse=True)
    bands = [row for row in rows if row["element"] != "variant"]
    diverged = runs[runs["status"] == "diverged"].assign(element="diverged")
    diverged["arm"] = [arm_label(run) for _, run in diverged.iterrows()]
    runs_diverged = diverged.drop(columns=["n_diverged"], errors="ignore").to_dict("records")
    table = pd.DataFrame([*variants_first, *bands, *runs_diverged])
    return table.reindex(columns=_COLUMNS).astype({"n_seeds": "Int64", "n_diverged": "Int64"})


def _draw_losses(axes: Axes, rows: pd.DataFrame) -> None:
    variants = rows[rows["element"] == "variant"]
    for band in rows[rows["element"] == "margin_band"].to_dict("records"):
        axes.axvspan(band["nll_low"], band["nll_high"], color="0.88", linewidth=0, zorder=0)
        axes.axvline(band["nll"], color="0.6", linewidth=0.8, zorder=1)
    for place, row in enumerate(variants.to_dict("records")):
        standard = row["alpha"] == 32 and row["lr_ratio"] == 1
        colour = "black" if standard else style.MUTED
        axes.hlines(place, row["nll_low"], row["nll_high"], color=colour, linewidth=1.4, zorder=2)
        face = "white" if row["at_edge"] else colour
        axes.plot(row["nll"], place, "s" if standard else "o", ms=5, mfc=face, mec=colour, mew=1.1, zorder=3)
    labels = [f"alpha {row['alpha']:g}, LR_B/LR_A {row['lr_ratio']:g}" for _, row in variants.iterrows()]
    axes.set_yticks(range(len(variants)), labels)
    axes.set(ylim=(-0.6, len(variants) - 0.4), xlabel="final test NLL (nats / token)")
    axes.grid(visible=False, axis="y")
    facts = [style.seeds_text(variants["n_seeds"])]
    facts += [f"{(rows['element'] == 'diverged').sum()} diverged"]
    lost = variants.loc[variants["nll"].isna(), "arm"]
    style.note(axes, " · ".join([*facts, *([f"no loss: {', '.join(lost)}"] if len(lost) else [])]))


def _draw_rates(axes: Axes, rows: pd.DataFrame) -> None:
    variants = rows[rows["element"] == "variant"]
    for place, row in enumerate(variants.to_dict("records")):
        axes.hlines(place, row["lr_low"], row["lr_high"], color=style.MUTED, linewidth=1.4, zorder=2)
        face = style.MUTED if row["resolved"] else "white"
        axes.plot(row["lr"], place, "D", ms=5, mfc=face, mec=style.MUTED, mew=1.1, zorder=3)
    if variants["lr"].notna().any():
        axes.set_xscale("log")
        style.number_log_ticks(axes.xaxis)
        # The axis spans a decade or more, so that it has ticks, and optima that are close look close.
        ends = variants[["lr", "lr_low", "lr_high"]].astype(float)
        low, high = float(ends.min().min()), float(ends.max().max())
        beside = max(1.2, math.sqrt(10 * low / high))
        axes.set_xlim(low / beside, high * beside)
    axes.set_xlabel("optimal learning rate of A")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0, labelleft=False)


def _marks(plotted: pd.DataFrame) -> list[Artist]:
    """Return the legend entries of the marks that occur."""
    variants = plotted[plotted["element"] == "variant"]
    edge = variants["at_edge"].astype(bool)
    resolved = variants["resolved"].fillna(False).astype(bool)
    has_band = bool((plotted["element"] == "margin_band").any())
    white = {"markerfacecolor": "white", "markeredgewidth": 1.1, "markersize": 5}
    entries: list[tuple[bool, Artist]] = [
        (True, style.mark("standard", "s", color="black", linestyle="-", linewidth=1.4, markersize=5)),
        (has_band, Patch(label="within the margin of the standard", facecolor="0.88")),
        (bool(edge.any()), style.mark("best LR at the edge", "o", **white)),
        (bool(resolved.any()), style.mark("optimum, interval", "D", linestyle="-", linewidth=1.4, markersize=5)),
        (bool((~resolved).any()), style.mark("optimum, not resolved", "D", **white)),
    ]
    return [entry for occurs, entry in entries if occurs]
