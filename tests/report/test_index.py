"""The index of a folder of results: what lies there is listed, whatever else is damaged or written at the same time."""

import re
from concurrent.futures import ThreadPoolExecutor, wait
from html import escape
from pathlib import Path

import pytest

from lorabench.report.page import write_index
from lorabench.store.io import write_frame
from lorabench.utils.lock import locked

from ..handmade import claims_table, make_claim, make_sweep, runs_table
from .conftest import HOSTILE, Page

VERDICTS = {"A7": "contradicted", "B2": "inconclusive", "F1": "confirmed", "C1": "confirmed", "B1": "not tested"}
CLAIMS = [make_claim(*named) for named in (VERDICTS | {"D1": "contradicted"}).items()]


def finish(name: str, day: int = 1, about: str = "About it &amp; more") -> Path:
    """Make a preset with a report, in which nothing but the head is; return the folder of its tables."""
    folder = Path("results") / name
    (folder / "report").mkdir(parents=True)
    head = f'<title>Question {name}</title><meta name="description" content="{about}">'
    head += '<meta name="abstract" content="It matches.">'
    (folder / "report/index.html").write_text(f"<!doctype html><head>{head}<p>text</p>")
    write_frame(runs_table(make_sweep(16, started=f"2026-01-{day:02}T03:04:05+00:00")), "runs", folder / "tables")
    write_frame(claims_table(CLAIMS), "claims", folder / "tables")
    return folder / "tables"


def entries(page: str) -> dict[str, Page]:
    found = re.findall(r'<article class="entry">(.*?)</article>', page, re.DOTALL)
    return {Page(entry.split("</h3>")[0]).text: Page(entry) for entry in found}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_reports_are_listed_with_runs_and_verdicts():
    for name, day in (("mine", 1), ("laptop", 2), ("laptop@100", 3)):
        finish(name, day)
    Path("results/unfinished/tables").mkdir(parents=True)
    page = write_index(Path("results")).read_text()
    assert re.findall(r"<h2.*?>(.*?)</h2>", page) == ["Your own models and data", "Presets of the paper, run here"]
    shown = entries(page)
    # The newest comes first, and a shipped preset goes by its name.
    assert list(shown) == ["Question mine", "laptop@100", "laptop"]
    mine = shown["Question mine"]
    assert mine.all("a", "href") == ["mine/report/index.html"]
    assert "About it & more It matches. 7 runs tiny 2026-01-01" in mine.text
    assert "2 confirmed ✗ 2 contradicted ? 1 inconclusive" in mine.text
    assert "laptop%40100/report/index.html" in shown["laptop@100"].all("a", "href")


def test_a_report_that_ends_while_another_process_writes_the_index_is_listed():
    finish("mine")
    with ThreadPoolExecutor(1) as other, locked(Path("results/.index.lock"), "the index", print):
        written = other.submit(write_index, Path("results"))
        assert not wait([written], timeout=0.5).done
        finish("later", day=2)
    assert list(entries(written.result().read_text())) == ["Question later", "Question mine"]


def test_a_damaged_table_keeps_no_other_report_from_being_listed():
    finish("mine")
    (finish("other") / "claims.parquet").write_bytes(b"PAR1")
    shown = entries(write_index(Path("results")).read_text())
    assert "2 confirmed" in shown["Question mine"].text
    assert "can't be read as a table" in shown["Question other"].text


def test_text_from_outside_stays_text_and_nothing_is_fetched_or_run():
    finish("mine", about=escape(f"description{HOSTILE}"))
    page = Page(write_index(Path("results")).read_text())
    assert " ".join(f"description{HOSTILE}".split()) in page.text
    assert not {"script", "x-evil", "img", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    [policy] = [value for value in page.all("meta", "content") if "default-src" in value]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
