"""The paper's figures, in the paper's order, redrawn from tidy tables.

Importing this package is cheap (no pandas, no matplotlib), so that the workflow can ask for the names.
A new figure is a module with a function `draw(tables)` and an entry here.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from lorabench.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from lorabench.tables import Tables


@dataclass(frozen=True)
class PaperFigure:
    """A figure of the paper. `name` is its module and file name, `experiment` the one whose tables it reads."""

    name: str
    title: str
    caption: str
    experiment: str

    def draw(self, tables: Tables) -> tuple[Figure, pd.DataFrame]:
        """The figure and, tidy, exactly what it plots."""
        drawn: tuple[Figure, pd.DataFrame] = import_module(f"{__name__}.{self.name}").draw(tables)
        return drawn


FIGURES = {
    figure.name: figure
    for figure in (
        PaperFigure(
            name="fig1_envelopes",
            title="Figure 1. Learning curves by LoRA rank",
            caption=(
                "Validation loss (nats per scored token) against training step. Each line is the envelope of one "
                "arm: at every step the lowest loss over its learning rates, so it is not a single run. Black is full "
                "fine-tuning; colour is LoRA rank. The grey band is two seed standard deviations to either side of "
                "the lowest envelope, where repeats let them be measured. An open circle marks the step from which "
                "an arm stays above that band to the end."
            ),
            experiment="rank",
        ),
        PaperFigure(
            name="fig2_lr_by_rank",
            title="Figure 2. Final loss against learning rate by LoRA rank",
            caption=(
                "Final test loss (nats per scored token) against learning rate, the mean over seeds where there are "
                "several, with their standard deviation as error bar. A diamond is the optimum of an arm, "
                "interpolated on the first seed's grid, and its bar the 95% bootstrap interval of the optimal "
                "learning rate. An open diamond is not resolved: it or its interval is at the edge of the grid, the "
                "grid is too coarse there, or the seed noise is unknown. Above a panel, a triangle is a loss beyond "
                "the range shown and a cross a run that diverged."
            ),
            experiment="rank",
        ),
    )
}


def save(name: str, tables: Path, out: Path) -> None:
    """Draw a figure from the tidy tables in `tables` and write `<name>.svg`, `.png` and `.csv` into `out`.

    Raises:
        UserError: there is no such figure, or the folder `tables` holds no tables.
    """
    from lorabench.figures.style import write_figure
    from lorabench.tables import Tables, write_csv

    if name not in FIGURES:
        raise UserError(f"figure {name!r}: allowed: {', '.join(FIGURES)}")
    figure, plotted = FIGURES[name].draw(Tables.read(tables))
    for kind in ("svg", "png"):
        write_figure(figure, out / f"{name}.{kind}")
    write_csv(plotted, out / f"{name}.csv")
