"""Short and long runs: loss against learning rate at several steps, and the ratio of optimal LRs by length."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lorabench.analysis.arms import arm_label, is_standard, with_arm_columns
from lorabench.analysis.at_step import at_end, at_step
from lorabench.analysis.comparison import Arm, Comparison, comparisons
from lorabench.analysis.optima import ratio_interval
from lorabench.analysis.published import paper_numbers
from lorabench.claims.learning_rate import SHORT_STEPS
from lorabench.figures import style
from lorabench.figures.lr_panel import LR_COLUMNS, STRIP, draw_lr_panel, lr_marks, lr_rows
from lorabench.store.tables import Tables

_COLUMNS = [*LR_COLUMNS, "full_steps", "ratio", "ratio_low", "ratio_high"]

# Ratios are drawn from this step on: earlier, the optimum of LoRA is beyond any grid, since B starts at zero.
_FIRST_STEP = 10

# The paper's numbers that the ratio is compared with, by their key in the table of the paper's numbers.
_REFERENCES = {"lr_ratio_lora_over_fullft": "long runs", "lr_ratio_short_runs": "short runs"}


@style.applied()
def draw(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw the figure; return it, and what it plots as one tidy table.

    Its columns and elements are those of `lr_rows`, with losses on the validation split at step `steps` of runs of
    `full_steps` steps. Further elements are `ratio` (of an arm's optimal LR to that of FullFT, with its 95% interval)
    and `reference` (the paper's ratios).
    """
    groups = style.titled(_standard(tables.runs))
    parts = [_rows(runs, tables.curves) for _, runs in groups]
    heights = [math.ceil((len(_lengths(part)) + 1) / 2) for part in parts]
    figure = style.new_figure(style.PANEL_HEIGHT * sum(heights))
    plotted = pd.concat([*parts, _references(parts)], ignore_index=True).reindex(columns=_COLUMNS)
    styles = style.arm_styles(plotted.dropna(subset=["arm"]))
    for place, ((title, _), rows) in enumerate(zip(groups, parts, strict=True)):
        first, lengths = 2 * sum(heights[:place]) + 1, _lengths(rows)
        for column, length in enumerate(lengths):
            axes = figure.add_subplot(sum(heights), 2, first + column)
            axes.set_title(f"{title} · at step {length}", pad=STRIP + 18, parse_math=False)
            draw_lr_panel(axes, rows[(rows["steps"] == length) & (rows["element"] != "ratio")], styles)
            axes.set_ylabel("validation NLL (nats / token)")
        axes = figure.add_subplot(sum(heights), 2, first + len(lengths))
        axes.set_title(f"{title} · LR ratio", pad=STRIP + 18, parse_math=False)
        _draw_ratio(axes, rows[rows["element"] == "ratio"], styles)
        if len(lengths) > 1:
            axes.set_xticks(lengths)
    style.legends(figure, styles, [*lr_marks(plotted), *_marks(plotted)])
    return figure, plotted


def _standard(runs: pd.DataFrame) -> pd.DataFrame:
    return with_arm_columns(runs[is_standard(runs)])


def _lengths(rows: pd.DataFrame) -> list[int]:
    """Return the steps that have a panel, ascending."""
    return sorted(int(step) for step in rows.loc[rows["element"] != "ratio", "steps"].unique())


def _rows(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Return what is plotted of one model, dataset, batch size and length."""
    evaluated, steps = _evaluated(runs, curves), runs["steps"].iloc[0]
    # A table without the length of its runs holds runs of one length.
    full = max(evaluated, default=0) if pd.isna(steps) else int(steps)
    by_step = {step: at_step(runs, curves, step) for step in evaluated if step < full}
    by_step[full] = at_end(runs).assign(steps=full)
    parts = [lr_rows(by_step[step]) for step in (*SHORT_STEPS, full) if step in by_step and len(by_step[step])]
    parts.append(pd.DataFrame([row for step, as_of in by_step.items() for row in _ratios(as_of, curves)]))
    rows = pd.concat([part for part in parts if len(part)], ignore_index=True)
    return rows.assign(full_steps=full).reindex(columns=_COLUMNS)


def _evaluated(runs: pd.DataFrame, curves: pd.DataFrame) -> list[int]:
    """Return the steps with validation losses, from the first step that is drawn."""
    if curves.empty:
        return []
    points = curves[curves["run_id"].isin(runs["run_id"]) & (curves["split"] == "validation")]
    return sorted(int(step) for step in points.loc[points["step"] >= _FIRST_STEP, "step"].unique())


def _ratios(runs: pd.DataFrame, curves: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the ratio of the optimal LR of each LoRA arm to that of FullFT; none where either is unknown."""
    if runs.empty:
        return []
    [comparison] = comparisons(runs, curves)
    fullft = comparison.fullft
    if fullft is None:
        return []
    return [_ratio(comparison, arm, fullft) for arm in comparison.arms if arm["method"] == "lora"]


def _ratio(comparison: Comparison, arm: Arm, fullft: Arm) -> dict[str, Any]:
    log_ratio = comparison.fit.log_ratio(arm_label(arm), arm_label(fullft))
    low, high = ratio_interval(log_ratio)
    return arm | {
        "arm": arm_label(arm),
        "element": "ratio",
        "ratio": math.exp(log_ratio.value),
        "ratio_low": low,
        "ratio_high": high,
        "resolved": not comparison.problems([arm, fullft], resolved=True),
    }


def _references(parts: list[pd.DataFrame]) -> pd.DataFrame:
    """Return the paper's ratios, if these runs give a ratio to compare with them."""
    if not any((part["element"] == "ratio").any() for part in parts):
        return pd.DataFrame(columns=_COLUMNS)
    printed = paper_numbers()
    rows = [{"element": "reference", "ratio": printed[key]} for key in _REFERENCES if key in printed]
    return pd.DataFrame(rows, columns=_COLUMNS)


def _draw_ratio(axes: Axes, rows: pd.DataFrame, styles: dict[str, style.ArmStyle]) -> None:
    printed = paper_numbers()
    for key, words in _REFERENCES.items():
        if key in printed and len(rows):
            axes.axhline(printed[key], color="0.6", linewidth=0.9, linestyle="--", zorder=1)
            text = f"paper, {words}: {printed[key]:g}"
            axes.annotate(
                text,
                (0, printed[key]),
                (2, 3),
                ("axes fraction", "data"),
                "offset points",
                color=style.MUTED,
                fontsize=7.5,
            )
    known = rows[rows["ratio"].notna() & (rows["steps"] > 0)]
    for arm, points in known.sort_values("steps").groupby("arm"):
        arm_style = styles[str(arm)]
        steps, ratio = points["steps"].astype(float), points["ratio"]
        axes.plot(steps, ratio, **arm_style.line)
        axes.vlines(steps, points["ratio_low"], points["ratio_high"], color=arm_style.colour, linewidth=1.2, zorder=4)
        for resolved, face in ((True, arm_style.colour), (False, "white")):
            chosen = points["resolved"].astype(bool) == resolved
            axes.plot(steps[chosen], ratio[chosen], arm_style.marker, ms=4.5, mfc=face, mec=arm_style.colour, zorder=5)
    axes.set(xscale="log", xlabel="training step")
    style.plain_log_ticks(axes)
    ratio_axis(axes)


def ratio_axis(axes: Axes) -> None:
    """Set up the y-axis for a ratio of optimal LRs, labelled with plain numbers."""
    axes.set(yscale="log", ylabel="optimal LR, LoRA / FullFT")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _marks(plotted: pd.DataFrame) -> list[Artist]:
    """Return the legend entries of the ratio's marks that occur."""
    ratio = plotted[(plotted["element"] == "ratio") & plotted["ratio"].notna()]
    unresolved = not ratio["resolved"].astype(bool).all()
    return [style.mark("ratio, not resolved", "o", markerfacecolor="white", markeredgewidth=1.2)] if unresolved else []
