"""Memorization: how many bits of random facts an adapter stores, against its number of parameters."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lorabench.analysis.arms import arm_label, is_standard
from lorabench.analysis.memorisation import best_stored, is_memorisation, stored_bits
from lorabench.figures import style
from lorabench.store.tables import Tables
from lorabench.utils import formats

_COLUMNS = [
    *("model", "dataset", "batch_size", "steps", "arm", "method", "rank", "placement"),
    *("element", "trainable_params", "bits", "bits_low", "bits_high", "bits_per_parameter"),
    *("lr", "seed", "n_seeds", "run_id"),
]
_LINE = "0.35"
_PER_PARAMETER = {1.0: ":", 2.0: "--"}


@style.applied()
def draw(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw the figure; return it, and what it plots as one tidy table.

    The column `element` says what a row is: `seed` (one run at its arm's best LR), `stored` (the mean over these runs,
    with its 95% t interval), `entropy` (all bits of the facts), `per_parameter` (ends of the lines of 1 and 2 bits per
    parameter) or `diverged` (one run). `bits` are the bits of the facts' answers that are stored.
    """
    plotted = _plotted(tables.runs)
    if plotted.empty:
        return style.empty_figure("There are no runs on a dataset of random facts."), plotted
    figure, panels = style.panels(plotted)
    styles = style.arm_styles(plotted.dropna(subset=["arm"]))
    for rows, axes in panels:
        _draw_panel(axes, rows, styles)
    style.legends(figure, styles, _marks(plotted))
    return figure, plotted


def _plotted(runs: pd.DataFrame) -> pd.DataFrame:
    facts = runs[is_standard(runs) & is_memorisation(runs)]
    if facts.empty:
        return pd.DataFrame(columns=_COLUMNS)
    best = best_stored(facts).rename(
        columns={"bits_stored": "bits", "bits_stored_low": "bits_low", "bits_stored_high": "bits_high"}
    )
    at_best = {run_id for run_ids in best["run_ids"] for run_id in run_ids}
    seeds = stored_bits(facts).rename(columns={"bits_stored": "bits"})
    of_arms = {
        "seed": seeds[seeds["run_id"].isin(at_best)],
        "stored": best.rename(columns={"lr_best": "lr"}),
        "diverged": facts[facts["status"] == "diverged"],
    }
    parts = [part.assign(element=element) for element, part in of_arms.items()]
    for part in parts:
        part["arm"] = [arm_label(row) for _, row in part.iterrows()]
    parts += [_entropy(facts), *(_per_parameter(panel) for _, panel in best.groupby(style.PANEL, dropna=False))]
    return pd.concat([part.reindex(columns=_COLUMNS) for part in parts if len(part)], ignore_index=True)


def _entropy(facts: pd.DataFrame) -> pd.DataFrame:
    whole = facts.groupby(style.PANEL, as_index=False, dropna=False).agg(bits=("entropy_bits", "max"))
    return whole.assign(element="entropy")


def _per_parameter(best: pd.DataFrame) -> pd.DataFrame:
    """Return the ends of the lines of 1 and 2 bits per parameter, over the range of one panel's adapters."""
    adapters = best[best["method"] == "lora"]
    params = (adapters if len(adapters) else best)["trainable_params"].to_numpy(float)
    panel = {name: best[name].iloc[0] for name in style.PANEL}
    return pd.DataFrame(
        panel
        | {"element": "per_parameter", "trainable_params": round(end), "bits": bits * round(end)}
        | {"bits_per_parameter": bits}
        for bits in _PER_PARAMETER
        for end in (params.min() / 1.5, params.max() * 1.5)
    )


def _draw_panel(axes: Axes, rows: pd.DataFrame, styles: dict[str, style.ArmStyle]) -> None:
    elements = {str(element): part for element, part in rows.groupby("element")}
    nothing = rows.iloc[:0]
    stored, seeds = elements.get("stored", nothing), elements.get("seed", nothing)
    for bits, linestyle in _PER_PARAMETER.items():
        line = elements.get("per_parameter", nothing)
        line = line[line["bits_per_parameter"] == bits]
        axes.plot(line["trainable_params"].astype(float), line["bits"], linestyle, color=_LINE, linewidth=1.1)
    for bits in elements.get("entropy", nothing)["bits"]:
        axes.axhline(bits, color=_LINE, linewidth=1.1, zorder=1)
    shown = stored[stored["bits"] > 0]
    adapters = shown[shown["method"] == "lora"].sort_values("trainable_params")
    axes.plot(adapters["trainable_params"].astype(float), adapters["bits"], color="0.7", linewidth=1.0, zorder=2)
    positive = seeds[seeds["bits"] > 0]
    for run in positive.to_dict("records"):
        axes.plot(run["trainable_params"], run["bits"], "_", ms=11, color=styles[run["arm"]].colour, zorder=5)
    # A logarithmic axis has no 0: an interval that reaches it is drawn to the lower end of the axis.
    floor = 0.7 * min(positive["bits"].min(), shown["bits"].min()) if len(positive) else math.nan
    for arm in shown.to_dict("records"):
        arm_style, params = styles[arm["arm"]], arm["trainable_params"]
        axes.vlines(params, max(arm["bits_low"], floor), arm["bits_high"], color=arm_style.colour, zorder=3)
        axes.plot(params, arm["bits"], arm_style.marker, ms=5.5, color=arm_style.colour, zorder=4)
    axes.set(xscale="log", yscale="log", xlabel="trainable parameters", ylabel="bits stored of the facts")
    if shown.empty:
        axes.set(xticks=[], yticks=[])
        axes.minorticks_off()
    else:
        for axis in (axes.xaxis, axes.yaxis):
            style.short_log_ticks(axis)
    style.note(axes, " · ".join(_facts(elements, stored)))


def _facts(elements: dict[str, pd.DataFrame], stored: pd.DataFrame) -> list[str]:
    """Return the texts for what a panel cannot show as a mark."""
    facts = [f"facts {formats.count(elements['entropy']['bits'].iloc[0])} bits"]
    if len(stored):
        facts.append(style.seeds_text(stored["n_seeds"]))
    nothing = stored.loc[~(stored["bits"] > 0), "arm"]
    if len(nothing):
        facts.append(f"stored nothing: {', '.join(nothing)}")
    diverged = elements.get("diverged")
    if diverged is not None:
        facts += style.diverged_text(diverged)
        lost = sorted(set(diverged["arm"]) - set(stored["arm"]))
        facts += [f"none finished: {', '.join(lost)}"] if lost else []
    return facts


def _marks(plotted: pd.DataFrame) -> list[Artist]:
    """Return the legend entries of the marks that occur."""
    elements = set(plotted["element"])
    entries: list[tuple[str, Artist]] = [
        ("entropy", Line2D([], [], color=_LINE, linewidth=1.1, label="all of the facts"))
    ]
    for bits, linestyle in _PER_PARAMETER.items():
        label = f"{bits:g} {'bit' if bits == 1 else 'bits'} / parameter"
        line = Line2D([], [], color=_LINE, linestyle=linestyle, linewidth=1.1, label=label)
        entries.append(("per_parameter", line))
    entries += [
        ("stored", style.mark("mean, 95% interval", "o", linestyle="-", linewidth=1.2)),
        ("seed", style.mark("one seed", "_", markersize=9)),
    ]
    return [entry for element, entry in entries if element in elements]
