"""Figure 3 of the paper: LoRA against full fine-tuning at several batch sizes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, NullLocator

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Comparison
from lorabench.analysis.curves import envelopes
from lorabench.errors import NothingToDrawError
from lorabench.figures import style
from lorabench.figures.fitted import fitted_comparisons, fitted_rows, with_interval
from lorabench.store.tables import Tables

_COLUMNS = [
    *("model", "dataset", "batch_size", "steps", "arm", "method", "rank", "placement"),
    *("element", "step", "examples", "lr", "nll", "gap", "low", "high"),
    *("n_seeds", "at_edge", "run_id", "seed"),
]

# The number of learning curves' panels in a row; heights in inches of these panels, and of the panels below them.
_CURVES_IN_A_ROW, _CURVES_HEIGHT = 4, 2.3
_BY_SIZE_HEIGHT = 2.6


@style.applied()
def draw(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw the figure; return it, and what it plots as one tidy table.

    The column `element` says what a row is: `envelope` (validation NLL of an arm at one step), `final` (an arm's fitted
    minimum of the test NLL), `gap` (that of LoRA minus that of FullFT, paired by seed, in the column `gap`) or
    `diverged` (one run). `low` and `high` are the 95% interval of a final loss or gap. Losses are in nats per scored
    token.
    """
    plotted = _plotted(tables)
    styles = {
        label: replace(look, linestyle="--") if label != "FullFT" else look
        for label, look in style.arm_styles(plotted).items()
    }
    blocks = list(plotted.groupby(["model", "dataset"], sort=True))
    rows = [math.ceil(block.groupby(style.PANEL, dropna=False).ngroups / _CURVES_IN_A_ROW) for _, block in blocks]
    heights = [_CURVES_HEIGHT * count + _BY_SIZE_HEIGHT for count in rows]
    figure = style.new_figure(sum(heights))
    places = figure.subfigures(len(blocks), 1, squeeze=False, height_ratios=heights)[:, 0]
    for place, ((model, dataset), block), count in zip(places, blocks, rows, strict=True):
        place.suptitle(f"{model} · {dataset}", x=0.01, ha="left", fontsize=9, weight="bold", parse_math=False)
        _draw_block(place, block, styles, count)
    edge = style.mark("best LR at the edge of its grid", "o", markerfacecolor="white", markeredgewidth=1.4)
    style.legends(figure, styles, [edge] if plotted["at_edge"].eq(True).any() else [])
    return figure, plotted


def _plotted(tables: Tables) -> pd.DataFrame:
    envelope = envelopes(tables.runs, tables.curves).rename(columns={"value": "nll"})
    compared = fitted_comparisons(tables)
    elements = {
        "envelope": envelope[envelope["step"] > 0],
        "final": fitted_rows(compared).rename(columns={"nll_low": "low", "nll_high": "high"}),
        "gap": pd.DataFrame([row for comparison in compared for row in _gaps(comparison)]),
        "diverged": tables.runs[tables.runs["status"] == "diverged"],
    }
    parts = []
    for element, part in elements.items():
        labels = [arm_label(row) for _, row in part.iterrows()]
        parts.append(part.assign(arm=labels, element=element).reindex(columns=_COLUMNS))
    parts = [part for part in parts if len(part)]
    if not parts:
        raise NothingToDrawError("no validation curves beyond step 0, and no sweep of learning rates")
    return pd.concat(parts, ignore_index=True)


def _gaps(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the fitted minimum of each LoRA arm minus that of FullFT."""
    fit, rows = comparison.fit, []
    for arm in comparison.arms:
        estimate = fit.gap(arm_label(arm), "FullFT")
        if arm["method"] == "lora" and not math.isnan(estimate.value):
            edge = any(fit.grids[label].edge is not None for label in (arm_label(arm), "FullFT"))
            own = {"n_seeds": estimate.n_seeds, "at_edge": edge}
            rows.append(arm | with_interval("gap", estimate, "low", "high") | own)
    return rows


def _draw_block(place: SubFigure, block: pd.DataFrame, styles: dict[str, style.ArmStyle], rows: int) -> None:
    heights = [_CURVES_HEIGHT * rows, _BY_SIZE_HEIGHT]
    above, below = place.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    sizes = [of_size for _, of_size in block.groupby(["batch_size", "steps"], dropna=False)]
    columns = min(_CURVES_IN_A_ROW, len(sizes))
    axes = above.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for number, panel in enumerate(axes.flat):
        if number >= len(sizes):
            panel.remove()
            continue
        of_size = sizes[number]
        _draw_curves(panel, of_size, styles)
        panel.set_title(f"batch {of_size['batch_size'].iloc[0]}", pad=18)
        panel.set(xlabel="examples seen", ylabel="validation NLL\n(nats / token)" if number % columns == 0 else "")
    _limit_curves(axes[0, 0], block[block["element"] == "envelope"])
    final, difference = below.subplots(1, 2)
    # Of runs of several lengths at one batch size, only the longest are compared.
    steps = block["steps"].astype("Int64")
    longest = block[steps.isna() | steps.eq(steps.groupby(block["batch_size"]).transform("max")).fillna(False)]
    _draw_by_size(final, longest[longest["element"] == "final"], "nll", styles)
    final.set_ylabel("final test NLL (nats / token)")
    _draw_by_size(difference, longest[longest["element"] == "gap"], "gap", styles)
    difference.axhline(0.0, color=style.FULLFT_COLOUR, linewidth=1.0, zorder=1)
    difference.set_ylabel("LoRA - FullFT (nats / token)")


def _draw_curves(axes: Axes, rows: pd.DataFrame, styles: dict[str, style.ArmStyle]) -> None:
    for arm, points in rows[rows["element"] == "envelope"].groupby("arm"):
        axes.plot(points["examples"].astype(float), points["nll"], **styles[str(arm)].line)
    steps = rows["steps"].dropna().unique()
    facts = [f"{length:,} steps" for length in steps] + [f"{(rows['element'] == 'diverged').sum()} diverged"]
    style.note(axes, " · ".join(facts))


def _limit_curves(axes: Axes, envelope: pd.DataFrame) -> None:
    """Limit the y-axis to the losses after the first tenth of the data, since the fall before it would flatten them."""
    late = envelope.loc[envelope["examples"] >= 0.1 * envelope["examples"].max(), "nll"]
    if len(late):
        pad = 0.05 * (late.max() - late.min()) or 0.05 * abs(late.max())
        axes.set_ylim(late.min() - pad, late.max() + pad)


def _draw_by_size(axes: Axes, rows: pd.DataFrame, value: str, styles: dict[str, style.ArmStyle]) -> None:
    """Draw one line per arm, with the marks of one batch size side by side."""
    arms = [label for label in styles if label in set(rows["arm"])]
    for place, arm in enumerate(arms):
        points, look = rows[rows["arm"] == arm].sort_values("batch_size"), styles[arm]
        x = points["batch_size"].astype(float) * 2 ** (0.12 * (place - (len(arms) - 1) / 2))
        axes.plot(x, points[value], **look.line)
        half = np.maximum(np.array([points[value] - points["low"], points["high"] - points[value]], float), 0.0)
        axes.errorbar(x, points[value], half, fmt="none", ecolor=look.colour, capsize=2.5, zorder=4)
        for edge, marks in points.assign(x=x).groupby(points["at_edge"].astype(bool)):
            face: dict[str, Any] = {"mfc": "white" if edge else look.colour, "mec": look.colour, "mew": 1.2}
            axes.plot(marks["x"], marks[value], look.marker, ms=4.5, zorder=5, **face)
    axes.set(xscale="log", xlabel="batch size")
    sizes = sorted({int(size) for size in rows["batch_size"]})
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    style.plain_log_ticks(axes)
    if sizes:
        axes.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
