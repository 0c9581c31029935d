"""The evidence of all sources: tables of what the runs of others say beside published presets, and two pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from lorabench.figures.evidence import draw_forest, draw_matrix
from lorabench.figures.style import write_figure
from lorabench.sources.lr_optima import known_optima, optima_table
from lorabench.sources.measurements import matrix, measurement_table, summary_table
from lorabench.sources.source import judge, read_sources, source_folders
from lorabench.store.io import write_csv
from lorabench.store.published import NOT_PUBLISHED


def evidence_tables(
    more: Sequence[Path] = (), own: Sequence[pd.DataFrame] = (), presets: Sequence[Path] = ()
) -> dict[str, pd.DataFrame]:
    """Judge the shipped sources and those in more folders, and set own presets next to them.

    Args:
        own: presets of one's own, each as from `read_own`.
        presets: folders of published presets, whose optimal learning rates are pooled with those of the sources.

    Returns:
        By the names of their files: all verdicts (`claims`), their `matrix`, `measurements` with their `summary`, and
        the known optimal learning rates (`lr_optima`).

    Raises:
        UserError: a source is refused; then nothing is judged.
    """
    sources = read_sources(source_folders(*more))
    claims = pd.concat([judge(source) for source in sources], ignore_index=True)
    measurements = measurement_table(sources, claims, own)
    return {
        "claims": claims.drop(columns=list(NOT_PUBLISHED)),
        "matrix": matrix(claims, own),
        "measurements": measurements,
        "summary": summary_table(measurements),
        "lr_optima": optima_table(known_optima(sources, presets)),
    }


def write_evidence(tables: Mapping[str, pd.DataFrame], out: Path) -> None:
    """Write the tables of the evidence, as from `evidence_tables`, and its pictures into a folder."""
    for name, rows in tables.items():
        write_csv(rows, out / f"{name}.csv")
    write_figure(draw_matrix(tables["matrix"]), out / "matrix.svg")
    write_figure(draw_forest(tables["measurements"], tables["summary"]), out / "forest.svg")
