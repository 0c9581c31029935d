"""Figure 5 of the paper, its supervised part: as figure 4, on a small dataset."""

from lorabench.figures.fig4_placement import draw

__all__ = ["draw"]
