"""Variants of LoRA's parametrization: the loss that each reaches at its best learning rate, and that learning rate."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lorabench.analysis.arms import arm_label, arm_table, is_standard
from lorabench.analysis.invariances import PAIR_SETTING, with_lr_grid
from lorabench.figures import style
from lorabench.figures.fits import compared, margin_band, optimum
from lorabench.figures.grid import ARM_COLUMNS, diverged_runs, occurring, only, seeds_text, tidy, titled
from lorabench.store.tables import Tables

_COLUMNS = [
    *(*ARM_COLUMNS, "alpha", "init_a", "lr_ratio", "eps", "element", "nll", "nll_low", "nll_high"),
    *("n_seeds", "at_edge", "lr", "lr_low", "lr_high", "resolved", "n_diverged", "run_id"),
]

_ROW = 0.27  # the height in inches of the row of one variant


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
    heights = [_ROW * len(only(part, "variant")) + 1.2 for part in parts]
    figure = style.new_figure(sum(heights))
    axes = figure.subplots(len(parts), 2, squeeze=False, sharey="row", gridspec_kw={"height_ratios": heights})
    for (title, _), rows, (left, right) in zip(settings, parts, axes, strict=True):
        left.set_title(title, pad=18, parse_math=False)
        _draw_losses(left, rows)
        _draw_rates(right, only(rows, "variant"))
    plotted = pd.concat(parts, ignore_index=True)
    style.legends(figure, {}, _marks(plotted))
    return figure, plotted


def _settings(runs: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return a title and the runs of each setting that has the standard parametrization and a variant of it."""
    if runs.empty:
        return []
    lora = with_lr_grid(runs)
    titles = []
    for title, panel in titled(lora[lora["method"] == "lora"]):
        for _, rows in panel.groupby(PAIR_SETTING, dropna=False):
            standard = is_standard(rows)
            if standard.any() and not standard.all():
                rank, eps = rows["rank"].iloc[0], rows["eps"].iloc[0]
                titles.append((f"{title} · r{rank}" + (f" · eps {eps:g}" if panel["eps"].nunique() > 1 else ""), rows))
    return titles


def _rows(tables: Tables, runs: pd.DataFrame) -> pd.DataFrame:
    """Return what is plotted of one setting."""
    [comparison] = compared(tables, runs)
    unknown = {"lr": math.nan, "nll": math.nan, "resolved": False, "at_edge": False}
    rows = []
    for arm in comparison.arms:
        best = optimum(comparison, arm)
        lost = len(diverged_runs(comparison.rows[arm_label(arm)]))
        rows.append(arm | (best if best and best["fitted"] else unknown) | {"n_diverged": lost})
    columns = [name for name in _COLUMNS if name not in comparison.arms[0] and name not in ("arm", "element", "run_id")]
    variants = arm_table(rows, columns).sort_values(["alpha", "lr_ratio"], ascending=False, kind="stable")
    standard = margin_band(comparison, variants[is_standard(variants)].dropna(subset=["nll"]))
    if len(standard):
        margin = standard["nll_high"] - standard["nll_low"]
        standard = standard.assign(nll_low=standard["nll"] - margin, nll_high=standard["nll"])
    diverged = diverged_runs(runs).drop(columns=["n_diverged"], errors="ignore")
    table = tidy({"variant": variants, "margin_band": standard, "diverged": diverged}, _COLUMNS)
    return table.astype({"n_seeds": "Int64", "n_diverged": "Int64"})


def _draw_losses(axes: Axes, rows: pd.DataFrame) -> None:
    variants = only(rows, "variant")
    for band in only(rows, "margin_band").to_dict("records"):
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
    facts = [seeds_text(variants["n_seeds"]), f"{len(only(rows, 'diverged'))} diverged"]
    lost = variants.loc[variants["nll"].isna(), "arm"]
    style.note(axes, " · ".join([*facts, *([f"no loss: {', '.join(lost)}"] if len(lost) else [])]))


def _draw_rates(axes: Axes, variants: pd.DataFrame) -> None:
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
        margin = max(1.2, math.sqrt(10 * low / high))
        axes.set_xlim(low / margin, high * margin)
    axes.set_xlabel("optimal learning rate of A")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0, labelleft=False)


def _marks(plotted: pd.DataFrame) -> list[Artist]:
    """Return the legend entries of the marks that occur."""
    variants = only(plotted, "variant")
    resolved = variants["resolved"].astype(bool)
    white = {"markerfacecolor": "white", "markeredgewidth": 1.1, "markersize": 5}
    shade = Patch(label="within the margin of the standard", facecolor="0.88")
    return occurring(
        [
            (True, style.mark("standard", "s", color="black", linestyle="-", linewidth=1.4, markersize=5)),
            (len(only(plotted, "margin_band")), shade),
            (variants["at_edge"].astype(bool).any(), style.mark("best LR at the edge", "o", **white)),
            (resolved.any(), style.mark("optimum, interval", "D", linestyle="-", linewidth=1.4, markersize=5)),
            ((~resolved).any(), style.mark("optimum, not resolved", "D", **white)),
        ]
    )
