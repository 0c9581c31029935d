"""What several sources measured: a forest plot with a random-effects summary, and a matrix of verdicts by scale."""

from __future__ import annotations

import math
import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorabench.figures import style
from lorabench.figures.verdicts import LOOKS, SHORT_NAMES
from lorabench.sources.measurements import MEASURES, PAPER_VALUES, Z, holds_again, range_text, share_text

_WIDTH, _ROW, _NAMES, _NUMBERS = 9.2, 0.21, 3.55, 1.85  # inches
_PANEL_WIDTH = _WIDTH - _NAMES - _NUMBERS
_TEXT: dict[str, Any] = {"va": "center", "fontsize": 7.5, "parse_math": False}


_RATIO = "optimal LR of LoRA over that of full fine-tuning"
_GAP = "LoRA minus full fine-tuning, nats per token; right is worse for LoRA"
_GROWTH = "growth of that gap from the smallest to the largest batch, nats per token"
_ACCURACY = "accuracy of LoRA minus that of full fine-tuning; left is worse for LoRA"
_RANK_1 = "accuracy of rank 1 minus that of full fine-tuning; left is worse for LoRA"

# The title of the panel of each measure, the label of its axis, and the format of its numbers.
_MEASURES = {
    "lr_ratio": ("Ratio of optimal learning rates", _RATIO, ".1f"),
    "loss_gap": ("Loss at the best LR", _GAP, "+.4f"),
    "gap_growth": ("Growth of that gap with batch size", _GROWTH, "+.4f"),
    "accuracy_gap": ("Accuracy at the best LR", _ACCURACY, "+.3f"),
    "rank_1_gap": ("RL at rank 1", _RANK_1, "+.3f"),
}
_MEAN, _PREDICTED = ["mean", "low", "high"], ["predicted_low", "predicted_high"]


@style.applied()
def draw_forest(measured: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """Draw a panel for each measure, from a `measurement_table` and its `summary_table`."""
    rows = {name: table for name in MEASURES if len(table := measured[measured["measure"] == name])}
    heights = [_ROW * (len(table) + 2) + 0.8 for table in rows.values()]
    figure = Figure(figsize=(_WIDTH, sum(heights)))
    left, width = _NAMES / _WIDTH, _PANEL_WIDTH / _WIDTH
    for place, (measure, table) in enumerate(rows.items()):
        bottom = sum(heights[place + 1 :])
        box = (left, (bottom + 0.5) / sum(heights), width, (heights[place] - 0.8) / sum(heights))
        over_all = summary[(summary["measure"] == measure) & (summary["attribute"] == "") & (summary["k"] > 1)]
        _draw_measure(figure.add_axes(box), measure, table, over_all)
    return figure


def _draw_measure(axes: Axes, measure: str, rows: pd.DataFrame, summary: pd.DataFrame) -> None:
    """Draw each measurement with its interval, then the mean as a diamond with its prediction interval in grey."""
    title, label, digits = _MEASURES[measure]
    half, paper, is_log = Z * rows["error"].where(rows["counts"]), PAPER_VALUES[measure], measure == "lr_ratio"
    rows = rows.assign(mean=rows["value"], low=rows["value"] - half, high=rows["value"] + half)
    if is_log:
        # The tables hold logarithms of ratios.
        paper, rows[_MEAN] = math.exp(paper), np.exp(rows[_MEAN])
        summary = summary.assign(**{name: np.exp(summary[name]) for name in (*_MEAN, *_PREDICTED)})
    axes.set_ylim(len(rows) + 1.5, -0.7)
    axes.axvline(paper, color="0.5", linestyle="--", linewidth=1, zorder=1)
    text = {"transform": axes.get_yaxis_transform(), **_TEXT}
    estimate = f"{{mean:{digits}}} [{{low:{digits}}}, {{high:{digits}}}]"
    names_at = -_NAMES / _PANEL_WIDTH + 0.02
    for slot, row in enumerate(rows.sort_values(["parameters", "study", "task"], kind="stable").to_dict("records")):
        is_rl, counts = row["task"] == "rl", bool(row["counts"])
        colour, marker = ("#9a4a00", "o") if is_rl else ("#274b8f", "s")
        if counts:
            axes.plot([row["low"], row["high"]], [slot, slot], color=colour, linewidth=1.4)
        axes.plot(row["mean"], slot, marker, color=colour, markersize=5, mfc=colour if counts else "white")
        batch = "" if pd.isna(row["batch_size"]) or is_rl else f", batch {int(row['batch_size'])}"
        name = f"{row['scale']:>5}  {row['source']}: {row['dataset']}{batch}{', RL' if is_rl else ''}"
        axes.text(names_at, slot, name, color="0.1" if counts else style.MUTED, **text)
        axes.text(1.02, slot, estimate.format_map(row) if counts else "not counted", color=colour, **text)
    below = len(rows) + 0.6
    for row in summary.to_dict("records"):
        if math.isfinite(row["predicted_low"]):
            ends = [row[name] for name in _PREDICTED]
            axes.plot(ends, [below, below], color="0.6", linewidth=3, solid_capstyle="butt", zorder=1)
        if math.isfinite(row["low"]):
            diamond = [row["low"], row["mean"], row["high"], row["mean"]]
            axes.fill(diamond, [below, below - 0.3, below, below + 0.3], color="0.1", zorder=3)
        share = f"mean of {row['k']} ({row['share']:.0%} of the variation is between them)"
        axes.text(names_at, below, share, weight="bold", **text)
        axes.text(1.02, below, estimate.format_map(row), weight="bold", **text)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.axhline(len(rows) - 0.25, color="0.8", linewidth=0.6)
    axes.set_title(title, pad=5)
    axes.set_xlabel(label, fontsize=_TEXT["fontsize"])
    ends = [paper, *rows[_MEAN].to_numpy().ravel(), *summary[["low", "high", *_PREDICTED]].to_numpy(float).ravel()]
    least, most = float(np.nanmin(ends)), float(np.nanmax(ends))
    if is_log:
        axes.set_xscale("log")
        axes.set_xlim(max(least / 1.3, 0.3), min(most * 1.3, 3000))
        style.log_ticks(axes.xaxis)
    else:
        axes.set_xlim(least - 0.05 * (most - least), most + 0.05 * (most - least))


_CELL_HEIGHT, _CELL_WIDTH, _NAMES_WIDTH = 0.5, 1.02, 2.75  # inches, of the matrix


@style.applied()
def draw_matrix(cells: pd.DataFrame) -> Figure:
    """Draw the cells of a `lorabench.sources.measurements.matrix`."""
    sizes = list(dict.fromkeys(cells.sort_values("parameters", kind="stable")["scale"]))
    scales = ["paper", *sizes]
    claims = list(dict.fromkeys(cells["claim_id"]))
    paper = cells.drop_duplicates("claim_id").set_index("claim_id")["paper_value"]
    width, height = _NAMES_WIDTH + _CELL_WIDTH * len(scales) + 0.1, _CELL_HEIGHT * (len(claims) + 1) + 0.55
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((_NAMES_WIDTH / width, 0.5 / height, _CELL_WIDTH * len(scales) / width, 1 - 0.52 / height))
    axes.set(xlim=(-0.5, len(scales) - 0.5), ylim=(len(claims) - 0.5, -1.5), xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    middle: dict[str, Any] = {"ha": "center", "va": "center"}
    for column, scale in enumerate(scales):
        axes.text(column, -0.95, scale, weight="bold", fontsize=10, **middle)
    axes.axhline(-0.5, color="0.4", linewidth=0.8)
    left = -0.5 - _NAMES_WIDTH / _CELL_WIDTH + 0.06
    at = {(cell["claim_id"], cell["scale"]): cell for cell in cells.to_dict("records")}
    for row, claim_id in enumerate(claims):
        axes.text(left, row, claim_id, weight="bold", va="center", color="0.1")
        axes.text(left + 0.36, row, SHORT_NAMES[claim_id], va="center", color="0.1", fontsize=8)
        if row:
            axes.axhline(row - 0.5, color="0.9", linewidth=0.6)
        # The paper's number or statement, in at most three short lines.
        said = str(paper[claim_id]).partition(";")[0].partition(" (")[0]
        said = "says so" if said in ("no number", "lower", "wider") else said
        said = "\n".join(textwrap.wrap(textwrap.shorten(said, 42, placeholder="..."), 17))
        axes.text(0, row, said, fontsize=6.5, color="0.25", **middle)
        for column, scale in enumerate(sizes, start=1):
            cell = at.get((claim_id, scale))
            if cell is None or cell["verdict"] == "not tested":
                axes.text(column, row, "\N{EN DASH}", color="0.7", **middle)
                continue
            colour, mark, face = LOOKS[str(cell["verdict"])]
            texts = [text for text in (share_text(cell), range_text(cell)) if text and range_text(cell)]
            axes.plot(column, row - 0.15 * len(texts), mark, color=colour, markersize=7, markerfacecolor=face)
            if holds_again(cell):
                axes.plot(column, row - 0.15 * len(texts), mark, color=colour, markersize=11, markerfacecolor="none")
            for line, text in enumerate(texts):
                place = row + (0.26 if len(texts) == 1 else 0.1 + 0.25 * line)
                axes.text(column, place, text, color=colour, fontsize=6.5, **middle)
    handles = [
        style.mark(verdict, mark, color=colour, markerfacecolor=face)
        for verdict, (colour, mark, face) in LOOKS.items()
        if verdict != "not tested"
    ]
    handles.append(
        style.mark("with a ring: came out again on held-out seeds", "o", markersize=9, markerfacecolor="none")
    )
    figure.legend(handles=handles, loc="lower left", ncols=4, handletextpad=0.2, columnspacing=1.0, borderaxespad=0.3)
    return figure
