"""`lorabench evidence` writes the matrix, the forest plot and the generated parts of three pages."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lorabench.errors import UserError
from lorabench.figures.matrix import draw_matrix
from lorabench.report.evidence import (
    END,
    MATRIX_PAGES,
    PAGE,
    PUBLISHED,
    START,
    gather,
    lr_evidence,
    matrix_block,
    publish,
    published_folders,
    published_presets,
    write,
)
from lorabench.sources.lr_left_out import by_source, compared
from lorabench.sources.lr_optima import optima_of_table
from lorabench.utils.packaged import LR_OPTIMA

from ..conftest import REPOSITORY


@pytest.fixture(scope="module")
def evidence():
    return gather(own=published_presets(REPOSITORY), presets=published_folders(REPOSITORY))


def test_the_figure_has_a_dash_where_there_are_no_runs():
    cells = pd.read_csv(REPOSITORY / PUBLISHED / "matrix.csv")
    judged = cells[cells["verdict"] != "not tested"].drop_duplicates(["claim_id", "scale"])
    texts = [text.get_text() for text in draw_matrix(cells).axes[0].texts]
    empty = cells["claim_id"].nunique() * cells["scale"].nunique() - len(judged)
    assert texts.count("\N{EN DASH}") == empty > 0


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
    (tmp_path / lr_evidence.PAGE).write_text(f"{lr_evidence.START}\nreplaced text\n{lr_evidence.END}\n")
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
    lrs = (tmp_path / lr_evidence.PAGE).read_text()
    assert "replaced text" not in lrs
    assert all(name in lrs for name in set(evidence.lr_optima["source"]))


def test_the_committed_learning_rates_follow_from_the_sources(evidence):
    optima = pd.read_csv(REPOSITORY / PUBLISHED / "lr_optima.csv")
    assert repr(optima_of_table(pd.read_csv(LR_OPTIMA))) == repr(optima_of_table(optima))
    columns = [name for name in optima if name != "rank"]
    pd.testing.assert_frame_equal(
        evidence.lr_optima[columns].replace("", np.nan), optima[columns], check_dtype=False, rtol=1e-6
    )
    committed = pd.read_csv(REPOSITORY / PUBLISHED / "lr_left_out_summary.csv")
    summary = compared(by_source(evidence.lr_left_out))
    pd.testing.assert_frame_equal(summary, committed, rtol=1e-3)
    page = (REPOSITORY / lr_evidence.PAGE).read_text(encoding="utf-8")
    assert lr_evidence.lr_block(evidence.lr_optima, evidence.lr_left_out) in page


def test_the_rule_that_recommends_is_as_far_off_as_the_page_says(evidence):
    summary = compared(by_source(evidence.lr_left_out)).set_index(["task", "method", "rule"])
    for key in [("sft", "fullft"), ("sft", "lora"), ("rl", "fullft"), ("rl", "lora")]:
        pooled, law = summary.loc[(*key, "pooled")], summary.loc[(*key, "law")]
        assert pooled["off"] <= law["off"]
        assert pooled["loss_above_best"] <= law["loss_above_best"]


def test_a_page_without_a_place_is_refused_before_anything_is_written(evidence, tmp_path):
    for page in (*MATRIX_PAGES, PAGE):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text("no place\n")
    with pytest.raises(UserError, match="has no place for its generated part"):
        publish(evidence, tmp_path / "out", tmp_path)
    assert not (tmp_path / PUBLISHED).exists()
