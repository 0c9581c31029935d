"""Publishing results: copies of a finished preset or of the evidence of all sources, and the pages that show them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lorabench.errors import UserError
from lorabench.figures.evidence import draw_forest, draw_left_out, draw_matrix
from lorabench.figures.style import write_figure
from lorabench.report import summary
from lorabench.report.blocks import NOT_PUBLISHED, PUBLISHED, check_places, published_folders, write_blocks
from lorabench.runs import PROTOCOL_VERSION
from lorabench.sources.lr_left_out import by_source, compared, left_out
from lorabench.sources.lr_optima import known_optima, optima_table
from lorabench.sources.measurements import (
    Own,
    growth_measurements,
    matrix,
    measurement_table,
    measurements,
    own_measurements,
    read_own,
    summary_table,
)
from lorabench.sources.studies import Study, judge, read_studies, source_folders
from lorabench.store.io import read_claims, read_table, write_csv
from lorabench.store.layout import Layout
from lorabench.utils.files import atomic_path, digest, write_json

DEFAULT_PRESET = "laptop"
"""The preset that Snakemake runs where none is named."""

_FIGURE_KINDS = (".svg", ".png", ".csv")
"""The suffixes of a figure's files: two pictures, and the table of what they show."""


def publish(layout: Layout, root: Path) -> None:
    """Copy a preset's figures, claims and provenance to where the repository shows them, and write its pages.

    Args:
        layout: the preset, finished.
        root: the root of the repository.

    Raises:
        UserError: a page has no place for its part, the figure of the verdicts has not been drawn, or the table claims
            is from another version; then nothing is changed.
    """
    runs, claims = read_table(layout.tables(), "runs"), read_claims(layout.tables())
    drawn = sorted(path for path in layout.figures.glob("*.*") if path.suffix in _FIGURE_KINDS)
    if layout.figures / "verdicts.svg" not in drawn:
        raise UserError(f"figure {layout.figures}/verdicts.svg does not exist; run the preset {layout.name} first")
    check_places(root, layout.name)
    for path in drawn:
        with atomic_path(layout.published / path.name) as unfinished:
            shutil.copyfile(path, unfinished)
    for path in set(layout.published.glob("*.*")) - {layout.published / path.name for path in drawn}:
        path.unlink()
    write_csv(claims.drop(columns=list(NOT_PUBLISHED)), layout.published / "claims.csv")
    write_json(_provenance(layout, runs), layout.published / "provenance.json")
    write_blocks(root)


def _provenance(layout: Layout, runs: pd.DataFrame) -> dict[str, Any]:
    """Describe the runs, machines, code and inputs that the figures and claims of a preset were computed from."""
    environment = summary.environment(runs)
    first, last = environment["started"]
    return {
        "preset": layout.name,
        "preset_sha256": digest(layout.preset.model_dump(mode="json"), 64),
        "protocol_version": PROTOCOL_VERSION,
        "runs": len(runs),
        "runs_by_status": {str(status): int(count) for status, count in runs["status"].value_counts().items()},
        "run_seconds": round(float(runs["wall_s"].sum())),
        "devices": environment["devices"],
        "threads_per_job": [int(threads) for threads in environment["threads"]],
        "first_started": first,
        "last_started": last,
        "commits": environment["commits"],
        "runs_of_changed_code": environment["dirty"],
        "versions": environment["versions"],
        "inputs": summary.inputs(runs),
    }


@dataclass(frozen=True)
class Evidence:
    """All verdicts and measurements of the published sources and of published presets."""

    studies: list[Study]
    claims: pd.DataFrame
    matrix: pd.DataFrame
    measurements: pd.DataFrame
    summary: pd.DataFrame
    lr_optima: pd.DataFrame
    """The known optimal learning rates."""
    lr_left_out: pd.DataFrame
    """How far off they would have been, had their source not been known."""


def gather(sources: Sequence[Path] = (), own: Sequence[Own] = (), presets: Sequence[Path] = ()) -> Evidence:
    """Judge the shipped sources and others, and put own presets beside them.

    Args:
        sources: folders of further sources.
        own: presets of one's own.
        presets: folders of published presets, whose optimal learning rates are pooled with those of the sources.

    Raises:
        UserError: a source is refused; then nothing is judged.
    """
    studies = read_studies(source_folders(*sources))
    claims = pd.concat([judge(study) for study in studies], ignore_index=True)
    measured = [part for preset in own for part in own_measurements(preset)] + measurements(studies)
    measured += growth_measurements(studies, claims)
    rows = measurement_table(measured)
    optima = known_optima(studies, presets)
    lrs = optima_table(optima)
    return Evidence(studies, claims, matrix(claims, own), rows, summary_table(rows), lrs, left_out(optima))


def published_presets(root: Path) -> list[Own]:
    """Return the presets whose verdicts a repository has published, by their folders' names."""
    return [read_own(folder, folder.name) for folder in published_folders(root)]


def write_evidence(evidence: Evidence, out: Path) -> None:
    """Write the tables and the figures of the evidence into a folder."""
    by_lr_source = by_source(evidence.lr_left_out)
    tables = {
        "claims": evidence.claims.drop(columns=list(NOT_PUBLISHED)),
        "matrix": evidence.matrix,
        "measurements": evidence.measurements,
        "summary": evidence.summary,
        "lr_optima": evidence.lr_optima,
        "lr_left_out": evidence.lr_left_out,
        "lr_left_out_summary": compared(by_lr_source),
    }
    figures = {
        "matrix": draw_matrix(evidence.matrix),
        "forest": draw_forest(evidence.measurements, evidence.summary),
        "lr_left_out": draw_left_out(by_lr_source),
    }
    for name, rows in tables.items():
        write_csv(rows, out / f"{name}.csv")
    for name, figure in figures.items():
        for kind in ("svg", "png"):
            write_figure(figure, out / f"{name}.{kind}")


def publish_evidence(evidence: Evidence, root: Path) -> None:
    """Write the evidence to where a repository shows it, and the generated parts of its pages.

    Raises:
        UserError: a page has no place for its part; then nothing is changed.
    """
    check_places(root)
    write_evidence(evidence, root / PUBLISHED / "evidence")
    write_blocks(root)
