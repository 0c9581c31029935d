"""The report: one self-contained HTML page, made from the tables and figures of a preset; and the index of reports."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np
import pandas as pd
import yaml
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from lorabench.analysis.comparison import Judging
from lorabench.analysis.estimate import ExampleLosses
from lorabench.claims.recipe import measured_recipe
from lorabench.config.loading import is_shipped
from lorabench.doctor.record import record_for
from lorabench.errors import UserError
from lorabench.figures.catalog import PaperFigure, figures_of_preset
from lorabench.figures.rl import runs_above_max_kl
from lorabench.figures.style import arm_styles
from lorabench.planning.plan import Plan
from lorabench.report import claim_text, summary
from lorabench.report.other_margins import turned
from lorabench.runs import MAX_KL
from lorabench.store.io import list_of_words, read_claims, read_rows, read_table
from lorabench.store.layout import Layout
from lorabench.store.made_from import named_in, of_tables
from lorabench.store.published import NOT_PUBLISHED
from lorabench.utils import formats
from lorabench.utils.files import atomic_path
from lorabench.utils.lock import locked
from lorabench.utils.studies import studies

_HERE = Path(__file__).parent

SECTIONS: list[dict[str, Any]] = yaml.safe_load((_HERE / "sections.yaml").read_text(encoding="utf-8"))
"""The page's sections in the paper's order, and then those of studies: which figures and claims are shown together."""
SECTIONS += [study.texts["section"] for study in studies()]


_SHOWN = ("runs", "curves", "test_losses", "claims", "verdicts_by_margin", "evals", "compute", "counts")
"""The tables that the page is made from."""


def build(plan: Plan, layout: Layout, source: str, out: Path, evaluated: bool = True) -> None:
    """Write the report of a preset from its figures and its tables runs, curves, claims and, if it exists, evals.

    `source` is the preset as the user named it: the name of a shipped preset, or the path of its file. Without
    `evaluated`, the page needs neither scores of lm-eval nor their figures. UserError says that a figure or a table is
    missing, or the table claims is from another version; then the file `out` stays as it is.
    """
    # The lines of the claims show what the picture of all verdicts shows.
    left_out = {"claims"} if evaluated else {"claims", "evals"}
    figures = [figure for figure in figures_of_preset(plan.preset) if figure.table not in left_out]
    tables = layout.tables()
    all_runs = read_table(tables, "runs")
    runs = summary.labelled(all_runs)
    judged = read_claims(tables)
    # A shipped preset reruns the paper. A user's own asks a question, and its page has only claims that it can test.
    question = not is_shipped(layout.name)
    judged = judged[~judged["verdict"].isin(["not tested", "setting not met"])] if question else judged
    claims = summary.claims(judged, runs)
    tested = [claim for claim in claims if claim["verdict"] != "not tested"]
    all_curves = read_table(tables, "curves")
    judging = Judging(plan.preset.margins, ExampleLosses.of(read_table(tables, "test_losses", optional=True)))
    recipe = measured_recipe(all_runs, all_curves, judging)
    trained = plan.preset.experiments.trained()
    rendered = (
        environment()
        .get_template("page.html.j2")
        .render(
            name=layout.name,
            question=question,
            preset=plan.preset,
            style=inline("page.css"),
            script=inline("page.js"),
            counting=claim_text.COUNTING,
            tally=claim_text.tally(judged),
            statements=dict(zip(judged["claim_id"], judged["statement"], strict=True)),
            bases=runs[["model", "base_params", "hidden_size"]].drop_duplicates("model").to_dict("records"),
            sections=arrange([_figure(figure, layout, source) for figure in figures], tested),
            untested=[claim for claim in claims if claim not in tested],
            margins=turned(read_table(tables, "verdicts_by_margin", optional=True), judged),
            recipe=recipe,
            costs=[summary.costs(runs, recommendation) for recommendation in recipe],
            environment=summary.environment(runs),
            rules=sorted(set(judged["rules"].dropna())),
            experiments=list(filter(None, (summary.experiment(name, runs, judging) for name in trained))),
            n_above_max_kl=len(runs_above_max_kl(all_curves)),
            max_kl=MAX_KL,
            evaluation=summary.evaluation(read_table(tables, "evals", optional=True)) if evaluated else [],
            evaluated=evaluated,
            work=summary.work(plan, runs),
            runs=runs.to_dict("records"),
            inputs=summary.inputs(runs),
            datasets=summary.dataset_origins(layout),
            doctor=record_for(plan.preset.execution),
            # As JSON for the page's script, escaped so that no text in it can end its HTML element.
            curves=htmlsafe_json_dumps(
                curves_to_draw(runs, all_curves), dumps=json.dumps, separators=(",", ":"), allow_nan=False
            ),
            downloads=table_downloads(tables, out.parent, evaluated),
            tables=tables,
            made_from=of_tables([tables], [name for name in _SHOWN if evaluated or name != "evals"]),
            figures_folder=layout.figures,
            command=_command(source, out),
        )
    )
    with atomic_path(out) as partial:
        partial.write_text(rendered, encoding="utf-8")


def environment() -> jinja2.Environment:
    """Return what renders the templates of pages; it escapes whatever is put into them."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(FILTERS)
    made.tests["missing"] = formats.missing
    return made


def inline(name: str) -> dict[str, str]:
    """Return a file to embed, and its hash: the page's policy lets a browser run and apply only what has one."""
    text = (_HERE / name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"text": Markup(text), "hash": f"sha256-{digest}"}


def _figure(figure: PaperFigure, layout: Layout, source: str) -> dict[str, Any]:
    """Return what the page shows of a figure, with its picture and its CSV file as data: URIs."""
    path = layout.figures / figure.name
    command = _command(source, path.with_suffix(".svg"))
    try:
        svg, csv = (path.with_suffix(suffix).read_bytes() for suffix in (".svg", ".csv"))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} does not exist; draw the figure with `{command}`") from error
    files = {"svg": _data_uri(svg, "image/svg+xml"), "csv": _data_uri(csv, "text/csv")}
    files |= {"made_from": named_in(path.with_suffix(".svg")) or ""}
    return {"name": figure.name, "title": figure.title, "caption": figure.caption, "command": command, **files}


def _command(source: str, target: Path) -> str:
    """Return the command line that makes a file of the preset."""
    # Snakemake runs laptop where no preset is named. Its --config takes all words that follow it, so it comes last.
    config = [] if source == "laptop" else ["--config", f"preset={source}"]
    return shlex.join(["snakemake", "--cores", "all", str(target), *config])


def arrange(figures: Sequence[dict[str, Any]], claims: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the sections that have a figure or a claim: `about` (one of SECTIONS), and its `figures` and `claims`.

    Figures (by `name`) and claims (by `claim_id`) that no section names are in a last section.
    """
    by_name = {figure["name"]: figure for figure in figures}
    by_id = {claim["claim_id"]: claim for claim in claims}
    arranged = [
        {
            "about": section,
            "figures": [by_name.pop(name) for name in section["figures"] if name in by_name],
            "claims": [by_id.pop(claim) for claim in section["claims"] if claim in by_id],
        }
        for section in SECTIONS
    ]
    further = {"id": "further", "short": "Further", "title": "Further figures and claims", "paper": ""}
    arranged.append({"about": further, "figures": list(by_name.values()), "claims": list(by_id.values())})
    return [section for section in arranged if section["figures"] or section["claims"]]


_POINTS = 60
"""The largest number of points of one curve; they are log-spaced in steps."""

MAX_EMBEDDED = 2_200_000
"""The largest size in bytes of all embedded tables together, compressed."""

_DASHES = {"-": "", "--": "6 3", ":": "2 3"}


def curves_to_draw(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Any]:
    """Return the learning curves of runs as plain data, for the page's script; of many steps there are 60, log-spaced.

    `measures` are a list of (split, metric), `grids` a list of lists of steps, and `curves` by run_id a list of (index
    of the measure, index of the grid, values to four digits). `styles` are, by label, a line's colour, dashes, width.
    """
    styles = arm_styles(runs.rename(columns={"label": "arm"}))
    drawn = {label: [style.colour, _DASHES[style.linestyle], style.linewidth] for label, style in styles.items()}
    measures: dict[tuple[str, str], int] = {}
    grids: dict[tuple[int, ...], int] = {}
    by_run: dict[str, list[Any]] = {}
    if len(curves):
        curves = curves[curves["run_id"].isin(runs["run_id"]) & np.isfinite(curves["value"].astype(float))]
        curves = curves.sort_values("step", kind="stable")
    for (split, metric, run_id), points in curves.groupby(["split", "metric", "run_id"]) if len(curves) else ():
        steps = points["step"].to_numpy(int)
        kept = np.arange(len(steps))
        if len(steps) > _POINTS:
            wanted = np.geomspace(max(1, steps[0]), steps[-1], _POINTS - 1)
            kept = np.unique([0, *np.searchsorted(steps, np.floor(wanted + 0.5)).clip(0, len(steps) - 1)])
        measure = measures.setdefault((str(split), str(metric)), len(measures))
        grid = grids.setdefault(tuple(steps[kept].tolist()), len(grids))
        values = [float(f"{value:.4g}") for value in points["value"].to_numpy(float)[kept]]
        by_run.setdefault(str(run_id), []).append([measure, grid, values])
    return {"measures": list(measures), "grids": list(grids), "curves": by_run, "styles": drawn}


def table_downloads(folder: Path, page: Path, evaluated: bool) -> list[dict[str, Any]]:
    """Return the tables of a folder as data: URIs of their CSV files, compressed with gzip; evals only if `evaluated`.

    For each there are `file` (its name), `bytes` (the size of the file), `embedded` (whether it is in the page) and
    `uri` (a data: URI, or of a table that is too large to embed the path of the file from the folder of the page).
    """
    downloads, left = [], MAX_EMBEDDED
    for name in ("runs", "curves", "claims", *(["evals"] if evaluated else []), "compute", "counts"):
        paths = [path for kind in ("csv", "parquet") if (path := folder / f"{name}.{kind}").is_file()]
        for path in paths[:1]:
            content = gzip.compress(path.read_bytes(), 6, mtime=0) if path.suffix == ".csv" else b""
            row: dict[str, Any] = {"file": path.name, "bytes": path.stat().st_size}
            row |= {"embedded": 0 < len(content) <= left, "uri": Path(os.path.relpath(path, page)).as_posix()}
            if row["embedded"]:
                left -= len(content)
                row |= {"file": f"{path.name}.gz", "uri": _data_uri(content, "application/gzip")}
            downloads.append(row)
    return downloads


def _data_uri(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def text(value: Any) -> str:
    """Write a value that is not a number; the members of a list are joined by commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(text, value)) or formats.DASH
    return formats.DASH if formats.missing(value) or value == "" else str(value)


def anchor(name: Any, kind: str) -> str:
    """Return the HTML id of a run's row or a claim's card, safe in a link."""
    return f"{kind}-{re.sub(r'[^A-Za-z0-9_.-]', '-', str(name))}"


FILTERS = {
    function.__name__: function
    for function in (
        *(formats.number, formats.signed, formats.nll, formats.lr, formats.interval, formats.lr_interval),
        *(formats.count, formats.amount, formats.parameters, formats.duration, formats.when),
        *(text, list_of_words, anchor),
        *(claim_text.margin, claim_text.estimate, claim_text.spread, claim_text.measured),
        *(claim_text.sentence, claim_text.details, claim_text.verdict_again),
    )
}
"""The functions that the templates use as filters, by name."""


def write_index(results: Path) -> Path:
    """Write the index of the reports in a folder of results, the newest first, and return its path.

    Of two processes that end together the second waits, since the first one's list might lack the second one's page.
    """
    template = environment().get_template("index.html.j2")
    with (
        locked(results / ".index.lock", "the index of all reports", print),
        atomic_path(results / "index.html") as partial,
    ):
        page = template.render(groups=_reports(results), style=inline("page.css"), own_style=inline("index.css"))
        partial.write_text(page, encoding="utf-8")
    return results / "index.html"


def _reports(results: Path) -> dict[str, list[dict[str, Any]]]:
    """Return what the index says of each report in a folder of results, by group, the newest first."""
    own, shipped = "Your own models and data", "Presets of the paper, run here"
    groups: dict[str, list[dict[str, Any]]] = {own: [], shipped: []}
    # Of a preset with two reports, the one with scores of lm-eval is listed.
    reports = {
        path.parent: path
        for name in ("without_evaluation.html", "index.html")
        for path in sorted(results.glob(f"*/report/{name}"))
    }
    for report in reports.values():
        name, tables = report.parents[1].name, report.parents[1] / "tables"
        with report.open("rb") as file:
            head = file.read(2**15).decode(errors="replace")
        texts = re.findall(r'<(?:title>|meta name="(\w+)" content=")(.*?)(?:</title>|">)', head, re.DOTALL)
        stated = {field or "title": unescape(text) for field, text in texts}
        entry: dict[str, Any] = {"title": name if is_shipped(name) else stated.get("title", name)}
        entry |= {"about": stated.get("description", ""), "answer": stated.get("abstract", "")}
        entry |= {"report": quote(report.relative_to(results).as_posix()), "size": (), "verdicts": (), "last": ""}
        # What is damaged of one preset keeps no other from being listed.
        try:
            counts = read_claims(tables, NOT_PUBLISHED)["verdict"].value_counts()
            runs = read_rows(tables, "runs", ["model", "started"])
        except UserError as error:
            entry["size"] = [f"Its tables can't be read: {error}."]
        else:
            started = sorted(row["started"] for row in runs if row["started"])
            days = dict.fromkeys(time[:10] for time in (*started[:1], *started[-1:]))
            models = ", ".join(sorted({row["model"] for row in runs}))
            entry |= {
                "size": [f"{len(runs):,} run{'' if len(runs) == 1 else 's'}", models, " to ".join(days)],
                "verdicts": [(word, int(counts[word])) for word in claim_text.VERDICTS if word in counts],
                "last": max(started, default=""),
            }
        groups[shipped if is_shipped(name) else own].append(entry)
    for entries in groups.values():
        entries.sort(key=lambda entry: entry["last"], reverse=True)
    return groups
