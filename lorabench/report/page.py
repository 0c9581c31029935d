"""The report: one HTML page that needs nothing beside it, from a preset's tables and figures."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2

from lorabench.config import PRESETS
from lorabench.figures import EVALS, PaperFigure, of_preset
from lorabench.layout import Layout
from lorabench.plan import Plan
from lorabench.records import atomic_path
from lorabench.report import summary
from lorabench.report.text import FILTERS, missing
from lorabench.tables import read_table

_DEFAULT_PRESET = "laptop"


def build(plan: Plan, layout: Layout, out: Path, evaluated: bool = True) -> None:
    """Write the report of a preset from its tidy tables (runs, curves, claims, and evals if there is one) and figures.

    Args:
        plan: what was to be run.
        layout: where tables and figures lie.
        out: the HTML file, written whole or not at all.
        evaluated: whether to show scores of lm-eval; without them the page needs neither their table nor their figures.

    Raises:
        FileNotFoundError: a table or a figure is not there.
    """
    figures = [figure for figure in of_preset(plan.preset) if evaluated or figure.experiments != EVALS]
    runs = summary.labelled(read_table(layout.tables(), "runs"))
    claims = read_table(layout.tables(), "claims")
    page = _template().render(
        name=layout.name,
        preset=plan.preset,
        verdicts=summary.by_verdict(claims),
        claims=summary.claims(claims, runs, [figure.name for figure in figures]),
        environment=summary.environment(runs),
        figures=[_figure(figure, layout) for figure in figures],
        experiments=[found for name in plan.preset.experiments.trained() if (found := summary.experiment(name, runs))],
        evaluation=summary.evaluation(read_table(layout.tables(), "evals", optional=True)) if evaluated else [],
        evaluated=evaluated,
        work=summary.work(plan, runs),
        runs=summary.runs_with_versions(runs),
        inputs=summary.inputs(runs),
        command=_command(layout, out),
    )
    with atomic_path(out) as partial:
        partial.write_text(page, encoding="utf-8")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    environment.tests["missing"] = missing
    return environment.get_template("template.html.j2")


def _figure(figure: PaperFigure, layout: Layout) -> dict[str, Any]:
    """What the page shows of a figure; its files as data: URIs."""
    kinds = {"svg": "image/svg+xml", "png": "image/png", "csv": "text/csv"}
    files = {kind: _data_uri(layout.figures / f"{figure.name}.{kind}", mime) for kind, mime in kinds.items()}
    command = _command(layout, layout.figures / f"{figure.name}.svg")
    return {"name": figure.name, "title": figure.title, "caption": figure.caption, "command": command, **files}


def _data_uri(path: Path, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _command(layout: Layout, target: Path) -> str:
    """What to type to make a file again."""
    shipped = (PRESETS / f"{layout.name}.yaml").is_file()
    preset = layout.name if shipped else f"PATH/TO/{layout.name}.yaml"
    # Snakemake's --config takes all words that follow it, so it comes last.
    config = "" if preset == _DEFAULT_PRESET else f" --config preset={preset}"
    return f"snakemake --cores all {target}{config}"
