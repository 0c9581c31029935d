"""Parts of the page: its sections, the curves that are thinned for it, and the tables that it offers for download."""

from __future__ import annotations

import base64
import gzip
import json
import random
import string

import numpy as np
import pandas as pd
import pytest

from lorabench.claims.judge import CLAIMS
from lorabench.figures.catalog import FIGURES
from lorabench.report import page
from lorabench.report.page import SECTIONS, arrange, curves_to_draw, table_downloads
from lorabench.report.summary import labelled

from ..handmade import curves_of, make_sweep, runs_table


@pytest.fixture
def runs() -> pd.DataFrame:
    return labelled(runs_table(make_sweep(None) + make_sweep(4)))


def test_each_figure_and_each_claim_has_one_place():
    placed = [name for section in SECTIONS for name in section["figures"]]
    assert sorted([*placed, "verdicts"]) == sorted(FIGURES)
    assert sorted(claim for section in SECTIONS for claim in section["claims"]) == sorted(claim.id for claim in CLAIMS)
    # A claim on a figure of the paper is where the figure is.
    numbered = {claim.id: f"fig{claim.figure[0]}_" for claim in CLAIMS if claim.figure[0].isdigit()}
    assert numbered
    for section in SECTIONS:
        for claim in numbered.keys() & set(section["claims"]):
            assert any(name.startswith(numbered[claim]) for name in section["figures"]), claim
    ids = [section["id"] for section in SECTIONS]
    assert len({*ids, *FIGURES}) == len(ids) + len(FIGURES)


def test_what_is_in_no_section_comes_last_and_empty_sections_are_left_out():
    figures = [{"name": "new_figure"}, {"name": "fig1_envelopes"}]
    claims = [{"claim_id": "Z1"}, {"claim_id": "B1"}]
    first, second, last = arrange(figures, claims)
    assert [first["about"]["id"], second["about"]["id"], last["about"]["id"]] == ["rank", "learning-rate", "further"]
    assert (first["figures"], first["claims"]) == ([figures[1]], [])
    assert (last["figures"], last["claims"]) == ([figures[0]], [claims[0]])


def test_curves_are_those_of_the_table(runs):
    curves = curves_of(runs)
    drawn = curves_to_draw(runs, curves)
    assert drawn["measures"] == [("validation", "nll")]
    assert set(drawn["curves"]) == set(runs["run_id"])
    for run_id, [[measure, grid, values]] in drawn["curves"].items():
        own = curves[(curves["run_id"] == run_id) & curves["value"].notna()]
        assert measure == 0
        assert drawn["grids"][grid] == tuple(own["step"])
        assert values == pytest.approx(list(own["value"]), rel=1e-3)
    # Runs that finished share one list of steps, and runs that diverged another.
    assert len(drawn["grids"]) == 2
    assert json.loads(json.dumps(drawn, allow_nan=False))["curves"] == drawn["curves"]
    # Of a long curve there are the ends and points that are spaced by logarithm.
    long = curves.iloc[[0] * 10_001].assign(step=range(10_001))
    [steps] = map(np.array, curves_to_draw(runs, long)["grids"])
    assert (steps[0], steps[-1]) == (0, 10_000)
    assert 40 < len(steps) <= 60
    assert 8 <= ((steps > 100) & (steps <= 1000)).sum() <= 16
    # Unknown runs and values that are no numbers are left out.
    odd = curves.head(3).assign(run_id=["stranger", *curves["run_id"][1:3]], value=[1.0, np.inf, np.nan], step=999)
    assert curves_to_draw(runs, pd.concat([curves, odd]))["curves"] == drawn["curves"]


def test_tables_are_embedded_compressed_where_large_and_named_where_too_large(tmp_path):
    noise = random.Random(0).choices(string.ascii_letters, k=4_000_000)
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    (tmp_path / "evals.csv").write_text("a,b\n" * 100_000)
    (tmp_path / "curves.csv").write_text("".join(noise))
    small, huge, large = table_downloads(tmp_path, tmp_path / "report")
    assert (small["file"], large["file"], huge["file"]) == ("runs.csv", "evals.csv.gz", "curves.csv")
    assert base64.b64decode(small["uri"].partition(",")[2]) == b"a,b\n1,2\n"
    packed = base64.b64decode(large["uri"].partition(",")[2])
    assert gzip.decompress(packed) == (tmp_path / "evals.csv").read_bytes()
    assert (huge["embedded"], huge["uri"]) == (False, "../curves.csv")
    some = table_downloads(tmp_path, tmp_path, without=("evals",))
    assert [table["file"] for table in some] == ["runs.csv", "curves.csv"]
    assert huge["bytes"] == 4_000_000


def test_a_table_that_is_too_large_is_named_without_being_read(tmp_path, monkeypatch):
    (tmp_path / "evals.csv").write_text("a,b\n" * 100_000)
    (tmp_path / "curves.parquet").write_bytes(b"a table")
    monkeypatch.setattr(page, "MAX_READ", 399_999)
    monkeypatch.setattr(page.gzip, "compress", None)
    curves, evals = table_downloads(tmp_path, tmp_path)
    assert curves == {"file": "curves.parquet", "bytes": 7, "embedded": False, "uri": "curves.parquet"}
    assert evals == {"file": "evals.csv", "bytes": 400_000, "embedded": False, "uri": "evals.csv"}
