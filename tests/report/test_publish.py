"""What the repository shows of a finished preset."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from lorabench.analysis.claims import judge_claims
from lorabench.errors import UserError
from lorabench.layout import Layout
from lorabench.report.publish import CORE, END, SHOWN, START, block, publish
from lorabench.tables import Tables, write_frame
from tests.conftest import REPOSITORY
from tests.handmade import curves_of, laptop_like


@pytest.fixture(scope="module")
def tables() -> Tables:
    """Make runs of the laptop preset by hand, with their claims."""
    runs = laptop_like()
    return Tables(runs=runs, curves=curves_of(runs))


@pytest.fixture(scope="module")
def judged(tables: Tables) -> pd.DataFrame:
    return judge_claims(tables)


@pytest.fixture
def finished(tables: Tables, judged: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """Make an empty folder look as if the laptop preset had been run in it, with a README with a place for results."""
    monkeypatch.chdir(tmp_path)
    layout = Layout.of("laptop")
    write_frame(tables.runs, "runs", layout.tables())
    write_frame(judged, "claims", layout.tables())
    layout.figures.mkdir(parents=True)
    for name in SHOWN:
        (layout.figures / f"{name}.svg").write_text("<svg/>")
    Path("README.md").write_text(f"before\n{START}\nthe last one\n{END}\nafter\n")
    return layout


def test_claims_and_provenance_lie_beside_the_figures(finished: Layout, tables: Tables, judged: pd.DataFrame):
    publish(finished, Path("README.md"))
    claims = pd.read_csv(finished.figures / "claims.csv")
    assert list(claims.claim_id) == list(judged.claim_id)
    assert list(claims.verdict) == list(judged.verdict)
    provenance = json.loads((finished.figures / "provenance.json").read_text())
    assert provenance["runs"] == len(tables.runs)
    assert provenance["runs_by_status"] == tables.runs.status.value_counts().to_dict()
    assert provenance["devices"] == ["AMD EPYC 7B13"]
    assert provenance["commits"] == ["0123456789abcdef0123456789abcdef01234567"]


def test_the_block_takes_the_place_of_the_old_one_and_nothing_else(finished: Layout):
    publish(finished, Path("README.md"))
    text = Path("README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "the last one" not in text
    assert text.count(START) == text.count(END) == 1
    publish(finished, Path("README.md"))
    assert Path("README.md").read_text() == text


def test_every_claim_is_in_the_block_with_its_verdict(finished: Layout):
    publish(finished, Path("README.md"))
    claims = pd.read_csv(finished.figures / "claims.csv")
    rows = {line.split(" | ")[0][2:]: line for line in block(finished.figures).splitlines() if line.startswith("| ")}
    assert set(claims.claim_id) <= set(rows)
    for claim in claims.itertuples():
        assert f"| {claim.verdict} |" in rows[claim.claim_id]
    assert set(CORE) <= set(claims.claim_id)


def test_text_is_no_markup(finished: Layout):
    publish(finished, Path("README.md"))
    claims = pd.read_csv(finished.figures / "claims.csv")
    claims.loc[0, "statement"] = "a|b <script>\nc"
    claims.to_csv(finished.figures / "claims.csv", index=False)
    assert "a\\|b &lt;script> c" in block(finished.figures)


def test_a_readme_without_a_place_is_refused_before_anything_is_written(finished: Layout):
    Path("README.md").write_text("nothing")
    with pytest.raises(UserError, match="no place for the results"):
        publish(finished, Path("README.md"))
    assert not (finished.figures / "claims.csv").exists()


def test_a_missing_figure_is_named(finished: Layout):
    (finished.figures / f"{SHOWN[0]}.svg").unlink()
    with pytest.raises(UserError, match=SHOWN[0]):
        publish(finished, Path("README.md"))


def test_the_readme_says_what_the_committed_files_say(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    assert block(Path("paper_figures/laptop")) in Path("README.md").read_text(encoding="utf-8")
