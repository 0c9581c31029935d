"""Variants of LoRA beside LoRA and full fine-tuning: the result by learning rate, and how far each is from LoRA where
both have their best learning rate.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import SubFigure
from matplotlib.ticker import MaxNLocator

from lorabench.analysis.arms import arm_label, each_arm
from lorabench.analysis.comparison import Arm, Comparison
from lorabench.config.fields import FROM_WEIGHTS, VARIANT_NAMES
from lorabench.figures import grid, style
from lorabench.figures.by_lr import STRIP, draw_lr_panel, lr_marks, result_rows
from lorabench.figures.grid import PANEL, Styles, only, seeds_text
from lorabench.figures.style import ArmStyle
from lorabench.store.checks import is_rl
from lorabench.store.tables import Tables
from studies.lr_ratio.predictions import DEFAULT
from studies.variants.switches import Switch, switches, variant_of

_NAMES: dict[str, str] = {"fullft": "FullFT"} | {str(variant): name for variant, name in VARIANT_NAMES.items()}
# Readers with any colour vision can tell the colours apart, and lines and marks differ, too.
_LOOKS = {
    "fullft": (style.FULLFT_COLOUR, "-", "s"),
    "lora": ("#0072B2", "-", "o"),
    "rslora": ("#E69F00", "-", "<"),
    "lora_plus": ("#D55E00", "--", "P"),
    "dora": ("#009E73", "-", "^"),
    "pissa": ("#CC79A7", "-", "v"),
    "olora": ("#56B4E9", "--", "p"),
    "qlora": ("#661100", ":", "X"),
}
_GAPS = [
    *("variant", "gap", "gap_low", "gap_high", "margin", "comparable"),
    *("lr_ratio", "lr_ratio_low", "lr_ratio_high", "lr_ratio_predicted", "resolved", "n_seeds"),
]
_TYPES = {"rank": "Int64", "n_seeds": "Int64", "comparable": "boolean", "resolved": "boolean"}
_PREDICTED: dict[str, Any] = {"marker": "|", "ls": "none", "color": "black", "ms": 13, "mew": 1.5, "zorder": 2.5}
# The heights in inches of a row of panels by LR, and of the panels of gaps: without their rows, and each row.
_BY_LR, _GAP_PANELS, _GAP = 2.9, 1.0, 0.21
_SPACE = 0.6  # the space between two variants, in rows


def draw(tables: Tables) -> style.Drawn:
    """Draw the variants; return it, and what it plots as one tidy table.

    The columns and elements are those of `result_rows`, and `variant`, which is `fullft` for full fine-tuning. Further
    rows are `gap`, one for each variant beside LoRA of the same rank and placement, and one for full fine-tuning beside
    each LoRA, whose rank and placement it has. `gap` is the fitted minimum of the test loss (nats per scored token; in
    RL that of the error rate) minus LoRA's, with its 95% interval, `margin` the smallest difference that matters, and
    `comparable` whether nothing speaks against a verdict on the gap. `lr_ratio` is the optimal LR (of A) over LoRA's,
    with its 95% interval, `lr_ratio_predicted` what the claims X2, X4 and X5 predict of it, `resolved` whether nothing
    speaks against a verdict on this ratio, and `n_seeds` the number of seeds that both have.
    """
    parts = [rows for arm, rows in each_arm(tables.runs) if _variant(arm)]
    if not parts:
        return style.empty_figure("There are no runs of LoRA or a variant."), pd.DataFrame(columns=["element", *_GAPS])
    tables = replace(tables, runs=pd.concat(parts))
    comparisons = grid.compared(tables)
    variants = {arm_label(arm): str(_variant(arm)) for comparison in comparisons for arm in comparison.arms}
    results = result_rows(tables, comparisons)
    results = results.assign(variant=results["arm"].map(variants))
    columns = [*results, *(name for name in _GAPS if name not in results)]
    gaps = pd.DataFrame([row for comparison in comparisons for row in _gap_rows(comparison)])
    plotted = grid.tidy({"gap": gaps}, columns, results).astype(_TYPES)
    labels = sorted(variants, key=lambda label: list(_NAMES).index(variants[label]))
    styles = {label: _look(variants[label]) for label in labels}
    blocks, heights = grid.titled(plotted), []
    for _, block in blocks:
        known = _known_gaps(block)
        height = _GAP_PANELS + _GAP * (len(known) + _SPACE * known["variant"].nunique()) if len(known) else 0.0
        heights.append([_BY_LR * math.ceil(len(_by_layers(block)) / 2), height])
    figure = style.new_figure(sum(map(sum, heights)))
    places = figure.subfigures(len(blocks), 1, squeeze=False, height_ratios=list(map(sum, heights)))[:, 0]
    for place, (title, block), (upper, lower) in zip(places, blocks, heights, strict=True):
        place.suptitle(title, x=0.01, ha="left", fontsize=9, weight="bold", parse_math=False)
        above, below = place.subfigures(2, 1, height_ratios=[upper, lower]) if lower else (place, None)
        _draw_by_lr(above, _by_layers(block), styles)
        if below is not None:
            _draw_gaps(below, _known_gaps(block), "error rate" if is_rl(tables.runs).any() else "test NLL")
    known = _known_gaps(plotted)
    marks = [
        *lr_marks(plotted),
        (known["margin"].notna().any(), style.shade("within the margin of LoRA")),
        (known["lr_ratio_predicted"].notna().any(), style.line("predicted ratio", **_PREDICTED)),
        (not known[["comparable", "resolved"]].all(axis=None), style.mark("no verdict", "o", mfc="white", mew=1.2)),
    ]
    shown = {name: _look(name) for name in _NAMES if name in variants.values()}
    return style.legends(figure, shown, plotted, marks)


def _variant(arm: Arm) -> str | None:
    return "fullft" if arm["method"] == "fullft" else variant_of(arm)


def _look(variant: str) -> ArmStyle:
    colour, line, marker = _LOOKS[variant]
    width, zorder = {"fullft": (2.8, 2.0), "lora": (2.4, 3.5)}.get(variant, (1.2, 3.0))
    return ArmStyle(_NAMES[variant], colour, line, width, marker, zorder)


def _gap_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the rows `gap` of a comparison, in the order of variants, placements and ranks."""
    others = [variant for variant in VARIANT_NAMES if variant != "lora"]
    pairs: list[tuple[str, Arm, Arm, float]]
    pairs = [(switch.variant, switch.arm, switch.lora, _predicted(switch)) for switch in switches(comparison, *others)]
    if (fullft := comparison.fullft) is not None:
        pairs += [("fullft", fullft, arm, math.nan) for arm in comparison.arms if variant_of(arm) == "lora"]
    rows = []
    for variant, arm, lora, predicted in pairs:
        gap, ratio = comparison.gap(arm, lora), comparison.fit.log_ratio(arm_label(arm), arm_label(lora))
        rows.append(
            {name: arm[name] for name in (*PANEL, "method")}
            | {"arm": arm_label(arm), "variant": variant, "rank": lora["rank"], "placement": lora["placement"] or "all"}
            | grid.with_interval("gap", gap)
            | {"margin": comparison.margin.value, "comparable": not comparison.problems([arm, lora])}
            | {f"lr_{name}": value for name, value in grid.lr_ratio(ratio).items()}
            | {"lr_ratio_predicted": predicted}
            | {"resolved": not comparison.problems([arm, lora], resolved=True), "n_seeds": gap.n_seeds}
        )
    return sorted(rows, key=lambda row: (list(_NAMES).index(row["variant"]), row["placement"], row["rank"]))


def _predicted(switch: Switch) -> float:
    """Return the ratio of LRs that claim X2, X4 or X5 predicts, as by default; NaN if none does, or it is not known."""
    if switch.comparison.is_rl:
        return math.nan
    if switch.variant in ("rslora", "lora_plus") and (movement := DEFAULT.movement):
        return switch.ratio_by_movement(movement)
    return switch.ratio_by_first_update() if switch.variant in FROM_WEIGHTS else math.nan


def _known_gaps(rows: pd.DataFrame) -> pd.DataFrame:
    return only(rows, "gap").dropna(subset=["gap"])


def _by_layers(block: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return the rows of each panel by LR: full fine-tuning, and LoRA and its variants of one rank and placement."""
    rows = block[block["element"] != "gap"]
    shared, adapters = rows[rows["rank"].isna()], rows[rows["rank"].notna()]
    panels = []
    for (placement, _), own in adapters.groupby([adapters["placement"].fillna("all"), "rank"]):
        title = f"rank {int(own['rank'].iloc[0])}" + ("" if placement == "all" else f", {placement}")
        panels.append((title, pd.concat([shared, own])))
    return panels or [("FullFT", shared)]


def _draw_by_lr(place: SubFigure, panels: list[tuple[str, pd.DataFrame]], styles: Styles) -> None:
    """Draw the panels by LR, two side by side, with the same range of LRs and results."""
    axes = place.subplots(math.ceil(len(panels) / 2), min(2, len(panels)), squeeze=False)
    for panel, (title, rows) in zip(axes.flat, panels, strict=False):
        draw_lr_panel(panel, rows, styles)
        panel.set_title(title, pad=STRIP + 18)
    drawn = list(axes.flat[: len(panels)])
    for panel in axes.flat[len(panels) :]:
        panel.remove()
    for name in ("xlim", "ylim"):
        ends = [end for panel in drawn for end in getattr(panel, f"get_{name}")()]
        for panel in drawn:
            panel.set(**{name: (min(ends), max(ends))})


def _draw_gaps(place: SubFigure, rows: pd.DataFrame, loss: str) -> None:
    """Draw a row for each variant and rank: its gap to LoRA in the left panel, the ratio of LRs in the right one."""
    left, right = place.subplots(1, 2, sharey=True)
    places = (rows["variant"] != rows["variant"].shift()).cumsum() * _SPACE + np.arange(len(rows))
    margin = float(rows["margin"].iloc[0])
    if not math.isnan(margin):
        left.axvspan(-margin, margin, color="0.88", linewidth=0, zorder=0)
    for axes, value, same, filled in ((left, "gap", 0, "comparable"), (right, "lr_ratio", 1, "resolved")):
        axes.axvline(same, color=_look("lora").colour, linewidth=1.2, zorder=1)
        for height, row in zip(places, rows.to_dict("records"), strict=True):
            look = _look(row["variant"])
            axes.hlines(height, row[f"{value}_low"], row[f"{value}_high"], color=look.colour, linewidth=1.4, zorder=2)
            face = look.colour if row[filled] else "white"
            axes.plot(row[value], height, look.marker, ms=5, mfc=face, mec=look.colour, mew=1.1, zorder=3)
        axes.grid(visible=False, axis="y")
    right.plot(rows["lr_ratio_predicted"], places, **_PREDICTED)
    style.log_axes(right, "optimal learning rate / LoRA's")
    style.log_ticks(right.xaxis)
    right.tick_params(axis="y", length=0, labelleft=False)
    right.set_title("ratio of learning rates to LoRA", pad=18)
    placement = rows["placement"].where(rows["placement"] != "all", "")
    layers = [f"r{int(rank)} {layers}".strip() for rank, layers in zip(rows["rank"], placement, strict=True)]
    labels = [f"{_NAMES[name]}, {where}" for name, where in zip(rows["variant"], layers, strict=True)]
    left.set_yticks(places, labels)
    left.set(ylim=(places.iloc[-1] + 0.7, places.iloc[0] - 0.7), xlabel=f"lowest {loss} minus LoRA's")
    left.xaxis.set_major_locator(MaxNLocator(5))
    left.set_title("gap to LoRA of the same rank", pad=18)
    style.note(left, seeds_text(rows["n_seeds"]), "" if math.isnan(margin) else f"margin {margin:.2g}")
