"""Publishing a finished preset and the evidence: the copied files, and the generated parts of README and docs."""

import json
import re
import shutil
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path

import pandas as pd
import pytest

import publish as publish_script
from evidence import publish_evidence
from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.claims.rules_hash import rules_sha256
from lorabench.errors import UserError
from lorabench.figures.evidence import evidence_tables
from lorabench.report.claim_text import VERDICTS
from lorabench.report.freeze import freeze, frozen_path, write_frozen
from lorabench.sources.measurements import read_own
from lorabench.store.io import read_claims, write_frame
from lorabench.store.layout import Layout
from lorabench.store.published import PUBLISHED, evidence_folders
from lorabench.store.tables import Tables
from pages import SOURCES, pages
from publish import publish, publish_held_out

from ..conftest import REPOSITORY
from ..handmade import claims_table, curves_of, laptop_like, make_claim, sft

PAGES = {
    "README.md": ["answers"],
    "advice/docs/trainers.md": ["trainers"],
    "docs/other-runs.md": ["evidence"],
    "docs/results.md": ["matrix", "laptop", "overnight"],
    "docs/learning-rate.html": ["facts"],
}
"""The pages, with their generated parts."""

EVIDENCE = REPOSITORY / PUBLISHED / "evidence"


def places(name: str) -> str:
    start = f"<!-- {name}: written by `workflow/scripts/`, never by hand -->"
    return f"before {name}\n{start}\nthe last one\n<!-- end of {name} -->\nafter {name}\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a repository that has published evidence, and whose pages have places for the generated parts."""
    monkeypatch.chdir(tmp_path)
    for page, names in PAGES.items():
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text("".join(map(places, names)))
    shutil.copytree(EVIDENCE, tmp_path / PUBLISHED / "evidence")
    return tmp_path


@pytest.fixture(scope="module")
def judged() -> pd.DataFrame:
    """Make a row for each claim, with all verdicts."""
    verdicts = cycle(VERDICTS)
    return claims_table([make_claim(claim.id, next(verdicts), statement=claim.statement) for claim in CLAIMS])


@pytest.fixture
def finished(judged: pd.DataFrame, root: Path) -> Layout:
    """Make the laptop preset as if it had been run and published before."""
    layout, runs = Layout.of("laptop"), laptop_like()
    for name, frame in (("runs", runs), ("curves", curves_of(runs)), ("claims", judged)):
        write_frame(frame, name, layout.tables())
    for folder, name in ((layout.figures, "verdicts.svg"), (layout.published, "of_an_older_version.svg")):
        folder.mkdir(parents=True)
        (folder / name).write_text("<svg/>")
    return layout


def test_figures_claims_and_provenance_are_copied_and_parts_take_the_place_of_old_ones(
    finished: Layout, judged: pd.DataFrame, root: Path
):
    publish(finished, Path())
    assert {path.name for path in finished.published.iterdir()} == {"verdicts.svg", "claims.csv", "provenance.json"}
    assert list(pd.read_csv(finished.published / "claims.csv")["verdict"]) == list(judged["verdict"])
    provenance = json.loads((finished.published / "provenance.json").read_text())
    assert provenance["runs_by_status"] == laptop_like()["status"].value_counts().to_dict()
    written = {page: (root / page).read_text() for page in PAGES}
    for page, names in PAGES.items():
        for name in names:
            assert all(part in written[page] for part in places(name).split("the last one"))
    # The preset overnight was not published here, so its part stays.
    assert "".join(written.values()).count("the last one") == 1
    publish(finished, Path())
    assert {page: (root / page).read_text() for page in PAGES} == written


def test_held_out_verdicts_stand_beside_the_explored_ones(
    finished: Layout, judged: pd.DataFrame, root: Path, monkeypatch: pytest.MonkeyPatch
):
    publish(finished, Path())
    preset = finished.preset
    explored = judged.assign(rules=rules_sha256(preset.margins, preset.predictions or {}))
    frozen = root / "frozen.yaml"
    write_frozen(freeze("laptop@100", explored), frozen)
    held_out = Layout.of("laptop@100")
    turned = explored.assign(verdict=explored["verdict"].where(explored["claim_id"] != "B1", "inconclusive"))
    for name, frame in (("runs", laptop_like()), ("claims", turned)):
        write_frame(frame, name, held_out.tables())
    with pytest.raises(UserError, match="preset laptop@100 has other seeds than the explored ones"):
        publish(held_out, Path())
    with pytest.raises(UserError, match="runs have the seeds 0, 1, 2, which are not among those frozen"):
        publish_held_out([frozen], Path())
    assert not (finished.published / "held_out").exists()
    monkeypatch.setattr(publish_script, "check_kept", lambda *_: "0123")
    held_out.figures.mkdir(parents=True)
    (held_out.figures / "fig1.csv").write_text("lr\n0.1\n")
    sentence = publish_held_out([frozen], Path())
    folder = finished.published / "held_out"
    written = {path.name for path in folder.iterdir()}
    assert written == {"came_out_again.csv", "claims.csv", "fig1.csv", "provenance.json"}
    assert json.loads((folder / "provenance.json").read_text())["frozen"]["commit"] == "0123"
    part = (root / "docs/results.md").read_text()
    assert f"{sentence}." in part
    verdict = explored.set_index("claim_id").loc["B1", "verdict"]
    assert re.search(rf"\| B1 \|[^|]*\| {verdict}[^|]*\| inconclusive \|", part)
    # Publishing what was explored leaves the held-out results.
    publish(finished, Path())
    assert (folder / "came_out_again.csv").is_file()


@pytest.mark.slow
def test_batches_are_published_together_beside_the_verdict_of_each(root: Path, monkeypatch: pytest.MonkeyPatch):
    made, today = sft.batches({0: 0.0, 1: 0.0, 2: 0.0}), datetime.now(UTC).isoformat()
    known = made.runs.assign(device="a CPU", host="a", threads=1, git_sha="0123", git_dirty_patch=None, versions="{}")
    known = known.assign(started=today, wall_s=1.0, test_data="data")
    known[["model_sha256", "dataset_sha256", "tokenizer_sha256", "template_sha256"]] = "0"
    for number, preset in enumerate(("laptop", "laptop@100", "laptop@200")):
        layout, runs = Layout.of(preset), known[known["seed"] // 100 == number]
        curves = made.curves[made.curves["run_id"].isin(runs["run_id"])]
        for name, frame in (("runs", runs), ("curves", curves)):
            write_frame(frame, name, layout.tables(), all_columns=False)
        claims = judge_claims(Tables.read(layout.tables()), margins=layout.preset.margins, predictions={})
        write_frame(claims, "claims", layout.tables())
        if number:
            frozen = freeze(preset, read_claims(Layout.of("laptop").tables()))
            write_frozen(frozen, frozen_path(preset))
    finished = Layout.of("laptop")
    finished.figures.mkdir(parents=True)
    (finished.figures / "verdicts.svg").write_text("<svg/>")
    publish(finished, Path())
    monkeypatch.setattr(publish_script, "check_kept", lambda *_: "0123456789")
    paths = [frozen_path("laptop@100"), frozen_path("laptop@200")]
    with pytest.raises(UserError, match="are not the first batches of laptop that count, in order"):
        publish_held_out(paths[::-1], Path())
    sentence = publish_held_out(paths, Path())
    own = read_own(finished.published, "laptop").set_index("claim_id").loc["B2"]
    assert (own["verdict"], own["held_out"], own["explored"]) == ("confirmed", "confirmed", False)
    assert (own["batches"], own["batches_alike"]) == (2, 2)
    part = (root / "docs/results.md").read_text()
    assert f"2 batches of held-out seeds, frozen before their runs, are judged together. Alone: {sentence}." in part
    assert re.search(r"\| B2 \|[^|]*\| confirmed[^|]*\| confirmed \| 2 of 2 \|", part)


def test_a_preset_that_was_never_explored_is_published_with_its_verdicts_as_held_out(
    finished: Layout, judged: pd.DataFrame, root: Path, monkeypatch: pytest.MonkeyPatch
):
    write_frozen(freeze("laptop@100", None), root / "frozen.yaml")
    held_out = Layout.of("laptop@100")
    shutil.copytree(finished.tables(), held_out.tables())
    monkeypatch.setattr(publish_script, "check_kept", lambda *_: "0123456789")
    with pytest.raises(UserError, match=r"verdicts\.svg does not exist; run the preset laptop@100 first"):
        publish_held_out([root / "frozen.yaml"], Path())
    shutil.copytree(finished.figures, held_out.figures)
    publish_held_out([root / "frozen.yaml"], Path())
    part = (root / "docs/results.md").read_text()
    assert "All seeds are held out: margins, rules and data were frozen in 0123456, before any run." in part
    assert (finished.published / "verdicts.svg").is_file()
    assert read_own(finished.published, "laptop")["held_out"].tolist() == judged["verdict"].tolist()


def test_what_cannot_be_published_is_refused_before_anything_is_written(
    finished: Layout, judged: pd.DataFrame, root: Path
):
    other = Layout.of("long_runs")
    shutil.copytree(finished.tables(), other.tables())
    shutil.copytree(finished.figures, other.figures)
    with pytest.raises(UserError, match=r"docs/results.md has no place for its generated part: .*<!-- long_runs: "):
        publish(other, Path())
    judged.drop(columns="margin_low").to_parquet(finished.tables() / "claims.parquet")
    with pytest.raises(UserError, match="no column margin_low: judge the claims again"):
        publish(finished, Path())
    assert not (finished.published / "claims.csv").exists()


def test_the_committed_pages_say_what_the_committed_files_say():
    """When it fails: python workflow/scripts/evidence.py."""
    for page, text in pages(REPOSITORY).items():
        assert text == (REPOSITORY / page).read_text(encoding="utf-8"), page


@pytest.mark.slow
def test_evidence_is_published_with_its_pages(root: Path):
    folders = evidence_folders(REPOSITORY)
    evidence = evidence_tables(own=[read_own(folder, folder.name) for folder in folders], presets=folders)
    shutil.rmtree(root / PUBLISHED / "evidence")
    shutil.copytree(REPOSITORY / SOURCES, root / SOURCES)
    shutil.copytree(REPOSITORY / PUBLISHED / "laptop", root / PUBLISHED / "laptop")
    publish_evidence(evidence, root)
    written = root / PUBLISHED / "evidence"
    # These are written by benchmarks.
    others = ("lr_left_out", "lr_curvatures", "lr_evidence", "lr_regret", "lr_ratio_regret", "framework_")
    committed = {path.name for path in EVIDENCE.iterdir() if not path.name.startswith(others)}
    assert {path.name for path in written.iterdir()} == committed
    before, after = (pd.read_csv(folder / "lr_optima.csv").drop(columns="rank") for folder in (EVIDENCE, written))
    pd.testing.assert_frame_equal(after, before, check_dtype=False, rtol=1e-6)
    assert "[inconclusive](other-runs.md#nayyirahsan)" in (root / "docs/results.md").read_text()
