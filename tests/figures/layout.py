"""The layout of a figure without its pictures, which take most of the time."""

from __future__ import annotations

from matplotlib.figure import Figure

from lorabench.figures.style import applied


def lay_out(figure: Figure) -> None:
    """Compute what writing a figure computes, without a file: bad texts, limits and axes raise here."""
    with applied():
        figure.draw_without_rendering()
