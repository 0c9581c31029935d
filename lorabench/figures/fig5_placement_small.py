"""The supervised part of the paper's figure 5: it is drawn as figure 4, from runs on a small dataset."""

from lorabench.figures.fig4_placement import draw

__all__ = ["draw"]
