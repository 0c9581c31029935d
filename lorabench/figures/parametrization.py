"""What LoRA's parametrization does: the factor 1/r, two redundant hyperparameters, when A moves, how updates grow; and
its variants: the loss that each reaches at its best learning rate, and that learning rate.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lorabench.analysis import invariances
from lorabench.analysis.arms import arm_label, arm_table, is_standard
from lorabench.analysis.curves import train_curves
from lorabench.analysis.estimate import mean_interval
from lorabench.analysis.invariances import PAIR_SETTING
from lorabench.analysis.slopes import log_log
from lorabench.figures import grid, style
from lorabench.figures.grid import ARM_COLUMNS, Styles, diverged_runs, only, seeds_text
from lorabench.store.tables import Tables

_STEPS = 50  # over which runs that should be equivalent are compared
_IDENTICAL = 1e-5  # the numerical precision of a training loss, in nats per token

_ENDS, _BAND = ["value", "low", "high"], {"low": "value_low", "high": "value_high"}
_COLUMNS = [*ARM_COLUMNS, "eps", "element", "rule", "update_scale", "time_scale"]
_COLUMNS += ["step", "value", "low", "high", "n", "run_id"]

_RULE_LOOKS: dict[str, dict[str, Any]] = {
    rule: {"color": colour, "linestyle": line, "marker": marker}
    for rule, (colour, line, marker) in zip(
        invariances.RULES.values(), (("black", "-", "o"), ("0.35", "--", "s"), ("0.6", ":", "^")), strict=True
    )
}


def draw(tables: Tables) -> style.Drawn:
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
    lora = invariances.with_scales(tables.runs)
    if lora.empty:
        return style.empty_figure("There are no LoRA runs."), pd.DataFrame(columns=_COLUMNS)
    groups = [(f"{model} · {dataset}", runs) for (model, dataset), runs in lora.groupby(["model", "dataset"])]
    parts = [_rows(runs, tables.curves) for _, runs in groups]
    plotted = pd.concat(parts, ignore_index=True)
    figure = style.new_figure(2 * style.PANEL_HEIGHT * len(groups))
    styles = style.arm_styles(plotted)
    titles = ("first update", "redundant pair", "when A moves", "size of updates")
    for place, ((title, _), rows) in enumerate(zip(groups, parts, strict=True)):
        panels = [figure.add_subplot(2 * len(groups), 2, 4 * place + column) for column in (1, 2, 3, 4)]
        for axes, what in zip(panels, titles, strict=True):
            axes.set_title(f"{title} · {what}", pad=18, parse_math=False)
        _draw_first_descents(panels[0], only(rows, "first_descent"))
        _draw_differences(panels[1], only(rows, "equivalent"), only(rows, "not_equivalent"))
        _draw_move_times(panels[2], only(rows, "a_moved"), only(rows, "a_not_moved"), styles)
        _draw_update_norms(panels[3], rows, styles)
    return style.legends(figure, styles, plotted)


def _rows(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    # The largest difference of equivalent runs by step, and the range of the difference of other pairs. Before the
    # first update, all runs have the loss of the base model.
    apart = invariances.differences(invariances.invariance_pairs(runs), curves, _STEPS)
    pairs = apart[apart["step"] > 1].groupby(["eps", "step", "equivalent"], dropna=False)["difference"]
    ranges = pairs.agg(low="min", high="max", n="size").reset_index()
    equivalent = ranges["equivalent"].astype(bool)
    # The time until A moves is a geometric mean over seeds, which is unknown if A did not move that far in one of them.
    times = invariances.move_times(runs, curves)
    times = times.assign(size=np.log(times["step"].astype(float)))
    times = _over_seeds(times, [*PAIR_SETTING, *invariances.CONFIGURATION], "update_scale", "time_scale")
    times[_ENDS] = np.exp(times[_ENDS].astype(float))
    moved = times["value"].notna()
    # In runs whose A stays still, only B is updated noticeably, so the norm is per unit of the LR of B.
    controls = runs[runs["run_id"].isin(invariances.fixed_a_controls(runs)["run_id_slow"])]
    still = train_curves(controls, curves, "update_norm")
    still = still.assign(size=still["value"] / (still["lr"] * still["lr_ratio"]))
    descents = invariances.descent_ratios(invariances.first_descents(runs, curves))
    parts = {
        "first_descent": descents.rename(columns={"ratio": "value", "n_seeds": "n"}),
        "equivalent": ranges.assign(value=ranges["high"])[equivalent],
        "not_equivalent": ranges.assign(value=ranges["low"])[~equivalent],
        "a_moved": times[moved],
        "a_not_moved": times.assign(value=times["steps"].astype(float))[~moved & times["steps"].notna()],
        "update_norm": _over_seeds(invariances.step_sizes(runs, curves), [*PAIR_SETTING, "step"]),
        "still_a": _over_seeds(still, [*PAIR_SETTING, "lr", "lr_ratio", "step"], "time_scale"),
        "diverged": diverged_runs(runs).drop(columns="method"),
    }
    rows = grid.tidy({element: part.dropna(axis=1, how="all") for element, part in parts.items()}, _COLUMNS)
    # Only these elements have the colour of their rank; the other rows have no entry in the legend.
    coloured = rows["element"].isin(["a_moved", "a_not_moved", "update_norm"])
    rows["arm"] = ("LoRA r" + rows["rank"].astype("Int64").astype(str)).where(coloured, None)
    rows = rows.assign(model=runs["model"].iloc[0], dataset=runs["dataset"].iloc[0], method="lora")
    return rows.astype({"n": "Int64", "step": "Int64"})


def _over_seeds(table: pd.DataFrame, key: list[str], *kept: str) -> pd.DataFrame:
    """Return the mean over seeds of the column `size`, its 95% interval, the number of seeds, and the `kept` columns.

    Rows that agree in the columns of `key` differ in their seed only.
    """
    rows = []
    for _, seeds in table.groupby(key, dropna=False):
        row = {name: seeds[name].iloc[0] for name in (*key, *kept)} | {"n": len(seeds)}
        rows.append(row | dict(zip(_ENDS, mean_interval(seeds["size"]), strict=True)))
    return pd.DataFrame(rows, columns=[*key, *kept, "n", *_ENDS])


def _draw_first_descents(axes: Axes, descents: pd.DataFrame) -> None:
    if descents.empty:
        style.say(axes, "The curves hold no descent of step 1.")
        return
    axes.axhspan(0.95, 1.05, color="0.88", linewidth=0, zorder=0)
    entries = {}
    for _, batch_rows in descents.groupby(["placement", "batch_size", "eps"], dropna=False):
        for rule, look in _RULE_LOOKS.items():
            ratios = batch_rows[batch_rows["rule"] == rule].sort_values("rank").astype({"rank": float})
            if len(ratios):
                ratio, *ends = ratios[_ENDS].to_numpy(float).T
                bars: dict[str, Any] = {"yerr": np.abs(ends - ratio), "capsize": 2.5, "ms": 4, "linewidth": 1.3}
                entries[rule] = axes.errorbar(ratios["rank"], ratio, **bars, zorder=2, **look)
    axes.legend(entries.values(), entries, loc="lower right")
    style.log_axes(axes, "rank", "first descent over that of the highest rank", "log")
    axes.set_xticks(sorted(set(descents["rank"].astype(int))))
    low = min(0.5, float(descents["value"].min()))
    axes.set_ylim(low / 1.3, max(1.3, float(descents["value"].max()) * 1.3))
    style.log_ticks(axes.yaxis)
    seeds = descents["n"].astype(int)
    style.note(axes, f"{seeds.min()} seeds · band ± 5%" if seeds.nunique() == 1 else f"{seeds.min()} seeds or more")


def _draw_differences(axes: Axes, equivalent: pd.DataFrame, other: pd.DataFrame) -> None:
    if equivalent.empty:
        style.say(axes, "No two runs should be equivalent.")
        return
    if len(other):
        grid.band(axes, other, "step", "low", "high", label="others, range")
        steps = other["step"].astype(float)
        axes.plot(steps, other["value"], "--", color="0.45", linewidth=1.2, label="others, smallest", zorder=2)
    # A difference of exactly 0 has no place on a log axis.
    shown = equivalent[equivalent["value"] > 0]
    axes.plot(shown["step"].astype(float), shown["value"], color="black", label="equivalent, largest", zorder=3)
    axes.axhline(_IDENTICAL, color="black", linestyle=":", linewidth=1.0, zorder=1)
    style.log_axes(axes, "training step", "|difference of NLL| so far (nats / token)", "log")
    axes.legend(loc="upper left")
    low, high = axes.get_ylim()
    # The upper part of the panel is kept free for the legend.
    axes.set_ylim(min(low, _IDENTICAL / 10), high * (high / min(low, _IDENTICAL / 10)) ** 0.35)
    axes.set_xlim(1, _STEPS * 1.1)
    last, others = equivalent.iloc[-1], other["n"].iloc[-1] if len(other) else 0
    remark = "" if pd.isna(last["eps"]) else f"eps {last['eps']:g}"
    remark = "equivalent runs equal to the last bit" if shown.empty else remark
    style.note(axes, f"{last['n']} equivalent pairs", f"{others} others", remark)


def _draw_move_times(axes: Axes, moved: pd.DataFrame, not_moved: pd.DataFrame, styles: Styles) -> None:
    if moved.empty and not_moved.empty:
        style.say(axes, "The curves do not hold how far A has moved.")
        return
    facts = []
    if len(moved):
        grid.points(axes, moved.rename(columns=_BAND).assign(marker="o"), "time_scale", "value", styles, 4)
        # Only runs whose first updates have the same size can be compared.
        scale = moved["update_scale"].map(lambda value: f"{value:.9g}")
        comparable = moved.sort_values("time_scale").groupby([*PAIR_SETTING, scale], dropna=False)
        for _, line in comparable:
            axes.plot(line["time_scale"], line["value"], color="0.6", linewidth=0.9, zorder=1)
        fit = log_log(moved["time_scale"], moved["value"], groups=comparable.ngroup()[moved.index])
        at = np.array([moved["time_scale"].min(), moved["time_scale"].max()], float)
        middle = np.exp(np.log(moved[["time_scale", "value"]].astype(float)).mean())
        axes.plot(at, middle["value"] * at / middle["time_scale"], ":", color="0.4", linewidth=1.2, zorder=1)
        if not math.isnan(fit.slope):
            facts.append(f"slope {fit.slope:.2f}, dotted 1")
    if len(not_moved):
        grid.points(axes, not_moved.assign(marker="^", filled=False), "time_scale", "value", styles, 4.5)
        facts.append(f"{len(not_moved)} beyond the end (open)")
    style.log_axes(axes, "init_A / LR_A", "steps until A has moved by its norm", "log")
    # The axis spans a decade or more, so that it has ticks.
    drawn = pd.concat([moved, not_moved])["value"].astype(float)
    axes.set_ylim(min(drawn.min() / 1.4, drawn.max() / 7), drawn.max() * 1.4)
    style.log_ticks(axes.yaxis)
    style.note(axes, *facts)


def _draw_update_norms(axes: Axes, rows: pd.DataFrame, styles: Styles) -> None:
    norms, still, diverged = (only(rows, element) for element in ("update_norm", "still_a", "diverged"))
    if norms.empty:
        style.say(axes, "The curves hold no update norms\nin the standard parametrization.")
        return
    grid.lines(axes, norms.sort_values("step").rename(columns=_BAND), "step", "value", styles, marker="o", ms=3)
    for _, control in still.sort_values("step").groupby([*PAIR_SETTING, "time_scale"], dropna=False):
        axes.plot(control["step"].astype(float), control["value"], "--", color="0.45", linewidth=1.2, zorder=2)
    style.log_axes(axes, "training step", "||change of W|| / LR, one step", "log")
    style.log_ticks(axes.yaxis)
    lost = f"{len(diverged)} runs diverged" if len(diverged) else ""
    style.note(axes, seeds_text(norms["n"]), "dashed: A still" if len(still) else "", lost)


_VARIANTS = [*ARM_COLUMNS, "alpha", "init_a", "lr_ratio", "eps", "element", "nll", "nll_low", "nll_high"]
_VARIANTS += ["n_seeds", "at_edge", "lr", "lr_low", "lr_high", "resolved", "n_diverged", "run_id"]
_ROW = 0.27  # the height in inches of the row of one variant


def draw_variants(tables: Tables) -> style.Drawn:
    """Draw the variants; return it, and what it plots as one tidy table.

    The column `element` says what a row is: `variant` (`nll` is the fitted minimum of the test loss, in nats per scored
    token, with its 95% interval; `lr` is the fitted optimum of LR_A with its 95% interval), `margin_band` (from the
    standard's loss down by the margin, from `nll_low` to `nll_high`) or `diverged` (one run).
    """
    parts: list[tuple[str, pd.DataFrame]] = []
    lora = invariances.with_lr_grid(tables.runs[tables.runs["method"] == "lora"])
    for title, panel in grid.titled(lora):
        for _, rows in panel.groupby(PAIR_SETTING, dropna=False):
            standard = is_standard(rows)
            # A setting has the standard parametrization and a variant of it.
            if standard.any() and not standard.all():
                several = f" · eps {rows['eps'].iloc[0]:g}" if panel["eps"].nunique() > 1 else ""
                parts.append((f"{title} · r{rows['rank'].iloc[0]}{several}", _variant_rows(tables, rows)))
    if not parts:
        sentence = "There are no LR-tuned variants of the standard parametrization."
        return style.empty_figure(sentence), pd.DataFrame(columns=_VARIANTS)
    heights = [_ROW * len(only(part, "variant")) + 1.2 for _, part in parts]
    figure = style.new_figure(sum(heights))
    axes = figure.subplots(len(parts), 2, squeeze=False, sharey="row", gridspec_kw={"height_ratios": heights})
    for (title, rows), (left, right) in zip(parts, axes, strict=True):
        left.set_title(title, pad=18, parse_math=False)
        _draw_variants(left, right, rows)
    plotted = pd.concat([part for _, part in parts], ignore_index=True)
    variants = only(plotted, "variant")
    resolved = variants["resolved"].astype(bool)
    white = {"mfc": "white", "mew": 1.1, "ms": 5}
    marks = [
        (True, style.mark("standard", "s", color="black", ls="-", lw=1.4, ms=5)),
        ("margin_band", style.shade("within the margin of the standard", "0.88")),
        (variants["at_edge"].astype(bool).any(), style.mark("best LR at the edge", "o", **white)),
        (resolved.any(), style.mark("optimum, interval", "D", ls="-", lw=1.4, ms=5)),
        ((~resolved).any(), style.mark("optimum, not resolved", "D", **white)),
    ]
    return style.legends(figure, {}, plotted, marks)


def _variant_rows(tables: Tables, runs: pd.DataFrame) -> pd.DataFrame:
    [comparison] = grid.compared(tables, runs)
    unknown = {"lr": math.nan, "nll": math.nan, "resolved": False, "at_edge": False}
    rows = []
    for arm in comparison.arms:
        best = grid.optimum(comparison, arm)
        lost = len(diverged_runs(comparison.rows[arm_label(arm)]))
        rows.append(arm | (best if best and best["fitted"] else unknown) | {"n_diverged": lost})
    columns = [name for name in _VARIANTS if name not in {*comparison.arms[0], "arm", "element", "run_id"}]
    variants = arm_table(rows, columns).sort_values(["alpha", "lr_ratio"], ascending=False, kind="stable")
    standard = grid.margin_band(comparison, variants[is_standard(variants)].dropna(subset=["nll"]))
    if len(standard):
        # A variant is better if its loss is lower than the standard's by more than the margin.
        margin = standard["nll_high"] - standard["nll_low"]
        standard = standard.assign(nll_low=standard["nll"] - margin, nll_high=standard["nll"])
    diverged = diverged_runs(runs).drop(columns=["n_diverged"], errors="ignore")
    table = grid.tidy({"variant": variants, "margin_band": standard, "diverged": diverged}, _VARIANTS)
    return table.astype({"n_seeds": "Int64", "n_diverged": "Int64"})


def _draw_variants(left: Axes, right: Axes, rows: pd.DataFrame) -> None:
    """Draw a row for each variant: the loss at its best LR in the left panel, and that LR in the right panel."""
    variants = only(rows, "variant")
    for band in only(rows, "margin_band").to_dict("records"):
        left.axvspan(band["nll_low"], band["nll_high"], color="0.88", linewidth=0, zorder=0)
        left.axvline(band["nll"], color="0.6", linewidth=0.8, zorder=1)
    for place, row in enumerate(variants.to_dict("records")):
        shape, colour = ("s", "black") if row["alpha"] == 32 and row["lr_ratio"] == 1 else ("o", style.MUTED)
        for axes, value, marker, edge, filled in (
            (left, "nll", shape, colour, not row["at_edge"]),
            (right, "lr", "D", style.MUTED, row["resolved"]),
        ):
            axes.hlines(place, row[f"{value}_low"], row[f"{value}_high"], color=edge, linewidth=1.4, zorder=2)
            face = edge if filled else "white"
            axes.plot(row[value], place, marker, ms=5, mfc=face, mec=edge, mew=1.1, zorder=3)
    labels = [f"alpha {row['alpha']:g}, LR_B/LR_A {row['lr_ratio']:g}" for _, row in variants.iterrows()]
    left.set_yticks(range(len(variants)), labels)
    left.set(ylim=(-0.6, len(variants) - 0.4), xlabel="final test NLL (nats / token)")
    lost = ", ".join(variants.loc[variants["nll"].isna(), "arm"])
    diverged = f"{len(only(rows, 'diverged'))} diverged"
    style.note(left, seeds_text(variants["n_seeds"]), diverged, f"no loss: {lost}" if lost else "")
    if variants["lr"].notna().any():
        right.set_xscale("log")
        style.log_ticks(right.xaxis)
        # The axis spans a decade or more, so that it has ticks, and optima that are close look close.
        ends = variants[["lr", "lr_low", "lr_high"]].astype(float)
        low, high = float(ends.min().min()), float(ends.max().max())
        margin = max(1.2, math.sqrt(10 * low / high))
        right.set_xlim(low / margin, high * margin)
    right.set_xlabel("optimal learning rate of A")
    right.tick_params(axis="y", length=0, labelleft=False)
    for axes in (left, right):
        axes.grid(visible=False, axis="y")
