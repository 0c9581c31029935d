"""Figures 7 and 8 of the paper: accuracy, responses, and the sampler's distribution over RL training.

The panel of the sampler's distribution is one that the paper does not have.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lorabench.analysis.arms import ARM, arm_table
from lorabench.analysis.comparison import comparisons
from lorabench.analysis.curves import metric_points
from lorabench.analysis.rewards import with_error_rates
from lorabench.figures import grid, style
from lorabench.figures.by_lr import ACCURACY_COLUMNS, STRIP, draw_levels, draw_lr_panel, lr_marks, result_rows
from lorabench.figures.grid import ARM_COLUMNS, PANEL, Styles, only, rows_of, seeds_text
from lorabench.runs import MAX_KL
from lorabench.store.tables import Tables
from lorabench.utils import formats

_COLUMNS = [*ARM_COLUMNS, "element", "split", "lr", "step", "episodes", "mean", "sd", "n_seeds"]
_COLUMNS += ["n_problems", "n_samples", "truncated", "max_new_tokens", "run_id"]

# The number of columns of the grid that panels are placed on, and the height of a panel in inches.
_GRID, _HEIGHT = 6, 2.6
_KL = "KL (nats per token)"


def draw_accuracy(tables: Tables) -> style.Drawn:
    """Draw figure 7; return it, and what it plots as one tidy table.

    The column `element` says what a row is: `curve` (greedy test accuracy of an arm near its optimal LR after a step,
    its mean and standard deviation over seeds), or one of `result_rows`.
    """
    curves = _curve_rows(tables, "test", "accuracy").rename(columns={"mean": "accuracy", "sd": "accuracy_sd"})
    columns = [*ACCURACY_COLUMNS, "step", "episodes"]
    plotted = grid.tidy({"curve": curves}, columns, result_rows(tables, grid.compared(tables)))
    figure, styles, panels = grid.panels(plotted, 2, STRIP)
    for rows, [axes, right] in panels:
        curve = only(rows, "curve").rename(columns={"accuracy": "mean", "accuracy_sd": "sd"})
        if curve.empty:
            style.say(axes, "There are no test accuracies over training.")
        else:
            draw_levels(axes, rows, "accuracy")
            _draw_curves(axes, curve, styles)
            axes.set_ylabel("test accuracy at the best LR")
            style.note(axes, seeds_text(curve["n_seeds"]), strip=STRIP)
        draw_lr_panel(right, rows, styles)
    return style.legends(figure, styles, plotted, lr_marks(plotted))


def _curve_rows(tables: Tables, split: str, metric: str, *further: str) -> pd.DataFrame:
    """Return a metric over the training of each arm near its optimal LR: its `mean` and `sd` over seeds.

    The mean of each further metric gets a column of its name. A training batch has few problems, and each step has
    others, so metrics of the split `train` are running means over a twentieth of the steps.
    """
    rows = reward_curves(tables.runs, tables.curves, split, metric)
    for name in further:
        other = reward_curves(tables.runs, tables.curves, split, name).rename(columns={"mean": name})
        rows = rows.merge(other[[*ARM, "step", name]], how="left", on=[*ARM, "step"])
    for _, arm in rows.groupby(ARM, dropna=False) if split == "train" else []:
        smoothed = ["mean", "sd", *further]
        window = arm[smoothed].astype(float).rolling(max(1, round(len(arm) / 20)), center=True, min_periods=1)
        rows.loc[arm.index, smoothed] = window.mean()
    return rows.assign(split=split)


def reward_curves(
    runs: pd.DataFrame, curves: pd.DataFrame, split: str = "train", metric: str = "reward"
) -> pd.DataFrame:
    """Return a metric over training at the LR of each arm's grid that is nearest to its fitted optimum.

    Returns:
        One row per arm and step, ascending: lr, step, episodes, mean and sd over the finished seeds that have the step
        (in the metric's unit; sd NaN with one seed), n_seeds, run_ids.
    """
    points = metric_points(curves, split, metric, ("run_id", "step", "examples", "value"))
    points = points.sort_values(["step", "run_id"]).astype({"value": float})
    columns = ["step", "episodes", "mean", "sd", "n_seeds", "run_ids"]
    rows: list[dict[Any, Any]] = []
    for comparison in comparisons(with_error_rates(runs), curves):
        for arm in comparison.arms:
            chosen = comparison.at_optimum(arm)
            by_step = points[points["run_id"].isin(chosen["run_id"])].groupby("step", as_index=False)
            table = by_step.agg(
                episodes=("examples", "max"),
                mean=("value", "mean"),
                sd=("value", "std"),
                n_seeds=("run_id", "size"),
                run_ids=("run_id", list),
            )
            rows += [arm | {"lr": float(chosen["lr"].iloc[0])} | row for row in table.to_dict("records")]
    return arm_table(rows, ["lr", *columns]).astype({"step": "Int64", "episodes": "Int64"})


def runs_above_max_kl(curves: pd.DataFrame) -> set[str]:
    """Return the run_id of each run with a step whose KL has an absolute value above MAX_KL."""
    kl = metric_points(curves, "train", "kl")
    return set(kl.loc[kl["value"].astype(float).abs() > MAX_KL, "run_id"])


def _draw_curves(axes: Axes, rows: pd.DataFrame, styles: Styles) -> None:
    """Draw the mean of each arm as a line, and its standard deviation over seeds as a band."""
    ends = {"mean_low": rows["mean"] - rows["sd"], "mean_high": rows["mean"] + rows["sd"]}
    grid.lines(axes, rows.assign(**ends), "step", "mean", styles)
    axes.set_xlabel("training step")
    # Runs that were stopped at once have only a point at step 0.
    axes.set_xlim(0, max(1, axes.get_xlim()[1]))
    # No metric is negative, but a band may be, and so is half of the range that Matplotlib gives to zeros.
    low, high = axes.get_ylim()
    axes.set_ylim(bottom=max(low, -0.04 * high))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def draw_responses(tables: Tables) -> style.Drawn:
    """Draw figure 8; return it, and what it plots as one tidy table.

    Arms are shown at the LR of their grid nearest to the fitted optimum; `mean` and `sd` are over seeds. The column
    `element` says what a row is: `accuracy` (on the further problem set `split`, over `n_samples` answers to its
    `n_problems`), `response_length` (in tokens, with the share `truncated` at `max_new_tokens`), `reflection` (the
    share of responses with a word of backtracking or checking), `kl` (the absolute value of the KL of sampler and
    learner, nats per token), `above_max_kl` (one run, at any LR, with a KL above MAX_KL) or `diverged` (one run, at any
    LR). Lengths, reflection and KL are running means over training batches.
    """
    runs, curves = tables.runs, tables.curves
    sets = sorted(set(curves.loc[curves["metric"] == "accuracy", "split"]) - {"train", "validation", "test"})
    accuracies = [_curve_rows(tables, name, "accuracy", "n_problems", "n_samples") for name in sets]
    cap = runs.groupby(PANEL, dropna=False, as_index=False)["max_new_tokens"].max()
    # A logarithmic axis can show only absolute values, and a band would reach down to its edge where its deviation is
    # above the mean.
    kl = curves[curves["metric"] == "kl"]
    kl = kl.assign(value=kl["value"].astype(float).abs())
    parts = {
        "accuracy": pd.concat(accuracies) if accuracies else pd.DataFrame(),
        "response_length": _curve_rows(tables, "train", "response_length", "truncated").merge(cap, "left", PANEL),
        "reflection": _curve_rows(tables, "train", "reflection"),
        "kl": _curve_rows(Tables(runs, kl), "train", "kl").assign(sd=math.nan),
        "above_max_kl": runs[runs["run_id"].isin(runs_above_max_kl(curves))],
        "diverged": grid.diverged_runs(runs),
    }
    plotted = grid.tidy(parts, _COLUMNS)
    styles = style.arm_styles(plotted)
    drawn = [(title, _panels(rows_of(plotted, rows.iloc[0], PANEL))) for title, rows in grid.titled(runs)]
    # Three panels stand in a row where that fills all rows, and otherwise two.
    widths = [2 if len(shown) % 3 == 0 else 3 for _, shown in drawn]
    heights = [math.ceil(len(shown) * width / _GRID) for (_, shown), width in zip(drawn, widths, strict=True)]
    figure = style.new_figure(_HEIGHT * sum(heights))
    places = figure.add_gridspec(sum(heights), _GRID)
    for place, ((title, shown), width) in enumerate(zip(drawn, widths, strict=True)):
        for number, (ylabel, rows, absent, fact) in enumerate(shown):
            row, column = divmod(number * width, _GRID)
            axes = figure.add_subplot(places[sum(heights[:place]) + row, column : column + width])
            axes.set_title("" if number else title, pad=18, parse_math=False)
            if rows.empty:
                style.say(axes, absent)
                continue
            if ylabel == _KL:
                axes.set_yscale("log")
                # The axis reaches over the limit whatever the values are; they may all be 0.
                axes.update_datalim([(0, MAX_KL / 2), (0, MAX_KL * 2)], updatex=False)
                axes.axhline(MAX_KL, color=style.MUTED, linestyle="--", linewidth=1)
            _draw_curves(axes, rows, styles)
            axes.set_ylabel(ylabel, parse_math=False)
            style.note(axes, seeds_text(rows["n_seeds"]), fact)
    return style.legends(figure, styles, plotted)


def _panels(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame, str, str]]:
    """Return the panels of a model and dataset: each one's y-label, rows, text if there are none, and fact to note."""
    accuracy, length, kl, above = (only(rows, name) for name in ("accuracy", "response_length", "kl", "above_max_kl"))
    panels = []
    absent = "There are no accuracies on a problem set\nother than the training set."
    for name, on_set in accuracy.groupby("split") if len(accuracy) else [("", accuracy)]:
        # An accuracy is the mean of this number of answers of a run.
        counts = {"answers": on_set["n_samples"].max(), "problems": on_set["n_problems"].max()}
        known = [f"{formats.count(count)} {what}" for what, count in counts.items() if not pd.isna(count)]
        panels.append((f"accuracy on {name}", on_set, absent, " to ".join(known)))
    # The share of responses that was cut off at the end of training, which bounds their length.
    cut = ""
    last = length.dropna(subset=["truncated"]).groupby("arm")["truncated"].last()
    if len(last):
        fewest, most, cap = f"{last.min():.0%}", f"{last.max():.0%}", length["max_new_tokens"].max()
        cut = f"{fewest if fewest == most else f'{fewest} to {most}'} cut"
        cut += "" if pd.isna(cap) else f" at {cap:.0f} tokens"
    high = f"{len(above)} run{'' if len(above) == 1 else 's'} above {MAX_KL:g}"
    diverged = f"{len(only(rows, 'diverged'))} diverged"
    return [
        *panels,
        ("response length (tokens)", length, "There are no response lengths.", cut),
        (_KL, kl, "There is no KL of sampler and learner.", high),
        ("share with reflection", only(rows, "reflection"), "There are no rates of reflection.", diverged),
    ]
