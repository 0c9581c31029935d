"""A report built from tables made by hand, one in which every text tries to break out, and a parser of its tags."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import yaml

from lorabench.claims.judge import judge_claims
from lorabench.doctor.record import Check, write_record
from lorabench.figures.catalog import FIGURES
from lorabench.planning.plan import make_plan
from lorabench.report import page
from lorabench.report.other_margins import UNTESTED
from lorabench.report.page import build
from lorabench.store.io import write_frame
from lorabench.store.layout import Layout
from lorabench.store.schemas import CLAIMS, CURVES, EVALS, RUNS
from lorabench.store.tables import Tables
from lorabench.utils.gpus import processor

from ..cli.test_speeds import record
from ..handmade import curves_of, evals_table, make_eval, make_sweep, runs_table

Change = Callable[[pd.DataFrame], pd.DataFrame]


class Page(HTMLParser):
    """A parsed page: its tags with their attributes, and its text outside of <style> and <script>."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.tags, self.words, self._hidden = source, [], [], False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, attribute: str) -> list[str]:
        return [attributes[attribute] for name, attributes in self.tags if name == tag and attribute in attributes]

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]

    @property
    def header(self) -> "Page":
        return Page(self.source.split("<header>")[1].split("</header>")[0])

    @property
    def claims(self) -> dict[str, "Page"]:
        """The claims by the ends of their ids, as they are when opened."""
        begins = re.split(r'<details class="claim" id="claim-', self.source)[1:]
        return {begin.partition('"')[0]: Page(begin.split("</dl>")[0]) for begin in begins}

    @property
    def rows(self) -> list[str]:
        """The texts of the rows of the page's first table."""
        body = self.source.split("<tbody>")[1]
        return [Page(row).text for row in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)]

    def section(self, heading: str) -> "Page":
        return Page(self.source.split(f'<section aria-labelledby="{heading}"')[1].split("</section>")[0])


@pytest.fixture(scope="session")
def built() -> dict[str, Any]:
    """Return the folders of the reports that were built, by the data that they were made of; and claims, by runs."""
    return {}


@pytest.fixture
def report(tmp_path_factory, built: dict[str, Any], raw_preset: dict[str, Any], monkeypatch):
    """Return a function that builds the report of runs in a folder and enters it; equal runs are built once.

    Texts of claims and curves are changed by functions of these tables. With `shipped` the page is that of a preset
    that is shipped, which reruns the paper. `before` is called in the folder before the page is built.
    """

    def make(
        rows: list[dict[str, Any]],
        evals: list[dict[str, Any]] | None = None,
        claims: Change | None = None,
        curves: Change | None = None,
        by_margin: Change | None = None,
        shipped: bool = False,
        before: Callable[[], object] | None = None,
        **changes: Any,
    ) -> Page:
        key, of_runs = repr((rows, evals, claims, curves, by_margin, shipped, changes)), repr((rows, curves))
        if of_runs not in built:
            # Equal runs are judged once, since most pages share them.
            runs = runs_table(rows)
            points = curves(curves_of(runs)) if curves else curves_of(runs)
            built[of_runs] = runs, points, judge_claims(Tables(runs, points))
        if key not in built:
            built[key] = tmp_path_factory.mktemp("report")
            monkeypatch.chdir(built[key])
            Path("mine.yaml").write_text(yaml.safe_dump(raw_preset | changes))
            layout = Layout.of("mine.yaml")
            runs, points, judged = built[of_runs]
            written = {"runs": runs, "curves": points, "claims": claims(judged) if claims else judged}
            written |= {} if evals is None else {"evals": evals_table(evals)}
            written |= {} if by_margin is None else {"verdicts_by_margin": by_margin(written["claims"])}
            for name, table in written.items():
                write_frame(table, name, layout.tables())
            # The page embeds whatever lies there; drawing is tested with the figures.
            layout.figures.mkdir(parents=True)
            for name in FIGURES:
                picture = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 5"><title>{name}</title></svg>'
                (layout.figures / f"{name}.svg").write_text(picture)
                (layout.figures / f"{name}.csv").write_text(f"figure\n{name}\n")
            if before:
                before()
            with monkeypatch.context() as patched:
                patched.setattr(page, "is_shipped", lambda _: shipped)
                build(make_plan(layout.preset), layout, "mine.yaml", layout.report)
        monkeypatch.chdir(built[key])
        return Page(Layout.of("mine.yaml").report.read_text())

    return make


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [row for rank in (None, 1, 16) for row in make_sweep(rank)]


EVALUATION = {"experiments": ["rank"], "tasks": [{"name": "hellaswag", "about": "forgotten"}]}
HOSTILE = (
    "'\"></script></style><script>window.hacked=1</script><img/src=x/onerror=window.hacked=1>"
    "<a/href=javascript:window.hacked=1>-->]]><x-evil/onclick=window.hacked=1>{{7*7}}\u2028\\u003cx-evil>&lt;"
)

# Columns that the page does not show in full (a time, a short hash) or at all, or that allow only a few values.
_KEPT = {
    "runs": {
        *("task", "method", "status", "started", "git_sha", "family", "protocol"),
        *("data_kind", "base_kind", "alpha_convention", "precision", "schedule"),
    },
    "curves": {"run_id"},
    "evals": {"run_id", "method", "about", "source", "template_sha256", "task_config", "placement"},
    "claims": {"kind", "verdict", "rules"},
}


def checked_machine() -> None:
    """Write the checks of this machine, whose texts try to break out, too."""
    texts = {"name": f"name{HOSTILE}", "sentence": f"found{HOSTILE}", "unit": f"unit{HOSTILE}"}
    check = Check(status="fail", value=0.5, planned=1.0, **texts)
    write_record(record(processor(), host=f"host{HOSTILE}", checks=[check]))


def at_twice_the_margins(claims: pd.DataFrame) -> pd.DataFrame:
    """Return verdicts by margin in which those that are inconclusive are confirmed at twice the margins."""
    rows = claims.loc[~claims["verdict"].isin(UNTESTED)]
    rows = rows[["claim_id", "verdict", "margin_low", "margin_high", "estimate", "ci_low", "ci_high"]]
    other = rows.assign(factor=2.0, verdict=rows["verdict"].replace("inconclusive", "confirmed"))
    return pd.concat([rows.assign(factor=1.0), other])


def columns(name: str) -> list[str]:
    """Return the text columns of a table that are made hostile and that the page shows."""
    schema = {"runs": RUNS, "curves": CURVES, "evals": EVALS, "claims": CLAIMS}[name]
    return [column.name for column in schema if pa.types.is_string(column.type) and column.name not in _KEPT[name]]


def hostile_report(report: Any) -> Any:
    """Build a report in which every text tries to break out of its place in the page."""
    texts, scores = ({name: f"{name}{HOSTILE}" for name in columns(table)} for table in ("runs", "evals"))
    texts["versions"] = scores["versions"] = json.dumps({"torch": f"versions{HOSTILE}"})
    rows = []
    for place, row in enumerate(make_sweep(None) + make_sweep(1) + make_sweep(16)):
        own = {"run_id": f"run_id{HOSTILE}{place}", "experiments": ["rank", f"experiments{HOSTILE}"]}
        # Without LoRA on all layers no claim would have an estimate.
        layers = texts["placement"] if row["rank"] == 16 else row["placement"]
        rows.append(row | texts | own | {"placement": layers})
    evals = [make_eval(rank, 0.5, **scores) for rank in ("base", None)]

    def spoilt(name: str) -> Any:
        def spoil(table: pd.DataFrame) -> pd.DataFrame:
            texts = {column: f"{column}{HOSTILE}" for column in columns(name)}
            # The ids of claims stay distinct.
            ids = [f"claim_id{HOSTILE}{place}" for place in range(len(table))]
            return table.assign(**texts | ({"claim_id": ids} if name == "claims" else {}))

        return spoil

    return report(
        rows,
        evals,
        claims=spoilt("claims"),
        curves=spoilt("curves"),
        by_margin=at_twice_the_margins,
        before=checked_machine,
        evaluation=EVALUATION,
        description=f"description{HOSTILE}",
        limits=[f"limit{HOSTILE}"],
        shipped=True,
    )
