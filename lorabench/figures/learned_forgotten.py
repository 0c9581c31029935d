"""What each arm learned against what it forgot, and against its test NLL, from scores of lm-eval.

"LoRA Learns Less and Forgets Less" (Biderman et al., 2024) has such a plot; here each arm is at its best LR. Where a
task gives the likelihood of the right answers, that measures what was learned, since the accuracy of a small model is
near 0 whatever it has learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lorabench.analysis.arms import arm_labels
from lorabench.errors import UserError
from lorabench.figures import style
from lorabench.figures.grid import PANEL, Styles, titled
from lorabench.store.tables import Tables

_BITS = "bits_per_byte"
# The metrics of right answers by preference: the strictest metric, or the customary metric, comes first.
_ACCURACIES = ("exact_match", "prompt_level_strict_acc", "acc_norm", "acc")
_MEASURES = {_BITS: "bits per byte above the base", "accuracy": "accuracy below the base"}
_REFERENCE: dict[str, Any] = {"color": "0.7", "linewidth": 0.9, "zorder": 1}

_RUN = [*PANEL, "run_id", "method", "rank", "placement", "arm", "lr", "seed", "final_test_nll"]
_LEARNED = ["learned", "learned_stderr", "learned_tasks", "learned_bits", "learned_bits_tasks"]
_COLUMNS = [*_RUN, *_LEARNED, "measure", "forgotten", "forgotten_stderr", "forgotten_tasks"]
_BASE, _NLL = "base", "final_test_nll"


def draw(tables: Tables) -> style.Drawn:
    """Draw the figure; return it, and what it plots as one tidy table.

    The table has one row per run (and the base, whose `arm` is `base`) and measure of forgetting. `learned` is an
    accuracy from 0 to 1. `learned_bits` is the number of bits per byte that the right answers cost less than under the
    base; it is null where no task gives their likelihood. `measure` says what `forgotten` is: the `bits_per_byte`
    above the base's, or the `accuracy` below the base's, the mean over `forgotten_tasks`. Standard errors are over
    documents; the standard errors of `forgotten` are of the run's own score, without the base's.
    """
    evals = tables.evals
    trained = evals[evals["method"].notna()]
    if trained.empty:
        raise UserError("there is no table evals, or it has no trained run")
    trained = trained.assign(arm=arm_labels(trained))
    base = evals[evals["method"].isna()]
    titles, groups = zip(*titled(trained), strict=True)
    parts = [_panel_rows(runs, base[base["model"] == runs["model"].iloc[0]]) for runs in groups]
    plotted = pd.concat(parts, ignore_index=True)
    measures = [name for name in _MEASURES if (plotted["measure"] == name).any()] or [_BITS]
    figure = style.new_figure((style.PANEL_HEIGHT + 0.4) * len(parts))
    axes = figure.subplots(len(parts), len(measures) + 1, squeeze=False)
    styles = style.arm_styles(plotted[plotted["arm"] != _BASE])
    for title, rows, row_of_panels in zip(titles, parts, axes, strict=True):
        row_of_panels[0].set_title(title, pad=18, parse_math=False)
        _draw_row(row_of_panels, rows, measures, styles)
    marks = [(True, style.mark(look.label, look.marker, color=look.colour)) for look in styles.values()]
    before = bool((plotted["arm"] == _BASE).any()), style.mark("before training", "x", mew=1.8)
    return style.legends(figure, {}, plotted, [*marks, before])


def _panel_rows(runs: pd.DataFrame, base: pd.DataFrame) -> pd.DataFrame:
    """Return what is plotted of one model trained on one dataset, from its scores and its base's."""
    base = base.assign(arm=_BASE, **{name: runs[name].iloc[0] for name in PANEL})
    # The base has no run_id, so runs and base share another key.
    scores = pd.concat([base, runs]).assign(key=lambda frame: frame["run_id"].fillna(_BASE))
    learned, forgotten = (scores[scores["about"] == about] for about in ("learned", "forgotten"))
    rows = scores.drop_duplicates("key").reset_index(drop=True)
    key = rows["key"]
    values, errors, tasks = _mean(_accuracies(learned), own=True)
    rows = rows.assign(learned=key.map(values), learned_stderr=key.map(errors), learned_tasks=tasks)
    # Bits saved on right answers, and what was forgotten, are measured against the base.
    values, _, tasks = _mean(learned[learned["metric"] == _BITS], own=True)
    if _BASE in values:
        rows = rows.assign(learned_bits=values[_BASE] - key.map(values), learned_bits_tasks=tasks)
    parts = []
    for measure, lost in {_BITS: forgotten[forgotten["metric"] == _BITS], "accuracy": _accuracies(forgotten)}.items():
        values, errors, tasks = _mean(lost)
        if _BASE in values:
            more = key.map(values) - values[_BASE]
            part = rows.assign(measure=measure, forgotten=more if measure == _BITS else 0 - more)
            parts.append(part.assign(forgotten_stderr=key.map(errors), forgotten_tasks=tasks))
    plotted = pd.concat(parts or [rows]).sort_index(kind="stable")
    return plotted.reindex(columns=_COLUMNS).astype({"rank": "Int64", "seed": "Int64"})


def _accuracies(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the accuracies of each task by one metric and filter, the same for all runs."""
    kept = [scores.iloc[:0]]
    for _, task_scores in scores[scores["higher_is_better"].eq(True)].groupby("task"):
        metrics = list(task_scores["metric"].unique())
        metric = next((name for name in _ACCURACIES if name in metrics), metrics[0])
        by_metric = task_scores[task_scores["metric"] == metric]
        # Strict filters come before others, and flexible ones last.
        filters = by_metric["filter"].fillna("none")
        strictest = min(filters.unique(), key=lambda name: ("strict" not in name, "flexible" in name, name))
        kept.append(by_metric[filters == strictest])
    return pd.concat(kept)


def _mean(scores: pd.DataFrame, own: bool = False) -> tuple[pd.Series[float], pd.Series[float], str]:
    """Return the mean over tasks of each run that has them all, by its key, its standard error, and the tasks.

    The standard error takes documents as independent. With `own`, tasks on the training data count, if there are any.
    """
    on_own_data = scores["source"].eq(scores["dataset"])
    scores = scores[on_own_data] if own and on_own_data.any() else scores
    # A base has a score on the test data of each batch of its runs.
    means = scores.groupby(["key", "task"], as_index=False)[["value", "stderr"]].mean()
    values = means.pivot(index="key", columns="task", values="value").dropna()
    stderrs = means.pivot(index="key", columns="task", values="stderr").reindex(values.index)
    error = np.sqrt((stderrs**2).sum(axis="columns", skipna=False)) / max(1, len(values.columns))
    names = ["task", "metric", "filter"]
    tasks = scores[names].fillna("none").drop_duplicates().sort_values(names)
    return values.mean(axis="columns"), error, "; ".join(" ".join(row) for row in tasks.itertuples(index=False))


def _draw_row(panels: Sequence[Axes], rows: pd.DataFrame, measures: Sequence[str], styles: Styles) -> None:
    """Draw the panels of one model and dataset: one for each measure of forgetting, and one for the test NLL."""
    has_bits = bool(rows["learned_bits"].notna().any())
    only_bits = has_bits and not rows["learned"].notna().any()
    drawn: dict[str, list[Axes]] = {"learned_bits": [], "learned": []}
    for measure, axes in zip([*measures, _NLL], panels, strict=True):
        # The last panel has the accuracy as its height, and those before it bits per byte, where there are both.
        up = "learned_bits" if only_bits or (has_bits and measure != _NLL) else "learned"
        shown = rows.drop_duplicates("run_id") if measure == _NLL else rows[rows["measure"] == measure]
        if measure == _NLL and not rows[_NLL].notna().any():
            style.say(axes, "There is no test NLL\nafter reinforcement learning.")
            continue
        if shown.empty:
            style.say(axes, "Forgetting is measured against the base,\nwhich has no score on these tasks.")
            continue
        label, across = "test NLL\nnats per scored token", _NLL
        if measure != _NLL:
            # The base is where the two grey lines cross.
            axes.axvline(0, **_REFERENCE)
            label, across = f"{_MEASURES[measure]}:\n{_named(shown['forgotten_tasks'])}", "forgotten"
        for score in shown.loc[shown["arm"] == _BASE, up].dropna():
            axes.axhline(score, **_REFERENCE)
        placed = shown.dropna(subset=[up, across])
        for row in placed.to_dict("records"):
            point: dict[str, Any] = {"color": style.MUTED, "fmt": "x", "markeredgewidth": 1.8, "zorder": 1.5}
            if look := styles.get(row["arm"]):
                point = {"color": look.colour, "fmt": look.marker, "zorder": look.zorder}
            errors = row["learned_stderr"] if up == "learned" else None, row.get(f"{across}_stderr")
            axes.errorbar(row[across], row[up], *errors, markersize=6, elinewidth=0.9, **point)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        # The range is not empty even where all accuracies are 0.
        if up == "learned" and placed[up].max() == 0:
            axes.set_ylim(-0.002, 0.05)
        # The base was trained on no dataset of its own, so it has no test NLL.
        unplaced = (shown["arm"] != _BASE).sum() - (placed["arm"] != _BASE).sum()
        style.note(axes, f"{unplaced} without a score" if unplaced else "")
        axes.set_xlabel(f"{label}\n(lower is better)", parse_math=False)
        drawn[up].append(axes)
    # Panels with the same height share their y-axis, which has its label at the first of them.
    labels = {"learned_bits": "bits per byte of right answers\nbelow the base", "learned": "accuracy"}
    for up, alike in drawn.items():
        for axes in alike[1:]:
            axes.sharey(alike[0])
            axes.tick_params(labelleft=False)
        for first in alike[:1]:
            label = f"{labels[up]}: {_named(rows[f'{up}_tasks'])}\n(higher is better)"
            first.set_ylabel(label, parse_math=False)
            first.autoscale_view()


def _named(tasks: pd.Series[str]) -> str:
    """Name a score by its task, or by the number of tasks that it is the mean of."""
    names = tasks.iloc[0].split("; ")
    return names[0].split(" ")[0] if len(names) == 1 else f"mean of {len(names)} tasks"
