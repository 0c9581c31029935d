"""What each arm learned against what it forgot, and against its test NLL, from scores of lm-eval.

"LoRA Learns Less and Forgets Less" (Biderman et al., 2024) has such a plot; here each arm is at its best LR. Where a
task gives the likelihood of the right answers, that measures what was learned, since the accuracy of a small model is
near 0 whatever it has learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lorabench.analysis.arms import arm_label
from lorabench.errors import UserError
from lorabench.figures import style
from lorabench.figures.grid import PANEL, Styles, titled
from lorabench.store.tables import Tables

BITS = "bits_per_byte"
# The metrics of right answers by preference: the strictest metric, or the customary metric, comes first.
_ACCURACIES = ("exact_match", "prompt_level_strict_acc", "acc_norm", "acc")
_MEASURES = {BITS: "bits per byte above the base", "accuracy": "accuracy below the base"}
_REFERENCE: dict[str, Any] = {"color": "0.7", "linewidth": 0.9, "zorder": 1}

_RUN = [*PANEL, "run_id", "method", "rank", "placement", "arm", "lr", "seed", "final_test_nll"]
_LEARNED = ["learned", "learned_stderr", "learned_tasks", "learned_bits", "learned_bits_tasks"]
_SCORES = [*_LEARNED, "measure", "forgotten", "forgotten_stderr", "forgotten_tasks"]
COLUMNS = [*_RUN, *_SCORES]
BASE = "base"


def draw(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw the figure; return it, and what it plots as one tidy table.

    The table has one row per run (and the base, whose `arm` is `base`) and measure of forgetting. `learned` is an
    accuracy from 0 to 1. `learned_bits` is the number of bits per byte that the right answers cost less than under the
    base; it is null where no task gives their likelihood. `measure` says what `forgotten` is: the `bits_per_byte`
    above the base's, or the `accuracy` below the base's, the mean over `forgotten_tasks`. Standard errors are over
    documents; the standard errors of `forgotten` are of the run's own score, without the base's.

    Raises:
        UserError: there is no table evals, it has no trained run, or it has two scores of one kind for a run.
    """
    evals = tables.evals
    if evals.empty:
        raise UserError("there is no table evals")
    score = ["model", "run_id", "task", "metric", "filter"]
    if (twice := evals.duplicated(score)).any():
        repeated = evals.loc[twice, score].dropna(axis="columns").iloc[0]
        raise UserError(f"the evals table has the score {' '.join(map(str, repeated))} more than once")
    trained = evals[evals["method"].notna()]
    if trained.empty:
        raise UserError("the evals table has no trained run")
    trained = trained.assign(arm=[arm_label(row) for _, row in trained.iterrows()])
    panels = [
        (title, _panel_rows(of_panel, evals[evals["method"].isna() & evals["model"].eq(of_panel["model"].iloc[0])]))
        for title, of_panel in titled(trained)
    ]
    plotted = pd.concat([rows for _, rows in panels], ignore_index=True)
    return _figure(panels, plotted), plotted


@dataclass(frozen=True)
class _Mean:
    """The mean of scores over tasks, by the key of a run, with its standard error and the names of the tasks."""

    values: pd.Series[float]
    stderrs: pd.Series[float]
    tasks: str


def _panel_rows(runs: pd.DataFrame, base: pd.DataFrame) -> pd.DataFrame:
    """Return what is plotted of one model trained on one dataset, from its scores and its base's."""
    base = base.assign(arm=BASE, **{name: runs[name].iloc[0] for name in PANEL})
    # The base has no run_id, so runs and base share another key.
    scores = pd.concat([base, runs]).assign(key=lambda frame: frame["run_id"].fillna(BASE))
    learned, learned_bits = _learned(scores), _learned_bits(scores)
    forgotten = _forgotten(scores)
    rows = []
    for key, of_run in scores.groupby("key", sort=False):
        row: dict[Any, Any] = of_run.iloc[0].reindex(_RUN).to_dict()
        row |= {"learned": learned.values.get(key), "learned_stderr": learned.stderrs.get(key)}
        row |= {"learned_tasks": learned.tasks}
        if learned_bits:
            row |= {"learned_bits": learned_bits.values.get(key), "learned_bits_tasks": learned_bits.tasks}
        for measure, mean in forgotten.items():
            of_measure: dict[str, Any] = {"measure": measure, "forgotten_tasks": mean.tasks}
            of_measure |= {"forgotten": mean.values.get(key), "forgotten_stderr": mean.stderrs.get(key)}
            rows.append(row | of_measure)
        if not forgotten:
            rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS).astype({"rank": "Int64", "seed": "Int64"})


def _learned(scores: pd.DataFrame) -> _Mean:
    """Return the accuracy on the tasks of the training data, or on all tasks of what is learned if none is of them."""
    return _mean(_own(_accuracies(scores[scores["about"] == "learned"])))


def _learned_bits(scores: pd.DataFrame) -> _Mean | None:
    """Return how many bits per byte each run saves on the right answers; None without a score of the base."""
    bits = _mean(_own(scores[(scores["about"] == "learned") & (scores["metric"] == BITS)]))
    if BASE not in bits.values:
        return None
    return _Mean(bits.values[BASE] - bits.values, bits.stderrs, bits.tasks)


def _own(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the scores of tasks on the training data, or all scores if no task is on them."""
    own = scores[scores["source"].eq(scores["dataset"]).fillna(False).astype(bool)]
    return scores if own.empty else own


def _forgotten(scores: pd.DataFrame) -> dict[str, _Mean]:
    """Return, by measure, how much worse than the base each run is; a measure without the base's score is left out."""
    forgotten = scores[scores["about"] == "forgotten"]
    measured = {BITS: forgotten[forgotten["metric"] == BITS], "accuracy": _accuracies(forgotten)}
    means = {}
    for measure, of_measure in measured.items():
        mean = _mean(of_measure)
        if BASE in mean.values:
            worse = mean.values - mean.values[BASE]
            means[measure] = _Mean(worse if measure == BITS else 0 - worse, mean.stderrs, mean.tasks)
    return means


def _accuracies(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the accuracies of each task by one metric and filter, the same for all runs."""
    kept = []
    for _, of_task in scores[scores["higher_is_better"].fillna(False).astype(bool)].groupby("task"):
        metrics = list(of_task["metric"].unique())
        metric = next((name for name in _ACCURACIES if name in metrics), metrics[0])
        of_metric = of_task[of_task["metric"] == metric]
        strictest = min(of_metric["filter"].fillna("none").unique(), key=_looseness)
        kept.append(of_metric[of_metric["filter"].fillna("none") == strictest])
    return pd.concat(kept) if kept else scores.iloc[:0]


def _looseness(name: str) -> tuple[int, str]:
    """Return a sort key that puts strict filters first and flexible filters last."""
    return (0 if "strict" in name else 2 if "flexible" in name else 1, name)


def _mean(scores: pd.DataFrame) -> _Mean:
    """Return the mean over tasks of each run that has them all; its standard error takes documents as independent."""
    values = scores.pivot(index="key", columns="task", values="value").dropna()
    stderrs = scores.pivot(index="key", columns="task", values="stderr").reindex(values.index)
    names = ["task", "metric", "filter"]
    tasks = scores[names].fillna("none").drop_duplicates().sort_values(names)
    return _Mean(
        values.mean(axis="columns"),
        np.sqrt((stderrs**2).sum(axis="columns", skipna=False)) / max(1, len(values.columns)),
        "; ".join(" ".join(row) for row in tasks.itertuples(index=False)),
    )


def _figure(panels: list[tuple[str, pd.DataFrame]], plotted: pd.DataFrame) -> Figure:
    measures = [name for name in _MEASURES if (plotted["measure"] == name).any()] or [BITS]
    figure = style.new_figure((style.PANEL_HEIGHT + 0.4) * len(panels))
    grid = figure.subplots(len(panels), len(measures) + 1, squeeze=False)
    styles = style.arm_styles(plotted[plotted["arm"] != BASE])
    for (title, rows), of_row in zip(panels, grid, strict=True):
        of_row[0].set_title(title, pad=18, parse_math=False)
        has_bits = bool(rows["learned_bits"].notna().any())
        only_bits = has_bits and not rows["learned"].notna().any()
        for measure, axes in zip(measures, of_row[:-1], strict=True):
            _draw_forgotten(axes, rows[rows["measure"] == measure], measure, has_bits, styles)
        _draw_nll(of_row[-1], rows.drop_duplicates("run_id"), styles, "learned_bits" if only_bits else "learned")
        # The panels before this one have bits per byte as their height, and those from it on have the accuracy.
        split = len(of_row) if only_bits else len(of_row) - 1 if has_bits else 0
        bits = "bits per byte of right answers\nbelow the base: "
        _label_height(of_row[:split], bits, rows["learned_bits_tasks"].iloc[0])
        _label_height(of_row[split:], "accuracy: ", rows["learned_tasks"].iloc[0])
    marks: list[Artist] = [style.mark(look.label, look.marker, color=look.colour) for look in styles.values()]
    if (plotted["arm"] == BASE).any():
        marks.append(style.mark("before training", "x", markeredgewidth=1.8))
    style.legends(figure, {}, marks)
    return figure


def _label_height(of_row: Sequence[Axes], what: str, tasks: str) -> None:
    """Give panels a common y-axis, with its label at the first panel that has data."""
    drawn = [axes for axes in of_row if axes.axison]
    for axes in drawn[:1]:
        axes.set_ylabel(f"{_named(what, tasks)}\n(higher is better)", parse_math=False)
    for axes in drawn[1:]:
        axes.sharey(drawn[0])
        axes.tick_params(labelleft=False)
    if drawn:
        drawn[0].autoscale_view()


def _draw_forgotten(axes: Axes, rows: pd.DataFrame, measure: str, has_bits: bool, styles: Styles) -> None:
    """Draw what was learned against what was forgotten; the base is where the two grey lines cross."""
    if rows.empty:
        style.say(axes, "Forgetting is measured against the base,\nwhich has no score on these tasks.")
        return
    label = _named(f"{_MEASURES[measure]}:\n", rows["forgotten_tasks"].iloc[0])
    axes.axvline(0, **_REFERENCE)
    _draw_points(axes, rows, "forgotten", styles, "learned_bits" if has_bits else "learned")
    axes.set_xlabel(f"{label}\n(lower is better)", parse_math=False)


def _draw_nll(axes: Axes, rows: pd.DataFrame, styles: Styles, up: str) -> None:
    """Draw what runs learned against their test NLL on the training data's test split."""
    if not rows["final_test_nll"].notna().any():
        style.say(axes, "There is no test NLL\nafter reinforcement learning.")
        return
    _draw_points(axes, rows, "final_test_nll", styles, up)
    axes.set_xlabel("test NLL\nnats per scored token\n(lower is better)")


def _draw_points(axes: Axes, rows: pd.DataFrame, across: str, styles: Styles, up: str) -> None:
    """Draw runs with their standard errors, and the base's score as a line; count the runs that lack a number."""
    for row in rows[rows["arm"] == BASE].dropna(subset=[up]).to_dict("records"):
        axes.axhline(row[up], **_REFERENCE)
    placed = rows.dropna(subset=[up, across])
    for row in placed.to_dict("records"):
        look = styles.get(row["arm"])
        point: dict[str, Any] = {"color": style.MUTED, "fmt": "x", "markeredgewidth": 1.8, "zorder": 1.5}
        if look:
            point = {"color": look.colour, "fmt": look.marker, "zorder": look.zorder}
        error = row["learned_stderr"] if up == "learned" else None
        across_error = row["forgotten_stderr"] if across == "forgotten" else None
        axes.errorbar(row[across], row[up], error, across_error, markersize=6, elinewidth=0.9, **point)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    # The range is not empty even where all accuracies are 0.
    if up == "learned" and placed[up].max() == 0:
        axes.set_ylim(-0.002, 0.05)
    # The base was trained on no dataset of its own, so it has no test NLL.
    unplaced = len(rows[rows["arm"] != BASE]) - len(placed[placed["arm"] != BASE])
    style.note(axes, f"{unplaced} without a score" if unplaced else "")


def _named(what: str, tasks: str) -> str:
    """Name a score by its task, or by the number of tasks that it is the mean of."""
    names = tasks.split("; ")
    return f"{what}{names[0].split(' ')[0]}" if len(names) == 1 else f"{what}mean of {len(names)} tasks"
