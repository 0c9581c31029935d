"""Verdicts as a picture: estimates in units of the margin that decides each claim."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import blended_transform_factory

from lorabench.figures import style
from lorabench.store.tables import Tables
from lorabench.utils.studies import studies
from lorabench.utils.yaml_files import read_yaml

_NAMES: dict[str, dict[str, str]] = read_yaml(Path(__file__).with_name("claim_names.yaml"))

FAMILIES, SHORT_NAMES = _NAMES["families"], _NAMES["claims"]
"""The subject of each family of claims, by the first letter of their ids; what each claim says, in at most 34
characters."""
for _study in studies():
    FAMILIES |= _study.texts["families"]
    SHORT_NAMES |= _study.texts["claims"]

LINEAR, LAST, END = 2.0, 20.0, 30.0
"""Margins up to which the axis is linear, at which marks beyond its end are drawn, and at which it ends."""

LOOKS: Mapping[str, tuple[str, str, str]] = {
    "confirmed": ("#17683a", "o", "#17683a"),
    "right sign, below the margin": ("#7a8a00", "^", "#7a8a00"),
    "contradicted": ("#a3211b", "X", "#a3211b"),
    "not seen here": ("#a3211b", "X", "white"),
    "inconclusive": ("#b07a00", "o", "white"),
    "setting not met": ("#4a4fb0", "D", "white"),
    "not tested": ("#77818b", "s", "white"),
}
"""By verdict: colour, mark, and the colour inside the mark. Marks tell verdicts apart where colours don't."""

# Inches. The figure is narrow, so that its text can be read where the page is 390 pixels wide.
_WIDTH, _ROW, _GUTTER = 4.1, 0.155, 2.1
_TEXT: dict[str, Any] = {"va": "center", "fontsize": 7.2, "parse_math": False}
_ID_WIDTH = 0.155  # as a share of the panel's width
_BADGES = 10  # in a row of the strip

_COLUMNS = ["claim_id", "family", "name", "verdict", "kind", "unit", "estimate", "ci_low", "ci_high"]
_COLUMNS += ["margin_low", "margin_high", "scale", "x", "x_low", "x_high", "holds_from", "holds_to"]


def draw(tables: Tables) -> style.Drawn:
    """Draw all verdicts; return the figure, and what it plots as one tidy table.

    `x`, `x_low` and `x_high` are the estimate and the ends of its 95% interval in units of the margin; they are null
    for a claim that is only named below the panel. The claim holds from `holds_from` to `holds_to`. `scale` is `log`
    where a ratio is measured by its logarithm.
    """
    plotted = in_margins(tables.claims)
    drawn, named = plotted[plotted["x"].notna()], plotted[plotted["x"].isna()]
    slots = len(drawn) + drawn["family"].nunique()
    strip = 0.0 if named.empty else 0.3 + 0.19 * math.ceil(len(named) / _BADGES)
    shown = [verdict for verdict in LOOKS if (plotted["verdict"] == verdict).any()]
    # The legend has three columns, and one mark more than there are verdicts.
    above, below = 0.16 + 0.15 * math.ceil((len(shown) + 1) / 3), 0.5
    height = above + max(slots, 2) * _ROW + below + strip
    figure = style.new_figure(height)
    figure.set_layout_engine("none")
    figure.set_size_inches(_WIDTH, height)
    bottom = (below + strip) / height
    axes = figure.add_axes((_GUTTER / _WIDTH, bottom, 1 - (_GUTTER + 0.12) / _WIDTH, 1 - above / height - bottom))
    if drawn.empty:
        style.say(axes, "no claim has both an interval and a margin")
    else:
        _draw_claims(axes, drawn)
    looks = {verdict: LOOKS[verdict] for verdict in shown}
    marks: list[Any] = [
        style.mark(name, mark, color=line, ms=4.8, mfc=face) for name, (line, mark, face) in looks.items()
    ]
    marks.append(style.shade("where the claim holds", "#dcefe2"))
    gaps: dict[str, Any] = {"handlelength": 1.2, "handletextpad": 0.5, "columnspacing": 0.8}
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0.0, 1 - 0.02 / height)}
    figure.legend(handles=marks, ncols=3, fontsize=_TEXT["fontsize"], **place, **gaps)
    if named.empty:
        return figure, plotted
    # The ids of the claims without numbers are badges at the bottom; `top` is in inches from there.
    top = strip - 0.12
    figure.text(0.06 / _WIDTH, top / height, "Without an interval or a margin:", weight="bold", **_TEXT)
    order = named["verdict"].map(list(LOOKS).index)
    for badge, row in enumerate(named.loc[order.sort_values(kind="stable").index].to_dict("records")):
        across = 0.24 + (badge % _BADGES) * (_WIDTH - 0.3) / _BADGES
        up = top - 0.2 - 0.19 * (badge // _BADGES)
        colour, _, face = LOOKS[row["verdict"]]
        box = {"boxstyle": "round,pad=0.22", "facecolor": face, "edgecolor": colour}
        look: dict[str, Any] = {"color": colour if face == "white" else "white", "ha": "center", "bbox": box}
        figure.text(across / _WIDTH, up / height, row["claim_id"], **look, **_TEXT)
    return figure, plotted


def in_margins(claims: pd.DataFrame) -> pd.DataFrame:
    """Return the table `claims` with estimate, interval and confirming range in units of the margin.

    Between two finite ends of the margin, 0 is the middle of the band and 1 its upper end. With one end, 0 is no effect
    and 1 or -1 that end. Where one of the numbers is not known, there is nothing in these units.
    """
    ids, ends = claims["claim_id"].astype(str), ["margin_low", "margin_high"]
    numbers = claims[[*ends, "estimate", "ci_low", "ci_high"]].astype(float)
    finite = numbers.where(np.isfinite(numbers))
    known = numbers.notna().all(axis=1) & finite.drop(columns=ends).notna().all(axis=1)
    log = claims["unit"].astype(str).str.startswith("ratio") & (finite.min(axis=1) > 0)
    finite[log] = np.log(finite[log])
    low, high = finite["margin_low"], finite["margin_high"]
    # With one end, the unit is its distance from no effect.
    unit = ((high - low) / 2).fillna(low.abs()).fillna(high.abs())
    middle = ((low + high) / 2).fillna(0.0)
    placed = finite.fillna(numbers).sub(middle, axis=0).div(unit, axis=0).where(known & (unit >= 1e-12))
    return claims.assign(
        family=ids.str[:1],
        name=ids.map(SHORT_NAMES).fillna(claims["statement"]),
        scale=log.map({True: "log", False: "linear"}).where(placed["estimate"].notna()),
        x=placed["estimate"],
        x_low=placed[["ci_low", "ci_high"]].min(axis=1),
        x_high=placed[["ci_low", "ci_high"]].max(axis=1),
        holds_from=placed["margin_low"],
        holds_to=placed["margin_high"],
    )[_COLUMNS]


def _draw_claims(axes: Axes, drawn: pd.DataFrame) -> None:
    """Draw a row for each claim, below the name of its family."""
    left = -(_GUTTER - 0.06) / (axes.get_position().width * _WIDTH)
    text = {"transform": blended_transform_factory(axes.transAxes, axes.transData), **_TEXT}
    slot = 0
    for family, claims in drawn.groupby("family", sort=False):
        axes.text(left, slot, FAMILIES.get(str(family), str(family)), weight="bold", **text)
        for row in claims.to_dict("records"):
            slot += 1
            colour, marker, face = LOOKS[row["verdict"]]
            axes.text(left, slot, row["claim_id"], color=colour, weight="bold", **text)
            axes.text(left + _ID_WIDTH, slot, row["name"], **text)
            holds = np.clip([row["holds_from"], row["holds_to"]], -END, END)
            axes.fill_betweenx([slot - 0.4, slot + 0.4], *holds, color="#dcefe2", linewidth=0, zorder=1)
            x, low, high = (float(np.clip(row[name], -LAST, LAST)) for name in ("x", "x_low", "x_high"))
            axes.plot([low, high], [slot, slot], color=colour, linewidth=1.5, zorder=3)
            for end, arrow in ((row["x_low"], "<"), (row["x_high"], ">")):
                if abs(end) > END:
                    axes.plot(math.copysign(END * 0.88, end), slot, arrow, color=colour, markersize=3.5, zorder=3)
            axes.plot(x, slot, marker, color=colour, mfc=face, markersize=4.6, markeredgewidth=1.1, zorder=4)
        slot += 1
    axes.set_xscale("symlog", linthresh=LINEAR, linscale=0.9)
    axes.set(xlim=(-END, END), ylim=(slot - 0.4, -0.6), yticks=[])
    axes.set_xticks([-10, -3, -1, 0, 1, 3, 10])
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "\N{MINUS SIGN}")))
    axes.set_xlabel("margins from no difference,\nor from the middle of a band", fontsize=_TEXT["fontsize"])
    axes.spines["left"].set_visible(False)
