"""The index of a folder of results: one page over its reports, those of own models and data first."""

from __future__ import annotations

import re
import sys
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lorabench.analysis.rules import DECIDED
from lorabench.claims.judge import CORE
from lorabench.config.loading import is_shipped, load_preset, split_name
from lorabench.errors import UserError
from lorabench.report import claim_text
from lorabench.report.page import environment, inline
from lorabench.store.io import read_claims, read_rows
from lorabench.store.published import NOT_PUBLISHED
from lorabench.utils.files import atomic_path
from lorabench.utils.lock import locked

LINES = 3
"""The most claims that an entry shows; the report has all."""


def write_index(results: Path) -> Path:
    """Write the index of a folder of results from what lies there, and return its path.

    Reports that are finished at the same time write it one after the other, so that the last one has all of them.
    """
    out = results / "index.html"
    with locked(results / "index.lock", str(out), lambda line: print(line, file=sys.stderr)):
        own: list[dict[str, Any]] = []
        shipped: list[dict[str, Any]] = []
        # Of a preset with two reports, the one with scores of lm-eval is listed.
        names = ("without_evaluation.html", "index.html")
        reports = {path.parent: path for name in names for path in sorted(results.glob(f"*/report/{name}"))}
        for report in reports.values():
            ours = is_shipped(report.parents[1].name)
            (shipped if ours else own).append(_entry(report, results, ours))
        groups = {"Your own models and data": own, "Presets of the paper, run here": shipped}
        for entries in groups.values():
            entries.sort(key=lambda entry: entry["last"], reverse=True)
        styles = {"style": inline("page.css"), "own_style": inline("index.css")}
        page = environment().get_template("index.html.j2").render(groups=groups, lines=LINES, **styles)
        with atomic_path(out) as partial:
            partial.write_text(page, encoding="utf-8")
    return out


def _entry(report: Path, results: Path, ours: bool) -> dict[str, Any]:
    """Return what the index shows of a preset, by its report and its tables.

    `last` is the time at which its last run was started, as text in ISO 8601; `note` says why there are no verdicts.
    """
    with report.open("rb") as file:
        head = file.read(2**15).decode(errors="replace")
    texts = re.findall(r'<(?:title>|meta name="(\w+)" content=")(.*?)(?:</title>|">)', head, re.DOTALL)
    stated = {field or "title": unescape(text) for field, text in texts}
    name = report.parents[1].name
    entry = {
        "title": name if ours else stated.get("title", name),
        "about": stated.get("description") or (load_preset(split_name(name)[0]).description if ours else ""),
        "answer": stated.get("abstract", ""),
        "report": quote(report.relative_to(results).as_posix()),
        "last": "",
        "size": [],
        "verdicts": [],
        "claims": [],
        "note": "",
    }
    # What is damaged of one preset keeps no other from being listed.
    try:
        claims = read_claims(results / name / "tables", NOT_PUBLISHED)
        runs = read_rows(results / name / "tables", "runs", ["model", "started"])
    except UserError as error:
        return entry | {"note": f"Its tables can't be read: {error}."}
    # Of each fact one core claim is shown: those that are decided come first, then those that are inconclusive.
    core = claims[claims["claim_id"].isin(CORE) & claims["verdict"].isin((*DECIDED, "inconclusive"))]
    core = core.assign(open=core["verdict"] == "inconclusive", place=core["claim_id"].map(CORE.index))
    core = core.sort_values(["open", "place"], kind="stable").drop_duplicates("fact").head(LINES)
    started = sorted(row["started"] for row in runs if row["started"])
    days = dict.fromkeys(time[:10] for time in (*started[:1], *started[-1:]))
    models = ", ".join(sorted({row["model"] for row in runs}))
    counts = claims["verdict"].value_counts()
    return entry | {
        "last": max(started, default=""),
        "size": [f"{len(runs):,} run{'' if len(runs) == 1 else 's'}", models, " to ".join(days)],
        "verdicts": [(verdict, int(counts[verdict])) for verdict in claim_text.VERDICTS if verdict in counts],
        "claims": core.to_dict("records"),
    }
