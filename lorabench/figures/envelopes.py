"""Envelopes of learning curves, the lowest loss at every step: figures 1 and 3 of the paper, and over FLOPs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator

from lorabench.analysis.arms import arm_label, rows_of
from lorabench.analysis.comparison import Comparison
from lorabench.analysis.curves import envelopes
from lorabench.analysis.optima import fitted_noise
from lorabench.analysis.step_flops import loss_by_flops
from lorabench.errors import NothingToDrawError
from lorabench.figures import style
from lorabench.figures.fits import compared, departure_rows, fitted_minima, with_interval
from lorabench.figures.grid import (
    ARM_COLUMNS,
    PANEL,
    Styles,
    band,
    bars,
    diverged_facts,
    diverged_runs,
    lines,
    occurring,
    only,
    panels,
    points,
    sigma_text,
    tidy,
)
from lorabench.store.tables import Tables

_BY_STEP = [
    *(*ARM_COLUMNS, "element", "step", "examples", "tokens"),
    *("nll", "nll_low", "nll_high", "lr", "run_id", "n_runs"),
]
_BY_FLOPS = [*ARM_COLUMNS, "element", "flops", "step", "tokens", "nll", "lr", "run_id"]


def draw_by_step(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw figure 1; return it, and what it plots as one tidy table.

    The column `element` says what a row is: `envelope` (one step of an arm), `departure` (the step at which a rank
    leaves the highest rank's curve), `noise_band` (from `nll_low` to `nll_high`), `before_training` (the base model) or
    `diverged` (one run). Losses are validation NLL in nats per scored token.
    """
    comparisons = compared(tables)
    envelope = envelopes(tables.runs, tables.curves)
    # A log axis has no step 0, so the base model's loss is written above the panel instead.
    envelope = envelope[envelope["step"] > 0].rename(columns={"value": "nll"})
    lowest = envelope.groupby([*PANEL, "step"], as_index=False, dropna=False)["nll"].min()
    lowest = lowest.merge(fitted_noise(comparisons)[[*PANEL, "sigma"]], how="left", on=PANEL)
    around = lowest.assign(nll_low=lowest["nll"] - 2 * lowest["sigma"], nll_high=lowest["nll"] + 2 * lowest["sigma"])
    parts = {
        "envelope": envelope,
        "departure": departure_rows(comparisons, envelope, ["nll"]),
        "diverged": diverged_runs(tables.runs),
        "noise_band": around.dropna(subset=["nll_low"]),
        "before_training": _before_training(tables.runs, tables.curves),
    }
    plotted = tidy(parts, _BY_STEP)
    if plotted.empty:
        raise NothingToDrawError("no validation curves beyond step 0")
    figure, drawn = panels(plotted)
    styles = style.arm_styles(plotted)
    for rows, (axes,) in drawn:
        noise, base, curves = only(rows, "noise_band"), only(rows, "before_training"), only(rows, "envelope")
        band(axes, noise, "step", "nll_low", "nll_high")
        lines(axes, curves, "step", "nll", styles)
        points(axes, only(rows, "departure")[["arm", "step", "nll"]], "step", "nll", styles, False, "o", 6)
        axes.set(xscale="log", xlabel="training step", ylabel="validation NLL (nats / token)")
        style.plain_log_ticks(axes)
        facts = [f"before training {loss:.2f}" for loss in base["nll"]]
        sigma = (noise["nll_high"] - noise["nll_low"]).iloc[0] / 4 if len(noise) else math.nan
        style.note(axes, " · ".join([*facts, sigma_text(sigma), *diverged_facts(rows, curves, "no curve")]))
    departure = style.mark("a rank leaves the highest rank's curve", "o", markerfacecolor="white", markeredgewidth=1.4)
    shade = Patch(label=f"lowest envelope ± 2{style.SIGMA} of seeds", facecolor="0.85")
    elements = set(plotted["element"])
    marks = occurring([("departure" in elements, departure), ("noise_band" in elements, shade)])
    style.legends(figure, styles, marks)
    return figure, plotted


def _before_training(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    start = curves[(curves["step"] == 0) & (curves["split"] == "validation") & (curves["metric"] == "nll")]
    joined = start.merge(runs[["run_id", *PANEL]], on="run_id")
    return joined.groupby(PANEL, as_index=False, dropna=False).agg(nll=("value", "median")).assign(step=0)


def draw_by_flops(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw envelopes over training FLOPs, of which the paper predicts what they show; return what they plot, too.

    The column `element` says what a row is: `envelope` (one step of an arm) or `diverged` (one run). Losses are
    validation NLL in nats per scored token.

    Raises:
        NothingToDrawError: runs lack train_flops or train_tokens, or none with both has a validation curve.
    """
    if missing := [name for name in ("train_flops", "train_tokens") if name not in tables.runs]:
        raise NothingToDrawError(f"the runs table has no column {', '.join(missing)}")
    envelope = loss_by_flops(tables.runs, tables.curves).rename(columns={"value": "nll"})
    plotted = tidy({"envelope": envelope, "diverged": diverged_runs(tables.runs)}, _BY_FLOPS)
    if plotted.empty:
        raise NothingToDrawError("no validation curves of runs whose training FLOPs are known")
    noise = fitted_noise(compared(tables))
    figure, drawn = panels(plotted)
    styles = style.arm_styles(plotted)
    for rows, (axes,) in drawn:
        curves = only(rows, "envelope")
        lines(axes, curves, "flops", "nll", styles)
        axes.set(xscale="log", xlabel="training FLOPs (linear layers)", ylabel="validation NLL (nats / token)")
        sigma = float(rows_of(noise, rows.iloc[0], PANEL)["sigma"].iloc[0])
        style.note(axes, " · ".join([sigma_text(sigma), *diverged_facts(rows, curves, "no curve")]))
    style.legends(figure, styles, [])
    return figure, plotted


_BY_BATCH_SIZE = [
    *(*ARM_COLUMNS, "element", "step", "examples", "lr", "nll", "gap", "low", "high"),
    *("n_seeds", "at_edge", "run_id", "seed"),
]

# The number of learning curves' panels in a row; heights in inches of these panels, and of the panels below them.
_CURVES_IN_A_ROW, _CURVES_HEIGHT = 4, 2.3
_BY_SIZE_HEIGHT = 2.6


def draw_by_batch_size(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw figure 3; return it, and what it plots as one tidy table.

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
    plotted = tidy(parts, _BY_BATCH_SIZE)
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
