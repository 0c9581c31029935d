"""Compute: FLOPs, time and memory of a training step of LoRA over the same of full fine-tuning, by rank.

The paper gives the FLOPs in its discussion of compute efficiency, without a figure.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis.step_flops import COMPUTE_SETTING, each_setting, flops_ratio
from lorabench.errors import UserError
from lorabench.figures import style
from lorabench.figures.grid import only
from lorabench.store.tables import Tables

_COLUMNS = [*COMPUTE_SETTING, "placement", "effective_width", "element", "rank", "ratio"]
_LINE_POINTS = 33  # of the formula's line, which is curved on a log axis

_LOOKS: dict[str, dict[str, Any]] = {
    "counted": {"label": "counted as it runs", "color": "black", "marker": "o", "linestyle": "none", "markersize": 5},
    "formula": {"label": "2/3 + 2R/N", "color": "0.45", "linewidth": 1.4},
    "step_time": {"label": "step time", "color": "#d8576b", "marker": "s", "linestyle": "-", "markersize": 4.5},
    "memory": {"label": "peak memory", "color": "#5c01a6", "marker": "^", "linestyle": "--", "markersize": 5},
}
_REFERENCES: dict[float, dict[str, Any]] = {
    2 / 3: {"label": "2/3", "color": "0.45", "linestyle": ":", "linewidth": 1.2},
    1.0: {"label": "as full fine-tuning", "color": "black", "linestyle": "-", "linewidth": 0.8},
}
_ELEMENTS = {"counted": "flops_ratio", "step_time": "step_ratio", "memory": "memory_ratio"}


def draw(tables: Tables) -> style.Drawn:
    """Draw the figure; return it, and what it plots as one tidy table.

    The column `element` says of what quantity a row's ratio LoRA / FullFT is: `counted` (FLOPs of the linear layers as
    counted), `formula` (points of the formula's line, whose ranks are not whole numbers), `step_time` or `memory`.
    UserError says that there is no table compute, or no LoRA in it; see also `flops_ratio`.
    """
    if tables.compute.empty:
        raise UserError("there is no table compute")
    ratios = flops_ratio(tables.compute)
    settings = each_setting(ratios)
    if not settings:
        raise UserError("the compute table has no LoRA")
    figure = style.new_figure(2.6 * len(settings) - 0.1)
    panels = figure.subplots(len(settings), 2, squeeze=False, sharey="row")
    drawn = []
    for (name, rows), (flops, measured) in zip(settings, panels, strict=True):
        rows = rows.astype({"rank": float})
        parts = [rows.assign(element=element, ratio=rows[column]) for element, column in _ELEMENTS.items()]
        ranks = np.geomspace(rows["rank"].min() / 1.2, rows["rank"].max() * 1.2, _LINE_POINTS)
        line = rows.iloc[[0] * _LINE_POINTS].assign(element="formula", rank=ranks)
        parts.append(line.assign(ratio=2 / 3 + 2 * ranks / line["effective_width"].astype(float)))
        plotted = pd.concat([part.dropna(subset=["ratio"]) for part in parts], ignore_index=True)[_COLUMNS]
        drawn.append(plotted)
        for axes, elements, references, what in (
            (flops, ["formula", "counted"], [2 / 3, 1.0], "FLOPs"),
            (measured, ["step_time", "memory"], [1.0], "measured"),
        ):
            for height in references:
                axes.axhline(height, zorder=1, **_REFERENCES[height])
            for element in elements:
                points = only(plotted, element)
                axes.plot(points["rank"], points["ratio"], **_LOOKS[element])
            style.log_axes(axes, "LoRA rank R", f"{what}, LoRA / FullFT", base=2)
            ticks = sorted({int(rank) for rank in rows["rank"]})
            axes.set(xlim=(ticks[0] / 1.3, ticks[-1] * 1.3), xticks=ticks)
            axes.set_ylim(0, 1.08 * max(1.0, plotted["ratio"].max()))
        first = rows.iloc[0].astype(object).dropna()
        flops.set_title(name, pad=18, parse_math=False)
        style.note(flops, f"N = {first['effective_width']:.4g}" if "effective_width" in first else "")
        sizes = [str(first[name]) for name in ("batch_size", "sequence_length") if name in first]
        style.note(measured, f"{' x '.join(sizes)} tokens" if len(sizes) == 2 else "", str(first.get("device", "")))
    plotted = pd.concat(drawn, ignore_index=True)
    shown = set(plotted["element"])
    looks = [*(look for element, look in _LOOKS.items() if element in shown), *_REFERENCES.values()]
    figure.legend(handles=[style.line(**look) for look in looks], loc="outside upper left", ncols=len(looks))
    return figure, plotted
