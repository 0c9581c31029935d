"""The final result against the learning rate, by arm: figures 2 and 6 of the paper, a panel of others, figures 4 and 5,
which add the result by the layers that carry LoRA against the parameters, and what it would be had runs been shorter.

In RL the result is the accuracy: the rows are made from error rates as if these were losses, and then turned around.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter
from matplotlib.transforms import ScaledTranslation, blended_transform_factory

from lorabench.analysis.alpha_rules import judged_arms
from lorabench.analysis.arms import ARM, arm_label, with_losses
from lorabench.analysis.comparison import Comparison, comparisons
from lorabench.analysis.curves import at_step
from lorabench.analysis.published import paper_numbers, sweep_of
from lorabench.claims.learning_rate import SHORT_STEPS
from lorabench.figures import grid, style
from lorabench.figures.grid import ARM_COLUMNS, PANEL, Styles, only
from lorabench.store.checks import is_rl
from lorabench.store.tables import Tables
from lorabench.utils import formats

LR_COLUMNS = [*ARM_COLUMNS, "element", "lr", "lr_low", "lr_high"]
LR_COLUMNS += ["nll", "nll_sd", "n_seeds", "resolved", "above_range", "run_id", "seed"]
ACCURACY_COLUMNS = [name.replace("nll", "accuracy") for name in LR_COLUMNS if name != "above_range"]

# For the column of the final result, the test loss or in RL the test accuracy: the `element` of rows that are its means
# over seeds, and the labels of its axis in a panel by learning rate and where arms are at their best learning rate.
_RESULTS = {
    "nll": ("loss", "final test NLL (nats / token)", "best test NLL (nats / token)"),
    "accuracy": ("accuracy", "final test accuracy", "accuracy at the best LR"),
}

STRIP = 11.0
"""The height in points of the strip above a panel that holds the marks of runs outside the panel."""

_DODGE = 4.5  # the distance in points between the arms of one LR in the strip
_AXIS_POINTS = 30  # the height in points of the x-axis with its labels

_DIVERGED, _UNREWARDED = "x", "$0$"  # marks in the strip

_LEVEL: dict[str, Any] = {"color": "0.6", "linewidth": 1.2, "zorder": 1}

LEVELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "base": ("base_reward", "before training", _LEVEL),
    "constant": ("constant_reward", "best constant answer", {**_LEVEL, "linestyle": ":"}),
    "rule": ("rule_reward", "best cheap rule", {**_LEVEL, "linestyle": "--"}),
}
"""The lines at accuracies without learning the task, by element: the column of `runs`, the entry of the legend, the
look of the line."""


def draw(tables: Tables) -> style.Drawn:
    """Draw figure 2 or 6; return it, and what it plots as one tidy table, the `result_rows` and published losses.

    Rows of the element `published` are losses of full fine-tuning, and of LoRA on all layers, that others published for
    a panel's model and dataset, in the place that `source` names; their data order, chat template and schedule may
    differ.
    """
    plotted, sources = result_rows(tables, grid.compared(tables)), []
    if "nll" in plotted:
        for _, panel in plotted[PANEL].drop_duplicates().iterrows():
            sweep = sweep_of(panel["model"], panel["dataset"]).assign(**dict(panel))
            sweep = sweep[(sweep["method"] == "fullft") | (sweep["placement"] == "all")]
            plotted = grid.tidy({"published": sweep}, [*LR_COLUMNS, "source"], plotted)
        sources = sorted(plotted["source"].dropna().unique())
    marks = [(True, style.mark(f"published ({name})", "o", color="0.6", ls="-", ms=3)) for name in sources]
    figure, styles, panels = grid.panels(plotted, 1, STRIP)
    for rows, [axes] in panels:
        draw_lr_panel(axes, rows, styles)
    return style.legends(figure, styles, plotted, [*lr_marks(plotted), *marks])


def draw_placement(tables: Tables) -> style.Drawn:
    """Draw figure 4, or a part of figure 5; return it, and what it plots as one tidy table: `result_rows` with best.

    The right panels show what each arm reaches at its best LR against its trainable parameters, listed below them.
    """
    plotted = result_rows(tables, grid.compared(tables), with_best=True)
    value = "accuracy" if "accuracy" in plotted else "nll"
    figure, styles, panels = grid.panels(plotted, 2, STRIP)
    for rows, [left, axes] in panels:
        draw_lr_panel(left, rows, styles)
        for band in only(rows, "margin_band").to_dict("records"):
            axes.axhspan(band[f"{value}_low"], band[f"{value}_high"], color="0.85", linewidth=0, zorder=0)
        best = only(rows, "best")
        placed = best.dropna(subset=["trainable_params"]).sort_values("trainable_params")
        counts = placed["trainable_params"].astype(float)
        for _, arms in placed.groupby("placement"):
            look: dict[str, Any] = {"color": style.MUTED, "linestyle": styles[arms["arm"].iloc[0]].linestyle}
            axes.plot(counts[arms.index], arms[value], linewidth=0.8, zorder=1, **look)
        for place, row in enumerate(placed.to_dict("records")):
            layers = "FullFT" if row["method"] == "fullft" else f"{row['placement'] or 'all'} r{int(row['rank'])}"
            label = f"{layers}  {row['parameters']}"
            grid.bars(axes, placed.iloc[[place]], "trainable_params", value, styles[row["arm"]], 6, label)
        axes.set(xscale="log", xlabel="trainable parameters", ylabel=_RESULTS[value][2])
        if placed.empty:
            axes.set(xticks=[], yticks=[])
        else:
            # Counts are written as in the paper's table.
            subs = (1.0,) if counts.max() > 100 * counts.min() else (1.0, 3.0, 6.0)
            style.log_ticks(axes.xaxis, formats.parameters, subs)
            below = axes.transAxes + ScaledTranslation(0, -_AXIS_POINTS / 72, axes.figure.dpi_scale_trans)
            axes.legend(loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, ncols=2, handletextpad=0.3)
        style.note(axes, grid.lacking("no parameter count", best["arm"], placed["arm"]))
    marks = [*lr_marks(plotted), ("margin_band", style.shade("within the margin of the best"))]
    return style.legends(figure, styles, plotted, marks)


def result_rows(tables: Tables, compared: Sequence[Comparison], with_best: bool = False) -> pd.DataFrame:
    """Return what the panels plot: losses, with LR_COLUMNS, as `lr_rows` does, or accuracies, with ACCURACY_COLUMNS.

    With `with_best` there are further columns, and rows of the `element` `best` (an arm's fitted minimum of the test
    NLL with its 95% interval, the count `trainable_params`, and in `parameters` the same as text) and `margin_band`
    (from the lowest of these up by the margin).

    In RL, `accuracy` takes the place of `loss`, and the band lies below the highest accuracy. Further rows are
    `unrewarded` (a run that never got a reward; the means count it with the accuracy of the base model), `base` (the
    model before training), `constant` (the most frequent answer to all problems) and `rule` (the best cheap rule, see
    `lorabench.data.problems`). Accuracies are of greedy answers to the test split, from 0 to 1.
    """
    runs = tables.runs
    of_best = ["nll_low", "nll_high", "at_edge", "trainable_params", "parameters"] if with_best else []
    columns, losses = [*LR_COLUMNS, *of_best], [lr_rows(compared)]
    for comparison in compared if with_best else []:
        best = grid.optima([comparison], fitted=True)
        counts = [comparison.rows[label]["trainable_params"].max() for label in best["arm"]]
        best["trainable_params"] = pd.Series(counts, best.index, "Int64")
        best["parameters"] = best["trainable_params"].map(formats.parameters, na_action="ignore")
        losses.append(grid.tidy({"best": best, "margin_band": grid.margin_band(comparison, best)}, columns))
    rows = grid.tidy({}, columns, *losses)
    if not is_rl(runs).any():
        return rows
    # An accuracy is 1 minus the error rate, with the ends of its interval exchanged.
    names = {"nll": "accuracy", "nll_sd": "accuracy_sd", "nll_low": "accuracy_high", "nll_high": "accuracy_low"}
    learned = rows.replace({"element": {"loss": "accuracy"}}).rename(columns=names)
    # The parabola of an optimum may pass below an error of 0.
    learned["accuracy"] = (1 - learned["accuracy"].astype(float)).clip(0, 1)
    for end in {"accuracy_low", "accuracy_high"} & set(learned.columns):
        learned[end] = 1 - learned[end].astype(float)
    by_panel = runs.groupby(PANEL, dropna=False, as_index=False)
    parts = {
        element: by_panel.agg(accuracy=(column, "median")).dropna(subset=["accuracy"])
        for element, (column, _, _) in LEVELS.items()
    }
    further = grid.tidy({"unrewarded": runs[runs["status"] == "unrewarded"]} | parts, ACCURACY_COLUMNS)
    return grid.tidy(
        {}, [name.replace("nll", "accuracy") for name in columns if name != "above_range"], learned, further
    )


def lr_rows(compared: Sequence[Comparison]) -> pd.DataFrame:
    """Return losses, the final test NLL in nats per scored token, with the columns LR_COLUMNS.

    The column `element` says what a row is: `loss` (the mean over the seeds of one arm and LR; `above_range` where it
    is drawn as a triangle above the panel), `optimum` (fitted, with the interval of the LR) or `diverged` (one run).
    """
    runs = pd.concat([comparison.runs for comparison in compared])
    finished = with_losses(runs).dropna(subset=["test_loss"])
    loss = finished.groupby([*ARM, "lr"], dropna=False, as_index=False).agg(
        nll=("test_loss", "mean"), nll_sd=("test_loss", "std"), n_seeds=("seed", "nunique")
    )
    loss["above_range"] = False
    for _, panel in loss.groupby(PANEL, dropna=False):
        # Losses are above the range if showing them would flatten the others; the best loss of an arm never is.
        nll = panel["nll"]
        lowest, worst_best = nll.min(), panel.groupby(ARM, dropna=False)["nll"].min().max()
        top = max(worst_best, nll.quantile(0.75))
        top += 0.25 * (top - lowest)
        is_stretched = nll.max() - lowest > 1.6 * (top - lowest)
        loss.loc[panel.index, "above_range"] = (nll > top) & is_stretched
    optimum = grid.optima(compared).dropna(subset=["nll"]).drop(columns="n_seeds")
    return grid.tidy({"loss": loss, "optimum": optimum, "diverged": grid.diverged_runs(runs)}, LR_COLUMNS)


def draw_lr_panel(axes: Axes, rows: pd.DataFrame, styles: Styles) -> None:
    """Draw the rows of one panel, which hold losses or accuracies; it needs STRIP points of free height above it."""
    rows = rows[~rows["element"].isin(["best", "margin_band", "curve", "ratio"])]
    rows = rows.assign(above_range=rows["above_range"].eq(True) if "above_range" in rows else False)
    value = "accuracy" if "accuracy" in rows else "nll"
    element, label, _ = _RESULTS[value]
    means = only(rows, element)
    axes.set(xscale="log", xlabel="learning rate", ylabel=label)
    # The labels of minor ticks would overlap.
    axes.xaxis.set_minor_formatter(NullFormatter())
    draw_levels(axes, rows, value)
    published = only(rows, "published").sort_values("lr")
    ranks = sorted(published["rank"].dropna().unique())
    # Published losses are grey, darker at higher ranks; squares are full fine-tuning.
    for _, points in published.groupby("arm"):
        rank = points["rank"].iloc[0]
        grey = 0.5 if pd.isna(rank) else 0.78 - 0.28 * (ranks.index(rank) + 1) / len(ranks)
        marker = "s" if pd.isna(rank) else "o"
        axes.plot(points["lr"], points[value], marker, ls="-", color=str(grey), lw=0.9, ms=3, zorder=1.5)
    grid.lines(axes, means, "lr", value, styles)
    for arm, points in means[~means["above_range"]].groupby("arm"):
        drawn = styles[str(arm)]
        axes.plot(points["lr"], points[value], drawn.marker, color=drawn.colour, ms=3.5, zorder=drawn.zorder)
        repeated = points[points["n_seeds"] > 1]
        bars: dict[str, Any] = {"fmt": "none", "ecolor": drawn.colour, "capsize": 2.5, "zorder": 4}
        axes.errorbar(repeated["lr"], repeated[value], repeated[f"{value}_sd"], **bars)
    for best in only(rows, "optimum").to_dict("records"):
        colour = styles[best["arm"]].colour
        axes.hlines(best[value], best["lr_low"], best["lr_high"], color=colour, linewidth=1.2, zorder=5)
        face, edge = (colour, "white") if best["resolved"] else ("white", colour)
        axes.plot(best["lr"], best[value], "D", ms=5.5, mfc=face, mec=edge, mew=1.0, zorder=6)
    lowest, highest = rows["lr"].min(), rows["lr"].max()
    around = max(1.3, (highest / lowest) ** 0.1)
    axes.set_xlim(lowest / around, highest * around)
    shown = rows[rows[value].notna() & ~rows["above_range"]]
    if shown.empty:
        axes.set(ylim=(0, 1), yticks=[])
    else:
        spread = shown[f"{value}_sd"].astype(float).fillna(0.0)
        low, high = (shown[value] - spread).min(), (shown[value] + spread).max()
        if value == "accuracy":
            # The range is not empty even where all accuracies are 0, or all are 1.
            low, high = min(low, 0.95), max(high, 0.05)
        pad = 0.04 * (high - low) or 0.04 * abs(high)
        axes.set_ylim(low - pad, high + pad)
    above, diverged, unrewarded = means[means["above_range"]], only(rows, "diverged"), only(rows, "unrewarded")
    marked = [above.assign(marker="^"), diverged.assign(marker=_DIVERGED), unrewarded.assign(marker=_UNREWARDED)]
    data_by_height = blended_transform_factory(axes.transData, axes.transAxes)
    # The strip has one mark per arm and LR, side by side where several arms share an LR.
    for _, at_lr in pd.concat(marked).drop_duplicates(["arm", "lr", "marker"]).groupby("lr"):
        for place, row in enumerate(sorted(at_lr.to_dict("records"), key=lambda row: list(styles).index(row["arm"]))):
            across = (place - (len(at_lr) - 1) / 2) * _DODGE
            shift = ScaledTranslation(across / 72, STRIP / 2 / 72, axes.figure.dpi_scale_trans)
            size, width = (5.5, 0.6) if row["marker"] == _UNREWARDED else (4.5, 1.4)
            look: dict[str, Any] = {"ms": size, "mew": width, "color": styles[row["arm"]].colour, "clip_on": False}
            axes.plot(row["lr"], 1, ls="none", marker=row["marker"], transform=data_by_height + shift, **look)
    counted = f"{len(unrewarded)} unrewarded" if value == "accuracy" else f"{len(above)} above the range"
    lost = grid.lacking(f"no {element}", diverged["arm"], means["arm"])
    style.note(axes, f"{len(diverged)} diverged", counted, lost, strip=STRIP)


def draw_levels(axes: Axes, rows: pd.DataFrame, column: str) -> None:
    """Draw the lines at accuracies without learning the task, those of LEVELS that are in the rows."""
    for element, (_, _, look) in LEVELS.items():
        for level in only(rows, element)[column]:
            axes.axhline(level, **look)


def lr_marks(plotted: pd.DataFrame) -> list[tuple[Any, Artist]]:
    """Return the legend entries of a panel for `style.legends`."""
    resolved = only(plotted, "optimum")["resolved"].astype(bool)
    return [
        (resolved.any(), style.mark("optimum, interval", "D", ls="-", lw=1.2)),
        ((~resolved).any(), style.mark("optimum, not resolved", "D", mfc="white", mew=1.2)),
        ("above_range" in plotted and plotted["above_range"].eq(True).any(), style.mark("above the range", "^")),
        ("diverged", style.mark("diverged", _DIVERGED, mew=1.5)),
        ("unrewarded", style.mark("never rewarded", _UNREWARDED, mew=0.6)),
        *((level, style.line(label, **look)) for level, (_, label, look) in LEVELS.items()),
    ]


_BY_LENGTH = [*LR_COLUMNS, "full_steps", "ratio", "ratio_low", "ratio_high"]
# Ratios are drawn from this step on: earlier, the optimum of LoRA is beyond any grid, since B starts at zero.
_FIRST_STEP = 10
# The paper's numbers that the ratio is compared with, by their key in the table of the paper's numbers.
_REFERENCES = {"lr_ratio_lora_over_fullft": "long runs", "lr_ratio_short_runs": "short runs"}


def draw_by_length(tables: Tables) -> style.Drawn:
    """Draw losses by LR, and the LR ratio, had runs ended at several steps; return what is plotted, too.

    The columns and elements are those of `lr_rows`, with losses on the validation split at step `steps` of runs of
    `full_steps` steps. Further elements are `ratio` (of an arm's optimal LR to that of FullFT, with its 95% interval)
    and `reference` (the paper's ratios).
    """
    groups = grid.titled(tables.runs[judged_arms(tables.runs)])
    parts = [_rows_by_length(runs, tables.curves) for _, runs in groups]
    lengths = [sorted(int(step) for step in rows.loc[rows["element"] != "ratio", "steps"].unique()) for rows in parts]
    heights = [math.ceil((len(steps) + 1) / 2) for steps in lengths]
    printed = paper_numbers()
    references = [printed[key] for key in _REFERENCES if any(len(only(rows, "ratio")) for rows in parts)]
    plotted = grid.tidy({"reference": pd.DataFrame({"ratio": references})}, _BY_LENGTH, *parts)
    figure = style.new_figure(style.PANEL_HEIGHT * sum(heights))
    styles = style.arm_styles(plotted)
    small: dict[str, Any] = {"textcoords": "offset points", "color": style.MUTED, "fontsize": 7.5}
    for place, ((title, _), rows, steps) in enumerate(zip(groups, parts, lengths, strict=True)):
        for column, what in enumerate([*(f"at step {step}" for step in steps), "LR ratio"], start=1):
            axes = figure.add_subplot(sum(heights), 2, 2 * sum(heights[:place]) + column)
            axes.set_title(f"{title} · {what}", pad=STRIP + 18, parse_math=False)
            if column <= len(steps):
                draw_lr_panel(axes, rows[rows["steps"] == steps[column - 1]], styles)
                axes.set_ylabel("validation NLL (nats / token)")
        ratios = only(rows, "ratio")
        for key, length in _REFERENCES.items() if len(ratios) else ():
            axes.axhline(printed[key], color="0.6", linewidth=0.9, linestyle="--", zorder=1)
            text = f"paper, {length}: {printed[key]:g}"
            axes.annotate(text, (0, printed[key]), (2, 3), ("axes fraction", "data"), **small)
        known = ratios[ratios["ratio"].notna() & (ratios["steps"] > 0)].sort_values("steps")
        grid.lines(axes, known[["arm", "steps", "ratio"]], "steps", "ratio", styles)
        grid.points(axes, known.assign(filled=known["resolved"]), "steps", "ratio", styles, 4.5)
        style.ratio_axes(axes, "training step")
        if len(steps) > 1:
            axes.set_xticks(steps)
    known = only(plotted, "ratio").dropna(subset=["ratio"])
    unresolved = style.mark("ratio, not resolved", "o", mfc="white", mew=1.2)
    marks = [*lr_marks(plotted), (not known["resolved"].astype(bool).all(), unresolved)]
    return style.legends(figure, styles, plotted, marks)


def _rows_by_length(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    own = curves[curves["run_id"].isin(runs["run_id"]) & (curves["split"] == "validation")]
    evaluated = sorted(int(step) for step in own.loc[own["step"] >= _FIRST_STEP, "step"].unique())
    # A table without the length of its runs holds runs of one length.
    full = int(runs["steps"].fillna(max(evaluated, default=0)).iloc[0])
    by_step = {step: at_step(runs, curves, step) for step in evaluated if step < full}
    by_step[full] = runs.assign(final_test_nll=runs["final_valid_nll"], steps=full)
    by_length = {step: comparisons(as_of, curves)[0] for step, as_of in by_step.items() if len(as_of)}
    parts = [lr_rows([by_length[step]]) for step in (*SHORT_STEPS, full) if step in by_length]
    ratios = []
    for comparison in by_length.values():
        for arm in comparison.arms:
            if arm["method"] == "lora" and comparison.fullft:
                ratio = grid.lr_ratio(comparison.fit.log_ratio(arm_label(arm), "FullFT"))
                resolved = not comparison.problems([arm, comparison.fullft], resolved=True)
                ratios.append(arm | ratio | {"resolved": resolved})
    return grid.tidy({"ratio": pd.DataFrame(ratios)}, _BY_LENGTH, *parts).assign(full_steps=full)
