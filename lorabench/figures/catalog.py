"""The catalogue of figures, read from `captions.yaml`, and drawing one as SVG, PNG and the CSV of what it plots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from lorabench.analysis.arms import in_experiments, with_arm_columns
from lorabench.analysis.comparison import NEEDED_BY
from lorabench.analysis.curves import curves_of
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.errors import NothingToDrawError, UserError
from lorabench.store.checks import check_comparable, check_curves, check_table, is_rl
from lorabench.store.io import read_claims, table_path, with_all_columns, write_csv
from lorabench.store.made_from import of_tables
from lorabench.store.tables import Tables
from lorabench.utils.studies import studies
from lorabench.utils.yaml_files import read_yaml

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lorabench.analysis.comparison import Task
    from lorabench.config.preset import Preset
    from lorabench.store.layout import Layout


@dataclass(frozen=True)
class PaperFigure:
    """A figure of the paper, of a claim in its text, or of the verdicts."""

    name: str  # The name of its files.
    title: str
    caption: str
    experiments: tuple[str, ...]
    drawn_by: str  # The module and its function that draw it, with a dot between them.
    package: str  # The package of the module, which is that of a study if the figure is.
    task: Task = "sft"
    table: str = "runs"
    """The table that it shows: that of the runs of its experiments and task, or compute, evals or claims."""

    def draw(self, tables: Tables) -> tuple[Figure, pd.DataFrame]:
        """Draw the figure from tables of its own runs; return it, and exactly what it plots as one tidy table.

        Missing columns, and all columns of a missing table, become nulls: a figure shows what the tables hold.
        """
        from lorabench.figures.style import applied

        names = ("runs", "curves", "compute", "evals")
        tables = replace(tables, **{name: with_all_columns(getattr(tables, name), name) for name in names})
        module, function = self.drawn_by.split(".")
        with applied():
            drawn: tuple[Figure, pd.DataFrame] = getattr(import_module(f"{self.package}.{module}"), function)(tables)
        return drawn

    @property
    def shows(self) -> tuple[str, ...]:
        """The tables that it is drawn from."""
        return ("runs", "curves", "test_losses") if self.table == "runs" else (self.table,)

    def folders(self, layout: Layout) -> list[Path]:
        """Return the folders of tables that a preset draws it from: those of its experiments, as far as there are."""
        if self.table != "runs":
            return [layout.tables()]
        chosen = layout.preset.experiments.chosen()
        return [layout.tables(experiment) for experiment in self.experiments if experiment in chosen]

    def own_runs(self, runs: pd.DataFrame) -> pd.DataFrame:
        """Return the runs of the figure's task and experiments; a run without experiments belongs to all of them."""
        runs = runs[in_experiments(runs, self.experiments)]
        return runs[is_rl(runs) == (self.task == "rl")]


FIGURES: dict[str, PaperFigure] = {}
"""All figures by name: the verdicts, then the others in the paper's order, and then those of studies."""

# In captions, texts that are shared stand for their names in braces.
_SHARED = {"loss_margin": f"{DEFAULT_MARGINS.loss:.0%}", "reward_margin": f"{100 * DEFAULT_MARGINS.reward:g} points"}
_OWN = read_yaml(Path(__file__).with_name("captions.yaml"))
for _texts, _package in ((_OWN, __package__), *((study.texts, study.package) for study in studies())):
    for _name, _text in _texts.get("shared", {}).items():
        _SHARED[_name] = _text.format_map(_SHARED)
    for _name, _about in _texts["figures"].items():
        _caption, _experiments = _about["caption"].format_map(_SHARED), tuple(_about["experiments"])
        _about = _about | {"caption": _caption, "experiments": _experiments, "package": _package}
        FIGURES[_name] = PaperFigure(_name, **_about)


def figures_of_preset(preset: Preset) -> list[PaperFigure]:
    """Return the figures that a preset has an experiment or an evaluation for, that of the verdicts first."""
    chosen = {*preset.experiments.chosen(), "claims", *(["evaluation"] if preset.evaluation else [])}
    return [figure for figure in FIGURES.values() if chosen & set(figure.experiments)]


def save_figure(name: str, folders: Sequence[Path], out: Path) -> None:
    """Draw a figure from the tidy tables in the given folders and write `<name>.svg`, `.png` and `.csv` into `out`.

    UserError says that there is no such figure, the tables hold nothing for it (NothingToDrawError), contradict one
    another, or are refused by `check_table`, `check_curves` or `check_comparable`; then nothing is written.
    """
    if name not in FIGURES:
        raise UserError(f"figure {name!r}: allowed: {', '.join(FIGURES)}")
    if FIGURES[name].table == "claims":
        tables = Tables(pd.DataFrame(), pd.DataFrame(), claims=_claims(folders))
    else:
        tables = Tables.read(*folders)
    _check(FIGURES[name].table, tables)
    _save(FIGURES[name], tables, out, of_tables(folders, FIGURES[name].shows))


def save_all_figures(folders: Sequence[Path], out: Path) -> Iterator[str]:
    """Draw all figures that the tables have rows for as `save_figure` does; yield a sentence on each that fails."""
    tables = replace(Tables.read(*folders), claims=_claims(folders))
    shown = {"compute": tables.compute, "evals": tables.evals, "claims": tables.claims}
    figures = [
        figure
        for figure in FIGURES.values()
        if len(figure.own_runs(tables.runs) if figure.table == "runs" else shown[figure.table])
    ]
    for table in {figure.table for figure in figures}:
        _check(table, tables)
    for figure in figures:
        try:
            _save(figure, tables, out, of_tables(folders, figure.shows))
        except NothingToDrawError as nothing:
            yield f"figure {figure.name} is not drawn: {nothing}"


def _check(table: str, tables: Tables) -> None:
    """Raise UserError if the table that figures are drawn from is not there or not as it should be."""
    if table == "claims" and tables.claims.empty:
        source = "the table claims of one folder, which `lorabench claims` writes"
        raise UserError(f"the figure verdicts is drawn from {source}")
    if table == "evals":
        check_comparable(tables.evals, "scores")
    if table == "runs":
        check_table(tables.runs)
        check_curves(tables.curves)


def _save(figure: PaperFigure, tables: Tables, out: Path, made_from: str) -> None:
    from lorabench.figures.style import write_figure

    if figure.table == "runs":
        if missing := [column for column in NEEDED_BY[figure.task] if column not in tables.runs]:
            raise NothingToDrawError(f"the runs table has no column {', '.join(missing)}")
        runs = with_arm_columns(figure.own_runs(tables.runs))
        if runs.empty:
            raise NothingToDrawError(f"the runs table has no runs of the experiment {' or '.join(figure.experiments)}")
        tables = replace(tables, runs=runs, curves=curves_of(tables.curves, runs))
    drawn, plotted = figure.draw(tables)
    for kind in ("svg", "png"):
        write_figure(drawn, out / f"{figure.name}.{kind}", made_from)
    write_csv(plotted, out / f"{figure.name}.csv")


def _claims(folders: Sequence[Path]) -> pd.DataFrame:
    """Return the table `claims`; empty if there is none, or several folders, whose runs are judged together."""
    alone = len(folders) == 1 and table_path(folders[0], "claims") is not None
    return read_claims(folders[0]) if alone else pd.DataFrame()
