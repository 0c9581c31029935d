"""The report page from tables made by hand."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lorabench.config.preset import Preset
from lorabench.doctor.record import Check, write_record
from lorabench.errors import UserError
from lorabench.figures.catalog import FIGURES
from lorabench.planning.plan import make_plan
from lorabench.report import page as page_module
from lorabench.report import summary
from lorabench.report.claim_text import headline
from lorabench.report.page import build
from lorabench.store.layout import Layout
from lorabench.utils.gpus import processor
from tests.cli.test_speeds import record

from ..handmade import claims_table, make_claim, make_eval, make_run, make_sweep
from .conftest import EVALUATION, HOSTILE, Page, columns, hostile_report


def judged_claims() -> pd.DataFrame:
    return pd.read_parquet(Layout.of("mine.yaml").tables() / "claims.parquet")


@pytest.fixture
def layout(report, rows, tmp_path, monkeypatch) -> Layout:
    """Enter a copy of the folder of a report, in which files may be changed."""
    report(rows)
    shutil.copytree(".", tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return Layout.of("mine.yaml")


def test_every_claim_is_there_with_its_verdict_and_links_to_its_runs(report, rows):
    page = report(rows)
    cards = dict(re.findall(r'<article class="claim" id="claim-(\w+)"(.*?)</article>', page.source, re.S))
    claims = judged_claims()
    assert sorted(cards) == sorted(claims["claim_id"])
    for claim in claims.itertuples():
        card = cards[claim.claim_id]
        for text in (claim.statement, claim.criterion, claim.verdict, claim.paper_value, claim.reason):
            assert " ".join(text.split()) in Page(card).text
        assert f"({'fig. ' if claim.figure[0].isdigit() else ''}{claim.figure})" in Page(card).text
        assert sorted(re.findall(r'href="#run-([^"]+)"', card)) == sorted(claim.run_ids)


def test_first_screen_has_the_picture_the_answer_and_the_verdicts(report, rows):
    header, claims = report(rows).header, judged_claims()
    assert f"{headline(claims)}." in header.text
    assert "verdicts" in header.ids
    assert header.all("img", "src")
    linked = [href for href in header.all("a", "href") if href.startswith("#claim-")]
    assert sorted(linked) == sorted(f"#claim-{claim_id}" for claim_id in claims["claim_id"])
    assert "Does LoRA match full fine-tuning here?" in header.text
    assert "a preset for tests" in header.text
    assert re.search(r"21 \(\d+ expected\): 18 done, 3 diverged", header.text)
    assert "Sampler of responses" not in header.text


def test_a_page_of_many_runs_is_cut_and_says_where_the_others_are(report, rows, monkeypatch):
    whole = report(rows)
    monkeypatch.setattr(page_module, "ROWS", 5)
    for name in ("SETTINGS", "RECIPE_SETTINGS"):
        monkeypatch.setattr(summary, name, 1)
    monkeypatch.setattr(summary, "CLAIM_RUNS", 3)
    monkeypatch.setattr(summary, "REASON", 20)
    first = replace(FIGURES["fig2_lr_by_rank"], settings=1)
    monkeypatch.setitem(FIGURES, first.name, first)
    others = [row | {"dataset": "worked", "run_id": f"worked-{row['run_id']}"} for row in rows]
    page = report(rows + others)
    table = page.section("runs")
    assert len(re.findall(r'<tr id="run-', table.source)) == 5
    assert "The table and the curves are those of the first 5 of 42 runs" in table.text
    assert len(json.loads(re.search(r'id="curves">(.*?)</script>', table.source)[1])["curves"]) == 5
    listed = set(re.findall(r'<tr id="(run-[^"]+)', page.source))
    assert {href[1:] for href in page.all("a", "href") if href.startswith("#run-")} <= listed
    assert "The first 5 of 6 diverged runs" in page.section("diverged").text
    assert "the first 1 of 2 combinations of model, dataset, batch size and length" in page.section("optima").text
    [figure] = re.findall(r'<figure id="fig2_lr_by_rank">(.*?)</figure>', page.source, re.S)
    assert "The first 1 of 2 combinations" in Page(figure).text
    [card] = re.findall(r'<article class="claim" id="claim-B2"(.*?)</article>', page.source, re.S)
    n_runs = int(judged_claims().set_index("claim_id").loc["B2", "n_runs"])
    assert f"The table claims has the other {n_runs - 3} in its column run_ids." in Page(card).text
    assert "… (the table claims has all of it)" in Page(card).text
    assert "All 21 runs" in whole.section("runs").text
    assert "the first 1 of 2 combinations of model, data" in page.section("recipe").text
    assert page.section("recipe").source.count("<td>worked</td>") == 0


JUDGED = [
    make_claim("B1"),
    make_claim("B3", "inconclusive"),
    make_claim("B5", "contradicted", fact="fact of B1", margin_low=0.02, margin_high=math.inf),
    make_claim("D1", "setting not met"),
    make_claim("G1", "not tested", kind="count"),
    make_claim("C5", kind="derivation"),
]


def test_claims_table_shows_verdict_margin_interval_power_scope_and_paper_in_this_order(report, rows):
    section = report(rows, claims=lambda table: claims_table(JUDGED)).section("claims")
    head, body = section.source.split("<tbody>")
    names = [Page(cell).text for cell in re.findall(r"<th.*?</th>", head)]
    assert names[2:] == ["Verdict", "Margin", "Estimate, 95% interval", "Power", "Measured on", "The paper"]
    rows_of = [[Page(cell).text for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in body.split("<tr")[1:]]
    by_id = {row[0]: row[1:] for row in rows_of}
    numbers = ["0.00200 nats [-0.00400, 0.00800]", "0.0085 nats", "0.8M parameters, 50 steps, worked", "no number"]
    # The claims of one fact stand together.
    assert list(by_id) == ["B1", "B5", "B3", "D1", "G1", "C5"]
    assert by_id["B1"] == [
        "statement of B1 One fact with B5 : fact of B1",
        "\N{CHECK MARK} confirmed",
        "±0.01 nats",
        *numbers,
    ]
    assert by_id["B5"][0] == "statement of B5 The same fact as B1"
    assert by_id["B5"][2] == "at least 0.02 nats"
    assert by_id["B3"][1] == "? inconclusive to decide: 6 seeds (now 3)"
    assert by_id["D1"][1].startswith(
        "\N{WHITE DIAMOND} setting not met needs runs of 1,000 steps or more (here at most"
    )
    assert by_id["D1"][3:] == numbers
    dash = "\N{EN DASH}"
    assert by_id["G1"] == ["statement of G1", f"{dash} not tested", dash, dash, dash, dash, "no number"]


def test_figures_stand_beside_their_claims_in_the_papers_order_and_links_resolve(report, rows):
    page = report(rows)
    first = page.section("rank")
    assert "fig1_envelopes" in first.ids
    assert {"claim-A1", "claim-A3", "claim-A8"} <= set(first.ids)
    assert "claim-B1" in page.section("learning-rate").ids
    assert page.ids.index("rank") < page.ids.index("learning-rate") < page.ids.index("batch-size")
    assert len(page.ids) == len(set(page.ids))
    targets = {href[1:] for href in page.all("a", "href") if href.startswith("#")}
    labels = {attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes}
    assert targets
    assert targets | labels | {f"run-{row['run_id']}" for row in rows} <= set(page.ids)


def test_nothing_is_fetched_and_the_policy_allows_only_the_pages_own_script_and_style(report, rows):
    page = report(rows)
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert not page.all("script", "src")
    assert not page.all("form", "action")
    assert all(source.startswith("data:image/") for source in page.all("img", "src"))
    outward = [href for href in page.all("a", "href") if not href.startswith(("#", "data:"))]
    assert set(outward) == {"https://doi.org/10.64434/tml.20250929"}
    assert "@import" not in page.source
    assert not re.search(r"url\((?!#)", page.source)
    hashes = {}
    for tag in ("script", "style"):
        [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", page.source, re.S)
        hashes[f"{tag}-src"] = f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    (policy,) = [attributes["content"] for _, attributes in page.tags if attributes.get("http-equiv")]
    nothing = dict.fromkeys(("default-src", "base-uri", "form-action"), "'none'")
    assert dict(rule.split(maxsplit=1) for rule in policy.split("; ")) == hashes | nothing | {"img-src": "data:"}
    # The policy allows neither style attributes nor inline handlers.
    assert not [name for _, attributes in page.tags for name in attributes if name == "style" or name.startswith("on")]


def test_figures_and_tables_are_embedded_with_caption_data_and_command(report, rows):
    page = report(rows, evals_of("base", None), evaluation=EVALUATION)
    links = [attributes for tag, attributes in page.tags if tag == "a" and "download" in attributes]
    files = {link["download"]: base64.b64decode(link["href"].partition(",")[2]) for link in links}
    tables, figures = Layout.of("mine.yaml").tables(), Layout.of("mine.yaml").figures
    for name in ("runs", "curves", "claims", "evals"):
        assert files[f"{name}.csv"] == (tables / f"{name}.csv").read_bytes()
    names = ("verdicts", "fig1_envelopes", "fig2_lr_by_rank", "loss_by_flops", "learned_forgotten")
    for name, source, alt in zip(names, page.all("img", "src"), page.all("img", "alt"), strict=True):
        assert base64.b64decode(source.partition(",")[2]) == (figures / f"{name}.svg").read_bytes()
        assert files[f"{name}.csv"] == (figures / f"{name}.csv").read_bytes()
        assert FIGURES[name].caption in alt
        assert FIGURES[name].caption in page.text
        assert f"snakemake --cores all paper_figures/mine/{name}.svg --config preset=mine.yaml" in page.text


def test_text_from_outside_stays_text(report):
    page = hostile_report(report)
    for table in ("runs", "evals", "claims"):
        for column in columns(table):
            assert " ".join(f"{column}{HOSTILE}".split()) in page.text, f"{table}.{column}"
    assert f"description{HOSTILE}".split()[0] in page.text
    assert [attributes.get("type") for tag, attributes in page.tags if tag == "script"] == ["application/json", None]
    assert "x-evil" not in {tag for tag, _ in page.tags}
    assert all(source.startswith("data:image/") for source in page.all("img", "src"))
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert not [href for href in page.all("a", "href") if not href.startswith(("#", "data:", "https://doi.org/"))]
    [text] = re.findall(r'<script type="application/json" id="curves">(.*?)</script>', page.source, re.S)
    curves = json.loads(text)
    assert curves["measures"] == [[f"split{HOSTILE}", f"metric{HOSTILE}"]]
    assert f"run_id{HOSTILE}0" in curves["curves"]


def test_without_a_script_every_run_is_in_the_table_and_diverged_ones_are_listed(report, rows):
    page = report(rows)
    [explorer] = [attributes for _, attributes in page.tags if attributes.get("id") == "explorer"]
    assert "hidden" in explorer
    assert explorer["data-begin"] == "rank"
    section = page.section("runs").text
    assert all(f"{row['run_id']} rank tiny instruct" in section for row in rows)
    assert section.count("node1 2026-01-02 03:0") == len(rows)
    listed = re.findall(r'href="#run-([^"]+)"', page.section("diverged").source)
    assert sorted(listed) == sorted(row["run_id"] for row in rows if row["status"] == "diverged")


def test_recipe_says_what_to_use_or_that_nothing_matches_or_can_be_compared(report):
    page = report([row for rank in (None, 1, 64) for row in make_sweep(rank, seeds=24)])
    answer = r"\byes tiny on instruct, batch 16: LoRA r64 at a learning rate of 2\.\d+e-3 is within"
    assert re.search(answer, page.header.text)
    section = page.section("recipe").text
    assert "tiny on instruct, batch 16: 64 (tried: 1, 64)" in section
    assert "10 times that of full fine-tuning" in section
    page = report([row for rank in (None, 1) for row in make_sweep(rank)])
    assert "No rank that was tried matches full fine-tuning. The best, LoRA r1" in page.header.text
    page = report(make_sweep(16))
    assert "not tested A comparison needs full fine-tuning and LoRA" in page.text
    assert "Not compared." in page.section("recipe").text


def test_a_sampler_that_is_far_from_its_learner_is_named_at_the_top_and_by_arm(report, raw_rl_preset):
    raw_rl_preset["execution"] |= {"sampler": "vllm"}
    kl = {"fullft": 0.034, "lora": 0.004}
    cells = {"task": "rl", "dataset": "gcd", "batch_size": 16, "steps": 3}
    cells |= dict.fromkeys(("base_reward", "final_valid_reward", "final_reward", "best_reward"), 0.5)
    rows, points = [], []
    for sweep in make_plan(Preset.model_validate(raw_rl_preset)).sweeps:
        run, condition = sweep.grid()[0], sweep.condition
        rows.append(make_run(condition.rank, run.lr, run_id=run.run_id, **cells))
        point = {"run_id": run.run_id, "step": 1, "examples": 16, "tokens": 32, "split": "train"}
        points += [point | {"metric": "kl", "value": kl[condition.method]}]
        points += [point | {"metric": "ratio_max", "value": 2.5}]
    page = report(rows, curves=lambda _: pd.DataFrame(points), **raw_rl_preset)
    assert "Sampler of responses vllm ! KL above 0.01 in 1 run " in page.header.text
    # Metrics that the curves do not have are dashes.
    assert page.section("sampler").rows == [
        "vllm tiny gcd 16 3 FullFT 3.40e-2 3.40e-2 \N{EN DASH} 2.50000 \N{EN DASH} 1 of 1",
        "vllm tiny gcd 16 3 LoRA r2 4e-3 4e-3 \N{EN DASH} 2.50000 \N{EN DASH} 0 of 1",
    ]


def test_what_is_missing_is_a_dash_and_uncommitted_changes_and_limits_are_shown(report):
    unknown = dict.fromkeys(["device", "host", "started", "git_sha", "versions", "threads", "wall_s", "train_flops"])
    sparse = [make_run(None, 1e-3), make_run(1, 1e-3, status="diverged")]
    whole = make_sweep(None, diverged_from=1.0) + make_sweep(1, diverged_from=1.0)
    for rows in (sparse, [row | unknown for row in whole]):
        page = report(rows)
        # The reasons are texts of the claims.
        shown = Page(re.sub(r'<dd class="reason">.*?</dd>', "", page.source, flags=re.DOTALL)).text
        assert "\N{EN DASH}" in shown
        assert not re.search(r"\b(nan|NaN|None|<NA>|NaT)\b", shown)
    assert "No run diverged: all 14 runs ended with finite losses." in page.text
    changed = [row | {"git_dirty_patch": "abc123"} for row in make_sweep(1)]
    page = report(make_sweep(None) + changed, limits=["It cannot fly."])
    for text in ("7 runs with uncommitted changes", "abc123", "It cannot fly."):
        assert text in page.text


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


def test_scores_are_shown_by_arm_base_first_with_both_filters(report, rows):
    page = report(rows, evals_of(16, None, "base"), evaluation=EVALUATION)
    section = page.section("evaluation")
    assert section.rows == [
        "base \N{EN DASH} 0.2700 ± 0.0200 0.3500 1.5200 ± 0.0200",
        "FullFT 3e-3 0.2600 ± 0.0200 0.3500 1.5100 ± 0.0200",
        "LoRA r16 3e-3 0.2500 ± 0.0200 0.3500 1.5000 ± 0.0200",
    ]
    assert "Arm LR Learned: lorabench_instruct exact_match, strict-match higher is better" in section.text
    assert "flexible-extract higher is better n 1,319, 5-shot, version 3.0" in section.text
    assert "Forgotten: pretraining bits_per_byte lower is better n 1,319, 0-shot" in section.text
    assert "perplexity" not in section.text
    assert "lm-eval 0.4.13, sampler own, 16 sequences at once" in section.text
    assert "learned_forgotten" in page.ids


def test_without_scores_of_runs_there_is_no_section_and_a_page_without_evaluation_needs_none(report, rows):
    for evals in (None, [make_eval("base", 0.1)]):
        page = report(rows, evals, evaluation=EVALUATION)
        assert "evaluation" not in page.ids
        assert "#evaluation" not in page.all("a", "href")
    layout = Layout.of("mine.yaml")
    for file in (*layout.figures.glob("learned_forgotten.*"), *layout.tables().glob("evals.*")):
        file.unlink()
    out = layout.report_without_evaluation
    build(make_plan(layout.preset), layout, "mine.yaml", out, evaluated=False)
    page = Page(out.read_text())
    assert "made without the scores of lm-evaluation-harness" in page.text
    assert not {"evaluation", "learned_forgotten"} & set(page.ids)
    assert f"snakemake --cores all {out} --config preset=mine.yaml" in page.text


def test_same_tables_give_the_same_page_and_an_error_leaves_the_old_one(layout):
    plan, before, other = make_plan(layout.preset), layout.report.read_text(), Path("other.html")
    build(plan, layout, "mine.yaml", layout.report)
    assert layout.report.read_text() == before
    # The commands are for a shell, and for this preset.
    build(plan, layout, "my presets/mine.yaml", other)
    assert f"{other} --config 'preset=my presets/mine.yaml'" in Page(other.read_text()).text
    build(plan, layout, "laptop", other)
    assert "--config" not in Page(other.read_text()).section("cost").text
    (layout.figures / "fig1_envelopes.svg").unlink()
    with pytest.raises(FileNotFoundError, match=r"fig1_envelopes\.svg"):
        build(plan, layout, "mine.yaml", layout.report)
    judged_claims().drop(columns=["margin_low", "scope"]).to_parquet(layout.tables() / "claims.parquet")
    with pytest.raises(UserError, match="no column margin_low, scope: judge the claims again"):
        build(plan, layout, "mine.yaml", layout.report)
    assert layout.report.read_text() == before


def test_the_checks_of_the_machine_are_shown_as_text(layout):
    assert "machine" not in Page(layout.report.read_text()).ids
    texts = {"name": f"name{HOSTILE}", "sentence": f"found{HOSTILE}", "unit": f"unit{HOSTILE}"}
    check = Check(status="fail", value=0.5, planned=1.0, **texts)
    write_record(record(processor(), host=f"host{HOSTILE}", checks=[check]))
    build(make_plan(layout.preset), layout, "mine.yaml", Path("doctor.html"))
    section = Page(Path("doctor.html").read_text()).section("machine")
    assert "1 of 1 checks failed" in section.text
    for text in (*texts.values(), f"host{HOSTILE}"):
        assert " ".join(text.split()) in section.text
    plain = {"h2", "p", "code", "div", "table", "thead", "tbody", "tr", "th", "td"}
    assert {tag for tag, _ in section.tags} <= plain
