"""The evidence of all sources: tables of what the runs of others say beside published presets, and two pictures: a
forest plot with a random-effects summary, and answers by the size of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from lorabench.analysis.finding import BORDERLINE, SEVERITY
from lorabench.analysis.optima import PAPER_RATIO
from lorabench.analysis.rules import DECIDED
from lorabench.figures import style
from lorabench.sources.lr_optima import known_optima, optima_table
from lorabench.sources.measurements import MEASURES, Z, holds_again, matrix, measurement_table, summary_table
from lorabench.sources.source import judge, read_sources, source_folders
from lorabench.store.io import write_csv
from lorabench.store.published import NOT_PUBLISHED
from lorabench.utils import formats


def evidence_tables(
    more: Sequence[Path] = (), own: Sequence[pd.DataFrame] = (), presets: Sequence[Path] = ()
) -> dict[str, pd.DataFrame]:
    """Judge the shipped sources and those in more folders, and set own presets, as from `read_own`, next to them.

    The optimal learning rates of published `presets`, given as folders, are pooled with those of the sources. Returned
    are, by the names of their files, all verdicts (`claims`), their `matrix`, `measurements` with their `summary`, and
    the known optimal learning rates (`lr_optima`).
    """
    sources = read_sources(source_folders(*more))
    claims = pd.concat([judge(source) for source in sources], ignore_index=True)
    measurements = measurement_table(sources, claims, own)
    return {
        "claims": claims.drop(columns=list(NOT_PUBLISHED)),
        "matrix": matrix(claims, own),
        "measurements": measurements,
        "summary": summary_table(measurements),
        "lr_optima": optima_table(known_optima(sources, presets)),
    }


def write_evidence(tables: Mapping[str, pd.DataFrame], out: Path) -> None:
    """Write the tables of the evidence, as from `evidence_tables`, and its pictures into a folder."""
    for name, rows in tables.items():
        write_csv(rows, out / f"{name}.csv")
    style.write_figure(draw_matrix(tables["matrix"]), out / "matrix.svg")
    style.write_figure(draw_forest(tables["measurements"], tables["summary"]), out / "forest.svg")


_WIDTH, _ROW, _NAMES, _NUMBERS = 9.2, 0.21, 3.55, 1.85  # inches
_PANEL_WIDTH = _WIDTH - _NAMES - _NUMBERS
_TEXT: dict[str, Any] = {"va": "center", "fontsize": 7.5, "parse_math": False}


# The title of the panel of each measure, the format of its numbers, and the label of its axis.
_LESS = "minus that of full fine-tuning; left is worse for LoRA"
_GROWTH = "growth of that gap from the smallest to the largest batch, nats per token"
_MEASURES = {
    "lr_ratio": ("Ratio of optimal learning rates", ".1f", "optimal LR of LoRA over that of full fine-tuning"),
    "loss_gap": ("Loss at the best LR", "+.4f", "LoRA minus full fine-tuning, nats per token; right is worse for LoRA"),
    "gap_growth": ("Growth of that gap with batch size", "+.4f", _GROWTH),
    "accuracy_gap": ("Accuracy at the best LR", "+.3f", f"accuracy of LoRA {_LESS}"),
    "rank_1_gap": ("RL at rank 1", "+.3f", f"accuracy of rank 1 {_LESS}"),
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
    title, digits, label = _MEASURES[measure]
    half, is_log = Z * rows["error"].where(rows["counts"]), measure == "lr_ratio"
    # Of the growth the paper says only that it is above 0.
    paper = PAPER_RATIO if is_log else 0.0
    rows = rows.assign(mean=rows["value"], low=rows["value"] - half, high=rows["value"] + half)
    if is_log:
        # The tables hold logarithms of ratios.
        rows[_MEAN] = np.exp(rows[_MEAN])
        summary = summary.assign(**{name: np.exp(summary[name]) for name in (*_MEAN, *_PREDICTED)})
    below = len(rows) + 0.6
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
    axes.set_xlim(least - 0.05 * (most - least), most + 0.05 * (most - least))
    if is_log:
        axes.set(xscale="log", xlim=(max(least / 1.3, 0.3), min(most * 1.3, 3000)))
        style.log_ticks(axes.xaxis)


QUESTIONS = {
    "B2": "LoRA's loss the same as\nfull fine-tuning's?",
    "A1": "LoRA keeps up all along\na long run?",
    "B1": "LoRA's best LR ten times\nfull fine-tuning's?",
    "B3": "One best LR for all\nranks from 4 up?",
    "A8": "Rank 1 too small where\ndata are many?",
    "E1": "LoRA on attention alone\nworse than on the MLP?",
    "D1": "LoRA harmed more by\nlarge batches?",
    "F1": "Rank 1 enough in\nreinforcement learning?",
}
"""The questions that claims answer with yes, each in two lines of at most 28 characters."""

ANSWERS = {
    "confirmed": "yes",
    "right sign, below the margin": "yes, but by less than matters",
    "contradicted": "no",
    "not seen here": "no",
    "inconclusive": "undecided",
}
"""The answer by verdict. Without runs in the setting of the claim there is none."""

# Inches. At a width of 360 pixels, as on a phone, letters have 10 pixels.
_QUESTIONS, _COLUMN, _ROW_HEIGHT, _HEAD, _KEY = 2.45, 0.78, 0.52, 0.66, 1.2
_LETTERS: dict[str, Any] = {"fontsize": 11.5, "va": "center", "linespacing": 1.15, "color": "0.1"}
_BETWEEN_COLUMNS = (1e7, 5e8, 5e9)  # parameters
# By answer: what a cell says, and its colour. Blue and orange differ for colour-blind readers too.
_YES, _NO, _OPEN = "#0b5394", "#b45309", "0.35"
_WORDS = {
    "yes": ("yes", _YES),
    "yes, but by less than matters": ("slight", _YES),
    "no": ("no", _NO),
    "undecided": ("?", _OPEN),
}


@style.applied()
def draw_matrix(cells: pd.DataFrame) -> Figure:
    """Draw the answers to the questions, from a `lorabench.sources.measurements.matrix`."""
    ordered = cells.sort_values("parameters", kind="stable")
    columns = list(ordered.groupby(np.searchsorted(_BETWEEN_COLUMNS, ordered["parameters"], side="right")))
    width, height = _QUESTIONS + _COLUMN * len(columns) + 0.08, _HEAD + _ROW_HEIGHT * len(QUESTIONS) + _KEY
    figure = Figure(figsize=(width, height))
    # One unit is one inch, from the upper left corner.
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    axes.text(0.08, _HEAD / 2, "Parameters of the model\nWho trained it", **_LETTERS)
    for place, (_, of_size) in enumerate(columns):
        across = _QUESTIONS + _COLUMN * (place + 0.5)
        trained = {"us" if own else "others" for own in of_size["source"].isna()}
        first, last = of_size["scale"].iloc[0], of_size["scale"].iloc[-1]
        sizes = first if first == last else f"{first.removesuffix(last[-1])}\N{EN DASH}{last}"
        head = f"{sizes}\n{'both' if len(trained) > 1 else trained.pop()}"
        axes.text(across, _HEAD / 2, head, ha="center", **_LETTERS)
        for row, claim_id in enumerate(QUESTIONS):
            asked = of_size[of_size["claim_id"] == claim_id].to_dict("records")
            worst = max(asked, key=lambda cell: SEVERITY.index(cell["verdict"]), default={})
            _draw_answer(axes, across, _HEAD + _ROW_HEIGHT * (row + 0.5), worst)
    for row, question in enumerate(QUESTIONS.values()):
        axes.axhline(_HEAD + _ROW_HEIGHT * row, color="0.85", linewidth=0.7)
        axes.text(0.08, _HEAD + _ROW_HEIGHT * (row + 0.5), question, **_LETTERS)
    top = height - _KEY
    axes.axhline(top, color="0.5", linewidth=0.7)
    known: dict[str, Any] = {"verdict": "confirmed", "p_again": 1.0, "held_out": None}
    keys: dict[str, dict[str, Any]] = {
        "firm": known,
        "a repeat may differ": known | {"p_again": 0.0},
        "undecided": known | {"verdict": "inconclusive"},
        "holds on held-out seeds": known | {"held_out": "confirmed"},
        "no runs in the paper's setting": {},
    }
    for place, (meaning, cell) in enumerate(keys.items()):
        across, down = (0.43, 2.6)[place % 2], top + 0.24 + 0.36 * (place // 2)
        _draw_answer(axes, across, down, cell)
        axes.text(across + 0.42, down, meaning, **_LETTERS)
    return figure


def _draw_answer(axes: Axes, across: float, down: float, cell: Mapping[Any, Any]) -> None:
    """Draw the answer of a cell of the matrix: pale if it is borderline, in a ring if it came out again."""
    answer = ANSWERS.get(cell.get("verdict", "not tested"))
    if answer is None:
        axes.text(across, down, "\N{EN DASH}", ha="center", **_LETTERS | {"color": "0.6"})
        return
    word, colour = _WORDS[answer]
    solid = cell["verdict"] in DECIDED and not borderline(cell)
    rings = [0.0, 0.05] if holds_again(cell) else [0.0]
    for size in rings if answer != "undecided" else ():
        box = (across - 0.3 - size, down - 0.12 - size), 0.6 + 2 * size, 0.24 + 2 * size
        look: dict[str, Any] = {"boxstyle": f"round,pad=0,rounding_size={0.1 + size}", "linewidth": 1.2}
        look |= {"facecolor": colour if solid and not size else "none", "edgecolor": colour}
        axes.add_patch(FancyBboxPatch(*box, transform=axes.transData, **look))
    shade = {"color": "white" if solid else colour, "va": "center_baseline"}
    axes.text(across, down, word, ha="center", weight="bold", **_LETTERS | shade)


def borderline(cell: Mapping[Any, Any]) -> bool:
    """Return whether a repeat would reach the verdict of a cell with a probability that is known to be too small."""
    return not formats.missing(cell["p_again"]) and bool(cell["p_again"] < BORDERLINE)
