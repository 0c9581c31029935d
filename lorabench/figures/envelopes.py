"""Envelopes of learning curves, the lowest loss over LRs at every step: figure 1 of the paper, and over FLOPs."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lorabench.analysis.arms import rows_of
from lorabench.analysis.curves import envelopes
from lorabench.analysis.optima import fitted_noise
from lorabench.analysis.step_flops import loss_by_flops
from lorabench.errors import NothingToDrawError
from lorabench.figures import style
from lorabench.figures.fits import compared, departure_rows
from lorabench.figures.grid import (
    ARM_COLUMNS,
    PANEL,
    band,
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
    styles = style.arm_styles(plotted.dropna(subset=["arm"]))
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
