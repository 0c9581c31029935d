"""What a repository shows of a finished preset: claims and provenance beside its figures, and a block of the README.

The block is made from the committed files alone, so that a test can check that the README agrees with them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from lorabench.config import preset_path
from lorabench.errors import UserError
from lorabench.figures import FIGURES
from lorabench.layout import Layout
from lorabench.plan import PROTOCOL_VERSION
from lorabench.records import atomic_path, file_sha256, write_json
from lorabench.report import summary
from lorabench.tables import read_table
from lorabench.utils import formats

START = "<!-- results: written by `lorabench publish`, never by hand -->"
END = "<!-- end of results -->"

SHOWN = ("fig2_lr_by_rank", "fig7_rl_curves")
"""The figures that the README shows."""

CORE = ("A1", "A3", "B1", "B2", "B3", "B4", "C1", "C5", "D1", "D2", "D3", "E1", "E2", "F1", "F2")
"""The central claims of the paper; the README shows the others in a folded part."""


def publish(layout: Layout, readme: Path) -> None:
    """Write the claims and provenance of a preset beside its figures, and the block of the README from these files.

    Raises:
        UserError: the README lacks the two lines that enclose the block, or a figure of SHOWN is missing.
    """
    runs, claims = (read_table(layout.tables(), name) for name in ("runs", "claims"))
    before, after = _split(readme)
    for name in SHOWN:
        if not (layout.figures / f"{name}.svg").is_file():
            raise UserError(f"figure {layout.figures / name}.svg does not exist; run the preset {layout.name} first")
    with atomic_path(layout.figures / "claims.csv") as partial:
        claims.drop(columns="run_ids").to_csv(partial, index=False)
    write_json(_provenance(layout, runs), layout.figures / "provenance.json")
    with atomic_path(readme) as partial:
        partial.write_text(before + block(layout.figures) + after, encoding="utf-8")


def _split(readme: Path) -> tuple[str, str]:
    """Return the text of the README before and after the block."""
    text = readme.read_text(encoding="utf-8")
    before, start, following = text.partition(START)
    _, end, after = following.partition(END)
    if not (start and end):
        raise UserError(f"{readme} has no place for the results: two lines are needed, {START} and {END}")
    return before, after


def _provenance(layout: Layout, runs: pd.DataFrame) -> dict[str, Any]:
    """Describe the runs, machines, code and inputs that the figures and claims of a preset were computed from."""
    environment = summary.environment(runs)
    first, last = environment["started"]
    return {
        "preset": layout.name,
        "preset_sha256": file_sha256(preset_path(layout.name)),
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


def block(figures: Path) -> str:
    """Return the block of the README, from the files that `publish` has written into a folder of figures."""
    claims = pd.read_csv(figures / "claims.csv")
    provenance = json.loads((figures / "provenance.json").read_text())
    counts = ", ".join(f"{len(ids)} {verdict}" for verdict, ids in summary.by_verdict(claims))
    devices = " and ".join(provenance["devices"])
    lines = [
        START,
        f"What the `{provenance['preset']}` preset says: of {len(claims)} claims {counts}. "
        f"Computed from {provenance['runs']} runs ({formats.duration(provenance['run_seconds'])} of one core "
        f"on {devices}, from {provenance['first_started'][:10]}).",
        "",
        *(f"![{FIGURES[name].title}]({figures / name}.svg)\n" for name in SHOWN),
        *_table(claims[claims["claim_id"].isin(CORE)]),
        "",
        "<details><summary>The other claims</summary>",
        "",
        *_table(claims[~claims["claim_id"].isin(CORE)]),
        "",
        "</details>",
        "",
        "Criteria, reasons and the runs behind each verdict are in the report.",
        END,
    ]
    return "\n".join(lines)


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
