"""Publishing a finished preset: copies of its figures, claims and provenance, and blocks of text about them.

The block of all claims stands on a page of the documentation, and that of the default preset's core claims in the
README as well. They are made from the committed files alone, so that a test can compare the pages with these files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from lorabench.claims.catalog import CORE
from lorabench.errors import UserError
from lorabench.figures.catalog import FIGURES
from lorabench.report import claim_text, summary
from lorabench.report.facts import COUNTING, facts, headline, in_order
from lorabench.report.generated_block import text_around, write_around
from lorabench.runs import PROTOCOL_VERSION
from lorabench.store.io import read_claims, read_table, write_csv
from lorabench.store.layout import Layout
from lorabench.utils import formats
from lorabench.utils.files import atomic_path, digest, write_json

START = "<!-- results: written by `lorabench publish`, never by hand -->"
END = "<!-- end of results -->"

FIGURE_KINDS = (".svg", ".png", ".csv")
"""The suffixes of a figure's files: two pictures, and the table of what they show."""

SHOWN = "verdicts"
"""The figure that the README shows; the page of results shows all."""

DEFAULT_PRESET = "laptop"
"""The preset whose core claims the README shows."""

FURTHER_PRESETS = ("long_runs",)
"""The presets whose verdicts the README shows where the default preset has not the setting of a core claim."""

_UNSETTLED = ("setting not met", "not tested")

_NOT_PUBLISHED = ("run_ids",)
"""The columns of the table claims that are left out."""

PICTURES = Path("published")
"""The link in `docs/` that leads to `paper_figures/published`."""


def results_page(preset: str) -> Path:
    """Return the page of a preset's results, as a path from the README."""
    return Path("docs/results.md" if preset == DEFAULT_PRESET else f"docs/results-{preset}.md")


def publish(layout: Layout, readme: Path) -> None:
    """Copy a preset's figures, claims and provenance to where the repository shows them, and write its pages.

    Args:
        layout: the preset, finished.
        readme: the README, which is written for the default preset and FURTHER_PRESETS only; the page of results lies
            in `docs/` beside it.

    Raises:
        UserError: a page has no place for its block, the figure that the README shows has not been drawn, or the table
            claims is from another version.
    """
    runs, claims = read_table(layout.tables(), "runs"), read_claims(layout.tables())
    published, default = layout.published, layout.published.with_name(DEFAULT_PRESET)
    makers = {readme.parent / results_page(layout.name): partial(results_block, published)}
    if published == default or (layout.name in FURTHER_PRESETS and default.is_dir()):
        makers[readme] = partial(readme_block, default)
    around = {path: text_around(path, START, END) for path in makers}
    drawn = sorted(path for path in layout.figures.glob("*.*") if path.suffix in FIGURE_KINDS)
    if layout.figures / f"{SHOWN}.svg" not in drawn:
        raise UserError(f"figure {layout.figures / SHOWN}.svg does not exist; run the preset {layout.name} first")
    for path in drawn:
        with atomic_path(layout.published / path.name) as unfinished:
            shutil.copyfile(path, unfinished)
    for path in set(layout.published.glob("*.*")) - {layout.published / path.name for path in drawn}:
        path.unlink()
    write_csv(claims.drop(columns=list(_NOT_PUBLISHED)), layout.published / "claims.csv")
    write_json(_provenance(layout, runs), layout.published / "provenance.json")
    for path, block in makers.items():
        write_around(path, around[path], block())


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
    """Return the README's block: the figure of all verdicts, and the core claims.

    Where the runs have not the setting of a claim, the row is that of the first of FURTHER_PRESETS whose runs have it.

    Args:
        figures: the default preset's folder that `publish` has written, as a path from the README. Those of further
            presets lie beside it.
    """
    claims, counted = _read(figures)
    core, pages = claims[claims["claim_id"].isin(CORE)].set_index("claim_id", drop=False), {}
    further = [name for name in FURTHER_PRESETS if (figures.with_name(name) / "claims.csv").is_file()]
    for name in further:
        others = read_claims(figures.with_name(name), without=_NOT_PUBLISHED).set_index("claim_id", drop=False)
        for claim_id in core.index[core["verdict"].isin(_UNSETTLED)].intersection(others.index):
            if others.loc[claim_id, "verdict"] not in _UNSETTLED:
                core.loc[claim_id], pages[claim_id] = others.loc[claim_id], name
    lines = [
        START,
        f"![{FIGURES[SHOWN].title}]({figures / SHOWN}.svg)",
        "",
        *counted,
        "",
        *_table(core, claims, pages),
        END,
    ]
    return "\n".join(lines)


def results_block(figures: Path) -> str:
    """Return the block of the page of results: all claims and all figures of a folder that `publish` has written."""
    claims, counted = _read(figures)
    tested = claims[claims["verdict"] != "not tested"]
    drawn = {name: _picture(figures, name) for name in FIGURES if (figures / f"{name}.svg").is_file()}
    first = drawn.pop(SHOWN, [])
    lines = [START, *first, *counted, "", *_table(tested, claims), "", *_untested(claims)]
    lines += chain.from_iterable(drawn.values())
    return "\n".join([*lines, END])


def _untested(claims: pd.DataFrame) -> list[str]:
    """Return a line that names the claims without runs; nothing if there are none."""
    untested = claims.loc[claims["verdict"] == "not tested", "claim_id"]
    return [f"Not tested, for want of such runs: {', '.join(untested)}.", ""] if len(untested) else []


def _picture(figures: Path, name: str) -> list[str]:
    """Return a figure with its caption for the page of results."""
    figure = FIGURES[name]
    return [f"![{figure.title}]({PICTURES / figures.name / name}.svg)", "", f"*{figure.caption}*", ""]


def _read(figures: Path) -> tuple[pd.DataFrame, list[str]]:
    """Return the claims of a published folder, and lines that count the verdicts and say what they rest on."""
    claims = read_claims(figures, without=_NOT_PUBLISHED)
    provenance = json.loads((figures / "provenance.json").read_text())
    devices = " and ".join(provenance["devices"])
    return in_order(claims), [
        f"What the `{provenance['preset']}` preset says. {headline(claims)}. Computed from {provenance['runs']} runs "
        f"({formats.duration(provenance['run_seconds'])} of one core on {devices}, "
        f"from {provenance['first_started'][:10]}).",
        "",
        f"*{COUNTING}*",
    ]


_HEADER = ("claim", "verdict", "margin", "measured, 95% interval", "power", "scope", "paper")


def _table(claims: pd.DataFrame, every: pd.DataFrame, presets: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """Return claims as a Markdown table; the facts that several of `every` claim state are named in their rows.

    Args:
        claims: the claims of the table.
        every: all claims of the preset.
        presets: the presets that other rows are from, by claim.
    """
    stating = {claim_id: fact.claim_ids for fact in facts(every) for claim_id in fact.claim_ids}
    lines = [f"| | {' | '.join(_HEADER)} |", f"|---|{'---|' * len(_HEADER)}"]
    for claim in claims.to_dict("records"):
        others = [claim_id for claim_id in stating[claim["claim_id"]] if claim_id != claim["claim_id"]]
        statement = claim["statement"] + (f" (one fact with {', '.join(others)})" if others else "")
        remark = claim_text.remark(claim)
        verdict = "; ".join(filter(None, [claim_text.verdict(claim), remark]))
        scope = _cell(claim["scope"])
        if claim["claim_id"] in presets:
            scope += f" (preset [{presets[claim['claim_id']]}]({results_page(presets[claim['claim_id']])}))"
        cells = (
            *(claim["claim_id"], statement, verdict, claim_text.margin(claim), _measured(claim)),
            *(claim_text.power(claim), scope, _cell(claim["paper_value"])),
        )
        lines.append(f"| {' | '.join(_escaped(cell) for cell in cells)} |")
    return lines


def _measured(claim: dict[Any, Any]) -> str:
    text = claim_text.estimate(claim)
    if pd.isna(claim["ci_low"]) or pd.isna(claim["ci_high"]):
        return text
    return f"{text} {formats.interval(claim['ci_low'], claim['ci_high'])}"


def _cell(value: Any) -> str:
    return formats.DASH if pd.isna(value) else str(value)


def _escaped(text: str) -> str:
    """Escape text so that it is no markup in a cell of a Markdown table."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
