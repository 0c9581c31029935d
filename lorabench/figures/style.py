"""The common look of all figures: sizes, colours by rank, panels, legends, and files with the same bytes everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from lorabench.utils.files import atomic_path

# These are inches: 7.2 in at 100 dpi is about the 700 px of a text column, so text appears at its nominal size.
WIDTH, PANEL_HEIGHT = 7.2, 3.1
PNG_DPI = 200

Drawn = tuple[Figure, pd.DataFrame]
"""A figure, and exactly what it plots as one tidy table."""

FULLFT_COLOUR = "black"
MUTED = "0.35"
SIGMA = "\N{GREEK SMALL LETTER SIGMA}"
# The part of the colour map that is neither too pale on white nor too near to black. Lightness falls all along it,
# so that the order of ranks survives in greyscale.
_RANK_MAP, _LOWEST_RANK, _HIGHEST_RANK = "plasma", 0.83, 0.24
_PLACEMENT_LOOKS = {"all": ("-", "o"), "mlp": ("--", "P"), "attn": (":", "v")}


@contextmanager
def applied() -> Iterator[None]:
    """Apply this style on top of Matplotlib's own defaults, whatever the user's configuration says."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rc_file(Path(__file__).with_name("figures.mplstyle"), use_default_template=False)
        yield


@dataclass(frozen=True)
class ArmStyle:
    """How an arm is drawn. FullFT is a wide line below the thin LoRA lines, so that both are visible together."""

    label: str
    colour: str
    linestyle: str
    linewidth: float
    marker: str
    zorder: float

    @property
    def line(self) -> dict[str, Any]:
        """The keyword arguments of Matplotlib for the arm's line."""
        return {"color": self.colour, "ls": self.linestyle, "lw": self.linewidth, "zorder": self.zorder}


def arm_styles(arms: pd.DataFrame) -> dict[str, ArmStyle]:
    """Return the style of each arm by its label, from rows with arm, method, rank and placement; FullFT comes first."""
    unique = arms[["arm", "method", "rank", "placement"]].dropna(subset=["arm"]).drop_duplicates("arm")
    ranks = sorted({int(rank) for rank in unique["rank"].dropna()})
    styles = {}
    for arm in unique.sort_values(["method", "rank", "placement"], na_position="first").to_dict("records"):
        label = arm["arm"]
        if arm["method"] == "fullft":
            styles[label] = ArmStyle(label, FULLFT_COLOUR, "-", 2.8, "s", 2.0)
            continue
        linestyle, marker = _PLACEMENT_LOOKS.get(arm["placement"], ("-", "o"))
        # The colour is that of the place of log(rank) between the lowest and the highest rank drawn.
        rank, low, high = (math.log(rank) for rank in (arm["rank"], ranks[0], ranks[-1]))
        place = (rank - low) / (high - low) if high > low else 0.5
        colour = to_hex(mpl.colormaps[_RANK_MAP](_LOWEST_RANK + place * (_HIGHEST_RANK - _LOWEST_RANK)))
        # Low ranks are drawn on top, since their curves differ most from the others.
        styles[label] = ArmStyle(label, colour, linestyle, 1.4, marker, 3 - ranks.index(arm["rank"]) / 100)
    return styles


def new_figure(height: float) -> Figure:
    """Make a figure of the standard width, with room for panels of `height` inches in total and for legends."""
    figure = Figure(figsize=(WIDTH, height + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def empty_figure(sentence: str) -> Figure:
    """Make a figure that only says why nothing is drawn."""
    figure = new_figure(PANEL_HEIGHT / 2)
    say(figure.add_subplot(), sentence)
    return figure


def say(axes: Axes, sentence: str) -> None:
    """Write into axes why they have no data, and hide their frame."""
    axes.axis("off")
    axes.text(0.5, 0.5, sentence, ha="center", va="center", color=MUTED, transform=axes.transAxes, wrap=True)


def log_ticks(
    axis: Axis, written: Callable[[float], str] = "{:g}".format, subs: tuple[float, ...] = (1.0, 3.0)
) -> None:
    """Label `subs` times the powers of ten, on a log axis that may span less than a decade; numbers as `written`."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))
    axis.set_minor_formatter(NullFormatter())


def log_axes(axes: Axes, xlabel: str, ylabel: str = "", yscale: str = "linear", base: int = 10) -> None:
    """Label the axes and make the x-axis logarithmic, with plain numbers at the powers of the base."""
    axes.set_xscale("log", base=base)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale=yscale)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def ratio_axes(axes: Axes, xlabel: str) -> None:
    """Set up the axes for a ratio of optimal LRs over a logarithmic x-axis, labelled with plain numbers."""
    log_axes(axes, xlabel, "optimal LR, LoRA / FullFT", "log")
    log_ticks(axes.yaxis, subs=(1.0, 2.0, 5.0))
    axes.yaxis.set_minor_locator(NullLocator())


def note(axes: Axes, *facts: str, strip: float = 0.0) -> None:
    """Write the facts that are not empty as a line of small text between a panel, or its strip, and its title."""
    look: dict[str, Any] = {"color": MUTED, "fontsize": 7.5, "parse_math": False}
    axes.annotate(" · ".join(filter(None, facts)), (0, 1), (0, strip + 5), "axes fraction", "offset points", **look)


def legends(
    figure: Figure, styles: Mapping[str, ArmStyle], plotted: pd.DataFrame, marks: Iterable[tuple[Any, Artist]] = ()
) -> Drawn:
    """Draw two legends, of the arms above the panels and of other marks below; return the figure and what it plots.

    Each of the marks comes after whether it occurs, or after the element that it stands for.
    """
    lines = [line(look.label, **look.line) for look in styles.values()]
    elements = set(plotted.get("element", ()))
    occurring = [mark for occurs, mark in marks if (occurs in elements if isinstance(occurs, str) else occurs)]
    gaps = {"handlelength": 1.6, "handletextpad": 0.6, "columnspacing": 1.3}
    for handles, place in ((lines, "upper"), (occurring, "lower")):
        if handles:
            # The widest entry in inches: a handle with its gaps, and letters of average width.
            widest = 0.5 + 0.065 * max(len(str(handle.get_label())) for handle in handles)
            columns = min(int(WIDTH / widest), len(handles))
            figure.legend(handles=handles, loc=f"outside {place} left", ncols=columns, **gaps)
    return figure, plotted


def line(label: str, **look: Any) -> Line2D:
    """Make the legend entry of a line."""
    return Line2D([], [], label=label, **look)


def shade(label: str, colour: str = "0.85") -> Patch:
    """Make the legend entry of a band."""
    return Patch(label=label, facecolor=colour)


def mark(label: str, marker: str, **properties: Any) -> Line2D:
    """Make the legend entry of a mark that means the same in the colour of every arm."""
    return line(label, marker=marker, **{"color": MUTED, "ls": "none", "ms": 6, **properties})


def write_figure(figure: Figure, path: Path, made_from: str | None = None) -> None:
    """Write a figure as SVG or PNG, by the suffix, whole or not at all; the same figure always gives the same bytes.

    The hash of what it was made from becomes its source (see `lorabench.store.made_from`).
    """
    kind = path.suffix.removeprefix(".")
    metadata = {"svg": {"Date": None}, "png": {"Software": None}}[kind] | {"Source": made_from}
    with applied(), atomic_path(path) as partial:
        figure.savefig(partial, format=kind, dpi=PNG_DPI, metadata=metadata)
