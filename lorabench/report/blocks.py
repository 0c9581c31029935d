"""The generated parts of the README and of the pages in `docs/`, written from the committed tables alone.

A part stands between two marker lines that name it; the text around it is written by hand. Everything that is longer
(all claims of all presets, all sources, criteria, optimal learning rates) is made when the documentation is built, by
`docs/hooks.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from lorabench.claims.judge import CLAIMS, CORE
from lorabench.errors import UserError
from lorabench.report import claim_text
from lorabench.report.facts import headline, in_order
from lorabench.sources.measurements import MEASURES
from lorabench.store.io import read_claims
from lorabench.utils import formats
from lorabench.utils.files import atomic_path

PUBLISHED = Path("paper_figures/published")
"""The folder of published results, from the root of the repository."""

SOURCES = Path("paper_figures/reference")
"""The folder of the shipped sources, from the root of the repository."""

NOT_PUBLISHED = ("run_ids",)
"""The columns of the table `claims` that are not published."""

_RESULTS, _OTHER_RUNS, _PAPER = Path("docs/results.md"), Path("docs/other-runs.md"), Path("docs/paper.md")


def write_blocks(root: Path) -> None:
    """Write all generated parts of a repository.

    Raises:
        UserError: a page has no place for its part; then no page is changed.
    """
    for page, text in pages(root).items():
        with atomic_path(root / page) as unfinished:
            unfinished.write_text(text, encoding="utf-8")


def pages(root: Path) -> dict[Path, str]:
    """Return the pages with generated parts, as paths from the root, with the text that they should have.

    Raises:
        UserError: a page has no place for its part.
    """
    texts: dict[Path, str] = {}
    for (page, name), make in _makers(root).items():
        before, after = _around(texts.get(page) or _read(root / page), name, page)
        texts[page] = f"{before}\n{make(root)}\n{after}"
    return texts


def check_places(root: Path, *presets: str) -> None:
    """Check that every page has a place for its parts, also for those of presets that were not published before.

    Raises:
        UserError: a page has no place for its part.
    """
    for page, name in _makers(root, *presets):
        _around(_read(root / page), name, page)


def _makers(root: Path, *presets: str) -> dict[tuple[Path, str], Callable[[Path], str]]:
    names = {*presets, *(folder.name for folder in published_folders(root))}
    return {
        (Path("README.md"), "matrix"): matrix,
        (_OTHER_RUNS, "evidence"): evidence,
        (_PAPER, "claims"): claims,
        **{(_RESULTS, name): partial(results, preset=name) for name in sorted(names)},
    }


def _read(page: Path) -> str:
    return page.read_text(encoding="utf-8") if page.is_file() else ""


def _around(text: str, name: str, page: Path) -> tuple[str, str]:
    """Return the text up to the end of a part's first marker, and from its second one on."""
    start = f"<!-- {name}: written by `lorabench publish` and `lorabench evidence`, never by hand -->"
    end = f"<!-- end of {name} -->"
    before, found_start, rest = text.partition(start)
    _, found_end, after = rest.partition(end)
    if not (found_start and found_end):
        raise UserError(f"{page} has no place for its generated part: it needs the two lines {start} and {end}")
    return before + start, end + after


def published_folders(root: Path) -> list[Path]:
    """Return the folders of the presets whose verdicts a repository has published."""
    return sorted(path.parent for path in (root / PUBLISHED).glob("*/provenance.json"))


def matrix(root: Path) -> str:
    """Return the core claims by the size of the model, as a picture and a table whose cells link to the runs."""
    cells = pd.read_csv(root / PUBLISHED / "evidence/matrix.csv")
    scales = list(dict.fromkeys(cells.sort_values("parameters", kind="stable")["scale"]))
    rows = []
    for claim_id, judged in cells.groupby("claim_id", sort=False):
        by_scale = {row["scale"]: _cell(row) for row in judged.to_dict("records")}
        first = judged.iloc[0]
        rows.append([claim_id, first["statement"], *(by_scale.get(scale, formats.DASH) for scale in scales)])
    picture = f"![Core claims by the size of the model]({PUBLISHED}/evidence/matrix.svg)"
    return "\n".join([picture, "", *table(["", "claim", *scales], rows)])


def _cell(row: Mapping[Any, Any]) -> str:
    if row["verdict"] == "not tested":
        return formats.DASH
    page = _RESULTS if pd.isna(row["source"]) else _OTHER_RUNS
    value = "" if pd.isna(row["estimate"]) else f" {formats.number(row['estimate'])}"
    if pd.notna(row["ci_low"]) and pd.notna(row["ci_high"]):
        value += f" {formats.interval(row['ci_low'], row['ci_high'])}"
    return f"[{claim_text.verdict(row)}]({page}#{row['origin']}){value}"


def results(root: Path, preset: str) -> str:
    """Return what a preset says in short: the count of its verdicts, its core claims, and the claims it decides."""
    folder = root / PUBLISHED / preset
    judged = in_order(read_claims(folder, without=NOT_PUBLISHED))
    provenance = json.loads((folder / "provenance.json").read_text())
    decided = judged["verdict"].isin(["confirmed", "contradicted"]) & judged["kind"].ne("count")
    shown = judged[judged["verdict"].ne("not tested") & (decided | judged["claim_id"].isin(CORE))]
    picture = f"../{PUBLISHED}/{preset}/verdicts.svg"
    lines = [
        f"![Verdicts of the preset {preset}]({picture})",
        "",
        f"{headline(judged)}. {provenance['runs']} runs, {formats.duration(provenance['run_seconds'])} of one core on "
        f"{' and '.join(provenance['devices'])}, from {provenance['first_started'][:10]}. "
        f"[All claims](../{PUBLISHED}/{preset}/claims.csv).",
        "",
        *table(
            ["", "claim", "verdict", "margin", "measured, 95% interval"],
            map(_row, shown.to_dict("records")),
        ),
    ]
    return "\n".join(lines)


def _row(claim: Mapping[Any, Any]) -> list[str]:
    verdict = "; ".join(filter(None, [claim_text.verdict(claim), claim_text.remark(claim)]))
    return [claim["claim_id"], claim["statement"], verdict, claim_text.margin(claim), measured(claim)]


def measured(claim: Mapping[Any, Any]) -> str:
    """Return the estimate of a claim with its interval."""
    if pd.isna(claim["ci_low"]) or pd.isna(claim["ci_high"]):
        return claim_text.estimate(claim)
    return f"{claim_text.estimate(claim)} {formats.interval(claim['ci_low'], claim['ci_high'])}"


def evidence(root: Path) -> str:
    """Return the numbers that several sources measured, and each source with its doubts and a count of its verdicts."""
    folder = root / PUBLISHED / "evidence"
    summary, judged = pd.read_csv(folder / "summary.csv"), pd.read_csv(folder / "claims.csv")
    rows = [
        [MEASURES[row["measure"]], row["k"], f"{_mean(row, 'mean')} [{_mean(row, 'low')}, {_mean(row, 'high')}]"]
        for row in summary[summary["attribute"].isna()].to_dict("records")
    ]
    lines = table(["measured", "sources", "mean, 95% interval"], rows)
    for path in sorted((root / SOURCES).glob("*/source.yaml")):
        source, name = yaml.safe_load(path.read_text()), path.parent.name
        verdicts = judged.loc[judged["source"].eq(name) & judged["verdict"].ne("not tested"), "verdict"]
        counted = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.value_counts().items())
        lines += [
            "",
            f"#### {name}",
            "",
            f"{source['about']}. From {source['origin']['repository']}, {source['origin']['date']}. "
            f"Doubts: {'; '.join(source['doubts'])}. Verdicts: {counted or 'none'}.",
        ]
    return "\n".join(lines)


def _mean(row: Mapping[Any, Any], name: str) -> str:
    return f"{math.exp(row[name]):.3g}" if row["measure"] == "lr_ratio" else f"{row[name]:+.4f}"


def claims(root: Path) -> str:
    """Return the statements of all claims with the paper's values; those of the core claims are in bold."""
    ordered = sorted(CLAIMS, key=lambda claim: (claim.id[0], int(claim.id[1:])))
    rows = [
        [f"**{claim.id}**" if claim.core else claim.id, claim.statement, claim.paper_value, claim.kind]
        for claim in ordered
    ]
    return "\n".join(table(["", "claim", "in the paper", "kind"], rows))


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Return the lines of a Markdown table; what would be markup in the cells is escaped."""
    header = list(header)
    return [
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(f"| {' | '.join(escaped(str(cell)) for cell in row)} |" for row in rows),
    ]


def escaped(text: str) -> str:
    """Return text for Markdown, also for the cell of a table: markup of HTML is shown as it is, code is set as code."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
