"""`lorabench evidence` writes the matrix, the forest plot and the generated parts of three pages."""

from __future__ import annotations

import pandas as pd
import pytest

from lorabench.errors import UserError
from lorabench.report.evidence import (
    END,
    MATRIX_PAGES,
    PAGE,
    PUBLISHED,
    START,
    gather,
    matrix_block,
    publish,
    published_presets,
    write,
)

from ..conftest import REPOSITORY


@pytest.fixture(scope="module")
def evidence():
    return gather(own=published_presets(REPOSITORY))


def test_the_committed_pages_show_the_committed_matrix():
    cells = pd.read_csv(REPOSITORY / PUBLISHED / "matrix.csv")
    for page in MATRIX_PAGES:
        assert matrix_block(cells, page) in (REPOSITORY / page).read_text(encoding="utf-8")
    assert cells["scale"].nunique() >= 4


def test_evidence_is_written_and_published(evidence, tmp_path):
    write(evidence, tmp_path / "out")
    for page in (*MATRIX_PAGES, PAGE):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(f"before\n{START}\nreplaced text\n{END}\nafter\n")
    publish(evidence, tmp_path / "out", tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert "| B1 |" in readme
    assert "(docs/evidence.md#nhckdvrl) 38.2" in readme
    page = (tmp_path / PAGE).read_text()
    for study in evidence.studies:
        assert f"\n## {study.of.name}\n" in page
        assert all(doubt in page for doubt in study.of.source.doubts)
    assert "replaced text" not in page
    assert (tmp_path / PUBLISHED / "forest.svg").is_file()


def test_a_page_without_a_place_is_refused_before_anything_is_written(evidence, tmp_path):
    for page in (*MATRIX_PAGES, PAGE):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text("no place\n")
    with pytest.raises(UserError, match="has no place for its generated part"):
        publish(evidence, tmp_path / "out", tmp_path)
    assert not (tmp_path / PUBLISHED).exists()
