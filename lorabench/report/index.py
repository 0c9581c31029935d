"""The index of a folder of results: one page over its reports, the published presets, and the runs of others."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from lorabench.analysis.rules import DECIDED
from lorabench.claims.judge import CORE
from lorabench.config.loading import is_shipped, load_preset, split_name
from lorabench.errors import UserError
from lorabench.report import claim_text
from lorabench.report.freeze import summary_of
from lorabench.report.page import environment, inline
from lorabench.report.publish import NOT_PUBLISHED, PUBLISHED, published_folders
from lorabench.sources.measurements import read_held_out, read_provenance
from lorabench.store.io import read_claims, read_rows
from lorabench.utils import formats
from lorabench.utils.files import atomic_path
from lorabench.utils.lock import locked

LINES = 3
"""The most claims that an entry shows; the report has all."""

EVIDENCE = "evidence"
"""The folder of the claims judged on the runs of others, in a folder of results and among what is published."""


@dataclass
class Entry:
    """What the index shows of a report, a published preset, or the runs of others."""

    title: str
    about: str
    links: list[tuple[str, str]]
    """Texts and relative addresses, the most important one first."""
    answer: str = ""
    """Whether LoRA matches full fine-tuning, in a sentence; empty where that is not known."""
    size: list[str] = field(default_factory=list)
    """How many runs of which models, and from when."""
    last: str = ""
    """The time at which the last run was started, as text in ISO 8601, by which entries are ordered."""
    verdicts: list[tuple[str, int]] = field(default_factory=list)
    """Each verdict with the number of claims that have it."""
    lines: list[tuple[str, str, list[tuple[str, str]], str]] = field(default_factory=list)
    """The most important claims that were tested: id, statement, verdicts with their texts, and the estimate."""
    report: str = ""
    """The relative address of the report, in which each claim has its place."""
    note: str = ""
    """A sentence on held-out seeds, or why there are no verdicts."""


def write_index(results: Path) -> Path:
    """Write the index of a folder of results from what lies there, and return its path.

    Reports that are finished at the same time write it one after the other, so that the last one has all of them.
    """
    out, root = results / "index.html", results.parent
    with locked(results / "index.lock", str(out), lambda line: print(line, file=sys.stderr)):
        own: list[Entry] = []
        shipped: list[Entry] = []
        for name, report in _reports(results).items():
            [(_, address)] = links = _links({"Report": report}, results)
            entry = _preset(name, results / name / "tables", links, _head(report))
            entry.report = address
            (shipped if is_shipped(name) else own).append(entry)
        groups = {
            "Your own models and data": own,
            "Presets of the paper, run here": shipped,
            "Presets of the paper, as published": [_published(folder, results) for folder in published_folders(root)],
            "Runs of others": _evidence(results, root),
        }
        for entries in groups.values():
            entries.sort(key=lambda entry: entry.last, reverse=True)
        styles = {"style": inline("page.css"), "own_style": inline("index.css")}
        page = environment().get_template("index.html.j2").render(groups=groups, lines=LINES, **styles)
        with atomic_path(out) as partial:
            partial.write_text(page, encoding="utf-8")
    return out


def _reports(results: Path) -> dict[str, Path]:
    """Return the report of each preset that has one, by name; the one with scores of lm-eval if there are two."""
    names = ("without_evaluation.html", "index.html")
    return {path.parents[1].name: path for name in names for path in sorted(results.glob(f"*/report/{name}"))}


def _head(report: Path) -> dict[str, str]:
    """Return the title, the description and the answer (`abstract`) that the head of a report has."""
    with report.open("rb") as file:
        head = file.read(2**15).decode(errors="replace")
    found = re.findall(r'<(?:title>|meta name="(\w+)" content=")(.*?)(?:</title>|">)', head, re.DOTALL)
    return {name or "title": unescape(text) for name, text in found}


def _preset(name: str, folder: Path, links: list[tuple[str, str]], head: Mapping[str, str]) -> Entry:
    """Return the entry of a preset by the tables in a folder, or by what is published there."""
    title = name if is_shipped(name) else head.get("title") or name
    preset = load_preset(split_name(name)[0]).description if is_shipped(name) else ""
    entry = Entry(title, head.get("description") or preset, links, head.get("abstract", ""))
    # What is damaged of one preset keeps no other from being listed.
    try:
        claims = read_claims(folder, NOT_PUBLISHED)
        if made := read_provenance(folder):
            runs, models = made["runs"], {row["model"] for row in made["inputs"]}
            started = [made["first_started"], made["last_started"]]
        else:
            rows = read_rows(folder, "runs", ["model", "started"])
            runs, models = len(rows), {row["model"] for row in rows}
            started = sorted(row["started"] for row in rows if row["started"])
    except UserError as error:
        entry.note = f"Its tables can't be read: {error}."
        return entry
    days = dict.fromkeys(time[:10] for time in (*started[:1], *started[-1:]))
    entry.size = [f"{runs:,} run{'' if runs == 1 else 's'}", ", ".join(sorted(models)), " to ".join(days)]
    entry.last, entry.verdicts = max(started, default=""), _counts(claims["verdict"])
    for claim in _most_important(claims):
        number = "" if formats.missing(claim["estimate"]) else claim_text.measured(claim)
        badge = claim["verdict"], claim_text.verdict(claim)
        entry.lines.append((claim["claim_id"], claim["statement"], [badge], number))
    return entry


def _published(folder: Path, results: Path) -> Entry:
    """Return the entry of a published preset, which has figures and tables and no page."""
    files = {"Verdicts": folder / "verdicts.svg", "All claims": folder / "claims.csv"}
    entry = _preset(folder.name, folder, _links(files, results), {})
    if not entry.note and (again := read_held_out(folder)) is not None:
        entry.note = f"Of the claims that seeds can change, {summary_of(again)}."
    return entry


def _evidence(results: Path, root: Path) -> list[Entry]:
    """Return an entry of the runs of others as they were judged here, or else as published; none if they were not."""
    folders = [path for path in (results / EVIDENCE, root / PUBLISHED / EVIDENCE) if (path / "claims.csv").is_file()]
    if not folders:
        return []
    judged = read_claims(folders[0], NOT_PUBLISHED)
    judged = judged[judged["verdict"] != "not tested"]
    files = {"Core claims by size of the model": "matrix.svg", "Estimates": "forest.svg", "All claims": "claims.csv"}
    links = _links({text: folders[0] / name for text, name in files.items()}, results)
    entry = Entry("Runs of others", "The same claims, judged on runs that others have published, model by model", links)
    entry.size = [f"{judged['source'].nunique()} sources", f"{judged.groupby(['source', 'model']).ngroups} models"]
    entry.verdicts = _counts(judged["verdict"])
    for claim in _most_important(judged):
        counts = _counts(judged.loc[judged["claim_id"] == claim["claim_id"], "verdict"])
        badges = [(verdict, f"{verdict} on {number} model{'' if number == 1 else 's'}") for verdict, number in counts]
        entry.lines.append((claim["claim_id"], claim["statement"], badges, ""))
    return [entry]


def _counts(verdicts: pd.Series[str]) -> list[tuple[str, int]]:
    counts = verdicts.value_counts()
    return [(verdict, int(counts[verdict])) for verdict in claim_text.VERDICTS if verdict in counts]


def _most_important(claims: pd.DataFrame) -> list[dict[Any, Any]]:
    """Return the first core claims that are decided, then those that are inconclusive, of each fact one."""
    core = claims[claims["claim_id"].isin(CORE) & claims["verdict"].isin((*DECIDED, "inconclusive"))]
    ordered = core.assign(open=core["verdict"] == "inconclusive", place=core["claim_id"].map(CORE.index))
    first = ordered.sort_values(["open", "place"], kind="stable").drop_duplicates("fact").head(LINES)
    rows: list[dict[Any, Any]] = first.to_dict("records")
    return rows


def _links(files: Mapping[str, Path], results: Path) -> list[tuple[str, str]]:
    """Return the texts of the files that exist, with their addresses relative to the index."""
    addresses = {
        text: Path(os.path.relpath(path, results)).as_posix() for text, path in files.items() if path.is_file()
    }
    return [(text, quote(address)) for text, address in addresses.items()]
