"""A panel of final loss against learning rate, by arm: the rows it plots, and its marks. Figures 2, 4 and 5 have it."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.transforms import ScaledTranslation, blended_transform_factory

from lorabench.analysis.arms import ARM, arm_label
from lorabench.analysis.noise import seed_noise
from lorabench.analysis.optimum import lr_optima
from lorabench.figures import style

COLUMNS = [
    *("model", "dataset", "batch_size", "steps", "arm", "method", "rank", "placement"),
    *("element", "lr", "lr_low", "lr_high"),
    *("nll", "nll_sd", "n_seeds", "resolved", "above_range", "run_id", "seed"),
]


STRIP = 11.0
"""Points above a panel that hold the marks of what is not inside."""

# Points between arms there at one LR.
_DODGE = 4.5


def lr_rows(runs: pd.DataFrame) -> pd.DataFrame:
    """What the panels plot, columns COLUMNS.

    Its column `element` says what a row is: `loss` (mean over the seeds of one arm and LR; `above_range` where it
    is drawn as a triangle at the top), `optimum` (interpolated, with the interval of the LR) or `diverged` (one
    run). Losses are final test NLL in nats per scored token.
    """
    finished = runs.dropna(subset=["final_test_nll"])
    loss = finished.groupby([*ARM, "lr"], dropna=False, as_index=False).agg(
        nll=("final_test_nll", "mean"), nll_sd=("final_test_nll", "std"), n_seeds=("seed", "nunique")
    )
    loss["above_range"] = False
    for _, panel in loss.groupby(style.PANEL, dropna=False):
        loss.loc[panel.index, "above_range"] = _above_range(panel)
    optimum = lr_optima(runs, seed_noise(runs)).dropna(subset=["lr_opt", "nll_opt"])
    optimum = optimum.rename(columns={"lr_opt": "lr", "nll_opt": "nll"})
    diverged = runs[runs["status"] == "diverged"]
    parts = []
    for element, part in {"loss": loss, "optimum": optimum, "diverged": diverged}.items():
        labels = [arm_label(row) for _, row in part.iterrows()]
        parts.append(part.assign(arm=labels, element=element).reindex(columns=COLUMNS))
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def _above_range(loss: pd.DataFrame) -> pd.Series[bool]:
    """Which losses of a panel are so high that showing them would flatten the rest; never an arm's best."""
    nll = loss["nll"]
    lowest, worst_best = nll.min(), loss.groupby(ARM, dropna=False)["nll"].min().max()
    top = max(worst_best, nll.quantile(0.75))
    top += 0.25 * (top - lowest)
    worth_it = nll.max() - lowest > 1.6 * (top - lowest)
    above: pd.Series[bool] = (nll > top) & worth_it
    return above


def draw_lr_panel(axes: Axes, rows: pd.DataFrame, styles: dict[str, style.ArmStyle]) -> None:
    """Draw the rows of one panel; needs STRIP points above it."""
    loss, optimum, diverged = (rows[rows["element"] == element] for element in ("loss", "optimum", "diverged"))
    above = loss[loss["above_range"].astype(bool)]
    for arm, points in loss.groupby("arm"):
        arm_style = styles[str(arm)]
        colour = arm_style.colour
        axes.plot(points["lr"], points["nll"], **arm_style.line)
        inside = points.drop(above.index, errors="ignore")
        axes.plot(inside["lr"], inside["nll"], arm_style.marker, color=colour, ms=3.5, zorder=arm_style.zorder)
        repeated = inside[inside["n_seeds"] > 1]
        bars: dict[str, Any] = {"fmt": "none", "ecolor": colour, "capsize": 2.5, "zorder": 4}
        axes.errorbar(repeated["lr"], repeated["nll"], repeated["nll_sd"], **bars)
    for best in optimum.to_dict("records"):
        colour = styles[best["arm"]].colour
        axes.hlines(best["nll"], best["lr_low"], best["lr_high"], color=colour, linewidth=1.2, zorder=5)
        face, edge = (colour, "white") if best["resolved"] else ("white", colour)
        axes.plot(best["lr"], best["nll"], "D", ms=5.5, mfc=face, mec=edge, mew=1.0, zorder=6)
    axes.set(xscale="log", xlabel="learning rate", ylabel="final test NLL (nats / token)")
    _limit(axes, rows)
    _marks_above(axes, pd.concat([above.assign(marker="^"), diverged.assign(marker="x")]), styles)
    style.note(axes, _facts(loss, diverged), STRIP)


def _limit(axes: Axes, rows: pd.DataFrame) -> None:
    """Set the range: all LRs, and all losses but those above the range."""
    lowest, highest = rows["lr"].min(), rows["lr"].max()
    beside = max(1.3, (highest / lowest) ** 0.1)
    axes.set_xlim(lowest / beside, highest * beside)
    shown = rows[rows["nll"].notna() & ~rows["above_range"].eq(True)]
    if shown.empty:
        axes.set(ylim=(0, 1), yticks=[])
        return
    spread = shown["nll_sd"].astype(float).fillna(0.0)
    low, high = (shown["nll"] - spread).min(), (shown["nll"] + spread).max()
    pad = 0.04 * (high - low) or 0.04 * abs(high)
    axes.set_ylim(low - pad, high + pad)


def _marks_above(axes: Axes, rows: pd.DataFrame, styles: dict[str, style.ArmStyle]) -> None:
    """Above the panel, one mark per arm and LR, side by side where several share an LR."""
    data_by_height = blended_transform_factory(axes.transData, axes.transAxes)
    for _, at_lr in rows.drop_duplicates(["arm", "lr", "marker"]).groupby("lr"):
        ordered = sorted(at_lr.to_dict("records"), key=lambda row: list(styles).index(row["arm"]))
        for place, row in enumerate(ordered):
            points = ((place - (len(ordered) - 1) / 2) * _DODGE, STRIP / 2)
            shift = ScaledTranslation(points[0] / 72, points[1] / 72, axes.figure.dpi_scale_trans)
            look: dict[str, Any] = {"ms": 4.5, "mew": 1.4, "color": styles[row["arm"]].colour, "clip_on": False}
            axes.plot(row["lr"], 1, row["marker"], transform=data_by_height + shift, **look)


def _facts(loss: pd.DataFrame, diverged: pd.DataFrame) -> str:
    facts = [f"{len(diverged)} diverged", f"{int(loss['above_range'].sum())} above the range"]
    lost = sorted(set(diverged["arm"]) - set(loss["arm"]))
    return " · ".join(facts + ([f"no loss: {', '.join(lost)}"] if lost else []))


def lr_marks(plotted: pd.DataFrame) -> list[Artist]:
    """Legend entries of the marks that occur."""
    optimum = plotted[plotted["element"] == "optimum"]
    resolved = optimum["resolved"].astype(bool)
    entries = [
        (resolved.any(), style.mark("optimum, interval", "D", linestyle="-", linewidth=1.2)),
        ((~resolved).any(), style.mark("optimum, not resolved", "D", markerfacecolor="white", markeredgewidth=1.2)),
        (plotted["above_range"].eq(True).any(), style.mark("above the range", "^")),
        ((plotted["element"] == "diverged").any(), style.mark("diverged", "x", markeredgewidth=1.5)),
    ]
    return [entry for occurs, entry in entries if occurs]
