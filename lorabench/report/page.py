"""The report: one self-contained HTML page, made from the tables and figures of a preset."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from lorabench.analysis.comparison import Judging
from lorabench.analysis.estimate import ExampleLosses
from lorabench.claims.recipe import measured_recipe
from lorabench.config.loading import PRESETS
from lorabench.doctor.record import record_for
from lorabench.figures.catalog import PaperFigure, figures_of_preset
from lorabench.planning.plan import Plan
from lorabench.report import summary
from lorabench.report.explorer import curves_to_draw, data_uri, table_downloads
from lorabench.report.facts import COUNTING, headline
from lorabench.report.publish import DEFAULT_PRESET
from lorabench.report.text import FILTERS
from lorabench.store.io import read_claims, read_table
from lorabench.store.layout import Layout
from lorabench.utils.files import atomic_path
from lorabench.utils.formats import missing

_HERE = Path(__file__).parent

SECTIONS: list[dict[str, Any]] = yaml.safe_load((_HERE / "sections.yaml").read_text(encoding="utf-8"))
"""The page's sections in the paper's order: which figures and claims are shown together."""


def build(plan: Plan, layout: Layout, source: str, out: Path, evaluated: bool = True) -> None:
    """Write the report of a preset from its figures and its tables runs, curves, claims and, if it exists, evals.

    Args:
        plan: the plan of the preset.
        layout: where tables and figures lie.
        source: the preset as the user named it: the name of a shipped preset, or the path of its file.
        out: the HTML file; it appears only when it is complete.
        evaluated: whether to show the scores of lm-eval. Without them the page needs neither their table nor their
            figures.

    Raises:
        FileNotFoundError: a figure is missing.
        UserError: a table is missing, or the table claims is from another version.
    """
    figures = [figure for figure in figures_of_preset(plan.preset) if evaluated or figure.table != "evals"]
    tables = layout.tables()
    all_runs = read_table(tables, "runs")
    runs = summary.labelled(all_runs)
    judged = read_claims(tables)
    claims = summary.claims(judged, runs)
    shown = [(figure, _figure(figure, layout, source)) for figure in figures]
    all_curves = read_table(tables, "curves")
    judging = Judging(plan.preset.margins, ExampleLosses.of(read_table(tables, "test_losses", optional=True)))
    curves = curves_to_draw(runs, all_curves)
    trained = plan.preset.experiments.trained()
    page = _template().render(
        name=layout.name,
        question=not (PRESETS / f"{layout.name}.yaml").is_file(),
        preset=plan.preset,
        style=_inline("page.css"),
        script=_inline("page.js"),
        headline=headline(judged),
        counting=COUNTING,
        tally=summary.tally(judged),
        statements=dict(zip(judged["claim_id"], judged["statement"], strict=True)),
        claims=claims,
        verdicts=next(drawn for figure, drawn in shown if figure.table == "claims"),
        sections=arrange([drawn for figure, drawn in shown if figure.table != "claims"], claims),
        recipe=measured_recipe(all_runs, all_curves, judging),
        environment=summary.environment(runs),
        experiments=list(filter(None, (summary.experiment(name, runs, judging) for name in trained))),
        sampler=summary.sampler(plan, runs, all_curves),
        evaluation=summary.evaluation(read_table(tables, "evals", optional=True)) if evaluated else [],
        evaluated=evaluated,
        work=summary.work(plan, runs),
        runs=summary.runs_with_versions(runs),
        inputs=summary.inputs(runs),
        datasets=summary.dataset_origins(layout),
        doctor=record_for(plan.preset.execution),
        curves=_json(curves),
        points=curves["points"],
        downloads=table_downloads(
            tables, ("runs", "curves", "claims", *(["evals"] if evaluated else []), "compute", "counts")
        ),
        tables=tables,
        figures_folder=layout.figures,
        command=_command(source, out),
    )
    with atomic_path(out) as partial:
        partial.write_text(page, encoding="utf-8")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    environment.tests["missing"] = missing
    return environment.get_template("page.html.j2")


def _inline(name: str) -> dict[str, str]:
    """Return a file of this package to embed, and its hash for the page's content security policy.

    The policy lets a browser run and apply only what has one of these hashes.
    """
    text = (_HERE / name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"text": Markup(text), "hash": f"sha256-{digest}"}


def _json(data: Any) -> Markup:
    """Return data as JSON for the page's script, escaped so that no text in it can end its HTML element."""
    return htmlsafe_json_dumps(data, dumps=json.dumps, separators=(",", ":"), allow_nan=False)


def _figure(figure: PaperFigure, layout: Layout, source: str) -> dict[str, Any]:
    """Return what the page shows of a figure, with its picture and its CSV file as data: URIs."""
    kinds = {"svg": "image/svg+xml", "csv": "text/csv"}
    path = layout.figures / figure.name
    files = {kind: data_uri(path.with_suffix(f".{kind}").read_bytes(), mime) for kind, mime in kinds.items()}
    command = _command(source, path.with_suffix(".svg"))
    return {"name": figure.name, "title": figure.title, "caption": figure.caption, "command": command, **files}


def _command(source: str, target: Path) -> str:
    """Return the command line that makes a file of the preset."""
    # Snakemake's --config takes all words that follow it, so it comes last.
    config = [] if source == DEFAULT_PRESET else ["--config", f"preset={source}"]
    return shlex.join(["snakemake", "--cores", "all", str(target), *config])


def arrange(figures: Sequence[dict[str, Any]], claims: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the sections that have a figure or a claim, each with its figures and claims in order.

    Figures and claims that no section names are in a last section.

    Args:
        figures: what the page shows of each figure, which has a `name`.
        claims: what the page shows of each claim, which has a `claim_id`.

    Returns:
        For each section: `about` (a member of SECTIONS), `figures` and `claims`.
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
