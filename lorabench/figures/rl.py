"""Figures 7 and 8 of the paper: accuracy, responses, and the sampler's distribution over RL training.

The panel of the sampler's distribution is one that the paper does not have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lorabench.analysis.arms import ARM, rows_of
from lorabench.analysis.rewards import reward_curves, runs_above_max_kl
from lorabench.figures import grid, style
from lorabench.figures.by_lr import (
    ACCURACY,
    ACCURACY_COLUMNS,
    STRIP,
    accuracy_rows,
    draw_levels,
    draw_lr_panel,
    lr_marks,
)
from lorabench.figures.grid import ARM_COLUMNS, PANEL, Styles, only, seeds_text
from lorabench.runs import MAX_KL
from lorabench.store.tables import Tables
from lorabench.utils import formats

_COLUMNS = [
    *(*ARM_COLUMNS, "element", "split", "lr", "step", "episodes", "mean", "sd", "n_seeds"),
    *("n_problems", "n_samples", "truncated", "max_new_tokens", "run_id"),
]

# A training batch has few problems, and each step has others, so training metrics are running means over this share of
# the steps.
_SMOOTH = 1 / 20

# The number of columns of the grid that panels are placed on, and the height of a panel in inches.
_GRID, _HEIGHT = 6, 2.6

_OWN_SPLITS = {"train", "validation", "test"}


def draw_accuracy(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw figure 7; return it, and what it plots as one tidy table.

    The column `element` says what a row is: `curve` (greedy test accuracy of an arm near its optimal LR after a step,
    its mean and standard deviation over seeds), or one of `accuracy_rows`.
    """
    curves = _curve_rows(tables, "test", "accuracy").rename(columns={"mean": "accuracy", "sd": "accuracy_sd"})
    columns = [*ACCURACY_COLUMNS, "step", "episodes"]
    plotted = grid.joined([grid.tidy({"curve": curves}, columns), accuracy_rows(tables)], columns)
    figure, drawn = grid.panels(plotted, each=2, strip=STRIP)
    styles = style.arm_styles(plotted)
    for rows, (over_time, by_lr) in drawn:
        curve = only(rows, "curve").rename(columns={"accuracy": "mean", "accuracy_sd": "sd"})
        if curve.empty:
            style.say(over_time, "There are no test accuracies over training.")
        else:
            draw_levels(over_time, rows, "accuracy")
            _draw_curves(over_time, curve, styles)
            over_time.set_ylabel("test accuracy at the best LR")
            style.note(over_time, seeds_text(curve["n_seeds"]), strip=STRIP)
        draw_lr_panel(by_lr, rows[rows["element"] != "curve"], styles, ACCURACY)
    style.legends(figure, styles, lr_marks(plotted))
    return figure, plotted


def _curve_rows(tables: Tables, split: str, metric: str, further: Sequence[str] = ()) -> pd.DataFrame:
    """Return a metric over the training of each arm near its optimal LR: its mean and standard deviation over seeds.

    Metrics of the split `train` are measured on each step's batch, so they are running means over a twentieth of the
    steps.

    Args:
        tables: RL runs and their curves.
        split: a split of the curves, or the name of a further problem set.
        metric: a metric of the curves.
        further: further metrics of the split; the mean of each gets a column.
    """

    def means(name: str) -> pd.DataFrame:
        rows = reward_curves(tables.runs, tables.curves, split, name)
        for _, arm in rows.groupby(ARM, dropna=False) if split == "train" else []:
            window = max(1, round(_SMOOTH * len(arm)))
            smooth = arm[["mean", "sd"]].astype(float).rolling(window, center=True, min_periods=1).mean()
            rows.loc[arm.index, ["mean", "sd"]] = smooth
        return rows

    rows = means(metric)
    for name in further:
        other = means(name).rename(columns={"mean": name})
        rows = rows.merge(other[[*ARM, "step", name]], how="left", on=[*ARM, "step"])
    return rows.assign(split=split)


def _draw_curves(axes: Axes, rows: pd.DataFrame, styles: Styles) -> None:
    """Draw the mean of each arm as a line, and its standard deviation over seeds as a band."""
    for arm, points in rows.groupby("arm"):
        mean, sd = points["mean"].astype(float), points["sd"].astype(float)
        look: dict[str, Any] = {"color": styles[str(arm)].colour, "alpha": 0.15, "linewidth": 0, "zorder": 1}
        axes.fill_between(points["step"].astype(float), mean - sd, mean + sd, **look)
    grid.lines(axes, rows, "step", "mean", styles)
    axes.set_xlabel("training step")
    # Runs that were stopped at once have only a point at step 0.
    axes.set_xlim(0, max(1, axes.get_xlim()[1]))
    # No metric is negative, but a band may be, and so is half of the range that Matplotlib gives to zeros.
    low, high = axes.get_ylim()
    axes.set_ylim(bottom=max(low, -0.04 * high))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


class _Panel(NamedTuple):
    """A panel: the label of its y-axis, its rows, the text if there are none, and a fact for its note.

    With a limit the y-axis is logarithmic, and the limit is a dashed line.
    """

    ylabel: str
    rows: pd.DataFrame
    absent: str
    fact: str
    limit: float | None = None


def draw_responses(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw figure 8; return it, and what it plots as one tidy table.

    Arms are shown at the LR of their grid nearest to the fitted optimum; `mean` and `sd` are over seeds. The column
    `element` says what a row is: `accuracy` (on the further problem set `split`, over `n_samples` answers to its
    `n_problems`), `response_length` (in tokens, with the share `truncated` at `max_new_tokens`), `reflection` (the
    share of responses with a word of backtracking or checking), `kl` (the absolute value of the KL of sampler and
    learner, nats per token), `above_max_kl` (one run, at any LR, with a KL above MAX_KL) or `diverged` (one run, at any
    LR). Lengths, reflection and KL are running means over training batches.
    """
    groups = grid.titled(tables.runs)
    plotted = _responses(tables)
    styles = style.arm_styles(plotted)
    drawn = [(title, _panels(rows_of(plotted, runs.iloc[0], PANEL))) for title, runs in groups]
    # Three panels stand in a row where that fills all rows, and otherwise two.
    widths = [2 if len(shown) % 3 == 0 else 3 for _, shown in drawn]
    heights = [math.ceil(len(shown) * width / _GRID) for (_, shown), width in zip(drawn, widths, strict=True)]
    figure = style.new_figure(_HEIGHT * sum(heights))
    places = figure.add_gridspec(sum(heights), _GRID)
    for place, ((title, shown), width) in enumerate(zip(drawn, widths, strict=True)):
        for number, panel in enumerate(shown):
            row, column = divmod(number * width, _GRID)
            axes = figure.add_subplot(places[sum(heights[:place]) + row, column : column + width])
            axes.set_title("" if number else title, pad=18, parse_math=False)
            _draw_panel(axes, panel, styles)
    style.legends(figure, styles)
    return figure, plotted


def _responses(tables: Tables) -> pd.DataFrame:
    """Return what figure 8 plots."""
    runs, curves = tables.runs, tables.curves
    accuracies = curves.loc[curves["metric"] == "accuracy", "split"] if len(curves) else pd.Series(dtype=str)
    sets = sorted(set(accuracies) - _OWN_SPLITS)
    on_sets = [_curve_rows(tables, name, "accuracy", ("n_problems", "n_samples")) for name in sets]
    length = _curve_rows(tables, "train", "response_length", ("truncated",))
    cap = runs.groupby(PANEL, dropna=False, as_index=False)["max_new_tokens"].max()
    # A logarithmic axis can show only absolute values, and a band would reach down to its edge where its deviation is
    # above the mean.
    kl = curves[curves["metric"] == "kl"] if len(curves) else curves
    kl = kl.assign(value=kl["value"].astype(float).abs()) if len(curves) else kl
    parts = {
        "accuracy": pd.concat(on_sets) if on_sets else pd.DataFrame(),
        "response_length": length.merge(cap, how="left", on=PANEL),
        "reflection": _curve_rows(tables, "train", "reflection"),
        "kl": _curve_rows(Tables(runs, kl), "train", "kl").assign(sd=math.nan),
        "above_max_kl": runs[runs["run_id"].isin(runs_above_max_kl(curves))],
        "diverged": grid.diverged_runs(runs),
    }
    return grid.tidy(parts, _COLUMNS)


def _panels(rows: pd.DataFrame) -> list[_Panel]:
    """Return the panels of one model and dataset."""
    accuracy, length, kl, above = (only(rows, name) for name in ("accuracy", "response_length", "kl", "above_max_kl"))
    sets = {str(name): on_set for name, on_set in accuracy.groupby("split")} or {"": accuracy}
    absent = "There are no accuracies on a problem set\nother than the training set."
    cut, high = _cut(length), f"{len(above)} run{'' if len(above) == 1 else 's'} above {MAX_KL:g}"
    reflection, diverged = only(rows, "reflection"), f"{len(only(rows, 'diverged'))} diverged"
    return [
        *(_Panel(f"accuracy on {name}", on_set, absent, _answers(on_set)) for name, on_set in sets.items()),
        _Panel("response length (tokens)", length, "There are no response lengths.", cut),
        _Panel("KL (nats per token)", kl, "There is no KL of sampler and learner.", high, limit=MAX_KL),
        _Panel("share with reflection", reflection, "There are no rates of reflection.", diverged),
    ]


def _draw_panel(axes: Axes, panel: _Panel, styles: Styles) -> None:
    if panel.rows.empty:
        style.say(axes, panel.absent)
        return
    if panel.limit is not None:
        axes.set_yscale("log")
        # The axis reaches over the limit whatever the values are; they may all be 0.
        axes.update_datalim([(0, panel.limit / 2), (0, panel.limit * 2)], updatex=False)
        axes.axhline(panel.limit, color=style.MUTED, linestyle="--", linewidth=1)
    _draw_curves(axes, panel.rows, styles)
    axes.set_ylabel(panel.ylabel, parse_math=False)
    style.note(axes, seeds_text(panel.rows["n_seeds"]), panel.fact)


def _answers(rows: pd.DataFrame) -> str:
    """Write how many answers of a run an accuracy is the mean of."""
    counts = {"answers": rows["n_samples"].max(), "problems": rows["n_problems"].max()}
    return " to ".join(f"{formats.count(count)} {what}" for what, count in counts.items() if not pd.isna(count))


def _cut(rows: pd.DataFrame) -> str:
    """Write which share of the responses was cut off at the end of training, which bounds their length."""
    last = rows.dropna(subset=["truncated"]).groupby("arm")["truncated"].last()
    if last.empty:
        return ""
    fewest, most = f"{last.min():.0%}", f"{last.max():.0%}"
    cap = rows["max_new_tokens"].max()
    share = fewest if fewest == most else f"{fewest} to {most}"
    return f"{share} cut" + ("" if pd.isna(cap) else f" at {cap:.0f} tokens")
