"""Capacity: the step at which each rank leaves the curve of the best arms, against its number of parameters."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from lorabench.analysis.arms import ARM, arm_label, is_standard
from lorabench.analysis.curves import envelopes
from lorabench.analysis.departure import departures
from lorabench.analysis.memorisation import BITS_PER_PARAMETER, description_lengths, is_memorisation
from lorabench.analysis.noise import seed_noise, sigma_of
from lorabench.analysis.thresholds import threshold_slope, thresholds
from lorabench.figures import style
from lorabench.store.tables import Tables
from lorabench.utils import formats

_COLUMNS = [
    *("model", "dataset", "batch_size", "steps", "arm", "method", "rank", "placement"),
    *("element", "step", "tokens", "tokens_low", "tokens_high", "excess", "nll", "lr", "run_id"),
    *("trainable_params", "slope", "slope_low", "slope_high", "bits"),
]
_OPTIONAL = ("trainable_params", "first_epoch_nats", "first_epoch_scored_tokens")
_LINE = "0.35"


@style.applied()
def draw(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw the figure; return it, and what it plots as one tidy table.

    The column `element` says what a row is. In the left panel: `excess` (one step of an arm's envelope: `nll` is the
    validation NLL and `excess` its height above the lowest envelope, both in nats per scored token), `noise_band` (two
    sigma, in `excess`), `departure` (the step at which an arm leaves the band for good). In the right panel, of
    training tokens against adapter parameters: `threshold` (the departure of a rank that had joined; `tokens_low` is
    the point before), `stays` (the tokens that a rank trained on without leaving), `slope` (points of the fitted line,
    with the slope and its interval), `proportional` (points of the reference line), `description_length` (the
    dataset's `bits`, and the parameters that hold them at 2 bits each). A row `diverged` is one run.
    """
    plotted = _plotted(tables.runs, tables.curves)
    if plotted.empty:
        return style.empty_figure("There are no runs on a dataset other than random facts."), plotted
    figure, panels = style.panel_pairs(plotted)
    styles = style.arm_styles(plotted.dropna(subset=["arm"]))
    for rows, left, right in panels:
        _draw_excess(left, rows, styles)
        _draw_thresholds(right, rows, styles)
    style.legends(figure, styles, _marks(plotted))
    return figure, plotted


def _plotted(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    runs = runs.reindex(columns=[*runs.columns, *(name for name in _OPTIONAL if name not in runs)])
    runs = runs[is_standard(runs) & ~is_memorisation(runs)]
    noise = seed_noise(runs)
    envelope = envelopes(runs, curves)
    left = departures(envelope, noise)
    reached = thresholds(runs, envelope, left).dropna(subset=["trainable_params"])
    # The description length is drawn where there are thresholds to compare it with.
    described = description_lengths(runs).merge(
        reached.loc[reached["status"].isin(["left", "stays"]), style.PANEL].drop_duplicates(), on=style.PANEL
    )
    envelope = envelope[envelope["step"] > 0].rename(columns={"value": "nll"})
    of_step = envelope.groupby([*style.PANEL, "step"], dropna=False)["nll"]
    envelope["excess"] = envelope["nll"] - of_step.transform("min")
    gone = reached[reached["status"] == "left"].rename(columns={"tokens_before": "tokens_low"})
    of_arms = {
        "excess": envelope,
        "departure": left[left["departed"].fillna(False)].merge(envelope, on=[*ARM, "step"]),
        "threshold": gone.assign(tokens_high=gone["tokens"]),
        "stays": reached[reached["status"] == "stays"],
        "description_length": described.assign(
            trainable_params=(described["bits"] / BITS_PER_PARAMETER).round().astype("Int64")
        ),
        "diverged": runs[runs["status"] == "diverged"],
    }
    parts = [part.assign(element=element) for element, part in of_arms.items()]
    for part in parts:
        part["arm"] = [arm_label(row) for _, row in part.iterrows()]
    parts += [_noise_band(envelope, noise), *(_lines(panel) for _, panel in gone.groupby(style.PANEL, dropna=False))]
    parts = [part.reindex(columns=_COLUMNS) for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=_COLUMNS)


def _noise_band(envelope: pd.DataFrame, noise: pd.DataFrame) -> pd.DataFrame:
    """Return the height of two sigma at the first and the last step of each panel whose sigma is known."""
    ends = envelope.groupby(style.PANEL, dropna=False)["step"].agg(["min", "max"]).reset_index()
    ends = ends.melt(style.PANEL, value_name="step").drop(columns="variable")
    sigma = pd.Series([sigma_of(noise, row, "validation") for _, row in ends.iterrows()], dtype=float)
    return ends.assign(element="noise_band", excess=2 * sigma).dropna(subset=["excess"])


def _lines(gone: pd.DataFrame) -> pd.DataFrame:
    """Return points of the fitted line, and of a line of slope 1, through the mean of the departures of one panel."""
    if len(gone) < 2:
        return gone.iloc[:0]
    line = threshold_slope(gone.assign(tokens_before=gone["tokens_low"]))
    if math.isnan(line.slope):
        return gone.iloc[:0]
    x, y = (np.log10(gone[name].to_numpy(float)) for name in ("trainable_params", "tokens"))
    rows = []
    for element, slopes in (("slope", (line.slope, line.low, line.high)), ("proportional", (1.0, math.nan, math.nan))):
        for end in (x.min(), x.mean(), x.max()):
            at = [float(10 ** (y.mean() + slope * (end - x.mean()))) for slope in slopes]
            rows.append(
                {name: gone[name].iloc[0] for name in style.PANEL}
                | {"element": element, "trainable_params": round(10**end), "tokens": at[0]}
                | {"tokens_low": min(at[1:]), "tokens_high": max(at[1:])}
                | {"slope": slopes[0], "slope_low": slopes[1], "slope_high": slopes[2]}
            )
    return pd.DataFrame(rows)


def _of(rows: pd.DataFrame, element: str) -> pd.DataFrame:
    return rows[rows["element"] == element]


def _draw_excess(axes: Axes, rows: pd.DataFrame, styles: dict[str, style.ArmStyle]) -> None:
    band, drawn = _of(rows, "noise_band"), _of(rows, "excess")
    axes.fill_between(band["step"].astype(float), 0, band["excess"], color="0.85", linewidth=0, zorder=1)
    for arm, points in drawn.groupby("arm"):
        axes.plot(points["step"].astype(float), points["excess"], **styles[str(arm)].line)
    for point in _of(rows, "departure").to_dict("records"):
        colour = styles[point["arm"]].colour
        axes.plot(point["step"], point["excess"], "o", ms=6, mfc="white", mec=colour, mew=1.5, zorder=4)
    axes.set(xscale="log", xlabel="training step", ylabel="above the lowest envelope (nats / token)")
    if len(band):
        # The axis is linear within the noise and logarithmic beyond, so that it has a place for 0 and for a whole nat.
        axes.set_yscale("symlog", linthresh=band["excess"].iloc[0], linscale=0.6)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    style.plain_log_ticks(axes)
    facts = [style.sigma_text(band["excess"].iloc[0] / 2 if len(band) else math.nan)]
    diverged = _of(rows, "diverged")
    if len(diverged):
        facts += style.diverged_text(diverged)
        lost = sorted(set(diverged["arm"]) - set(drawn["arm"]))
        facts += [f"no curve: {', '.join(lost)}"] if lost else []
    style.note(axes, " · ".join(facts))


def _draw_thresholds(axes: Axes, rows: pd.DataFrame, styles: dict[str, style.ArmStyle]) -> None:
    thresholds, slope, held = _of(rows, "threshold"), _of(rows, "slope"), _of(rows, "description_length")
    if thresholds.empty and _of(rows, "stays").empty:
        known = len(_of(rows, "noise_band"))
        unknown = f"{style.SIGMA} is unknown, so departures\ncannot be distinguished from noise."
        style.say(axes, "No rank joins the shared curve." if known else unknown)
        return
    axes.fill_between(
        slope["trainable_params"].astype(float), slope["tokens_low"], slope["tokens_high"], color="0.9", linewidth=0
    )
    for element, linestyle in (("slope", "-"), ("proportional", ":")):
        line = _of(rows, element)
        axes.plot(line["trainable_params"].astype(float), line["tokens"], linestyle, color=_LINE, linewidth=1.1)
    for point in thresholds.to_dict("records"):
        colour, params = styles[point["arm"]].colour, point["trainable_params"]
        axes.vlines(params, point["tokens_low"], point["tokens_high"], color=colour, linewidth=1.4, zorder=3)
        axes.plot(params, point["tokens"], "o", ms=6, mfc="white", mec=colour, mew=1.5, zorder=4)
    for point in _of(rows, "stays").to_dict("records"):
        axes.plot(point["trainable_params"], point["tokens"], "^", ms=6, color=styles[point["arm"]].colour, zorder=4)
    for params in held["trainable_params"]:
        axes.axvline(float(params), color=_LINE, linestyle="--", linewidth=1.0)
    axes.set(xscale="log", yscale="log", xlabel="adapter parameters", ylabel="train tokens at departure")
    for axis in (axes.xaxis, axes.yaxis):
        style.short_log_ticks(axis)
    facts = []
    if len(slope):
        first = slope.iloc[0]
        interval = formats.fixed_interval(first["slope_low"], first["slope_high"], 2)
        facts.append(f"slope {first['slope']:.2f} {interval}")
    else:
        facts.append("1 rank leaves" if len(thresholds) == 1 else f"{len(thresholds)} ranks leave")
    if len(held):
        facts.append(f"first epoch {formats.amount(held['bits'].iloc[0], 'bit')}")
    style.note(axes, " · ".join(facts))


def _marks(plotted: pd.DataFrame) -> list[Artist]:
    """Return the legend entries of the marks that occur."""
    elements = set(plotted["element"])
    entries = [
        ("departure", style.mark("leaves the band for good", "o", markerfacecolor="white", markeredgewidth=1.4)),
        ("noise_band", Patch(label=f"within 2{style.SIGMA} of seeds", facecolor="0.85")),
        ("stays", style.mark("never left", "^")),
        ("slope", Line2D([], [], color=_LINE, linewidth=1.1, label="fitted slope, 95% interval")),
        ("proportional", Line2D([], [], color=_LINE, linestyle=":", linewidth=1.1, label="slope 1")),
        (
            "description_length",
            Line2D(
                [],
                [],
                color=_LINE,
                linestyle="--",
                linewidth=1.0,
                label="2 bits / parameter hold the first epoch's loss",
            ),
        ),
    ]
    return [entry for element, entry in entries if element in elements]
