"""Publishing a finished preset: copies of its figures, claims and provenance, and two blocks of text about them.

The block of the core claims stands in the README, the block of all claims on a page of the documentation. Both are
made from the committed files alone, so that a test can compare the pages with these files.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from lorabench.claims.catalog import CORE
from lorabench.errors import UserError
from lorabench.figures.catalog import FIGURES
from lorabench.report import summary
from lorabench.report.generated_block import text_around, write_around
from lorabench.runs import PROTOCOL_VERSION
from lorabench.storage.layout import Layout
from lorabench.tables.io import read_table
from lorabench.utils import formats
from lorabench.utils.files import atomic_path, write_json
from lorabench.utils.hashing import digest

START = "<!-- results: written by `lorabench publish`, never by hand -->"
END = "<!-- end of results -->"

FIGURE_KINDS = (".svg", ".png", ".csv")
"""The suffixes of a figure's files: two pictures, and the table of what they show."""

SHOWN = "fig2_lr_by_rank"
"""The figure that the README shows; the page of results shows all."""

RESULTS_PAGE = Path("docs/results.md")
"""The page of results, beside the README."""

PICTURES = Path("published")
"""The link in `docs/` that leads to `paper_figures/published`."""


def publish(layout: Layout, readme: Path) -> None:
    """Copy a preset's figures, claims and provenance to where the repository shows them, and write both pages.

    Args:
        layout: the preset, finished.
        readme: the README; the page of results lies in `docs/` beside it.

    Raises:
        UserError: a page has no place for its block, or the figure that the README shows has not been drawn.
    """
    runs, claims = (read_table(layout.tables(), name) for name in ("runs", "claims"))
    page = readme.parent / RESULTS_PAGE
    around = {path: text_around(path, START, END) for path in (readme, page)}
    drawn = sorted(path for path in layout.figures.glob("*.*") if path.suffix in FIGURE_KINDS)
    if layout.figures / f"{SHOWN}.svg" not in drawn:
        raise UserError(f"figure {layout.figures / SHOWN}.svg does not exist; run the preset {layout.name} first")
    for path in drawn:
        with atomic_path(layout.published / path.name) as partial:
            shutil.copyfile(path, partial)
    for path in set(layout.published.glob("*.*")) - {layout.published / path.name for path in drawn}:
        path.unlink()
    with atomic_path(layout.published / "claims.csv") as partial:
        claims.drop(columns="run_ids").to_csv(partial, index=False)
    write_json(_provenance(layout, runs), layout.published / "provenance.json")
    for path, text in ((readme, readme_block(layout.published)), (page, results_block(layout.published))):
        write_around(path, around[path], text)


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


def readme_block(figures: Path) -> str:
    """Return the README's block: one figure and the core claims.

    Args:
        figures: a folder that `publish` has written, as a path from the README.
    """
    claims, summary_line = _read(figures)
    lines = [
        START,
        summary_line,
        "",
        f"![{FIGURES[SHOWN].title}]({figures / SHOWN}.svg)",
        "",
        *_table(claims[claims["claim_id"].isin(CORE)]),
        END,
    ]
    return "\n".join(lines)


def results_block(figures: Path) -> str:
    """Return the block of the page of results: all claims and all figures of a folder that `publish` has written."""
    claims, summary_line = _read(figures)
    names = [name for name in FIGURES if (figures / f"{name}.svg").is_file()]
    lines = [START, summary_line, "", *_table(claims), ""]
    for name in names:
        figure = FIGURES[name]
        lines += [f"![{figure.title}]({PICTURES / figures.name / name}.svg)", "", f"*{figure.caption}*", ""]
    return "\n".join([*lines, END])


def _read(figures: Path) -> tuple[pd.DataFrame, str]:
    """Return the claims of a published folder, and a sentence that counts the verdicts and says what they rest on."""
    claims = pd.read_csv(figures / "claims.csv")
    provenance = json.loads((figures / "provenance.json").read_text())
    counts = ", ".join(f"{len(ids)} {verdict}" for verdict, ids in summary.by_verdict(claims))
    devices = " and ".join(provenance["devices"])
    return claims, (
        f"What the `{provenance['preset']}` preset says: of {len(claims)} claims {counts}. "
        f"Computed from {provenance['runs']} runs ({formats.duration(provenance['run_seconds'])} of one core "
        f"on {devices}, from {provenance['first_started'][:10]})."
    )


def _table(claims: pd.DataFrame) -> list[str]:
    rows = ["| | claim | verdict | measured here, 95% interval | paper |", "|---|---|---|---|---|"]
    for claim in claims.to_dict("records"):
        measured = _measured(claim)
        cells = (claim["claim_id"], claim["statement"], claim["verdict"], measured, _cell(claim["paper_value"]))
        rows.append(f"| {' | '.join(_escaped(cell) for cell in cells)} |")
    return rows


def _measured(claim: dict[Any, Any]) -> str:
    if pd.isna(claim["estimate"]):
        return ""
    words = [formats.number(claim["estimate"])]
    if pd.notna(claim["ci_low"]) and pd.notna(claim["ci_high"]):
        words.append(formats.interval(claim["ci_low"], claim["ci_high"]))
    return " ".join([*words, _cell(claim["unit"])]).strip()


def _cell(value: Any) -> str:
    return "" if pd.isna(value) else str(value)


def _escaped(text: str) -> str:
    """Escape text so that it is no markup in a cell of a Markdown table."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
