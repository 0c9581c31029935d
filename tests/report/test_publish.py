"""Publishing a finished preset: the copied files, and the blocks of both pages."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pandas as pd
import pytest

from lorabench.claims.catalog import CLAIMS, CORE
from lorabench.errors import UserError
from lorabench.report.facts import VERDICTS, headline
from lorabench.report.publish import END, SHOWN, START, publish, readme_block, results_block, results_page
from lorabench.store.io import write_frame
from lorabench.store.layout import Layout
from lorabench.store.tables import Tables

from ..conftest import REPOSITORY
from ..handmade import claims_table, curves_of, laptop_like, make_claim

RESULTS_PAGE = results_page("laptop")
PAGES = (Path("README.md"), RESULTS_PAGE)


@pytest.fixture(scope="module")
def tables() -> Tables:
    """Make tables of the laptop preset by hand."""
    runs = laptop_like()
    return Tables(runs=runs, curves=curves_of(runs))


@pytest.fixture(scope="module")
def judged() -> pd.DataFrame:
    """Make a row for each claim, with all verdicts."""
    verdicts = cycle(VERDICTS)
    return claims_table([make_claim(claim.id, next(verdicts), statement=claim.statement) for claim in CLAIMS])


@pytest.fixture
def finished(tables: Tables, judged: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """Make the laptop preset as if it had been run in an empty folder, with a README that has a place for results."""
    monkeypatch.chdir(tmp_path)
    layout = Layout.of("laptop")
    write_frame(tables.runs, "runs", layout.tables())
    write_frame(judged, "claims", layout.tables())
    layout.figures.mkdir(parents=True)
    (layout.figures / f"{SHOWN}.svg").write_text("<svg/>")
    layout.published.mkdir(parents=True)
    (layout.published / "of_an_older_version.svg").write_text("<svg/>")
    RESULTS_PAGE.parent.mkdir()
    for page in PAGES:
        page.write_text(f"before\n{START}\nthe last one\n{END}\nafter\n")
    return layout


def test_figures_are_copied_with_claims_and_provenance(finished: Layout, tables: Tables, judged: pd.DataFrame):
    publish(finished, Path("README.md"))
    assert {path.name for path in finished.published.iterdir()} == {f"{SHOWN}.svg", "claims.csv", "provenance.json"}
    claims = pd.read_csv(finished.published / "claims.csv")
    assert list(claims.claim_id) == list(judged.claim_id)
    assert list(claims.verdict) == list(judged.verdict)
    provenance = json.loads((finished.published / "provenance.json").read_text())
    assert provenance["runs"] == len(tables.runs)
    assert provenance["runs_by_status"] == tables.runs.status.value_counts().to_dict()
    assert provenance["devices"] == ["AMD EPYC 7B13"]
    assert provenance["commits"] == ["0123456789abcdef0123456789abcdef01234567"]


@pytest.mark.parametrize("page", PAGES)
def test_the_block_takes_the_place_of_the_old_one_and_nothing_else(finished: Layout, page: Path):
    publish(finished, Path("README.md"))
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "the last one" not in text
    assert text.count(START) == text.count(END) == 1
    publish(finished, Path("README.md"))
    assert page.read_text() == text


def rows_of(block: str) -> dict[str, str]:
    """Return the rows of a block's table by claim."""
    return {
        line.split(" | ")[0][2:]: line
        for line in block.splitlines()
        if line.startswith("| ") and "claim" not in line[:9]
    }


def test_claims_are_in_the_blocks_with_their_verdicts(finished: Layout):
    publish(finished, Path("README.md"))
    claims = pd.read_csv(finished.published / "claims.csv")
    blocks = results_block(finished.published), readme_block(finished.published)
    every, core = map(rows_of, blocks)
    tested = claims[claims["verdict"] != "not tested"]
    assert list(every) == list(tested.claim_id)
    untested = claims.loc[claims["verdict"] == "not tested", "claim_id"]
    assert f"Not tested, for want of such runs: {', '.join(untested)}." in blocks[0]
    assert set(core) == set(CORE)
    for claim in tested.itertuples():
        assert f" | {claim.verdict}" in every[claim.claim_id]
    for claim_id in set(core) - set(untested):
        assert core[claim_id] == every[claim_id]
    for block in blocks:
        lines = block.splitlines()
        assert f"({lines[1].partition('](')[2]}".endswith(f"{SHOWN}.svg)"), "the picture comes first"
        assert headline(claims) in block
        assert "| verdict | margin | measured, 95% interval | power | scope | paper |" in block


def test_a_row_has_the_margin_the_power_and_what_is_missing(finished: Layout):
    publish(finished, Path("README.md"))
    claims = [
        make_claim("B1", fact="one"),
        make_claim("B5", "inconclusive", fact="one"),
        make_claim("B2", borderline=True),
        make_claim("D1", "setting not met", missing="natural text"),
        make_claim("D5", "not tested"),
    ]
    claims_table(claims).drop(columns="run_ids").to_csv(finished.published / "claims.csv", index=False)
    rows = rows_of(results_block(finished.published))
    measured = (
        "±0.01 nats | 0.00200 nats [-0.00400, 0.00800] | 0.0085 nats | 0.8M parameters, 50 steps, worked | no number"
    )
    assert rows["B1"] == f"| B1 | statement of B1 (one fact with B5) | confirmed | {measured} |"
    assert f"| inconclusive; to decide: 6 seeds (now 3) | {measured} |" in rows["B5"]
    assert f"| confirmed, borderline | {measured} |" in rows["B2"]
    assert f"| setting not met; needs natural text | {measured} |" in rows["D1"]
    assert "D5" not in rows


def test_an_old_table_is_refused_before_anything_is_written(finished: Layout, judged: pd.DataFrame):
    judged.drop(columns="margin_low").to_parquet(finished.tables() / "claims.parquet")
    with pytest.raises(UserError, match="no column margin_low: judge the claims again"):
        publish(finished, Path("README.md"))
    assert not (finished.published / "claims.csv").exists()


def test_claims_published_without_the_column_of_borderline_verdicts_are_read(finished: Layout):
    publish(finished, Path("README.md"))
    path = finished.published / "claims.csv"
    pd.read_csv(path).drop(columns="borderline").to_csv(path, index=False)
    assert "borderline" not in results_block(finished.published)


def test_text_is_no_markup(finished: Layout):
    publish(finished, Path("README.md"))
    claims = pd.read_csv(finished.published / "claims.csv")
    claims.loc[0, "statement"] = "a|b <script>\nc"
    claims.to_csv(finished.published / "claims.csv", index=False)
    assert "a\\|b &lt;script> c" in results_block(finished.published)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_without_a_place_is_refused_before_anything_is_written(finished: Layout, page: Path):
    page.write_text("nothing")
    with pytest.raises(UserError, match=f"{page} has no place for its generated part"):
        publish(finished, Path("README.md"))
    assert not (finished.published / "claims.csv").exists()


def test_a_missing_figure_is_named(finished: Layout):
    (finished.figures / f"{SHOWN}.svg").unlink()
    with pytest.raises(UserError, match=SHOWN):
        publish(finished, Path("README.md"))


def test_another_preset_has_a_page_of_its_own_and_leaves_the_readme(finished: Layout):
    before = Path("README.md").read_text()
    other = replace(finished, name="overnight")
    page = results_page("overnight")
    page.write_text(f"{START}\n{END}\n")
    for folder in (other.tables(), other.figures):
        folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(finished.tables(), other.tables(), dirs_exist_ok=True)
    shutil.copytree(finished.figures, other.figures, dirs_exist_ok=True)
    publish(other, Path("README.md"))
    assert "What the `overnight` preset says." in page.read_text()
    assert f"published/overnight/{SHOWN}.svg" in page.read_text()
    assert Path("README.md").read_text() == before


def test_the_readme_takes_from_a_further_preset_what_the_default_one_has_no_setting_for(finished: Layout):
    publish(finished, Path("README.md"))
    scope = {"A1": "setting not met", "A3": "not tested", "B1": "inconclusive", "B3": "setting not met"}
    claims_table([make_claim(*row) for row in scope.items()]).to_csv(finished.published / "claims.csv", index=False)
    further = replace(finished, name="long_runs")
    results_page("long_runs").write_text(f"{START}\n{END}\n")
    shutil.copytree(finished.tables(), further.tables())
    shutil.copytree(finished.figures, further.figures)
    verdicts = {"A1": "contradicted", "A3": "confirmed", "B1": "confirmed", "B3": "not tested"}
    write_frame(claims_table([make_claim(*row) for row in verdicts.items()]), "claims", further.tables())
    publish(further, Path("README.md"))
    rows = rows_of(Path("README.md").read_text())
    link = "(preset [long_runs](docs/results-long_runs.md))"
    assert "| contradicted |" in rows["A1"]
    assert link in rows["A1"]
    assert "| confirmed |" in rows["A3"]
    assert link in rows["A3"]
    assert "| inconclusive" in rows["B1"]
    assert link not in rows["B1"]
    assert "| setting not met" in rows["B3"]
    assert link not in rows["B3"]


@pytest.mark.parametrize(
    "preset", sorted(path.parent.name for path in REPOSITORY.glob("paper_figures/published/*/provenance.json"))
)
def test_the_pages_say_what_the_committed_files_say(preset: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    published = Layout.of(preset).published
    assert results_block(published) in results_page(preset).read_text(encoding="utf-8")
    if preset == "laptop":
        assert readme_block(published) in Path("README.md").read_text(encoding="utf-8")
