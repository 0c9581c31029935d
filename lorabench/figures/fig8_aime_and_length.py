"""Figure 8 of the paper: accuracy on further problem sets, and the growth of responses, over RL training.

A further panel, which the paper does not have, shows how far the sampler's distribution is from the learner's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorabench.analysis.arms import arm_label, rows_of
from lorabench.analysis.rl_health import runs_above_max_kl
from lorabench.figures import style
from lorabench.figures.rl_curves import CURVE_COLUMNS, curve_rows, draw_curves
from lorabench.runs import MAX_KL
from lorabench.store.tables import Tables
from lorabench.utils import formats

_COLUMNS = [*CURVE_COLUMNS, "n_problems", "n_samples", "truncated", "max_new_tokens", "run_id"]

# The number of columns of the grid that panels are placed on, and the height of a panel in inches.
_GRID, _HEIGHT = 6, 2.6

_OWN_SPLITS = {"train", "validation", "test"}


class _Panel(NamedTuple):
    """A panel: the label of its y-axis, its rows, the text if there are none, and facts for its note.

    With a limit the y-axis is logarithmic, and the limit is a dashed line.
    """

    ylabel: str
    rows: pd.DataFrame
    absent: str
    facts: list[str]
    limit: float | None = None


@style.applied()
def draw(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw the figure; return it, and what it plots as one tidy table.

    Arms are shown at the LR of their grid nearest to the fitted optimum; `mean` and `sd` are over seeds. The column
    `element` says what a row is: `accuracy` (on the further problem set `split`, over `n_samples` answers to its
    `n_problems`), `response_length` (in tokens, with the share `truncated` at `max_new_tokens`), `reflection` (the
    share of responses with a word of backtracking or checking), `kl` (the absolute value of the KL of sampler and
    learner, nats per token), `above_max_kl` (one run, at any LR, with a KL above MAX_KL) or `diverged` (one run, at any
    LR). Lengths, reflection and KL are running means over training batches.
    """
    groups = style.titled(tables.runs)
    plotted = _plotted(tables.runs, tables.curves)
    styles = style.arm_styles(plotted)
    drawn = [(title, _panels(rows_of(plotted, runs.iloc[0], style.PANEL))) for title, runs in groups]
    # Three panels stand in a row where that fills all rows, and otherwise two.
    widths = [2 if len(panels) % 3 == 0 else 3 for _, panels in drawn]
    heights = [math.ceil(len(panels) * width / _GRID) for (_, panels), width in zip(drawn, widths, strict=True)]
    figure = style.new_figure(_HEIGHT * sum(heights))
    grid = figure.add_gridspec(sum(heights), _GRID)
    for place, ((title, panels), width) in enumerate(zip(drawn, widths, strict=True)):
        for number, panel in enumerate(panels):
            row, column = divmod(number * width, _GRID)
            axes = figure.add_subplot(grid[sum(heights[:place]) + row, column : column + width])
            axes.set_title("" if number else title, pad=18, parse_math=False)
            _draw_panel(axes, panel, styles)
    style.legends(figure, styles, [])
    return figure, plotted


def _further_sets(curves: pd.DataFrame) -> list[str]:
    """Return the problem sets in the curves that are neither trained on nor used to choose a learning rate."""
    return [] if curves.empty else sorted(set(curves.loc[curves["metric"] == "accuracy", "split"]) - _OWN_SPLITS)


def _plotted(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    on_sets = [
        curve_rows(runs, curves, name, "accuracy", ("n_problems", "n_samples")) for name in _further_sets(curves)
    ]
    length = curve_rows(runs, curves, "train", "response_length", ("truncated",))
    cap = runs.groupby(style.PANEL, dropna=False, as_index=False)["max_new_tokens"].max()
    reflection = curve_rows(runs, curves, "train", "reflection")
    # On a logarithmic axis a band would reach down to the edge where its deviation is above the mean.
    kl = curve_rows(runs, _without_sign(curves), "train", "kl").assign(sd=math.nan)
    above = runs[runs["run_id"].isin(runs_above_max_kl(curves))].assign(element="above_max_kl")
    diverged = runs[runs["status"] == "diverged"].assign(element="diverged")
    of_runs = pd.concat([above, diverged])
    of_runs["arm"] = [arm_label(run) for _, run in of_runs.iterrows()]
    parts = [*on_sets, length.merge(cap, how="left", on=style.PANEL), reflection, kl, of_runs]
    parts = [part.reindex(columns=_COLUMNS) for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=_COLUMNS)


def _without_sign(curves: pd.DataFrame) -> pd.DataFrame:
    """Return the curves of KL with their absolute values, which a logarithmic axis can show."""
    if curves.empty:
        return curves
    kl = curves[curves["metric"] == "kl"]
    return kl.assign(value=kl["value"].astype(float).abs())


def _panels(rows: pd.DataFrame) -> list[_Panel]:
    """Return the panels of one model and dataset."""
    accuracy, length, kl, above, reflection, diverged = (
        rows[rows["element"] == element]
        for element in ("accuracy", "response_length", "kl", "above_max_kl", "reflection", "diverged")
    )
    sets = {str(name): of_set for name, of_set in accuracy.groupby("split")} or {"": accuracy}
    absent = "There are no accuracies on a problem set\nother than the training set."
    return [
        *(_Panel(f"accuracy on {name}", of_set, absent, _answers(of_set)) for name, of_set in sets.items()),
        _Panel("response length (tokens)", length, "There are no response lengths.", _cut(length)),
        _Panel(
            "KL (nats per token)",
            kl,
            "There is no KL of sampler and learner.",
            [f"{len(above)} run{'' if len(above) == 1 else 's'} above {MAX_KL:g}"],
            limit=MAX_KL,
        ),
        _Panel("share with reflection", reflection, "There are no rates of reflection.", [f"{len(diverged)} diverged"]),
    ]


def _draw_panel(axes: Axes, panel: _Panel, styles: dict[str, style.ArmStyle]) -> None:
    if panel.rows.empty:
        style.say(axes, panel.absent)
        return
    if panel.limit is not None:
        axes.set_yscale("log")
        # The axis reaches over the limit whatever the values are; they may all be 0.
        axes.update_datalim([(0, panel.limit / 2), (0, panel.limit * 2)], updatex=False)
        axes.axhline(panel.limit, color=style.MUTED, linestyle="--", linewidth=1)
    draw_curves(axes, panel.rows, styles)
    axes.set_ylabel(panel.ylabel, parse_math=False)
    style.note(axes, " · ".join([style.seeds_text(panel.rows["n_seeds"]), *panel.facts]))


def _answers(rows: pd.DataFrame) -> list[str]:
    """Write how many answers of a run an accuracy is the mean of."""
    counts = {"answers": rows["n_samples"].max(), "problems": rows["n_problems"].max()}
    known = [f"{formats.count(count)} {what}" for what, count in counts.items() if not pd.isna(count)]
    return [" to ".join(known)] if known else []


def _cut(rows: pd.DataFrame) -> list[str]:
    """Write which share of the responses was cut off at the end of training, which bounds their length."""
    last = rows.dropna(subset=["truncated"]).groupby("arm")["truncated"].last()
    if last.empty:
        return []
    fewest, most = formats.percent(last.min()), formats.percent(last.max())
    cap = rows["max_new_tokens"].max()
    words = [
        fewest if fewest == most else f"{fewest} to {most}",
        "cut",
        *([] if pd.isna(cap) else [f"at {cap:.0f} tokens"]),
    ]
    return [" ".join(words)]
