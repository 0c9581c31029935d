"""What mkdocs adds to the pages in this folder: long tables, made from code and committed files, and links that fit.

The pages link to files of the repository, so that they can be read there as well. On the site, a link to a file that
has a page of its own leads to that page, and a link to another file becomes plain text. The first page and those of
studies are READMEs.
"""

from __future__ import annotations

import datetime
import os
import re
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import pyarrow as pa
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow/scripts"))

from export import MEANINGS, type_name
from lorabench.claims.claim import Claim
from lorabench.claims.judge import CLAIMS
from lorabench.figures.catalog import FIGURES
from lorabench.figures.verdicts import FAMILIES
from lorabench.report import claim_text
from lorabench.store.io import read_claims
from lorabench.store.published import (
    HELD_OUT,
    NOT_PUBLISHED,
    PUBLISHED,
    published_folders,
    read_batches,
    read_held_out,
    read_provenance,
)
from lorabench.store.schemas import RUNS, SCHEMAS, description
from lorabench.utils import formats
from lorabench.utils.markdown import escaped, table
from pages import SOURCES, held_out, held_out_lines, verdict_columns

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

ELSEWHERE = {
    "README.md": "index.md",
    **{
        path.relative_to(ROOT).as_posix(): f"{path.parent.name.replace('_', '-')}.md"
        for path in sorted((ROOT / "studies").glob("*/README.md"))
    },
    **{path.relative_to(ROOT).as_posix(): path.name for path in sorted((ROOT / "advice/docs").glob("*.md"))},
}
"""The first page, and the pages of studies and of lora-advice, which lie in other folders, by their file."""

PAGES = {
    **ELSEWHERE,
    "lorabench/claims/judge.py": "claims.md",
    "lorabench/store/schemas.py": "columns.md",
    f"{PUBLISHED}/calibration.csv": "all-calibration.md",
    "docs/rule_changes.yaml": "rule-changes.md",
    f"{PUBLISHED}/evidence/claims.csv": "all-evidence.md",
    f"{PUBLISHED}/evidence/lr_optima.csv": "all-learning-rates.md",
    **{str((folder / "claims.csv").relative_to(ROOT)): f"all-{folder.name}.md" for folder in published_folders(ROOT)},
}
"""The pages that are made for the site, by the file of the repository that they show."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from committed files."""
    from mkdocs.structure.files import File

    texts = {
        **{name: page_of(ROOT / file) for file, name in ELSEWHERE.items()},
        "claims.md": claims_page(),
        "columns.md": columns_page(),
        "all-calibration.md": calibration_page(),
        "rule-changes.md": rule_changes_page(read_rule_changes()),
        "all-evidence.md": evidence_page(),
        "all-learning-rates.md": learning_rates_page(),
        **{f"all-{folder.name}.md": results_page(folder) for folder in published_folders(ROOT)},
    }
    for name, text in texts.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links to files of the repository into links of the site; make room for tables of many columns."""
    name, text = page.file.src_uri, site_links(markdown, "../" * page.file.src_uri.count("/"))
    if name == "results.md":
        page.meta["hide"] = ["toc"]
    elif name.startswith("all-") or name == "rule-changes.md":
        page.meta["hide"], text = ["navigation", "toc"], f"[All results](results.md)\n\n{text}"
    return text


def site_links(markdown: str, to_docs: str = "") -> str:
    """Turn links to files of the repository into links of the site, for a page from which `to_docs` leads to docs/."""
    for file, page in PAGES.items():
        markdown = re.sub(rf"\]\({re.escape(f'{to_docs}../{file}')}(?=[)#])", f"]({to_docs}{page}", markdown)
    markdown = markdown.replace(f"]({to_docs}../{PUBLISHED}/", f"]({to_docs}published/")
    return re.sub(rf"\[([^]\[]*)]\({to_docs}\.\./[^)]*\)", r"\1", markdown)


def page_of(file: Path) -> str:
    """Return the text of a page in another folder with links as of a page in docs/."""

    def link(match: re.Match[str]) -> str:
        return f"]({os.path.relpath(file.parent / match[1], ROOT / 'docs')}"

    return re.sub(r"\]\((?!https?:|#)([^)#\s]+)", link, file.read_text(encoding="utf-8"))


def claims_page() -> str:
    """Return the page of all claims: a section for each family, and in it one for each claim."""
    ordered = sorted(CLAIMS, key=lambda claim: (claim.id[0], int(claim.id[1:])))
    linked = [(f"[{claim.id}](#{claim.id.lower()})", claim) for claim in ordered]
    rows = [
        [f"**{link}**" if claim.core else link, claim.statement, claim.paper_value, claim.kind]
        for link, claim in linked
    ]
    lines = [
        f"# The {sum(claim.kind != 'own prediction' for claim in CLAIMS)} claims and their criteria",
        "",
        "Each claim is a testable statement of the paper; P1 to P7 and X1 to X7 are predictions of this project. Ids "
        f"in bold are the {sum(claim.core for claim in CLAIMS)} core claims, on which the paper's main conclusions "
        "rest. [Kinds of claims](verdicts.md#kinds-of-claims-and-how-they-are-counted) explains the last column.",
        "",
        *table(["", "claim", "in the paper", "kind"], rows),
        "",
        "## Criteria",
        "",
        "Where the paper leaves open what would confirm a statement, the criterion is this project's choice. "
        "The criteria use the [two decision rules](verdicts.md#the-two-decision-rules). *The margin* without a number "
        "is that of the preset: for losses 2% of the gain from the base to full fine-tuning, for accuracies 2 points, "
        "for learning rates a factor of 1.6. Where the conditions are not met, the verdict is `setting not met`.",
        "",
    ]
    for family, members in groupby(ordered, key=lambda claim: claim.id[0]):
        lines += [f"### {family}. {FAMILIES[family]}", ""]
        for claim in members:
            lines += [*_section(claim), ""]
    return "\n".join(lines)


def _section(claim: Claim) -> list[str]:
    where = {"text": "in the text", "own": "not in the paper"}.get(claim.figure, f"figure {claim.figure}")
    conditions = [f"{condition.text} (presets: {_listed(condition.presets)})" for condition in claim.conditions]
    entries = {
        "Kind": claim.kind + (", a core claim" if claim.core else ""),
        "In the paper": f"{claim.paper_value} ({where})",
        "Unit of the estimate": claim.unit,
        "Criterion": claim.criterion,
        "Needs": claim.needs,
        "Fact": claim.fact,
        "Conditions": "; ".join(conditions),
        "Experiments": _listed(claim.experiments),
    }
    lines = [f"- **{name}**: {escaped(text)}" for name, text in entries.items() if text]
    return [f"#### {claim.id} {escaped(claim.statement)} {{ #{claim.id.lower()} }}", "", *lines]


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"


def columns_page() -> str:
    """Return the page of the columns of all tidy tables; neighbours with one meaning share a row."""
    lines = [
        "# Columns of the tables",
        "",
        "[Files and tables](tables.md) says where the tables lie, and what the metrics in `curves` are. Losses are in "
        "nats per scored token, seconds are wall-clock seconds, sizes are bytes. A null means that the number does not "
        "exist for that row.",
    ]
    for name, schema in SCHEMAS.items():
        about = [(type_name(column.type), _meaning(column, name)) for column in schema]
        rows = [
            [", ".join(f"`{column.name}`" for column, _ in same), *shared]
            for shared, same in groupby(zip(schema, about, strict=True), key=lambda pair: pair[1])
        ]
        lines += ["", f"## {name}", "", MEANINGS[name], "", *table(["column", "type", "meaning"], rows)]
    return "\n".join(lines)


def _meaning(column: pa.Field, name: str) -> str:
    text = description(column)
    shared = name != "runs" and column.name in RUNS.names and text == description(RUNS.field(column.name))
    return "as in [`runs`](#runs)" if shared else text


def results_page(folder: Path) -> str:
    """Return the page of a published preset: all claims, what they were computed from, and all figures."""
    together = read_batches(folder)
    provenance = read_provenance(folder if together is None else folder / HELD_OUT)
    judged = claim_text.in_order(read_claims(folder, without=NOT_PUBLISHED) if together is None else together)
    tested = judged[judged["verdict"] != "not tested"]
    again, rules = read_held_out(folder), [name[:12] for name in sorted(set(judged["rules"].dropna()))]
    rows = [
        [claim["claim_id"], claim["statement"], claim_text.verdict(claim), *held_out(claim, again),
         claim_text.remark(claim), claim_text.margin(claim), claim_text.measured(claim),
         claim_text.details(claim).get("Power", formats.DASH),
         _text(claim["scope"]), _text(claim["paper_value"])]
        for claim in tested.to_dict("records")
    ]  # fmt: skip
    untested = judged.loc[judged["verdict"] == "not tested", "claim_id"]
    header = ["", "claim", *verdict_columns(provenance, again), "needs, or what would decide", "margin",
              "measured, 95% interval", "power", "scope", "paper"]  # fmt: skip
    lines = [
        f"# All claims and figures of {folder.name}",
        "",
        f"{claim_text.headline(judged)}. {claim_text.COUNTING} The verdicts were computed from {provenance['runs']} "
        f"runs on {' and '.join(provenance['devices'])} at commit "
        f"{', '.join(commit[:7] for commit in provenance['commits'])}, and judged by "
        f"the rules {', '.join(rules) or 'of an older version'}.",
        *held_out_lines(provenance, again),
        "",
        *table(header, rows),
        "",
        f"Not tested, since the preset has no such runs: {', '.join(untested)}.",
    ]
    for name, figure in FIGURES.items():
        if (folder / f"{name}.svg").is_file():
            picture = f"![{figure.title}](published/{folder.name}/{name}.svg)"
            lines += ["", f"## {figure.title}", "", picture, "", f"*{figure.caption}*"]
    return "\n".join(lines)


def evidence_page() -> str:
    """Return the page of all sources: what each is, its doubts, and every verdict that has runs behind it."""
    folder = ROOT / PUBLISHED / "evidence"
    judged = pd.read_csv(folder / "claims.csv")
    judged = judged[judged["n_runs"].gt(0) & judged["verdict"].ne("not tested")]
    lines = [
        "# All verdicts on published runs",
        "",
        "[Other people's runs](other-runs.md) says how to read this page. "
        "[The core claims by the size of the model](results.md#by-the-size-of-the-model) are among the results.",
        "",
        "![What several sources measured](published/evidence/forest.svg)",
        "",
        "The rows of the picture group the sources by what differs between them. A diamond is the mean of a group.",
        "",
        *table(*_frame(pd.read_csv(folder / "summary.csv"))),
    ]
    for path in sorted((ROOT / SOURCES).glob("*/source.yaml")):
        source, name = yaml.safe_load(path.read_text()), path.parent.name
        attributes = "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in source["attributes"].items())
        rows = [
            [claim["model"].rsplit("/", 1)[-1], claim["claim_id"], claim["statement"], claim_text.verdict(claim),
             claim_text.measured(claim), claim["n_runs"], _text(claim["scope"])]
            for claim in judged[judged["source"] == name].to_dict("records")
        ]  # fmt: skip
        header = ["model", "", "claim", "verdict", "measured, 95% interval", "runs", "scope"]
        lines += [
            "",
            f"## {name}",
            "",
            f"{source['about']}. From {source['origin']['repository']}, {source['origin']['path']} at commit "
            f"{source['origin']['commit']}; licence: {source['origin']['licence']}. {attributes}.",
            "",
            *(f"- {doubt}" for doubt in source["doubts"]),
            "",
            *(table(header, rows) if rows else []),
        ]
    return "\n".join(lines)


def learning_rates_page() -> str:
    """Return the page of all known optimal learning rates, and of how far off each rule would have been."""
    folder = ROOT / PUBLISHED / "evidence"
    return "\n".join(
        [
            "# Known optimal learning rates",
            "",
            "[Recommended learning rates](other-runs.md#recommended-learning-rates) says how they are pooled. `error` "
            "is a standard deviation of the logarithm of the learning rate, and `off` a factor.",
            "",
            "![How far off each rule would have been](published/evidence/lr_left_out.svg)",
            "",
            "## Rules, with each source left out in turn",
            "",
            *table(*_frame(pd.read_csv(folder / "lr_left_out_summary.csv"))),
            "",
            "## Optima",
            "",
            *table(*_frame(pd.read_csv(folder / "lr_optima.csv"))),
        ]
    )


def calibration_page() -> str:
    """Return the page of the shares of right and wrong verdicts on simulated sweeps, by claim and effect."""
    tables = {name: pd.read_csv(ROOT / PUBLISHED / f"{name}.csv") for name in ("calibration", "calibration_smollm2")}
    core = pd.read_csv(ROOT / PUBLISHED / "calibration_core.csv")
    return "\n".join(
        [
            "# Right and wrong verdicts on simulated sweeps",
            "",
            "[How often verdicts are wrong](estimates.md#how-often-verdicts-are-wrong) explains the simulation. "
            "`effect` is in margins; `wrong` has a 95% interval, and `decided_wrong` is its share of decided verdicts. "
            "All sweeps break the assumptions of the fit.",
            "",
            "## Sweeps with the noise of laptop",
            "",
            *table(*_frame(tables["calibration"])),
            "",
            "## Sweeps with the noise of SmolLM2-135M",
            "",
            *table(*_frame(tables["calibration_smollm2"])),
            "",
            "## The power of core",
            "",
            "100 simulated sweeps for each claim and effect, with the learning rates, seeds and examples of `core`, "
            "without traits and by the rules of 27 November 2026.",
            "",
            *table(*_frame(core)),
        ]
    )


class RuleChange(NamedTuple):
    """A record of docs/rule_changes.yaml, whose head describes the fields."""

    rule: str
    date: datetime.date
    commit: str
    why: str
    seen: str | None
    turned: list[str] | None


def read_rule_changes() -> list[RuleChange]:
    """Return all changes of rules, in the order in which they were made."""
    records = yaml.safe_load((ROOT / "docs/rule_changes.yaml").read_text(encoding="utf-8"))
    return [RuleChange(**record) for record in records]


def rule_changes_page(changes: Sequence[RuleChange]) -> str:
    """Return the page of all changes of rules, the newest first."""
    rows = [
        [change.date, change.rule, change.why, change.seen or "no results", _turned(change.turned), change.commit]
        for change in reversed(changes)
    ]
    return "\n".join(
        [
            "# Changes of rules",
            "",
            "A rule that is made or changed after a look at results can be made to fit them, on purpose or not. This "
            "table has every change of the rules of judging, and every choice of a design that was made after results "
            "had been seen: what was known then, and which verdicts turned. Verdicts on [held-out "
            "seeds](verdicts.md#held-out-seeds) come from rules that were fixed before.",
            "",
            f"{sum(change.seen is not None for change in changes)} of {len(changes)} changes were made after results "
            "that they are about had been seen.",
            "",
            *table(["date", "change", "why", "known before", "verdicts that turned", "commit"], rows),
        ]
    )


def _turned(verdicts: list[str] | None) -> str:
    return "not written down" if verdicts is None else "; ".join(verdicts) or "none"


def _frame(frame: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a table of numbers, which are written to three digits."""
    rows = [
        [f"{value:.3g}" if isinstance(value, float) and pd.notna(value) else _text(value) for value in row]
        for row in frame.itertuples(index=False)
    ]
    return [name.replace("_", " ") for name in frame.columns], rows


def _text(value: Any) -> str:
    return formats.DASH if pd.isna(value) else str(value)
