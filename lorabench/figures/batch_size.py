"""Figure 3 of the paper: LoRA against full fine-tuning at several batch sizes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, NullLocator

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Comparison
from lorabench.analysis.curves import envelopes
from lorabench.errors import NothingToDrawError
from lorabench.figures import style
from lorabench.figures.fits import compared, fitted_minima, with_interval
from lorabench.figures.grid import ARM_COLUMNS, PANEL, Styles, bars, diverged_runs, lines, only, tidy
from lorabench.store.tables import Tables

_COLUMNS = [
    *(*ARM_COLUMNS, "element", "step", "examples", "lr", "nll", "gap", "low", "high"),
    *("n_seeds", "at_edge", "run_id", "seed"),
]

# The number of learning curves' panels in a row; heights in inches of these panels, and of the panels below them.
_CURVES_IN_A_ROW, _CURVES_HEIGHT = 4, 2.3
_BY_SIZE_HEIGHT = 2.6


def draw(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw the figure; return it, and what it plots as one tidy table.

    The column `element` says what a row is: `envelope` (validation NLL of an arm at one step), `final` (an arm's fitted
    minimum of the test NLL), `gap` (that of LoRA minus that of FullFT, paired by seed, in the column `gap`) or
    `diverged` (one run). `low` and `high` are the 95% interval of a final loss or gap. Losses are in nats per scored
    token.
    """
    envelope = envelopes(tables.runs, tables.curves).rename(columns={"value": "nll"})
    comparisons = compared(tables)
    parts = {
        "envelope": envelope[envelope["step"] > 0],
        "final": fitted_minima(comparisons).rename(columns={"nll_low": "low", "nll_high": "high"}),
        "gap": pd.DataFrame([row for comparison in comparisons for row in _gaps(comparison)]),
        "diverged": diverged_runs(tables.runs),
    }
    plotted = tidy(parts, _COLUMNS)
    if plotted.empty:
        raise NothingToDrawError("no validation curves beyond step 0, and no sweep of learning rates")
    styles = {
        label: replace(look, linestyle="--") if label != "FullFT" else look
        for label, look in style.arm_styles(plotted).items()
    }
    blocks = list(plotted.groupby(["model", "dataset"], sort=True))
    rows = [math.ceil(block.groupby(PANEL, dropna=False).ngroups / _CURVES_IN_A_ROW) for _, block in blocks]
    heights = [_CURVES_HEIGHT * count + _BY_SIZE_HEIGHT for count in rows]
    figure = style.new_figure(sum(heights))
    places = figure.subfigures(len(blocks), 1, squeeze=False, height_ratios=heights)[:, 0]
    for place, ((model, dataset), block), count in zip(places, blocks, rows, strict=True):
        place.suptitle(f"{model} · {dataset}", x=0.01, ha="left", fontsize=9, weight="bold", parse_math=False)
        _draw_block(place, block, styles, count)
    edge = style.mark("best LR at the edge of its grid", "o", markerfacecolor="white", markeredgewidth=1.4)
    style.legends(figure, styles, [edge] if plotted["at_edge"].eq(True).any() else [])
    return figure, plotted


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


def _draw_block(place: SubFigure, block: pd.DataFrame, styles: Styles, rows: int) -> None:
    """Draw the panels of one model and dataset: curves by batch size, then losses and gaps over batch sizes."""
    heights = [_CURVES_HEIGHT * rows, _BY_SIZE_HEIGHT]
    above, below = place.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    sizes = [at_size for _, at_size in block.groupby(["batch_size", "steps"], dropna=False)]
    columns = min(_CURVES_IN_A_ROW, len(sizes))
    axes = above.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for number, panel in enumerate(axes.flat):
        if number >= len(sizes):
            panel.remove()
            continue
        at_size = sizes[number]
        lines(panel, only(at_size, "envelope"), "examples", "nll", styles)
        lengths = [f"{length:,} steps" for length in at_size["steps"].dropna().unique()]
        style.note(panel, " · ".join([*lengths, f"{len(only(at_size, 'diverged'))} diverged"]))
        panel.set_title(f"batch {at_size['batch_size'].iloc[0]}", pad=18)
        panel.set(xlabel="examples seen", ylabel="validation NLL\n(nats / token)" if number % columns == 0 else "")
    envelope = only(block, "envelope")
    # The fall of the losses in the first tenth of the data would flatten the rest.
    late = envelope.loc[envelope["examples"] >= 0.1 * envelope["examples"].max(), "nll"]
    if len(late):
        pad = 0.05 * (late.max() - late.min()) or 0.05 * abs(late.max())
        axes[0, 0].set_ylim(late.min() - pad, late.max() + pad)
    final, difference = below.subplots(1, 2)
    # Of runs of several lengths at one batch size, only the longest are compared.
    steps = block["steps"].astype("Int64")
    longest = block[steps.isna() | steps.eq(steps.groupby(block["batch_size"]).transform("max")).fillna(False)]
    _draw_by_size(final, only(longest, "final"), "nll", styles)
    final.set_ylabel("final test NLL (nats / token)")
    _draw_by_size(difference, only(longest, "gap"), "gap", styles)
    difference.axhline(0.0, color=style.FULLFT_COLOUR, linewidth=1.0, zorder=1)
    difference.set_ylabel("LoRA - FullFT (nats / token)")


def _draw_by_size(axes: Axes, rows: pd.DataFrame, value: str, styles: Styles) -> None:
    """Draw one line per arm, with the marks of one batch size side by side."""
    arms = [label for label in styles if label in set(rows["arm"])]
    for place, arm in enumerate(arms):
        shift = 2 ** (0.12 * (place - (len(arms) - 1) / 2))
        points = rows[rows["arm"] == arm].sort_values("batch_size")
        points = points.assign(x=points["batch_size"].astype(float) * shift)
        axes.plot(points["x"], points[value], **styles[arm].line)
        ends = {"low": f"{value}_low", "high": f"{value}_high"}
        bars(axes, points.rename(columns=ends), "x", value, styles[arm])
    axes.set(xscale="log", xlabel="batch size")
    sizes = sorted({int(size) for size in rows["batch_size"]})
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    style.plain_log_ticks(axes)
    if sizes:
        axes.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
