"""How far off each rule's learning rate would have been for each source that it has not seen."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lorabench.figures import style
from lorabench.sources.lr_left_out import METHODS, RULES

_LOOKS: dict[str, dict[str, Any]] = {
    "pooled": {"color": "#274b8f", "marker": "o", "markersize": 6},
    "law": {"color": "#9a4a00", "marker": "s", "markersize": 5, "markerfacecolor": "white"},
    "law_sqrt": {"color": "#9a4a00", "marker": "x", "markersize": 5},
}
_TITLES = {"fullft": "FullFT", "lora": "LoRA"}
_ROW, _MARGINS = 0.24, 0.9  # inches


@style.applied()
def draw_left_out(sources: pd.DataFrame) -> Figure:
    """Draw a panel for each task and method, with a row for each source.

    Args:
        sources: as from `lorabench.sources.lr_left_out.by_source`.
    """
    measured = sources[sources["optima"] > 0]
    tasks = [task for task in ("sft", "rl") if (measured["task"] == task).any()]
    slots = [measured.loc[measured["task"] == task, "source"].nunique() for task in tasks]
    figure = Figure(figsize=(style.WIDTH, _ROW * sum(slots) + _MARGINS * len(tasks) + 0.4), layout="constrained")
    panels = figure.subplots(len(tasks), 2, sharex=True, squeeze=False, height_ratios=slots)
    for of_task, task in zip(panels, tasks, strict=True):
        names = list(dict.fromkeys(measured.loc[measured["task"] == task, "source"]))
        for axes, method in zip(of_task, METHODS, strict=True):
            part = measured[(measured["task"] == task) & (measured["method"] == method)]
            _panel(axes, part, names, f"{task.upper()}, {_TITLES[method]}")
        of_task[1].set_yticklabels([])
    for axes in panels[-1]:
        axes.set_xlabel("predicted over measured optimal LR")
    handles = [Line2D([], [], linestyle="", label=label, **_LOOKS[rule]) for rule, label in RULES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _panel(axes: Axes, rows: pd.DataFrame, names: list[str], title: str) -> None:
    axes.axvline(1, color="0.5", linestyle="--", linewidth=1, zorder=1)
    for row in rows.to_dict("records"):
        axes.plot(row["signed"], names.index(row["source"]), linestyle="", **_LOOKS[str(row["rule"])])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_title(title)
