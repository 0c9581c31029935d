"""Learning curves: figures 1 and 3 of the paper, its figure of early curves, and losses over FLOPs.

Figures 1 and 3 show envelopes, the lowest validation loss of an arm at every step; early curves are training losses.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import FixedLocator, NullLocator

from lorabench.analysis.alpha_rules import judged_arms
from lorabench.analysis.arms import arm_label, arm_labels
from lorabench.analysis.curves import early_difference, train_curves
from lorabench.analysis.estimate import mean_interval
from lorabench.errors import NothingToDrawError
from lorabench.figures import grid, style
from lorabench.figures.grid import (
    ARM_COLUMNS,
    PANEL,
    Styles,
    compared,
    diverged_runs,
    envelopes,
    fitted_noise,
    only,
    rows_of,
)
from lorabench.store.tables import Tables

_LOSS = "validation NLL (nats / token)"

_BY_STEP = [*ARM_COLUMNS, "element", "step", "examples", "tokens"]
_BY_STEP += ["nll", "nll_low", "nll_high", "lr", "run_id", "n_runs"]


def draw_by_step(tables: Tables) -> style.Drawn:
    """Draw figure 1; return it, and what it plots as one tidy table.

    The column `element` says what a row is: `envelope` (one step of an arm), `departure` (the step at which a rank
    leaves the highest rank's curve), `noise_band` (from `nll_low` to `nll_high`), `before_training` (the base model) or
    `diverged` (one run). Losses are validation NLL in nats per scored token.
    """
    runs, curves = tables.runs, tables.curves
    comparisons = compared(tables)
    envelope = envelopes(runs, curves)
    # A log axis has no step 0, so the base model's loss is written above the panel instead.
    envelope = envelope[envelope["step"] > 0].rename(columns={"value": "nll"})
    lowest = envelope.groupby([*PANEL, "step"], as_index=False, dropna=False)["nll"].min()
    lowest = lowest.merge(fitted_noise(comparisons)[[*PANEL, "sigma"]], how="left", on=PANEL)
    around = lowest.assign(nll_low=lowest["nll"] - 2 * lowest["sigma"], nll_high=lowest["nll"] + 2 * lowest["sigma"])
    start = curves[(curves["step"] == 0) & (curves["split"] == "validation") & (curves["metric"] == "nll")]
    base = start.merge(runs[["run_id", *PANEL]], on="run_id").groupby(PANEL, as_index=False, dropna=False)
    parts = {
        "envelope": envelope,
        "departure": grid.departure_rows(comparisons, envelope, ["nll"]),
        "diverged": diverged_runs(runs),
        "noise_band": around.dropna(subset=["nll_low"]),
        "before_training": base.agg(nll=("value", "median")).assign(step=0),
    }
    plotted = grid.tidy(parts, _BY_STEP)
    if plotted.empty:
        raise NothingToDrawError("no validation curves beyond step 0")
    figure, styles, panels = grid.panels(plotted)
    for rows, [axes] in panels:
        noise, arms = only(rows, "noise_band"), only(rows, "envelope")
        grid.band(axes, noise, "step", "nll_low", "nll_high")
        grid.lines(axes, arms, "step", "nll", styles)
        departure = only(rows, "departure")[["arm", "step", "nll"]].assign(marker="o", filled=False)
        grid.points(axes, departure, "step", "nll", styles, 6)
        style.log_axes(axes, "training step", _LOSS)
        before = [f"before training {loss:.2f}" for loss in only(rows, "before_training")["nll"]]
        sigma = (noise["nll_high"] - noise["nll_low"]).iloc[0] / 4 if len(noise) else math.nan
        style.note(axes, *before, grid.sigma_text(sigma), *grid.diverged_facts(rows, arms, "no curve"))
    marks = {
        "departure": style.mark("a rank leaves the highest rank's curve", "o", mfc="white", mew=1.4),
        "noise_band": style.shade(f"lowest envelope ± 2{style.SIGMA} of seeds"),
    }
    return style.legends(figure, styles, plotted, marks.items())


_BY_FLOPS = [*ARM_COLUMNS, "element", "flops", "step", "tokens", "nll", "lr", "run_id"]


def draw_by_flops(tables: Tables) -> style.Drawn:
    """Draw envelopes over training FLOPs, on which the paper has a prediction; return the figure, and what it plots.

    The column `element` says what a row is: `envelope` (one step of an arm) or `diverged` (one run). Losses are
    validation NLL in nats per scored token.
    """
    envelope = loss_by_flops(tables.runs, tables.curves).rename(columns={"value": "nll"})
    plotted = grid.tidy({"envelope": envelope, "diverged": diverged_runs(tables.runs)}, _BY_FLOPS)
    if plotted.empty:
        raise NothingToDrawError("no validation curves of runs whose training FLOPs are known")
    noise = fitted_noise(compared(tables))
    figure, styles, panels = grid.panels(plotted)
    for rows, [axes] in panels:
        curves = only(rows, "envelope")
        grid.lines(axes, curves, "flops", "nll", styles)
        axes.set(xscale="log", xlabel="training FLOPs (linear layers)", ylabel=_LOSS)
        sigma = float(rows_of(noise, rows.iloc[0], PANEL)["sigma"].iloc[0])
        style.note(axes, grid.sigma_text(sigma), *grid.diverged_facts(rows, curves, "no curve"))
    return style.legends(figure, styles, plotted)


def loss_by_flops(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `envelopes` from step 1 on with flops, the training FLOPs of the run with the lowest loss
    there up to that step, where they are known; they are the same on every token."""
    points = envelopes(runs, curves)
    per_token = (runs["train_flops"].astype(float) / runs["train_tokens"].astype(float)).set_axis(runs["run_id"])
    points["flops"] = points["tokens"].astype(float) * points["run_id"].map(per_token).astype(float)
    return points[points["step"].gt(0).fillna(False) & points["flops"].gt(0)]


_BY_BATCH_SIZE = [*ARM_COLUMNS, "element", "step", "examples", "lr", "nll", "gap", "low", "high"]
_BY_BATCH_SIZE += ["n_seeds", "at_edge", "run_id", "seed"]

# The number of learning curves' panels in a row; heights in inches of these panels, and of the panels below them.
_CURVES_IN_A_ROW, _CURVES_HEIGHT, _BY_SIZE_HEIGHT = 4, 2.3, 2.6


def draw_by_batch_size(tables: Tables) -> style.Drawn:
    """Draw figure 3; return it, and what it plots as one tidy table.

    The column `element` says what a row is: `envelope` (validation NLL of an arm at one step), `final` (an arm's fitted
    minimum of the test NLL), `gap` (that of LoRA minus that of FullFT, paired by seed, in the column `gap`) or
    `diverged` (one run). `low` and `high` are the 95% interval of a final loss or gap. Losses are in nats per scored
    token.
    """
    envelope = envelopes(tables.runs, tables.curves).rename(columns={"value": "nll"})
    comparisons = compared(tables)
    gaps = []
    for comparison in comparisons:
        fit = comparison.fit
        for arm in comparison.arms:
            gap = fit.gap(arm_label(arm), "FullFT")
            if arm["method"] == "lora" and not math.isnan(gap.value):
                edge = any(fit.grids[label].edge is not None for label in (arm_label(arm), "FullFT"))
                gaps.append(arm | grid.with_interval("gap", gap) | {"n_seeds": gap.n_seeds, "at_edge": edge})
    parts = {
        "envelope": envelope[envelope["step"] > 0],
        "final": grid.optima(comparisons, fitted=True).rename(columns={"nll_low": "low", "nll_high": "high"}),
        "gap": pd.DataFrame(gaps).rename(columns={"gap_low": "low", "gap_high": "high"}),
        "diverged": diverged_runs(tables.runs),
    }
    plotted = grid.tidy(parts, _BY_BATCH_SIZE)
    if plotted.empty:
        raise NothingToDrawError("no validation curves beyond step 0, and no sweep of learning rates")
    styles = style.arm_styles(plotted)
    styles |= {label: replace(look, linestyle="--") for label, look in styles.items() if label != "FullFT"}
    blocks = list(plotted.groupby(["model", "dataset"], sort=True))
    rows = [math.ceil(block.groupby(PANEL, dropna=False).ngroups / _CURVES_IN_A_ROW) for _, block in blocks]
    heights = [_CURVES_HEIGHT * count + _BY_SIZE_HEIGHT for count in rows]
    figure = style.new_figure(sum(heights))
    places = figure.subfigures(len(blocks), 1, squeeze=False, height_ratios=heights)[:, 0]
    for place, ((model, dataset), block), count in zip(places, blocks, rows, strict=True):
        place.suptitle(f"{model} · {dataset}", x=0.01, ha="left", fontsize=9, weight="bold", parse_math=False)
        _draw_block(place, block, styles, count)
    open_mark = style.mark("best LR at the edge of its grid", "o", mfc="white", mew=1.4)
    return style.legends(figure, styles, plotted, [(plotted["at_edge"].eq(True).any(), open_mark)])


def _draw_block(place: SubFigure, block: pd.DataFrame, styles: Styles, rows: int) -> None:
    """Draw the panels of one model and dataset: curves by batch size, then losses and gaps over batch sizes."""
    heights = [_CURVES_HEIGHT * rows, _BY_SIZE_HEIGHT]
    above, below = place.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    sizes = [at_size for _, at_size in block.groupby(["batch_size", "steps"], dropna=False)]
    columns = min(_CURVES_IN_A_ROW, len(sizes))
    panels = above.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for number, (axes, at_size) in enumerate(zip(panels.flat, sizes, strict=False)):
        grid.lines(axes, only(at_size, "envelope"), "examples", "nll", styles)
        lengths = [f"{length:,} steps" for length in at_size["steps"].dropna().unique()]
        style.note(axes, *lengths, f"{len(only(at_size, 'diverged'))} diverged")
        axes.set_title(f"batch {at_size['batch_size'].iloc[0]}", pad=18)
        axes.set(xlabel="examples seen", ylabel="" if number % columns else "validation NLL\n(nats / token)")
    for axes in panels.flat[len(sizes) :]:
        axes.remove()
    envelope = only(block, "envelope")
    # The fall of the losses in the first tenth of the data would flatten the rest.
    late = envelope.loc[envelope["examples"] >= 0.1 * envelope["examples"].max(), "nll"]
    if len(late):
        pad = 0.05 * (late.max() - late.min()) or 0.05 * abs(late.max())
        panels[0, 0].set_ylim(late.min() - pad, late.max() + pad)
    losses, differences = below.subplots(1, 2)
    for axes, element, value, label in (
        (losses, "final", "nll", "final test NLL (nats / token)"),
        (differences, "gap", "gap", "LoRA - FullFT (nats / token)"),
    ):
        shown = only(block, element).rename(columns={"low": f"{value}_low", "high": f"{value}_high"})
        arms = [label for label in styles if label in set(shown["arm"])]
        for number, arm in enumerate(arms):
            # The marks of one batch size are side by side.
            shift = 2 ** (0.12 * (number - (len(arms) - 1) / 2))
            points = shown[shown["arm"] == arm].sort_values("batch_size")
            points = points.assign(x=points["batch_size"].astype(float) * shift)
            axes.plot(points["x"], points[value], **styles[arm].line)
            grid.bars(axes, points, "x", value, styles[arm])
        style.log_axes(axes, "batch size", label)
        ticks = sorted({int(size) for size in shown["batch_size"]})
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        if ticks:
            axes.set_xlim(ticks[0] / 1.5, ticks[-1] * 1.5)
    differences.axhline(0.0, color=style.FULLFT_COLOUR, linewidth=1.0, zorder=1)


_EARLY = [*ARM_COLUMNS, "element", "lr", "step", "nll", "difference", "half_width", "n_seeds", "other_rank", "run_id"]


def draw_early(tables: Tables) -> style.Drawn:
    """Draw the figure of early curves; return it, and what it plots as one tidy table.

    The column `element` says what a row is: `curve` (one step of a rank; `nll` is its training loss), `difference`
    (the loss of `rank` minus that of `other_rank` on the same batches, with the `half_width` of its 95% interval;
    differences of zero are left out), `sigma` (twice the standard deviation of the training loss over batches, in
    `difference`) or `diverged` (one run). Losses are means over `n_seeds` seeds, in nats per scored token.
    """
    groups = grid.titled(tables.runs[(tables.runs["method"] == "lora") & judged_arms(tables.runs)])
    if not groups:
        return style.empty_figure("There are no LoRA runs."), pd.DataFrame(columns=_EARLY)
    plotted = pd.concat([_early_rows(rows, tables.curves) for _, rows in groups], ignore_index=True)
    figure, styles, panels = grid.panels(plotted, 2)
    for rows, [losses, differences] in panels:
        curve, diverged = only(rows, "curve"), len(only(rows, "diverged"))
        if curve.empty:
            style.say(losses, "There are no training losses.")
        grid.lines(losses, curve, "step", "nll", styles)
        style.log_axes(losses, "training step", "training NLL (nats / token)")
        means = f"mean of {grid.seeds_text(curve['n_seeds'])}" if len(curve) else ""
        style.note(losses, f"LR {rows['lr'].iloc[0]:g}", means, f"{diverged} diverged" if diverged else "")
        _draw_difference(differences, only(rows, "difference"), only(rows, "sigma")["difference"])
    difference = only(plotted, "difference")["difference"].astype(float)
    marks = [
        ((difference > 0).any(), style.mark("higher loss at the lower rank", "o", ms=4)),
        ((difference < 0).any(), style.mark("lower loss at the lower rank", "o", ms=4, mfc="white")),
        (plotted["half_width"].notna().any(), style.line("half width of its 95% interval", color="0.6", lw=1.1)),
        ("sigma", style.line(f"2{style.SIGMA} of batches", color="black", ls="--", lw=1.1)),
    ]
    return style.legends(figure, styles, plotted, marks)


def _early_rows(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Return what is plotted of one panel at one LR: the LR of the difference of two ranks, or else the commonest."""
    panel: dict[str, Any] = {name: runs[name].iloc[0] for name in PANEL}
    early = early_difference(runs, curves)
    lr = early.lr if early else float(runs["lr"].mode().iloc[0])
    at_lr = runs[runs["lr"] == lr]
    at_lr = at_lr.assign(arm=arm_labels(at_lr))
    losses = train_curves(at_lr[at_lr["status"] == "done"], curves)
    # The mean of a rank that lacks a seed would be over other batches than the means of the other ranks.
    by_rank = [set(seeds) for _, seeds in losses.groupby("arm")["seed"]]
    if common := set.intersection(*by_rank) if by_rank else set():
        losses = losses[losses["seed"].isin(common)]
    curve = losses.groupby(["arm", "method", "rank", "placement", "step"], dropna=False, as_index=False)
    parts = {"curve": curve.agg(nll=("value", "mean"), n_seeds=("seed", "nunique")), "diverged": diverged_runs(at_lr)}
    if early:
        by_seed = early.curves.by_seed
        ranks = {"rank": early.low, "other_rank": early.high, "n_seeds": early.curves.n_seeds}
        intervals = [(step, *mean_interval(row)) for step, row in zip(by_seed.index, by_seed.to_numpy(), strict=True)]
        difference = pd.DataFrame(intervals, columns=["step", "difference", "low", "high"], dtype=float)
        difference = difference.assign(half_width=difference["high"] - difference["difference"])
        parts["difference"] = difference[difference["difference"] != 0].assign(**ranks)
        parts["sigma"] = pd.DataFrame([{"difference": 2 * early.sigma_batch, **ranks}]).dropna()
    rows = grid.tidy(parts, _EARLY)
    if rows.empty:
        rows = pd.DataFrame([{"element": "nothing"}], columns=_EARLY)
    return rows.assign(lr=lr, **panel).astype(dict.fromkeys(("rank", "other_rank", "n_seeds", "step"), "Int64"))


def _draw_difference(axes: Axes, points: pd.DataFrame, levels: pd.Series[float]) -> None:
    if points.empty:
        style.say(axes, "No two ranks above 1 with the same seeds\nhave losses that differ.")
        return
    steps, difference, half = (points[name].astype(float) for name in ("step", "difference", "half_width"))
    size = difference.abs()
    # Marks are large enough to distinguish open ones from filled ones.
    for chosen, face in ((difference >= 0, style.MUTED), (difference < 0, "white")):
        axes.plot(steps[chosen], size[chosen], "o", ms=3.8, mfc=face, mec=style.MUTED, mew=0.9, zorder=3)
    axes.plot(steps, half, color="0.6", linewidth=1.1, zorder=2)
    for level in levels:
        axes.axhline(level, color="black", linestyle="--", linewidth=1.1, zorder=1)
    style.log_axes(axes, "training step", "|difference of NLL| (nats / token)", "log")
    axes.set_xlim(1, max(10.0, float(steps.max()) * 1.15))
    shown = np.concatenate([size, half.dropna()])
    top = float(max([*shown, *levels]))
    # A difference that happens to be close to zero would stretch a log axis.
    floor = max(float(shown[shown > 0].min()), top / 3e4)
    axes.set_ylim(floor / 1.6, top * 1.8)
    ranks = f"r{points['rank'].iloc[0]} minus r{points['other_rank'].iloc[0]}"
    hidden = int((size < floor / 1.6).sum())
    style.note(axes, ranks, grid.seeds_text(points["n_seeds"]), f"{hidden} below the range" if hidden else "")
