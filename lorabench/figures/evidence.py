"""What several sources measured: a forest plot with a random-effects summary, and how far off rules of the LR are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lorabench.figures import style
from lorabench.sources.lr_left_out import METHODS, RULES
from lorabench.sources.measurements import MEASURES, PAPER_VALUES, Z

_WIDTH, _ROW, _NAMES, _NUMBERS = 9.2, 0.21, 3.55, 1.85  # inches
_TEXT = 7.5
_AXIS = {
    "lr_ratio": "optimal LR of LoRA over that of full fine-tuning",
    "loss_gap": "LoRA minus full fine-tuning, nats per token; right is worse for LoRA",
    "gap_growth": "growth of that gap from the smallest to the largest batch, nats per token",
    "rank_1_gap": "accuracy of rank 1 minus that of full fine-tuning; left is worse for LoRA",
}
_TITLE = {
    "lr_ratio": "Ratio of optimal learning rates",
    "loss_gap": "Loss at the best LR",
    "gap_growth": "Growth of that gap with batch size",
    "rank_1_gap": "RL at rank 1",
}


@style.applied()
def draw_forest(measured: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """Draw a panel for each measure.

    Args:
        measured: as from `measurement_table`.
        summary: as from `summary_table`.
    """
    names = [measure for measure in MEASURES if (measured["measure"] == measure).any()]
    rows = {measure: measured[measured["measure"] == measure] for measure in names}
    slots = [len(rows[measure]) + 2 for measure in names]
    heights = [_ROW * slot + 0.8 for slot in slots]
    figure = Figure(figsize=(_WIDTH, sum(heights)))
    top = sum(heights)
    for measure, height in zip(names, heights, strict=True):
        bottom = top - height
        box = (
            _NAMES / _WIDTH,
            (bottom + 0.5) / sum(heights),
            (_WIDTH - _NAMES - _NUMBERS) / _WIDTH,
            (height - 0.8) / sum(heights),
        )
        of_summary = (
            summary[(summary["measure"] == measure) & (summary["attribute"] == "")] if len(summary) else summary
        )
        _panel(figure.add_axes(box), measure, rows[measure], of_summary)
        top = bottom
    return figure


def _panel(axes: Axes, measure: str, rows: pd.DataFrame, summary: pd.DataFrame) -> None:
    shown = _shown(measure)
    axes.set_ylim(len(rows) + 1.5, -0.7)
    axes.axvline(shown(PAPER_VALUES[measure]), color="0.5", linestyle="--", linewidth=1, zorder=1)
    left: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": _TEXT}
    left["parse_math"] = False
    right = {**left, "ha": "left"}
    ends = [shown(PAPER_VALUES[measure])]
    for slot, row in enumerate(rows.sort_values(["parameters", "study", "task"], kind="stable").to_dict("records")):
        counts = bool(row["counts"])
        colour = "#274b8f" if row["task"] == "sft" else "#9a4a00"
        value = row["value"]
        ends.append(shown(value))
        if math.isfinite(row["error"]) and counts:
            low, high = shown(value - Z * row["error"]), shown(value + Z * row["error"])
            ends += [low, high]
            axes.plot([low, high], [slot, slot], color=colour, linewidth=1.4)
        axes.plot(
            shown(value),
            slot,
            "s" if row["task"] == "sft" else "o",
            color=colour,
            markersize=5,
            markerfacecolor=colour if counts else "white",
        )
        axes.text(-_NAMES / _panel_width() + 0.02, slot, _name(row), color="0.1" if counts else style.MUTED, **left)
        axes.text(1.02, slot, _numbers(measure, row) if counts else "not counted", color=colour, **right)
    for of_all in summary.to_dict("records"):
        ends += _summary(axes, measure, of_all, len(rows) + 0.6, left, right)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.axhline(len(rows) - 0.25, color="0.8", linewidth=0.6)
    axes.set_title(_TITLE[measure], pad=5)
    axes.set_xlabel(_AXIS[measure], fontsize=_TEXT)
    if measure == "lr_ratio":
        axes.set_xscale("log")
        axes.set_xlim(max(min(ends) / 1.3, 0.3), min(max(ends) * 1.3, 3000))
        style.number_log_ticks(axes.xaxis)
    else:
        spread = max(ends) - min(ends)
        axes.set_xlim(min(ends) - 0.05 * spread, max(ends) + 0.05 * spread)


def _panel_width() -> float:
    return _WIDTH - _NAMES - _NUMBERS


def _summary(
    axes: Axes, measure: str, row: dict[Any, Any], slot: float, left: dict[str, Any], right: dict[str, Any]
) -> list[float]:
    """Draw the diamond of the mean with its interval, and the prediction interval as a grey line; return their ends."""
    shown = _shown(measure)
    ends = []
    if math.isfinite(row["predicted_low"]):
        predicted = [shown(row["predicted_low"]), shown(row["predicted_high"])]
        axes.plot(predicted, [slot, slot], color="0.6", linewidth=3, solid_capstyle="butt", zorder=1)
        ends += predicted
    if math.isfinite(row["low"]):
        low, mean, high = (shown(row[name]) for name in ("low", "mean", "high"))
        axes.fill([low, mean, high, mean], [slot, slot - 0.3, slot, slot + 0.3], color="0.1", zorder=3)
        ends += [low, high]
    text = f"mean of {row['k']} ({row['share']:.0%} of the variation is between them)"
    axes.text(-_NAMES / _panel_width() + 0.02, slot, text, weight="bold", **left)
    axes.text(1.02, slot, _interval(measure, row["mean"], row["low"], row["high"]), weight="bold", **right)
    return ends


def _shown(measure: str) -> Any:
    return (lambda value: float(np.exp(value))) if measure == "lr_ratio" else float


def _name(row: dict[Any, Any]) -> str:
    batch = "" if pd.isna(row["batch_size"]) or row["task"] == "rl" else f", batch {int(row['batch_size'])}"
    return f"{row['scale']:>5}  {row['source']}: {row['dataset']}{batch}{', RL' if row['task'] == 'rl' else ''}"


def _numbers(measure: str, row: dict[Any, Any]) -> str:
    return _interval(measure, row["value"], row["value"] - Z * row["error"], row["value"] + Z * row["error"])


def _interval(measure: str, value: float, low: float, high: float) -> str:
    if measure == "lr_ratio":
        return f"{math.exp(value):.1f} [{math.exp(low):.1f}, {math.exp(high):.1f}]"
    digits = 3 if measure == "rank_1_gap" else 4
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


_LOOKS: dict[str, dict[str, Any]] = {
    "pooled": {"color": "#274b8f", "marker": "o", "markersize": 6},
    "law": {"color": "#9a4a00", "marker": "s", "markersize": 5, "markerfacecolor": "white"},
    "law_sqrt": {"color": "#9a4a00", "marker": "x", "markersize": 5},
}
_METHODS = {"fullft": "FullFT", "lora": "LoRA"}
_SOURCE_ROW, _MARGINS = 0.24, 0.9  # inches


@style.applied()
def draw_left_out(sources: pd.DataFrame) -> Figure:
    """Draw a panel for each task and method, with a row for each source.

    Args:
        sources: as from `lorabench.sources.lr_left_out.by_source`.
    """
    measured = sources[sources["optima"] > 0]
    tasks = [task for task in ("sft", "rl") if (measured["task"] == task).any()]
    slots = [measured.loc[measured["task"] == task, "source"].nunique() for task in tasks]
    figure = Figure(figsize=(style.WIDTH, _SOURCE_ROW * sum(slots) + _MARGINS * len(tasks) + 0.4), layout="constrained")
    panels = figure.subplots(len(tasks), 2, sharex=True, squeeze=False, height_ratios=slots)
    for (left, right), task in zip(panels, tasks, strict=True):
        names = list(dict.fromkeys(measured.loc[measured["task"] == task, "source"]))
        for axes, method in zip((left, right), METHODS, strict=True):
            part = measured[(measured["task"] == task) & (measured["method"] == method)]
            _left_out_panel(axes, part, names, f"{task.upper()}, {_METHODS[method]}")
        right.set_yticklabels([])
    for axes in panels[-1]:
        axes.set_xlabel("predicted over measured optimal LR")
    handles = [Line2D([], [], linestyle="", label=label, **_LOOKS[rule]) for rule, label in RULES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _left_out_panel(axes: Axes, rows: pd.DataFrame, names: list[str], title: str) -> None:
    axes.axvline(1, color="0.5", linestyle="--", linewidth=1, zorder=1)
    for row in rows.to_dict("records"):
        axes.plot(row["signed"], names.index(row["source"]), linestyle="", **_LOOKS[str(row["rule"])])
    axes.set_xscale("log")
    style.number_log_ticks(axes.xaxis)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_title(title)
