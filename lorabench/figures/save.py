"""Draw a figure of the catalogue and save it as SVG, PNG and the CSV of what it plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from lorabench.analysis.comparison import NEEDED_BY, curves_of
from lorabench.errors import NothingToDrawError, UserError
from lorabench.figures.catalog import CLAIMS_TABLE, COMPUTE_TABLE, EVALS_TABLE, FIGURES, PaperFigure
from lorabench.figures.style import write_figure
from lorabench.store.checks import check_curves, check_evals, check_table
from lorabench.store.io import empty_table, read_claims, table_path, with_all_columns, write_csv
from lorabench.store.tables import Tables


def drawable_figures(folders: Sequence[Path]) -> list[str]:
    """Return the names of the figures that the tables in the given folders have rows for.

    Raises:
        UserError: see `Tables.read`.
    """
    tables = Tables.read(*folders)
    own = {COMPUTE_TABLE: tables.compute, EVALS_TABLE: tables.evals, CLAIMS_TABLE: _claims(folders)}
    return [
        figure.name
        for figure in FIGURES.values()
        if not (own[figure.experiments] if figure.experiments in own else figure.of_experiments(tables.runs)).empty
    ]


def save_figure(name: str, folders: Sequence[Path], out: Path) -> None:
    """Draw a figure from the tidy tables in the given folders and write `<name>.svg`, `.png` and `.csv` into `out`.

    From merged tables it draws the runs of its own experiments only. Where the tables are refused, nothing is written.

    Raises:
        NothingToDrawError: the tables hold nothing for this figure.
        UserError: there is no such figure; the folders hold no tables, or tables that contradict one another; or see
            `check_table`, `check_curves` and `check_evals`.
    """
    if name not in FIGURES:
        raise UserError(f"figure {name!r}: allowed: {', '.join(FIGURES)}")
    figure, plotted = FIGURES[name].draw(_tables(folders, FIGURES[name]))
    for kind in ("svg", "png"):
        write_figure(figure, out / f"{name}.{kind}")
    write_csv(plotted, out / f"{name}.csv")


def _tables(folders: Sequence[Path], figure: PaperFigure) -> Tables:
    if figure.experiments != CLAIMS_TABLE:
        return _of_figure(Tables.read(*folders), figure)
    if (claims := _claims(folders)).empty:
        raise UserError(
            f"the figure {figure.name} is drawn from the table claims of one folder, which `lorabench claims` writes"
        )
    return Tables(empty_table(), empty_table(), claims=claims)


def _claims(folders: Sequence[Path]) -> pd.DataFrame:
    """Return the table `claims`; empty if there is none, or several folders, whose runs are judged together."""
    alone = len(folders) == 1 and table_path(folders[0], "claims") is not None
    return read_claims(folders[0]) if alone else empty_table()


def _of_figure(tables: Tables, figure: PaperFigure) -> Tables:
    """Return the checked tables with only a figure's runs; a figure of COMPUTE_TABLE or EVALS_TABLE reads no runs.

    Missing columns, and all columns of a missing table, become nulls: a figure shows what the tables hold.
    """
    if figure.experiments == COMPUTE_TABLE:
        return replace(tables, compute=with_all_columns(tables.compute, "compute"))
    if figure.experiments == EVALS_TABLE:
        check_evals(tables.evals)
        return replace(tables, evals=with_all_columns(tables.evals, "evals"))
    if tables.runs.columns.empty:
        raise UserError("there is no table runs")
    if missing := [name for name in NEEDED_BY[figure.task] if name not in tables.runs]:
        raise NothingToDrawError(f"the runs table has no column {', '.join(missing)}")
    check_table(tables.runs)
    check_curves(tables.curves)
    runs = with_all_columns(figure.of_experiments(tables.runs), "runs")
    if runs.empty:
        raise NothingToDrawError(f"the runs table has no runs of the experiment {' or '.join(figure.experiments)}")
    return replace(tables, runs=runs, curves=with_all_columns(curves_of(tables.curves, runs), "curves"))
