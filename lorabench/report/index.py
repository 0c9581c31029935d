"""The index of a folder of results: one page over its reports, the published presets, and the runs of others."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pandas as pd

from lorabench.analysis.rules import DECIDED
from lorabench.claims.judge import CORE
from lorabench.config.loading import PRESETS, load_preset, split_name
from lorabench.errors import UserError
from lorabench.report import claim_text
from lorabench.report.freeze import summary_of
from lorabench.report.page import environment, inline
from lorabench.report.publish import NOT_PUBLISHED, PUBLISHED, published_folders
from lorabench.sources.measurements import HELD_OUT, read_provenance
from lorabench.store.io import read_claims, read_rows
from lorabench.utils import formats
from lorabench.utils.files import atomic_path
from lorabench.utils.lock import locked

LINES = 3
"""The most claims that an entry shows; the report has all."""

EVIDENCE = "evidence"
"""The folder of the claims judged on the runs of others, in a folder of results and among what is published."""

_HEAD = 2**15
"""The bytes of a report in which its title and description are looked for."""


class Line(NamedTuple):
    """A claim with its verdict, or with those on several models."""

    claim_id: str
    statement: str
    badges: list[tuple[str, str]]
    """Verdicts, each with its text."""
    number: str = ""
    """The estimate with its interval."""


@dataclass(frozen=True)
class Entry:
    """What the index shows of a report, a published preset, or the runs of others."""

    name: str
    title: str
    about: str
    """A sentence without a full stop."""
    answer: str
    """Whether LoRA matches full fine-tuning, in a sentence; empty where that is not known."""
    links: list[tuple[str, str]]
    """Texts and relative addresses, the most important one first."""
    size: list[str]
    """How many runs of which models, and from when."""
    last: str
    """The time at which the last run was started, as text in ISO 8601, by which entries are ordered."""
    verdicts: list[tuple[str, int]]
    """Each verdict with the number of claims that have it."""
    lines: list[Line]
    """The most important claims that were tested."""
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
        reports = list(_reports(results))
        groups = {
            "Your own models and data": [entry for entry in reports if not _shipped(entry.name)],
            "Presets of the paper, run here": [entry for entry in reports if _shipped(entry.name)],
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


def _shipped(name: str) -> bool:
    return (PRESETS / f"{split_name(name)[0]}.yaml").is_file()


def _description(name: str) -> str:
    """Return the description of a shipped preset, empty for others."""
    return load_preset(split_name(name)[0]).description if _shipped(name) else ""


def _reports(results: Path) -> Iterator[Entry]:
    """Return the presets with a report in a folder of results."""
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        names = ("index.html", "without_evaluation.html")
        report = next((path for name in names if (path := folder / "report" / name).is_file()), None)
        if report is None:
            continue
        head, name = _Head(report), folder.name
        address = _address(report, results)
        title = name if _shipped(name) else head.title or name
        about = (
            name,
            title,
            head.named.get("description") or _description(name),
            head.named.get("abstract", ""),
            [("Report", address)],
        )
        # A damaged table of one preset keeps no other report from being listed.
        try:
            runs = read_rows(folder / "tables", "runs", ["model", "started"])
            verdicts, lines = _judged(read_claims(folder / "tables"))
        except UserError as error:
            yield Entry(*about, [], "", [], [], note=f"Its tables can't be read: {error}.")
            continue
        started = sorted(row["started"] for row in runs if row["started"])
        models = sorted({row["model"] for row in runs})
        size = _size(len(runs), models, started[:1], started[-1:])
        yield Entry(*about, size, started[-1] if started else "", verdicts, lines, address)


class _Head(HTMLParser):
    """The title, the description and the answer in the head of a report."""

    def __init__(self, report: Path) -> None:
        super().__init__()
        self.title, self.named, self._in_title = "", dict[str, str](), False
        with report.open("rb") as file:
            self.feed(file.read(_HEAD).decode(errors="replace"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_title = tag == "title"
        values = {name: value or "" for name, value in attrs}
        if tag == "meta" and "name" in values:
            self.named[values["name"]] = values.get("content", "")

    def handle_endtag(self, tag: str) -> None:
        self._in_title = False

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data


def _published(folder: Path, results: Path) -> Entry:
    """Return the entry of a published preset, which has figures and tables and no page."""
    named = folder.name, folder.name, _description(folder.name), ""
    try:
        made, (verdicts, lines) = read_provenance(folder), _judged(read_claims(folder, NOT_PUBLISHED))
    except UserError as error:
        return Entry(*named, [], [], "", [], [], note=f"What is published of it can't be read: {error}.")
    models = sorted({row["model"] for row in made["inputs"]})
    files = {"Verdicts": folder / "verdicts.svg", "All claims": folder / "claims.csv"}
    links = [(text, _address(path, results)) for text, path in files.items() if path.is_file()]
    again = folder / HELD_OUT / "came_out_again.csv"
    note = f"Of the claims that seeds can change, {summary_of(pd.read_csv(again))}." if again.is_file() else ""
    started = made["first_started"], made["last_started"]
    size = _size(made["runs"], models, [started[0]], [started[1]])
    return Entry(*named, links, size, started[1], verdicts, lines, note=note)


def _evidence(results: Path, root: Path) -> list[Entry]:
    """Return an entry of the runs of others as they were judged here, or else as published; none if they were not."""
    folders = [path for path in (results / EVIDENCE, root / PUBLISHED / EVIDENCE) if (path / "claims.csv").is_file()]
    if not folders:
        return []
    judged = read_claims(folders[0], NOT_PUBLISHED)
    judged = judged[judged["verdict"] != "not tested"]
    size = [f"{judged['source'].nunique()} sources", f"{judged.groupby(['source', 'model']).ngroups} models"]
    files = {"Core claims by size of the model": "matrix.svg", "Estimates": "forest.svg", "All claims": "claims.csv"}
    links = [
        (text, _address(folders[0] / name, results)) for text, name in files.items() if (folders[0] / name).is_file()
    ]
    lines = []
    for claim in _most_important(judged):
        counts = _counts(judged.loc[judged["claim_id"] == claim["claim_id"], "verdict"])
        badges = [(verdict, f"{verdict} on {number} model{'' if number == 1 else 's'}") for verdict, number in counts]
        lines.append(Line(claim["claim_id"], claim["statement"], badges))
    title, about = "Runs of others", "The same claims, judged on runs that others have published, model by model"
    return [Entry(EVIDENCE, title, about, "", links, size, "", _counts(judged["verdict"]), lines)]


def _judged(claims: pd.DataFrame) -> tuple[list[tuple[str, int]], list[Line]]:
    """Return the number of claims by verdict, and the most important claims."""
    lines = [
        Line(
            claim["claim_id"],
            claim["statement"],
            [(claim["verdict"], claim_text.verdict(claim))],
            "" if formats.missing(claim["estimate"]) else claim_text.measured(claim),
        )
        for claim in _most_important(claims)
    ]
    return _counts(claims["verdict"]), lines


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


def _size(runs: int, models: Iterable[str], first: Iterable[str], last: Iterable[str]) -> list[str]:
    days = list(dict.fromkeys(time[:10] for time in (*first, *last)))
    return [f"{runs:,} run{'' if runs == 1 else 's'}", ", ".join(models), " to ".join(days)]


def _address(path: Path, results: Path) -> str:
    """Return the address of a file, relative to the index."""
    return quote(Path(os.path.relpath(path, results)).as_posix())
