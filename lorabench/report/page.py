"""The report: one self-contained HTML page, made from the tables and figures of a preset; and the index of reports."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import shlex
from collections.abc import Collection, Sequence
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
from lorabench.analysis.rules import DECIDED
from lorabench.claims.judge import CORE
from lorabench.claims.recipe import measured_recipe
from lorabench.config.experiments import Block
from lorabench.config.loading import is_shipped
from lorabench.doctor.record import record_for
from lorabench.errors import UserError
from lorabench.figures.catalog import PaperFigure, figures_of_preset
from lorabench.figures.style import arm_styles
from lorabench.planning.plan import Plan
from lorabench.report import claim_text, summary
from lorabench.report.other_margins import turned
from lorabench.store.io import list_of_words, read_claims, read_rows, read_table
from lorabench.store.layout import Layout
from lorabench.store.made_from import named_in, of_tables
from lorabench.store.published import NOT_PUBLISHED
from lorabench.utils import formats
from lorabench.utils.files import atomic_path
from lorabench.utils.studies import studies

_HERE = Path(__file__).parent

SECTIONS: list[dict[str, Any]] = yaml.safe_load((_HERE / "sections.yaml").read_text(encoding="utf-8"))
"""The page's sections in the paper's order, and then those of studies: which figures and claims are shown together."""
SECTIONS += [study.texts["section"] for study in studies()]


_SHOWN = ("runs", "curves", "test_losses", "claims", "verdicts_by_margin", "evals", "compute", "counts")
"""The tables that the page is made from."""


def build(plan: Plan, layout: Layout, source: str, out: Path, evaluated: bool = True) -> None:
    """Write the report of a preset from its figures and its tables runs, curves, claims and, if it exists, evals.

    `source` is the preset as the user named it: the name of a shipped preset, or the path of its file. The file `out`
    appears only when it is complete. Without `evaluated`, the page needs neither scores of lm-eval nor their figures.

    Raises:
        UserError: a figure or a table is missing, or the table claims is from another version.
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
            # The data of a user stay out of the page.
            examples={
                name: None if question else summary.example(layout.dataset(name)) for name in plan.preset.sources
            },
            sections=arrange([_figure(figure, layout, source) for figure in figures], tested),
            untested=[claim for claim in claims if claim not in tested],
            margins=turned(read_table(tables, "verdicts_by_margin", optional=True), judged),
            recipe=recipe,
            costs=[summary.costs(runs, recommendation) for recommendation in recipe.recommendations],
            environment=summary.environment(runs),
            rules=sorted(set(judged["rules"].dropna())),
            experiments=list(filter(None, (summary.experiment(name, runs, judging) for name in trained))),
            sampler=summary.sampler(plan, runs, all_curves),
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
            downloads=table_downloads(tables, out.parent, without=() if evaluated else ("evals",)),
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

MAX_PLAIN, MAX_EMBEDDED, MAX_READ = 150_000, 2_200_000, 44_000_000
"""The largest sizes in bytes of a CSV file that is embedded uncompressed, of all embedded tables together, and of a
file that is read for the page, since a larger one is too large even when compressed."""

_DASHES = {"-": "", "--": "6 3", ":": "2 3"}


def curves_to_draw(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Any]:
    """Return the thinned learning curves of runs as plain data, for the page's script.

    Returns:
        `measures`: a list of (split, metric). `grids`: a list of lists of steps. `curves`: by run_id, a list of (index
        of the measure, index of the grid, values to four digits). `styles`: by label, the colour, dashes and width of a
        line. Of a curve with more than 60 steps there are the first, the last, and log-spaced ones between them.
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


def table_downloads(folder: Path, page: Path, without: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return the tables of a folder as data: URIs of their CSV files, compressed with gzip if they are large.

    Returns:
        For each table but those `without`: `file` (its name), `bytes` (the size of the file), `embedded` (whether it is
        in the page) and `uri` (a data: URI, or the path of the file from the folder of the page). A table that is too
        large to embed even when compressed is linked, as the parquet file where it is too large for CSV.
    """
    downloads, left = [], MAX_EMBEDDED
    for name in ("runs", "curves", "claims", "evals", "compute", "counts"):
        paths = [path for kind in ("csv", "parquet") if (path := folder / f"{name}.{kind}").is_file()]
        if name in without or not paths:
            continue
        path, size = paths[0], paths[0].stat().st_size
        content = path.read_bytes() if path.suffix == ".csv" and size <= MAX_READ else b""
        content = gzip.compress(content, 6, mtime=0) if size > MAX_PLAIN and content else content
        row: dict[str, Any] = {"file": path.name, "bytes": size, "embedded": 0 < len(content) <= left}
        row["uri"] = Path(os.path.relpath(path, page)).as_posix()
        if row["embedded"]:
            left -= len(content)
            row["uri"] = _data_uri(content, "application/gzip" if size > MAX_PLAIN else "text/csv")
            row["file"] += ".gz" if size > MAX_PLAIN else ""
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


def parametrization(block: Block) -> str:
    """Describe how the LoRA of a block of an experiment differs from the paper's parametrization."""
    listed = (block.alphas or [], block.inits_a, block.lr_ratios, *block.transforms)
    alphas, inits, ratios, *transforms = (", ".join(f"{value:g}" for value in values) for values in listed)
    parts = {
        f"variants {', '.join(block.variants)}": block.variants != ["lora"],
        f"alpha {alphas}": block.alphas,
        f"alpha times rank^{block.alpha_power:g}": block.alpha_power,
        f"init of A times {inits}": block.inits_a != [1.0],
        f"LR of B / LR of A {ratios}": block.lr_ratios != [1.0],
        f"p, q {' and '.join(transforms)}": transforms,
        f"Adam's epsilon {block.eps or 0:g}": block.eps is not None,
    }
    return "; ".join(part for part, differs in parts.items() if differs) or "standard"


def anchor(name: Any, kind: str) -> str:
    """Return the HTML id of a run's row or a claim's card, safe in a link."""
    return f"{kind}-{re.sub(r'[^A-Za-z0-9_.-]', '-', str(name))}"


FILTERS = {
    function.__name__: function
    for function in (
        *(formats.number, formats.signed, formats.nll, formats.lr, formats.interval, formats.lr_interval),
        *(formats.count, formats.amount, formats.parameters, formats.duration, formats.when),
        *(text, list_of_words, parametrization, anchor),
        *(claim_text.margin, claim_text.estimate, claim_text.spread, claim_text.measured, claim_text.verdict),
        *(claim_text.sentence, claim_text.details, claim_text.verdict_again),
    )
}
"""The functions that the templates use as filters, by name."""


LINES = 3
"""The most claims that an entry of the index shows; the report has all."""


def write_index(results: Path) -> Path:
    """Write the index of a folder of results from what lies there, and return its path.

    `last` of an entry is the time at which the last run was started, as text in ISO 8601; `note` says why there are no
    verdicts.
    """
    own: list[dict[str, Any]] = []
    shipped: list[dict[str, Any]] = []
    # Of a preset with two reports, the one with scores of lm-eval is listed.
    names = ("without_evaluation.html", "index.html")
    reports = {path.parent: path for name in names for path in sorted(results.glob(f"*/report/{name}"))}
    for report in reports.values():
        name = report.parents[1].name
        ours = is_shipped(name)
        with report.open("rb") as file:
            head = file.read(2**15).decode(errors="replace")
        texts = re.findall(r'<(?:title>|meta name="(\w+)" content=")(.*?)(?:</title>|">)', head, re.DOTALL)
        stated = {field or "title": unescape(text) for field, text in texts}
        entry: dict[str, Any] = {"title": name if ours else stated.get("title", name)}
        entry |= {"about": stated.get("description", ""), "answer": stated.get("abstract", "")}
        entry["report"] = quote(report.relative_to(results).as_posix())
        # What is damaged of one preset keeps no other from being listed.
        try:
            entry |= _told(results / name / "tables")
        except UserError as error:
            nothing = dict.fromkeys(("size", "verdicts", "claims"), ())
            entry |= nothing | {"last": "", "note": f"Its tables can't be read: {error}."}
        (shipped if ours else own).append(entry)
    for entries in (own, shipped):
        entries.sort(key=lambda entry: entry["last"], reverse=True)
    groups = {"Your own models and data": own, "Presets of the paper, run here": shipped}
    styles = {"style": inline("page.css"), "own_style": inline("index.css")}
    page = environment().get_template("index.html.j2").render(groups=groups, lines=LINES, **styles)
    with atomic_path(results / "index.html") as partial:
        partial.write_text(page, encoding="utf-8")
    return results / "index.html"


def _told(tables: Path) -> dict[str, Any]:
    """Return what the index shows of a preset's runs and claims."""
    claims, runs = read_claims(tables, NOT_PUBLISHED), read_rows(tables, "runs", ["model", "started"])
    # Of each fact one core claim is shown: those that are decided come first, then those that are inconclusive.
    core = claims[claims["claim_id"].isin(CORE) & claims["verdict"].isin((*DECIDED, "inconclusive"))]
    core = core.assign(open=core["verdict"] == "inconclusive", place=core["claim_id"].map(CORE.index))
    core = core.sort_values(["open", "place"], kind="stable").drop_duplicates("fact").head(LINES)
    started = sorted(row["started"] for row in runs if row["started"])
    days = dict.fromkeys(time[:10] for time in (*started[:1], *started[-1:]))
    models = ", ".join(sorted({row["model"] for row in runs}))
    counts = claims["verdict"].value_counts()
    return {
        "last": max(started, default=""),
        "size": [f"{len(runs):,} run{'' if len(runs) == 1 else 's'}", models, " to ".join(days)],
        "verdicts": [(verdict, int(counts[verdict])) for verdict in claim_text.VERDICTS if verdict in counts],
        "claims": core.to_dict("records"),
        "note": "",
    }
