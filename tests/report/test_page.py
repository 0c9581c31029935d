"""The report page from tables made by hand."""

import base64
import gzip
import hashlib
import json
import re
import shutil
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lorabench.claims.judge import CLAIMS
from lorabench.errors import UserError
from lorabench.figures.catalog import FIGURES
from lorabench.planning.plan import make_plan
from lorabench.report.other_margins import UNTESTED
from lorabench.report.page import SECTIONS, arrange, build, curves_to_draw
from lorabench.report.summary import labelled
from lorabench.store.layout import Layout

from ..handmade import curves_of, make_eval, make_run, make_sweep, rl, runs_table
from .conftest import EVALUATION, HOSTILE, Page, at_twice_the_margins, columns, hostile_report


def judged_claims() -> pd.DataFrame:
    return pd.read_parquet(Layout.of("mine.yaml").tables() / "claims.parquet")


def evals_of(*ranks: int | str | None) -> list[dict[str, Any]]:
    """Make the scores of each arm, last to first: accuracy by both filters, and bits per byte with a perplexity."""
    bits = {"about": "forgotten", "task": "pretraining", "metric": "bits_per_byte", "filter": "none"}
    bits |= {"higher_is_better": False, "num_fewshot": 0}
    rows = []
    for place, rank in enumerate(ranks):
        rows += [make_eval(rank, 1.5 + place / 100, **bits)]
        rows += [make_eval(rank, 3.0, **(bits | {"metric": "byte_perplexity"}))]
        rows += [make_eval(rank, 0.25 + place / 100), make_eval(rank, 0.35, filter="flexible-extract", stderr=None)]
    return rows


@pytest.fixture
def own(report, rows) -> Page:
    """Return the page of an own preset, with all parts that it may have."""
    return report(rows, evals_of(16, None, "base"), by_margin=at_twice_the_margins, evaluation=EVALUATION)


@pytest.mark.slow
def test_every_claim_has_one_place_with_what_it_was_judged_by_and_links_to_its_runs(report, rows):
    page, claims = report(rows, shipped=True), judged_claims()
    assert page.source.count('class="claim"') == len(claims)
    for claim in claims.itertuples():
        shown = page.claims[claim.claim_id]
        for text in (claim.statement, claim.criterion, claim.verdict, claim.paper_value, claim.reason):
            assert " ".join(text.split()) in shown.text
        assert f"({'fig. ' if claim.figure[0].isdigit() else ''}{claim.figure})" in shown.text
        assert sorted(re.findall(r'href="#run-([^"]+)"', shown.source)) == sorted(claim.run_ids)
    verdicts = page.section("verdicts")
    for verdict, number in claims["verdict"].value_counts().drop("not tested").items():
        [row] = re.findall(rf"</span> {verdict}</span></dt><dd>(.*?)</dd>", verdicts.source)
        assert row.count("#claim-") == sum(map(int, re.findall(r"<strong>(\d+)", row))) == number
    assert re.search(r"21 \(\d+ expected\): 18 done, 3 stopped as diverged", page.section("runs").text)
    assert re.search(r"\d+ claims were not tested by this preset .*N2", page.section("untested").text)


def test_the_page_of_an_own_preset_leads_with_answer_and_recipe_and_names_only_tested_claims(own):
    claims = judged_claims()
    tested = claims.loc[~claims["verdict"].isin(UNTESTED), "claim_id"]
    assert 0 < len(tested) < len(claims)
    assert sorted(own.claims) == sorted(tested)
    assert "untested" not in own.ids
    assert own.ids.index("answer") < own.ids.index("recipe") < own.ids.index("verdicts")
    assert "LoRA r16 trains 0.22M of 0.83M parameters; a run takes 41.5 s and 900 MB of memory" in own.header.text
    # The index of all reports reads the answer in the head.
    [answer] = [attributes["content"] for _, attributes in own.tags if attributes.get("name") == "abstract"]
    assert answer.startswith("These runs cannot decide. The loss of the best, LoRA r16 at a learning rate of 2.20e-3")
    assert answer in own.header.text


def test_links_resolve_and_the_policy_allows_only_the_pages_own_script_and_style(own, rows):
    assert len(own.ids) == len(set(own.ids))
    targets = {href[1:] for href in own.all("a", "href") if href.startswith("#")}
    labels = {attributes["aria-labelledby"] for _, attributes in own.tags if "aria-labelledby" in attributes}
    assert targets | labels | {f"run-{row['run_id']}" for row in rows} <= set(own.ids)
    assert not own.all("script", "src")
    assert not own.all("form", "action")
    outward = [href for href in own.all("a", "href") if not href.startswith(("#", "data:"))]
    # The other address is that of the index of all results beside this page, which is there only when asked for.
    assert set(outward) == {"https://doi.org/10.64434/tml.20250929", "../../index.html"}
    assert "@import" not in own.source
    assert not re.search(r"url\((?!#)", own.source)
    hashes = {}
    for tag in ("script", "style"):
        [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", own.source, re.S)
        hashes[f"{tag}-src"] = f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    (policy,) = [attributes["content"] for _, attributes in own.tags if attributes.get("http-equiv")]
    nothing = dict.fromkeys(("default-src", "base-uri", "form-action"), "'none'")
    assert dict(rule.split(maxsplit=1) for rule in policy.split("; ")) == hashes | nothing | {"img-src": "data:"}
    # The policy allows neither style attributes nor inline handlers.
    assert not [name for _, attributes in own.tags for name in attributes if name == "style" or name.startswith("on")]


def test_figures_and_tables_are_embedded_with_caption_data_and_command(own):
    links = [attributes for tag, attributes in own.tags if tag == "a" and "download" in attributes]
    files = {link["download"]: base64.b64decode(link["href"].partition(",")[2]) for link in links}
    tables, figures = Layout.of("mine.yaml").tables(), Layout.of("mine.yaml").figures
    for name in ("runs", "curves", "claims", "evals"):
        assert gzip.decompress(files[f"{name}.csv.gz"]) == (tables / f"{name}.csv").read_bytes()
    names = ("fig1_envelopes", "fig2_lr_by_rank", "loss_by_flops", "learned_forgotten")
    for name, source, alt in zip(names, own.all("img", "src"), own.all("img", "alt"), strict=True):
        assert base64.b64decode(source.partition(",")[2]) == (figures / f"{name}.svg").read_bytes()
        assert files[f"{name}.csv"] == (figures / f"{name}.csv").read_bytes()
        assert FIGURES[name].title == alt
        assert FIGURES[name].caption in own.text
        assert f"snakemake --cores all paper_figures/mine/{name}.svg --config preset=mine.yaml" in own.text


def test_text_from_outside_stays_text(report):
    page = hostile_report(report)
    for table in ("runs", "evals", "claims"):
        for column in columns(table):
            assert " ".join(f"{column}{HOSTILE}".split()) in page.text, f"{table}.{column}"
    assert f"description{HOSTILE}" in page.all("meta", "content")
    assert [attributes.get("type") for tag, attributes in page.tags if tag == "script"] == ["application/json", None]
    assert not {"x-evil", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert all(source.startswith("data:image/") for source in page.all("img", "src"))
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    known = ("#", "data:", "https://doi.org/", "../../index.html")
    assert not [href for href in page.all("a", "href") if not href.startswith(known)]
    [text] = re.findall(r'<script type="application/json" id="curves">(.*?)</script>', page.source, re.S)
    curves = json.loads(text)
    assert curves["measures"] == [[f"split{HOSTILE}", f"metric{HOSTILE}"]]
    assert f"run_id{HOSTILE}0" in curves["curves"]
    section = page.section("machine")
    assert "1 of 1 checks failed" in section.text
    for text in ("name", "found", "unit", "host"):
        assert " ".join(f"{text}{HOSTILE}".split()) in section.text


@pytest.mark.slow
def test_recipe_says_what_to_use_or_that_nothing_matches_or_can_be_compared(report):
    fine = [10 ** (sixth / 6) for sixth in range(-24, -10)]
    page = report([row for rank in (None, 1, 64) for row in make_sweep(rank, lrs=fine, seeds=24)])
    answer = r"\byes LoRA matches full fine-tuning from rank 64 on: at a learning rate of 2\.\d+e-3 its loss is within"
    assert re.search(answer, page.header.text)
    assert [row.split()[1] for row in page.section("recipe").rows] == ["r1", "r64"]
    page = report([row for rank in (None, 1) for row in make_sweep(rank)])
    assert "No rank that was tried matches full fine-tuning. The best, LoRA r1" in page.header.text
    page = report(make_sweep(16))
    assert "not tested A comparison needs full fine-tuning and LoRA" in page.text
    assert "Not compared." in page.section("recipe").text
    arms = [rl.arm(None, optimum=1e-4), rl.arm(1, optimum=1e-3)]
    rows = [make_run(run["rank"], run["lr"]) | run for runs, _ in arms for run in runs]
    point = {"step": 1, "examples": 16, "tokens": 32, "split": "train", "metric": "kl", "value": -0.034}
    page = report(rows, curves=lambda _: pd.DataFrame([point | {"run_id": rows[0]["run_id"]}]))
    assert "! KL above 0.01 in 1 run " in page.header.text
    assert "its error rate is within the margin of 10.0 points of that of full fine-tuning" in page.header.text


@pytest.mark.slow
def test_same_tables_give_the_same_page_and_an_error_leaves_the_old_one(own, tmp_path, monkeypatch):
    # Files are changed in a copy of the report's folder.
    monkeypatch.chdir(shutil.copytree(".", tmp_path / "copy"))
    layout = Layout.of("mine.yaml")
    plan, before = make_plan(layout.preset), layout.report.read_text()
    build(plan, layout, "mine.yaml", layout.report)
    assert layout.report.read_text() == before
    # A page without evaluation needs no scores.
    for file in (*layout.figures.glob("learned_forgotten.*"), *layout.tables().glob("evals.*")):
        file.unlink()
    build(plan, layout, "mine.yaml", layout.report_without_evaluation, evaluated=False)
    page = Page(layout.report_without_evaluation.read_text())
    assert "made without the scores of lm-evaluation-harness" in page.text
    assert not {"evaluation", "learned_forgotten"} & set(page.ids)
    with pytest.raises(UserError, match=r"learned_forgotten\.svg does not exist; draw the figure with `snakemake .*"):
        build(plan, layout, "mine.yaml", layout.report)
    judged_claims().drop(columns=["margin_low", "scope"]).to_parquet(layout.tables() / "claims.parquet")
    with pytest.raises(UserError, match="no column margin_low, scope: judge the claims again"):
        build(plan, layout, "mine.yaml", layout.report)
    assert layout.report.read_text() == before


def test_each_figure_and_each_claim_has_one_place():
    placed = [name for section in SECTIONS for name in section["figures"]]
    assert sorted([*placed, "verdicts"]) == sorted(FIGURES)
    assert sorted(claim for section in SECTIONS for claim in section["claims"]) == sorted(claim.id for claim in CLAIMS)
    ids = [section["id"] for section in SECTIONS]
    assert len({*ids, *FIGURES}) == len(ids) + len(FIGURES)
    # What is in no section comes last, and empty sections are left out.
    figures, claims = [{"name": "new_figure"}, {"name": "fig1_envelopes"}], [{"claim_id": "Z1"}, {"claim_id": "B1"}]
    *sections, last = arrange(figures, claims)
    assert [section["about"]["id"] for section in sections] == ["rank", "learning-rate"]
    assert (last["figures"], last["claims"]) == ([figures[0]], [claims[0]])


def test_curves_are_those_of_the_table():
    runs = labelled(runs_table(make_sweep(None) + make_sweep(4)))
    curves = curves_of(runs)
    drawn = curves_to_draw(runs, curves)
    assert drawn["measures"] == [("validation", "nll")]
    assert set(drawn["curves"]) == set(runs["run_id"])
    for run_id, [[_, grid, values]] in drawn["curves"].items():
        points = curves[(curves["run_id"] == run_id) & curves["value"].notna()]
        assert drawn["grids"][grid] == tuple(points["step"])
        assert values == pytest.approx(list(points["value"]), rel=1e-3)
    # Of a long curve there are the ends and points that are spaced by logarithm.
    [steps] = curves_to_draw(runs, curves.iloc[[0] * 10_001].assign(step=range(10_001)))["grids"]
    assert (steps[0], steps[-1]) == (0, 10_000)
    assert 40 < len(steps) <= 60
    assert 8 <= sum(100 < step <= 1000 for step in steps) <= 16
    # Unknown runs and values that are no numbers are left out.
    odd = curves.head(3).assign(run_id=["stranger", *curves["run_id"][1:3]], value=[1.0, np.inf, np.nan], step=999)
    assert curves_to_draw(runs, pd.concat([curves, odd]))["curves"] == drawn["curves"]
