"""Capacity: the tokens after which each rank leaves the highest rank's curve, and the bits of facts that it stores."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter

from lorabench.analysis.arms import ARM, is_standard
from lorabench.analysis.comparison import Arm, Comparison
from lorabench.analysis.curves import envelopes
from lorabench.analysis.memorisation import (
    BITS_PER_PARAMETER,
    best_stored,
    description_lengths,
    is_memorisation,
    stored_bits,
)
from lorabench.analysis.optima import fitted_noise, log_threshold, pair_at_optimum, runs_at_optimum, tokens_at
from lorabench.analysis.slopes import log_log
from lorabench.figures import grid, style
from lorabench.figures.grid import ARM_COLUMNS, PANEL, Styles, only, points
from lorabench.store.tables import Tables
from lorabench.utils import formats

_COLUMNS = [
    *(*ARM_COLUMNS, "element", "step", "tokens", "tokens_low", "tokens_high", "excess", "nll", "lr", "run_id"),
    *("trainable_params", "slope", "slope_low", "slope_high", "bits"),
]
_OPTIONAL = ("trainable_params", "first_epoch_nats", "first_epoch_scored_tokens")
_REACHED = [*ARM, "left", "step", "tokens", "tokens_low", "tokens_high", "error", "trainable_params"]
_LINE = "0.35"


def draw(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw the figure of capacity; return it, and what it plots as one tidy table.

    The column `element` says what a row is. In the left panel: `excess` (one step of an arm's envelope: `nll` is the
    validation NLL and `excess` its height above the lowest envelope, both in nats per scored token), `noise_band` (two
    sigma, in `excess`), `departure` (the step at which a rank leaves the highest rank's curve). In the right panel, of
    training tokens against adapter parameters: `threshold` (the tokens at which a rank that had joined the curve
    leaves it, from `tokens_low` to `tokens_high` with 95% confidence), `stays` (the tokens that a rank trained on
    without leaving), `slope` (points of the fitted line, with the slope and its interval), `proportional` (points of
    the reference line), `description_length` (the dataset's `bits`, and the parameters that hold them at 2 bits each).
    A row `diverged` is one run.
    """
    runs = tables.runs.reindex(columns=list(dict.fromkeys([*tables.runs.columns, *_OPTIONAL])))
    runs = runs[is_standard(runs) & ~is_memorisation(runs)]
    comparisons = grid.compared(tables, runs)
    envelope = envelopes(runs, tables.curves)
    envelope = envelope[envelope["step"] > 0].rename(columns={"value": "nll"})
    envelope["excess"] = envelope["nll"] - envelope.groupby([*PANEL, "step"], dropna=False)["nll"].transform("min")
    ends = envelope.groupby(PANEL, dropna=False)["step"].agg(["min", "max"]).reset_index()
    ends = ends.melt(PANEL, value_name="step").merge(fitted_noise(comparisons), how="left", on=PANEL)
    thresholds = pd.DataFrame([row for comparison in comparisons for row in _thresholds(comparison)], columns=_REACHED)
    left, stays = (thresholds[thresholds["left"] == known] for known in (True, False))
    # The description length is drawn where there are thresholds to compare it with.
    described = description_lengths(runs).merge(thresholds[PANEL].drop_duplicates(), on=PANEL)
    params = (described["bits"] / BITS_PER_PARAMETER).round().astype("Int64")
    parts = {
        "excess": envelope,
        "departure": grid.departure_rows(comparisons, envelope, ["nll", "excess", "tokens"]),
        "threshold": left,
        "stays": stays,
        "description_length": described.assign(trainable_params=params),
        "diverged": grid.diverged_runs(runs),
        "noise_band": ends.assign(excess=2 * ends["sigma"]).dropna(subset=["excess"]),
    }
    slopes = [_slopes(panel) for _, panel in left.groupby(PANEL, dropna=False)]
    plotted = grid.joined([grid.tidy(parts, _COLUMNS), *slopes], _COLUMNS)
    if plotted.empty:
        return style.empty_figure("There are no runs on a dataset other than random facts."), plotted
    figure, drawn = grid.panels(plotted, each=2)
    styles = style.arm_styles(plotted)
    for rows, (by_step, by_params) in drawn:
        _draw_excess(by_step, rows, styles)
        _draw_thresholds(by_params, rows, styles)
    entries = {
        "departure": style.mark("leaves the highest rank's curve", "o", mfc="white", mew=1.4),
        "noise_band": Patch(label=f"within 2{style.SIGMA} of seeds", facecolor="0.85"),
        "stays": style.mark("never left", "^"),
        "slope": _line("fitted slope, 95% interval"),
        "proportional": _line("slope 1", ":"),
        "description_length": _line("2 bits / parameter hold the first epoch's loss", "--", 1.0),
    }
    style.legends(figure, styles, [(len(only(plotted, element)), entry) for element, entry in entries.items()])
    return figure, plotted


def _line(label: str, linestyle: str = "-", linewidth: float = 1.1) -> Line2D:
    return Line2D([], [], color=_LINE, linestyle=linestyle, linewidth=linewidth, label=label)


def _thresholds(comparison: Comparison) -> list[Arm]:
    """Return the tokens at which each rank leaves, as claim A5 judges them, or that it trained on without leaving.

    `error` is the standard error of log10(tokens) from seeds. Ranks without a threshold are left out: those that never
    joined the highest rank's curve, lag without leaving, or do not leave along a line in log(step).
    """
    rows = []
    for rank, departure in grid.judged_departures(comparison).items():
        arm = comparison.lora[rank]
        runs = runs_at_optimum(comparison, arm)
        params, trained = runs["trainable_params"].iloc[0], tokens_at(comparison, arm, math.inf)
        row = arm | {"trainable_params": params}
        curves = pair_at_optimum(comparison, arm, comparison.highest) if comparison.highest else None
        if pd.isna(params) or math.isnan(trained):
            continue
        if departure.growth is None:
            rows.append(row | {"left": False, "tokens": trained})
        threshold = log_threshold(curves, departure, comparison.margin.value) if curves else ""
        if not isinstance(threshold, str):
            steps = zip(("tokens", "tokens_low", "tokens_high"), (threshold.value, *threshold.interval()), strict=True)
            at = {name: tokens_at(comparison, arm, 10**step) for name, step in steps}
            rows.append(row | at | {"left": True, "step": round(10**threshold.value), "error": threshold.seed_error})
    return rows


def _slopes(left: pd.DataFrame) -> pd.DataFrame:
    """Return points of the fitted line, and of a line of slope 1, through the mean of the thresholds of one panel."""
    line = log_log(left["trainable_params"], left["tokens"], math.sqrt(float((left["error"] ** 2).mean())))
    if math.isnan(line.slope):
        return pd.DataFrame(columns=_COLUMNS)
    x, y = (np.log10(left[name].to_numpy(float)) for name in ("trainable_params", "tokens"))
    rows = []
    for element, slopes in (("slope", (line.slope, line.low, line.high)), ("proportional", (1.0, math.nan, math.nan))):
        for end in (x.min(), x.mean(), x.max()):
            at = [float(10 ** (y.mean() + slope * (end - x.mean()))) for slope in slopes]
            rows.append(
                {name: left[name].iloc[0] for name in PANEL}
                | {"element": element, "trainable_params": round(10**end), "tokens": at[0]}
                | {"tokens_low": min(at[1:]), "tokens_high": max(at[1:])}
                | dict(zip(("slope", "slope_low", "slope_high"), slopes, strict=True))
            )
    return pd.DataFrame(rows, columns=_COLUMNS)


def _draw_excess(axes: Axes, rows: pd.DataFrame, styles: Styles) -> None:
    noise, curves = only(rows, "noise_band").assign(floor=0.0), only(rows, "excess")
    grid.band(axes, noise, "step", "floor", "excess")
    grid.lines(axes, curves, "step", "excess", styles)
    points(axes, only(rows, "departure"), "step", "excess", styles, filled=False, marker="o", size=6)
    axes.set(xscale="log", xlabel="training step", ylabel="above the lowest envelope (nats / token)")
    if len(noise):
        # The axis is linear within the noise and logarithmic beyond, so that it has a place for 0 and for a whole nat.
        # Noise that is next to nothing would give it many empty decades.
        axes.set_yscale("symlog", linthresh=max(noise["excess"].iloc[0], 1e-4), linscale=0.6)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    style.plain_log_ticks(axes)
    sigma = grid.sigma_text(noise["excess"].iloc[0] / 2 if len(noise) else math.nan)
    style.note(axes, sigma, *grid.diverged_facts(rows, curves, "no curve"))


def _draw_thresholds(axes: Axes, rows: pd.DataFrame, styles: Styles) -> None:
    thresholds, slope, held = only(rows, "threshold"), only(rows, "slope"), only(rows, "description_length")
    if thresholds.empty and only(rows, "stays").empty:
        unknown = f"{style.SIGMA} is unknown, so departures\ncannot be distinguished from noise."
        style.say(axes, "No rank is known to leave the shared curve." if len(only(rows, "noise_band")) else unknown)
        return
    grid.band(axes, slope, "trainable_params", "tokens_low", "tokens_high", "0.9")
    for element, linestyle in (("slope", "-"), ("proportional", ":")):
        line = only(rows, element)
        axes.plot(line["trainable_params"].astype(float), line["tokens"], linestyle, color=_LINE, linewidth=1.1)
    points(axes, thresholds, "trainable_params", "tokens", styles, filled=False, marker="o", size=6)
    points(axes, only(rows, "stays"), "trainable_params", "tokens", styles, marker="^", size=6)
    for params in held["trainable_params"]:
        axes.axvline(float(params), color=_LINE, linestyle="--", linewidth=1.0)
    axes.set(xscale="log", yscale="log", xlabel="adapter parameters", ylabel="train tokens at departure")
    for axis in (axes.xaxis, axes.yaxis):
        style.log_ticks(axis, EngFormatter(sep=""))
    leaving = "1 rank leaves" if len(thresholds) == 1 else f"{len(thresholds)} ranks leave"
    for fit in slope.head(1).to_dict("records"):
        leaving = f"slope {fit['slope']:.2f} {formats.fixed_interval(fit['slope_low'], fit['slope_high'], 2)}"
    style.note(axes, leaving, *(f"first epoch {formats.amount(bits, 'bit')}" for bits in held["bits"].head(1)))


_STORED = [
    *(*ARM_COLUMNS, "element", "trainable_params", "bits", "bits_low", "bits_high", "bits_per_parameter"),
    *("lr", "seed", "n_seeds", "run_id"),
]
_PER_PARAMETER = {1.0: ":", 2.0: "--"}


def draw_memorisation(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw how many bits of random facts an adapter stores; return the figure, and what it plots as one tidy table.

    The column `element` says what a row is: `seed` (one run at the LR nearest to its arm's optimum), `stored` (by the
    fitted lowest loss, with its 95% interval), `entropy` (all bits of the facts), `per_parameter` (ends of the lines of
    1 and 2 bits per parameter) or `diverged` (one run). `bits` are the bits of the facts' answers that are stored.
    """
    facts = tables.runs[is_standard(tables.runs) & is_memorisation(tables.runs)]
    if facts.empty:
        empty = pd.DataFrame(columns=_STORED)
        return style.empty_figure("There are no runs on a dataset of random facts."), empty
    names = {"bits_stored": "bits", "bits_stored_low": "bits_low", "bits_stored_high": "bits_high", "lr_best": "lr"}
    best, seeds = best_stored(facts).rename(columns=names), stored_bits(facts).rename(columns=names)
    at_best = {run_id for run_ids in best["run_ids"] for run_id in run_ids}
    # The lines of 1 and 2 bits per parameter span the range of a panel's adapters.
    ends = []
    for _, panel in best.groupby(PANEL, dropna=False):
        adapters = panel[panel["method"] == "lora"]
        params = (adapters if len(adapters) else panel)["trainable_params"].to_numpy(float)
        place = {name: panel[name].iloc[0] for name in PANEL}
        for bits in _PER_PARAMETER:
            for end in (round(params.min() / 1.5), round(params.max() * 1.5)):
                ends.append(place | {"trainable_params": end, "bits": bits * end, "bits_per_parameter": bits})
    parts = {
        "seed": seeds[seeds["run_id"].isin(at_best)],
        "stored": best,
        "diverged": grid.diverged_runs(facts),
        "entropy": facts.groupby(PANEL, as_index=False, dropna=False).agg(bits=("entropy_bits", "max")),
        "per_parameter": pd.DataFrame(ends),
    }
    plotted = grid.tidy(parts, _STORED)
    figure, drawn = grid.panels(plotted)
    styles = style.arm_styles(plotted)
    for rows, (axes,) in drawn:
        _draw_stored(axes, rows, styles)
    entries = [
        ("entropy", _line("all of the facts")),
        ("per_parameter", _line("1 bit / parameter", _PER_PARAMETER[1.0])),
        ("per_parameter", _line("2 bits / parameter", _PER_PARAMETER[2.0])),
        ("stored", style.mark("fitted lowest loss, 95% interval", "o", ls="-", lw=1.2)),
        ("seed", style.mark("one seed", "_", ms=9)),
    ]
    style.legends(figure, styles, [(len(only(plotted, element)), entry) for element, entry in entries])
    return figure, plotted


def _draw_stored(axes: Axes, rows: pd.DataFrame, styles: Styles) -> None:
    stored, seeds, entropy = only(rows, "stored"), only(rows, "seed"), only(rows, "entropy")
    for bits, linestyle in _PER_PARAMETER.items():
        line = rows[rows["bits_per_parameter"].eq(bits) & rows["element"].eq("per_parameter")]
        axes.plot(line["trainable_params"].astype(float), line["bits"], linestyle, color=_LINE, linewidth=1.1)
    for bits in entropy["bits"]:
        axes.axhline(bits, color=_LINE, linewidth=1.1, zorder=1)
    shown, positive = stored[stored["bits"] > 0], seeds[seeds["bits"] > 0]
    adapters = shown[shown["method"] == "lora"].sort_values("trainable_params")
    axes.plot(adapters["trainable_params"].astype(float), adapters["bits"], color="0.7", linewidth=1.0, zorder=2)
    points(axes, positive[["arm", "trainable_params", "bits"]], "trainable_params", "bits", styles, True, "_", 11)
    # A logarithmic axis has no 0: an interval that reaches it is drawn to the lower end of the axis.
    floor = 0.7 * min(positive["bits"].min(), shown["bits"].min()) if len(positive) else math.nan
    points(axes, shown.assign(bits_low=shown["bits_low"].clip(lower=floor)), "trainable_params", "bits", styles)
    axes.set(xscale="log", yscale="log", xlabel="trainable parameters", ylabel="bits stored of the facts")
    if shown.empty:
        axes.set(xticks=[], yticks=[])
        axes.minorticks_off()
    else:
        for axis in (axes.xaxis, axes.yaxis):
            style.log_ticks(axis, EngFormatter(sep=""))
    nothing = ", ".join(stored.loc[~(stored["bits"] > 0), "arm"])
    style.note(
        axes,
        f"facts {formats.count(entropy['bits'].iloc[0])} bits",
        grid.seeds_text(stored["n_seeds"]) if len(stored) else "",
        f"stored nothing: {nothing}" if nothing else "",
        *grid.diverged_facts(rows, stored, "none finished"),
    )
