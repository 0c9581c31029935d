"""The evidence of all sources: tables and figures in a folder, and the generated parts of the README and the docs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lorabench.errors import UserError
from lorabench.figures.forest import draw_forest
from lorabench.figures.lr_left_out import draw_left_out
from lorabench.figures.matrix import draw_matrix
from lorabench.figures.style import write_figure
from lorabench.report import claim_text, lr_evidence
from lorabench.report.generated_block import text_around, write_around
from lorabench.report.publish import results_page
from lorabench.sources.lr_left_out import by_source, compared, left_out
from lorabench.sources.lr_optima import known_optima, optima_table
from lorabench.sources.matrix import Own, matrix, read_own
from lorabench.sources.measurements import (
    MEASURES,
    growth_measurements,
    measurement_table,
    measurements,
    own_measurements,
    summary_table,
)
from lorabench.sources.studies import Study, judge, read_studies, source_folders
from lorabench.store.io import write_csv
from lorabench.utils import formats
from lorabench.utils.files import atomic_path

START = "<!-- matrix: written by `lorabench evidence`, never by hand -->"
END = "<!-- end of matrix -->"

PUBLISHED = Path("paper_figures/published/evidence")
"""Where the README and the docs find the evidence, from the repository's root."""

PAGE = Path("docs/evidence.md")
"""The page of evidence, beside the README; it lists every verdict behind the matrix."""

MATRIX_PAGES = (Path("README.md"), Path("docs/results.md"))
"""The pages that show the matrix."""

_PREDICTABLE = 4
"""The least number of sources from which the page predicts a further one; from three the interval is without end."""

_FILES = ("claims.csv", "matrix.csv", "measurements.csv", "summary.csv", "matrix.svg", "matrix.png", "forest.svg",
          "forest.png", "lr_optima.csv", "lr_left_out.csv", "lr_left_out_summary.csv", "lr_left_out.svg",
          "lr_left_out.png")  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """All verdicts and measurements."""

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
        sources: folders of sources beside the shipped ones.
        own: presets of one's own.
        presets: folders of published presets, whose optimal learning rates are pooled with those of the sources.

    Raises:
        UserError: a source is refused; then nothing is judged.
    """
    studies = read_studies(source_folders(*sources))
    claims = pd.concat([judge(study) for study in studies], ignore_index=True)
    measured = [part for preset in own for part in own_measurements(preset)] + measurements(studies)
    measured += growth_measurements(studies, claims)
    table = measurement_table(measured)
    optima = known_optima(studies, presets)
    lrs = optima_table([swept.optimum for swept in optima])
    return Evidence(studies, claims, matrix(claims, own), table, summary_table(table), lrs, left_out(optima))


def published_folders(root: Path) -> list[Path]:
    """Return the folders of the presets whose verdicts a repository has published."""
    return sorted(path.parent for path in (root / PUBLISHED.parent).glob("*/provenance.json"))


def published_presets(root: Path) -> list[Own]:
    """Return the presets whose verdicts a repository has published, by their folders' names."""
    return [read_own(folder, folder.name) for folder in published_folders(root)]


def write(evidence: Evidence, out: Path) -> None:
    """Write the tables and the figures into a folder."""
    write_csv(evidence.claims.drop(columns="run_ids"), out / "claims.csv")
    write_csv(evidence.matrix, out / "matrix.csv")
    write_csv(evidence.measurements, out / "measurements.csv")
    write_csv(evidence.summary, out / "summary.csv")
    by_lr_source = by_source(evidence.lr_left_out)
    write_csv(evidence.lr_optima, out / "lr_optima.csv")
    write_csv(evidence.lr_left_out, out / "lr_left_out.csv")
    write_csv(compared(by_lr_source), out / "lr_left_out_summary.csv")
    figures = {
        "matrix": draw_matrix(evidence.matrix),
        "forest": draw_forest(evidence.measurements, evidence.summary),
        "lr_left_out": draw_left_out(by_lr_source),
    }
    for name, figure in figures.items():
        for kind in ("svg", "png"):
            write_figure(figure, out / f"{name}.{kind}")


def publish(evidence: Evidence, out: Path, root: Path) -> None:
    """Copy the evidence to where a repository shows it, and write the generated parts of its pages.

    Args:
        evidence: all of it.
        out: the folder that `write` has written.
        root: the root of the repository.

    Raises:
        UserError: a page has no place for its part; then nothing is changed.
    """
    around = {page: text_around(root / page, START, END) for page in (*MATRIX_PAGES, PAGE)}
    around_lrs = text_around(root / lr_evidence.PAGE, lr_evidence.START, lr_evidence.END)
    for name in _FILES:
        if not (out / name).is_file():
            raise UserError(f"{out / name} does not exist")
        with atomic_path(root / PUBLISHED / name) as partial:
            shutil.copyfile(out / name, partial)
    cells = pd.read_csv(root / PUBLISHED / "matrix.csv")
    for page in MATRIX_PAGES:
        write_around(root / page, around[page], matrix_block(cells, page))
    write_around(root / PAGE, around[PAGE], evidence_block(evidence))
    lrs = lr_evidence.lr_block(evidence.lr_optima, evidence.lr_left_out)
    write_around(root / lr_evidence.PAGE, around_lrs, lrs)


def matrix_block(cells: pd.DataFrame, page: Path) -> str:
    """Return the matrix as a picture and as a Markdown table, whose cells link to the runs behind them.

    Args:
        cells: the table of the matrix, as published.
        page: the page that shows it, as a path from the root, for its links.
    """
    docs = "" if page.parts[0] == "docs" else "docs/"
    picture = "published/evidence/matrix.svg" if page.parts[0] == "docs" else str(PUBLISHED / "matrix.svg")
    scales = list(dict.fromkeys(cells.sort_values("parameters", kind="stable")["scale"]))
    lines = [START, f"![Core claims by the size of the model]({picture})", ""]
    lines += [f"| | claim | paper | {' | '.join(scales)} |", f"|---|---|---|{'---|' * len(scales)}"]
    for claim_id, of_claim in cells.groupby("claim_id", sort=False):
        at = {row["scale"]: row for row in of_claim.to_dict("records")}
        first = of_claim.iloc[0]
        texts = [_cell(at[scale], docs) if scale in at else formats.DASH for scale in scales]
        said = [str(claim_id), _escaped(first["statement"]), _escaped(str(first["paper_value"])), *texts]
        lines.append(f"| {' | '.join(said)} |")
    return "\n".join([*lines, END])


def _cell(row: dict[Any, Any], docs: str) -> str:
    if row["verdict"] == "not tested":
        return formats.DASH
    value = "" if pd.isna(row["estimate"]) else f" {formats.number(row['estimate'])}"
    if pd.notna(row["source"]):
        link = f"{docs}evidence.md#{row['origin']}"
    else:
        link = f"{docs}{results_page(row['origin']).name}"
    return f"[{claim_text.verdict(row)}]({link}){value}"


def evidence_block(evidence: Evidence) -> str:
    """Return the page of evidence: the forest plot, the summaries, and each source with its doubts and verdicts."""
    lines = [
        START,
        "![What several sources measured](published/evidence/forest.svg)",
        "",
        *_summaries(evidence.summary),
    ]
    sources = {study.of.name: study.of for study in evidence.studies}
    for name in sorted(sources):
        source = sources[name].source
        origin = source.origin
        attributes = {key: value for key, value in source.attributes.model_dump().items() if value is not None}
        lines += [
            f"## {name}",
            "",
            f"{source.about}. From {origin.repository}, `{origin.path}` ({origin.commit}, {origin.date}); licence: "
            f"{origin.licence}. Loss: {source.loss}. "
            f"{'; '.join(f'{key.replace(chr(95), chr(32))}: {value}' for key, value in attributes.items())}.",
            "",
            *(f"- {doubt}" for doubt in source.doubts),
            "",
            *_verdicts(evidence.claims[evidence.claims["source"] == name]),
        ]
    return "\n".join([*lines, END])


def _summaries(summary: pd.DataFrame) -> list[str]:
    lines = [
        "| measured | over | mean, 95% interval | a further source, 95% | between sources |",
        "|---|---|---|---|---|",
    ]
    for row in summary.to_dict("records"):
        if row["k"] < 2:
            continue
        what = MEASURES[row["measure"]] if not row["attribute"] else ""
        group = f"{row['attribute'].replace('_', ' ')} {row['group']}: {row['k']}"
        over = group if row["attribute"] else f"all {row['k']}"
        mean = f"{_value(row, 'mean')} {_ends(row, 'low', 'high')}"
        further = _ends(row, "predicted_low", "predicted_high") if row["k"] >= _PREDICTABLE else formats.DASH
        chance = row["p_of_groups"]
        explained = "" if math.isnan(chance) else f"; groups differ with p = {chance:.2f}"
        lines.append(f"| {what} | {over} | {mean} | {further} | {row['share']:.0%} of the variation{explained} |")
    return [*lines, ""]


def _value(row: dict[Any, Any], name: str) -> str:
    number = row[name]
    if math.isnan(number):
        return formats.DASH
    if row["measure"] == "lr_ratio":
        return f"{math.exp(number):.3g}" if number < math.log(1e4) else "more than 10,000"
    return f"{number:+.3f}" if row["measure"] == "rank_1_gap" else f"{number:+.4f}"


def _ends(row: dict[Any, Any], low: str, high: str) -> str:
    if math.isnan(row[low]):
        return formats.DASH
    return f"[{_value(row, low)}, {_value(row, high)}]"


def _verdicts(claims: pd.DataFrame) -> list[str]:
    """Return the verdicts that have runs behind them as a table."""
    tested = claims[claims["n_runs"].gt(0) & ~claims["verdict"].eq("not tested")]
    if tested.empty:
        return ["No claim can be judged on it; its numbers are in the forest plot.", ""]
    lines = ["| model | | claim | verdict | measured, 95% interval | runs | scope |", "|---|---|---|---|---|---|---|"]
    for row in tested.to_dict("records"):
        measured = claim_text.estimate(row)
        if pd.notna(row["ci_low"]) and pd.notna(row["ci_high"]):
            measured += f" {formats.interval(row['ci_low'], row['ci_high'])}"
        cells = (row["model"].rsplit("/", 1)[-1], row["claim_id"], row["statement"], claim_text.verdict(row), measured)
        scope = formats.DASH if pd.isna(row["scope"]) else row["scope"]
        lines.append(f"| {' | '.join(_escaped(str(cell)) for cell in (*cells, row['n_runs'], scope))} |")
    return [*lines, ""]


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
