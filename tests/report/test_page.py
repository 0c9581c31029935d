"""The report page from tables made by hand."""

from __future__ import annotations

import base64
import html
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lorabench.analysis.claims import judge_claims
from lorabench.figures import FIGURES
from lorabench.layout import Layout
from lorabench.plan import make_plan
from lorabench.report.page import build
from lorabench.tables import Tables, write_frame
from tests.handmade import curves_of, evals_table, make_eval, make_run, make_sweep, runs_table

SCRIPT = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of <style>."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.tags, self.words, self._in_style = source, [], [], False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, attribute: str) -> list[str]:
        return [found[attribute] for name, found in self.tags if name == tag and attribute in found]

    @property
    def ids(self) -> list[str]:
        return [found["id"] for _, found in self.tags if "id" in found]


@pytest.fixture
def report(tmp_path: Path, raw_preset: dict[str, Any], write_preset, monkeypatch):
    """Builds the report of some runs in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def make(rows: list[dict[str, Any]], evals: list[dict[str, Any]] | None = None, **changes: Any) -> Page:
        layout = Layout.of(write_preset(raw_preset | changes))
        runs = runs_table(rows)
        curves = curves_of(runs)
        tables = layout.tables()
        tables.mkdir(parents=True)
        runs.to_parquet(tables / "runs.parquet")
        curves.to_parquet(tables / "curves.parquet")
        write_frame(judge_claims(Tables(runs, curves)), "claims", tables)
        if evals is not None:
            write_frame(evals_table(evals), "evals", tables)
        # The page embeds whatever lies there; drawing is tested with the figures.
        layout.figures.mkdir(parents=True)
        for name in FIGURES:
            for kind in ("svg", "png", "csv"):
                (layout.figures / f"{name}.{kind}").write_text(f"{name} as {kind}")
        build(make_plan(layout.preset), layout, layout.report)
        return Page(layout.report.read_text())

    return make


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [row for rank in (None, 1, 16) for row in make_sweep(rank)]


def test_every_claim_is_there_with_its_verdict(report, rows):
    page = report(rows)
    claims = pd.read_parquet(Layout.of("mine.yaml").tables() / "claims.parquet")
    assert len(claims) > 0
    for claim in claims.itertuples():
        assert f"claim-{claim.claim_id}" in page.ids
        for said in (claim.statement, claim.criterion, claim.verdict, claim.paper_value, claim.reason):
            assert " ".join(said.split()) in page.text


def test_every_claim_links_to_its_runs(report, rows):
    page = report(rows)
    claims = pd.read_parquet(Layout.of("mine.yaml").tables() / "claims.parquet").set_index("claim_id")
    for claim_id, section in re.findall(r'<tr id="claim-(\w+)">(.*?)</tr>', page.source, re.S):
        linked = re.findall(r'href="#run-([^"]+)"', section)
        assert sorted(linked) == sorted(claims.loc[claim_id, "run_ids"])


def test_anchors_are_unique_and_resolve(report, rows):
    page = report(rows)
    assert len(page.ids) == len(set(page.ids))
    targets = {href[1:] for href in page.all("a", "href") if href.startswith("#")}
    assert targets
    assert targets <= set(page.ids)
    assert {f"run-{row['run_id']}" for row in rows} <= set(page.ids)
    labelled = {found["aria-labelledby"] for _, found in page.tags if "aria-labelledby" in found}
    assert labelled <= set(page.ids)


def test_nothing_is_fetched(report, rows):
    page = report(rows)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    assert all(source.startswith("data:image/") for source in page.all("img", "src"))
    outward = [href for href in page.all("a", "href") if not href.startswith(("#", "data:"))]
    assert set(outward) == {"https://doi.org/10.64434/tml.20250929"}
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert not any(name.startswith("on") for _, found in page.tags for name in found)


def test_policy_forbids_all_but_inline_styles_and_embedded_images(report, rows):
    (policy,) = [found["content"] for tag, found in report(rows).tags if found.get("http-equiv")]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    assert rules == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_figures_are_embedded_with_caption_data_and_command(report, rows):
    page = report(rows)
    sources, texts = page.all("img", "src"), page.all("img", "alt")
    shown = [figure for figure in FIGURES.values() if "rank" in figure.experiments]
    assert len(sources) == len(shown) >= 3
    downloads = {found["download"]: found["href"] for tag, found in page.tags if "download" in found}
    for figure, source, alt in zip(shown, sources, texts, strict=True):
        files = Layout.of("mine.yaml").figures / figure.name
        assert base64.b64decode(source.partition(",")[2]) == files.with_suffix(".svg").read_bytes()
        assert (
            base64.b64decode(downloads[f"{figure.name}.csv"].partition(",")[2])
            == files.with_suffix(".csv").read_bytes()
        )
        assert figure.caption in alt
        assert figure.caption in page.text
        assert f"snakemake --cores all paper_figures/mine/{figure.name}.svg" in page.text


def test_text_from_outside_is_escaped(report):
    rows = make_sweep(None, dataset=SCRIPT, device=SCRIPT, versions=SCRIPT) + make_sweep(1, dataset=SCRIPT, host=SCRIPT)
    page = report(rows, description=SCRIPT, limits=[SCRIPT])
    assert "<script" not in page.source
    assert page.source.count(html.escape(SCRIPT)) >= 4 + len(rows)


def test_diverged_runs_are_listed(report, rows):
    page = report(rows)
    section = page.source.split('id="diverged"')[1].split("</section>")[0]
    diverged = {row["run_id"] for row in rows if row["status"] == "diverged"}
    assert set(re.findall(r'href="#run-([^"]+)"', section)) == diverged


def test_says_so_when_none_diverged(report):
    rows = [row for rank in (None, 1) for row in make_sweep(rank, diverged_from=1.0)]
    assert "None. All 14 runs ended with finite numbers." in report(rows).text


def test_sparse_runs_show_dashes_and_no_nan(report):
    page = report([make_run(None, 1e-3), make_run(1, 1e-3, status="diverged")])
    # Reasons are the words of the claims.
    own = Page(re.sub(r'<td data-label="Reason".*?</td>', "", page.source, flags=re.DOTALL))
    assert "\N{EN DASH}" in own.text
    assert not re.search(r"\b(nan|NaN|None|<NA>|NaT)\b", own.text)


def test_missing_provenance_is_a_dash(report):
    unknown = dict.fromkeys(["device", "host", "started", "git_sha", "versions", "threads", "wall_s", "train_flops"])
    page = report([row | unknown for row in make_sweep(None) + make_sweep(1)])
    assert not re.search(r"\b(nan|None|<NA>|NaT)\b", page.text)


def test_uncommitted_changes_are_shown(report):
    page = report(make_sweep(None) + [row | {"git_dirty_patch": "abc123"} for row in make_sweep(1)])
    assert "7 runs with uncommitted changes" in page.text
    assert "abc123" in page.text


def test_limits_of_the_preset_are_listed(report, rows):
    assert "It cannot fly." in report(rows, limits=["It cannot fly."]).text


EVALUATION = {"experiments": ["rank"], "tasks": [{"name": "hellaswag", "about": "forgotten"}]}


def evals_of(*ranks: int | str | None) -> list[dict[str, Any]]:
    """Of each arm, last to first, accuracy by both filters, and bits per byte with a perplexity."""
    bits = {"about": "forgotten", "task": "pretraining", "metric": "bits_per_byte", "filter": "none"}
    bits |= {"higher_is_better": False, "num_fewshot": 0}
    rows = []
    for place, rank in enumerate(ranks):
        rows += [make_eval(rank, 1.5 + place / 100, **bits)]
        rows += [make_eval(rank, 3.0, **(bits | {"metric": "byte_perplexity"}))]
        rows += [make_eval(rank, 0.25 + place / 100), make_eval(rank, 0.35, filter="flexible-extract", stderr=None)]
    return rows


def test_scores_are_shown_by_arm_base_first_with_both_filters(report, rows):
    page = report(rows, evals_of(16, None, "base"), evaluation=EVALUATION)
    section = Page(page.source.split('<section aria-labelledby="evaluation">')[1].split("</section>")[0])
    body = [Page(row).text for row in re.findall(r"<tr>(.*?)</tr>", section.source.split("<tbody>")[1], re.DOTALL)]
    assert body == [
        "base \N{EN DASH} 0.2700 ± 0.0200 0.3500 1.5200 ± 0.0200",
        "FullFT 3e-3 0.2600 ± 0.0200 0.3500 1.5100 ± 0.0200",
        "LoRA r16 3e-3 0.2500 ± 0.0200 0.3500 1.5000 ± 0.0200",
    ]
    assert "Arm LR Learned Forgotten lorabench_instruct exact_match strict-match higher is better" in section.text
    assert "flexible-extract higher is better n 1,319, 5-shot, version 3.0 pretraining" in section.text
    assert "pretraining bits_per_byte lower is better n 1,319, 0-shot" in section.text
    assert "perplexity" not in section.text
    assert "lm-eval 0.4.13, 16 sequences at once" in section.text
    assert "#learned_forgotten" in section.all("a", "href")
    targets = {href[1:] for href in page.all("a", "href") if href.startswith("#")}
    assert targets <= set(page.ids)


def test_a_score_that_is_not_there_is_a_dash(report, rows):
    evals = [*evals_of("base", None), make_eval(16, 0.5, num_fewshot=None, n_samples=None, versions=None)]
    page = report(rows, evals, evaluation=EVALUATION)
    section = page.source.split('<section aria-labelledby="evaluation">')[1].split("</section>")[0]
    assert "LoRA r16 3e-3 0.5000 ± 0.0200 \N{EN DASH} \N{EN DASH}" in Page(section).text
    assert not re.search(r"\b(nan|NaN|None|<NA>|NaT)\b", Page(section).text)


@pytest.mark.parametrize("evals", [None, [], [make_eval("base", 0.1)]])
def test_without_scores_there_is_no_section(report, rows, evals):
    page = report(rows, evals)
    assert "evaluation" not in page.ids
    assert "#evaluation" not in page.all("a", "href")


def test_a_page_without_evaluation_needs_neither_scores_nor_their_figure(report, rows):
    report(rows, None, evaluation=EVALUATION)
    layout = Layout.of("mine.yaml")
    for file in layout.figures.glob("learned_forgotten.*"):
        file.unlink()
    out = layout.report_without_evaluation
    build(make_plan(layout.preset), layout, out, evaluated=False)
    page = Page(out.read_text())
    assert "made without the scores of lm-evaluation-harness" in page.text
    assert "evaluation" not in page.ids
    assert "learned_forgotten" not in page.ids
    assert f"snakemake --cores all {out} --config preset=PATH/TO/mine.yaml" in page.text


def test_same_tables_give_the_same_page(report, rows):
    first = report(rows).source
    layout = Layout.of("mine.yaml")
    build(make_plan(layout.preset), layout, layout.report)
    assert layout.report.read_text() == first


def test_a_missing_figure_is_an_error_and_leaves_the_old_page(report, rows):
    before = report(rows).source
    layout = Layout.of("mine.yaml")
    (layout.figures / "fig1_envelopes.svg").unlink()
    with pytest.raises(FileNotFoundError, match=r"fig1_envelopes\.svg"):
        build(make_plan(layout.preset), layout, layout.report)
    assert layout.report.read_text() == before
