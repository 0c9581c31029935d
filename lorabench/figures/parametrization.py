"""What LoRA's parametrization does: the factor 1/r, two redundant hyperparameters, when A moves, how updates grow."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorabench.analysis.curves import train_curves
from lorabench.analysis.estimate import mean_interval
from lorabench.analysis.invariances import (
    CONFIGURATION,
    PAIR_SETTING,
    RULES,
    descent_ratios,
    differences,
    first_descents,
    fixed_a_controls,
    invariance_pairs,
    move_times,
    step_sizes,
    with_scales,
)
from lorabench.analysis.slopes import log_log
from lorabench.figures import style
from lorabench.figures.grid import ARM_COLUMNS, Styles, diverged_runs, only, points, seeds_text, tidy
from lorabench.store.tables import Tables

# Runs that should be equivalent are compared over this number of steps.
_STEPS = 50

# The numerical precision of a training loss, in nats per token.
_IDENTICAL = 1e-5

_TITLES = ("first update", "redundant pair", "when A moves", "size of updates")

_ENDS = {"low": "value_low", "high": "value_high"}
_COLUMNS = [
    *(*ARM_COLUMNS, "eps", "element", "rule", "update_scale", "time_scale"),
    *("step", "value", "low", "high", "n", "run_id"),
]

_RULE_LOOKS: dict[str, dict[str, Any]] = {
    rule: {"color": colour, "linestyle": line, "marker": marker}
    for rule, colour, line, marker in zip(
        RULES.values(), ("black", "0.35", "0.6"), ("-", "--", ":"), ("o", "s", "^"), strict=True
    )
}


def draw(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw the figure; return it, and what it plots as one tidy table.

    The column `element` says what a row is; `value` is what is drawn, `low` and `high` are the ends of its interval,
    and `n` is the number of seeds or pairs that it is taken over:
    `first_descent` (ratio of the first descent to that of the highest rank, by `rule`; n seeds), `equivalent` (the
    largest difference of training NLL up to a step over n pairs of equivalent runs, in nats per token),
    `not_equivalent` (the smallest over other pairs, with the range over them), `a_moved` (steps until A has moved by
    its own norm; n seeds), `a_not_moved` (the length of runs in which A did not move that far), `update_norm` (the
    norm per unit of LR; n seeds), `still_a` (the norm per unit of LR of B, in runs whose A stays still) or `diverged`
    (one run).
    """
    lora = with_scales(tables.runs) if len(tables.runs) else pd.DataFrame()
    if lora.empty:
        return style.empty_figure("There are no LoRA runs."), pd.DataFrame(columns=_COLUMNS)
    groups = [(f"{model} · {dataset}", runs) for (model, dataset), runs in lora.groupby(["model", "dataset"])]
    parts = [_rows(runs, tables.curves) for _, runs in groups]
    plotted = pd.concat(parts, ignore_index=True)
    figure = style.new_figure(2 * style.PANEL_HEIGHT * len(groups))
    styles = style.arm_styles(plotted)
    for place, ((title, _), rows) in enumerate(zip(groups, parts, strict=True)):
        draws = (_draw_first_descents, _draw_differences, _draw_move_times, _draw_update_norms)
        for column, (what, draw_panel) in enumerate(zip(_TITLES, draws, strict=True), start=1):
            axes = figure.add_subplot(2 * len(groups), 2, 4 * place + column)
            axes.set_title(f"{title} · {what}", pad=18, parse_math=False)
            draw_panel(axes, rows, styles)
    style.legends(figure, styles, [])
    return figure, plotted


def _rows(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Return what is plotted of one model and dataset."""
    descents = descent_ratios(first_descents(runs, curves)).rename(columns={"ratio": "value", "n_seeds": "n"})
    parts = {"first_descent": descents, **_differences(runs, curves), **_move_times(runs, curves)}
    parts |= _update_norms(runs, curves) | {"diverged": diverged_runs(runs)}
    rows = tidy({element: part.dropna(axis=1, how="all") for element, part in parts.items()}, _COLUMNS)
    # No panel draws a run that diverged, so its arm has no entry in the legend.
    rows.loc[rows["element"] == "diverged", "arm"] = None
    rows = rows.assign(model=runs["model"].iloc[0], dataset=runs["dataset"].iloc[0], method="lora")
    return rows.astype({"n": "Int64", "step": "Int64"})


def _differences(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return, by step, the largest difference of equivalent runs, and the range of the difference of other pairs."""
    apart = differences(invariance_pairs(runs), curves, _STEPS)
    # Before the first update, all runs have the loss of the base model.
    pairs = apart[apart["step"] > 1].groupby(["eps", "step", "equivalent"], dropna=False)["difference"]
    range_of = pairs.agg(low="min", high="max", n="size").reset_index()
    equivalent = range_of["equivalent"].astype(bool)
    return {
        "equivalent": range_of[equivalent].assign(value=range_of["high"]),
        "not_equivalent": range_of[~equivalent].assign(value=range_of["low"]),
    }


def _move_times(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return for each configuration the geometric mean over seeds, or the length of its runs if A lags in one."""
    moved, not_moved = [], []
    for _, seeds in move_times(runs, curves).groupby([*PAIR_SETTING, *CONFIGURATION], dropna=False):
        first = seeds.iloc[0]
        row = {name: first[name] for name in (*PAIR_SETTING, "update_scale", "time_scale")}
        row |= {"n": len(seeds), "arm": f"LoRA r{first['rank']}"}
        if seeds["step"].notna().all():
            logs = mean_interval(np.log(seeds["step"]))
            moved.append(row | dict(zip(("value", "low", "high"), np.exp(logs), strict=True)))
        elif not pd.isna(first["steps"]):
            not_moved.append(row | {"value": float(first["steps"])})
    return {"a_moved": pd.DataFrame(moved), "a_not_moved": pd.DataFrame(not_moved)}


def _update_norms(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the sizes of updates as means over seeds, also of runs whose A stays still."""
    controls = runs[runs["run_id"].isin(fixed_a_controls(runs)["run_id_slow"])]
    still = train_curves(controls, curves, "update_norm")
    # Only B is updated noticeably, so the norm is per unit of the LR of B.
    still = still.assign(size=still["value"] / (still["lr"] * still["lr_ratio"]))
    sizes = {
        "update_norm": (step_sizes(runs, curves), [*PAIR_SETTING, "step"]),
        "still_a": (still, [*PAIR_SETTING, "lr", "lr_ratio", "step"]),
    }
    parts = {}
    for element, (table, key) in sizes.items():
        rows = []
        for _, seeds in table.groupby(key, dropna=False):
            row = {name: seeds[name].iloc[0] for name in (*PAIR_SETTING, "step")} | {"n": len(seeds)}
            row |= dict(zip(("value", "low", "high"), mean_interval(seeds["size"]), strict=True))
            if element == "still_a":
                rows.append(row | {"time_scale": seeds["time_scale"].iloc[0]})
            else:
                rows.append(row | {"arm": f"LoRA r{seeds['rank'].iloc[0]}"})
        parts[element] = pd.DataFrame(rows)
    return parts


def _draw_first_descents(axes: Axes, rows: pd.DataFrame, styles: Styles) -> None:
    descents = only(rows, "first_descent")
    if descents.empty:
        style.say(axes, "The curves hold no descent of step 1.")
        return
    axes.axhspan(0.95, 1.05, color="0.88", linewidth=0, zorder=0)
    batches = [name for name in ("placement", "batch_size", "eps") if descents[name].nunique(dropna=False) > 1]
    for _, batch_rows in descents.groupby(batches or ["model"], dropna=False):
        for rule, look in _RULE_LOOKS.items():
            ratios = batch_rows[batch_rows["rule"] == rule].sort_values("rank")
            if ratios.empty:
                continue
            ranks, ratio = ratios["rank"].astype(float), ratios["value"].astype(float)
            bars = np.abs([ratios["low"].astype(float) - ratio, ratios["high"].astype(float) - ratio])
            axes.errorbar(ranks, ratio, bars, capsize=2.5, ms=4, linewidth=1.3, label=rule, zorder=2, **look)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), loc="lower right")
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="first descent over that of the highest rank")
    axes.set_xticks(sorted(set(descents["rank"].astype(int))), minor=False)
    style.plain_log_ticks(axes)
    low = min(0.5, float(descents["value"].min()))
    axes.set_ylim(low / 1.3, max(1.3, float(descents["value"].max()) * 1.3))
    style.number_log_ticks(axes.yaxis)
    seeds = descents["n"].astype(int)
    style.note(axes, f"{seeds.min()} seeds · band ± 5%" if seeds.nunique() == 1 else f"{seeds.min()} seeds or more")


def _draw_differences(axes: Axes, rows: pd.DataFrame, styles: Styles) -> None:
    equivalent, other = only(rows, "equivalent"), only(rows, "not_equivalent")
    if equivalent.empty:
        style.say(axes, "No two runs should be equivalent.")
        return
    if len(other):
        steps = other["step"].astype(float)
        axes.fill_between(
            steps, other["low"], other["high"], color="0.85", linewidth=0, label="others, range", zorder=1
        )
        axes.plot(steps, other["value"], "--", color="0.45", linewidth=1.2, label="others, smallest", zorder=2)
    # A difference of exactly 0 has no place on a log axis.
    shown = equivalent[equivalent["value"] > 0]
    axes.plot(shown["step"].astype(float), shown["value"], color="black", label="equivalent, largest", zorder=3)
    axes.axhline(_IDENTICAL, color="black", linestyle=":", linewidth=1.0, zorder=1)
    axes.set(xscale="log", yscale="log", xlabel="training step", ylabel="|difference of NLL| so far (nats / token)")
    axes.legend(loc="upper left")
    low, high = axes.get_ylim()
    # The upper part of the panel is kept free for the legend.
    axes.set_ylim(min(low, _IDENTICAL / 10), high * (high / min(low, _IDENTICAL / 10)) ** 0.35)
    axes.set_xlim(1, _STEPS * 1.1)
    style.plain_log_ticks(axes)
    last = equivalent.iloc[-1]
    facts = [f"{last['n']} equivalent pairs", f"{other['n'].iloc[-1] if len(other) else 0} others"]
    if shown.empty:
        facts.append("equivalent runs equal to the last bit")
    elif not pd.isna(last["eps"]):
        facts.append(f"eps {last['eps']:g}")
    style.note(axes, " · ".join(facts))


def _draw_move_times(axes: Axes, rows: pd.DataFrame, styles: Styles) -> None:
    moved, not_moved = only(rows, "a_moved"), only(rows, "a_not_moved")
    if moved.empty and not_moved.empty:
        style.say(axes, "The curves do not hold how far A has moved.")
        return
    facts = []
    if len(moved):
        points(axes, moved.rename(columns=_ENDS), "time_scale", "value", styles, marker="o", size=4)
        # Only runs whose first updates have the same size can be compared.
        scale = moved["update_scale"].map(lambda value: f"{value:.9g}")
        for _, comparable in moved.groupby([*PAIR_SETTING, scale], dropna=False):
            ordered = comparable.sort_values("time_scale")
            axes.plot(ordered["time_scale"], ordered["value"], color="0.6", linewidth=0.9, zorder=1)
        line = log_log(
            moved["time_scale"], moved["value"], groups=moved.groupby([*PAIR_SETTING, scale], dropna=False).ngroup()
        )
        at = np.array([moved["time_scale"].min(), moved["time_scale"].max()], float)
        middle = np.exp(np.log(moved[["time_scale", "value"]].astype(float)).mean())
        axes.plot(at, middle["value"] * at / middle["time_scale"], ":", color="0.4", linewidth=1.2, zorder=1)
        if not math.isnan(line.slope):
            facts.append(f"slope {line.slope:.2f}, dotted 1")
    if len(not_moved):
        points(axes, not_moved, "time_scale", "value", styles, filled=False, marker="^", size=4.5)
        facts.append(f"{len(not_moved)} beyond the end (open)")
    axes.set(xscale="log", yscale="log", xlabel="init_A / LR_A", ylabel="steps until A has moved by its norm")
    # The axis spans a decade or more, so that it has ticks.
    drawn = pd.concat([moved, not_moved])["value"].astype(float)
    axes.set_ylim(min(drawn.min() / 1.4, drawn.max() / 7), drawn.max() * 1.4)
    style.plain_log_ticks(axes)
    style.number_log_ticks(axes.yaxis)
    style.note(axes, " · ".join(facts))


def _draw_update_norms(axes: Axes, rows: pd.DataFrame, styles: Styles) -> None:
    norms, diverged = only(rows, "update_norm"), only(rows, "diverged")
    if norms.empty:
        style.say(axes, "The curves hold no update norms\nin the standard parametrization.")
        return
    for arm, curve in norms.groupby("arm"):
        curve = curve.sort_values("step")
        steps, look = curve["step"].astype(float), styles[str(arm)]
        low, high = curve["low"].astype(float), curve["high"].astype(float)
        axes.fill_between(steps, low, high, color=look.colour, alpha=0.15, linewidth=0)
        axes.plot(steps, curve["value"], **look.line, marker="o", ms=3)
    still = only(rows, "still_a")
    for _, control in still.groupby([*PAIR_SETTING, "time_scale"], dropna=False):
        control = control.sort_values("step")
        axes.plot(control["step"].astype(float), control["value"], "--", color="0.45", linewidth=1.2, zorder=2)
    axes.set(xscale="log", yscale="log", xlabel="training step", ylabel="||change of W|| / LR, one step")
    style.plain_log_ticks(axes)
    style.number_log_ticks(axes.yaxis)
    facts = [seeds_text(norms["n"]), *(["dashed: A still"] if len(still) else [])]
    facts += [f"{len(diverged)} runs diverged"] if len(diverged) else []
    style.note(axes, " · ".join(facts))
