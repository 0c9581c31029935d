"""The shipped sources are judged by the same claims; one seed confirms nothing without a named noise."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from lorabench.claims.judge import CLAIMS
from lorabench.errors import UserError
from lorabench.sources.measurements import matrix, measurement_table, measurements, read_own, summary_table
from lorabench.sources.studies import import_source, judge, read_studies, source_folders
from lorabench.utils.files import REFERENCE

from ..conftest import REPOSITORY
from .conftest import ROWS


@pytest.fixture(scope="module")
def studies():
    return read_studies(source_folders())


@pytest.fixture(scope="module")
def claims(studies):
    return pd.concat([judge(study) for study in studies], ignore_index=True)


def test_every_shipped_source_is_read_and_judged(studies, claims):
    assert {study.of.name for study in studies} == {path.parent.name for path in REFERENCE.glob("*/source.yaml")}
    assert {study.described.scale for study in studies} == {"0.6B", "1.7B", "3B", "8B", "70B"}
    assert len(claims) == len(studies) * len(CLAIMS)


def test_one_seed_decides_nothing_without_a_named_noise(studies, claims):
    decided = claims[claims["verdict"].isin(["confirmed", "contradicted"])]
    several = {study.of.name: study.tables.runs.groupby(["lr"])["seed"].nunique().max() for study in studies
               if "lr" in study.tables.runs and "seed" in study.tables.runs}  # fmt: skip
    for row in decided.to_dict("records"):
        assert several[row["source"]] >= 3 or "seed noise from" in row["reason"], row["claim_id"]


def test_the_ratio_at_06b_is_contradicted_by_borrowed_noise(claims):
    row = claims[(claims["source"] == "nhckdvrl") & (claims["claim_id"] == "B1")].iloc[0]
    assert row["verdict"] == "contradicted"
    assert row["estimate"] == pytest.approx(38.2, abs=0.5)
    assert "seed noise from nayyirahsan" in row["reason"]


def test_theories_of_alpha_32_are_not_asked_about_another_alpha(claims):
    predictions = claims[claims["claim_id"].isin(["P2", "P3", "P4"])].set_index(["source", "claim_id"])
    assert set(predictions.loc["nayyirahsan", "verdict"]) == {"not tested"}
    assert predictions.loc[("nhckdvrl", "P4"), "verdict"] == "contradicted"


def test_measurements_are_those_of_the_grids(studies):
    table = measurement_table(measurements(studies))
    gap = table[(table["measure"] == "rank_1_gap") & (table["dataset"] == "MATH outcome reward")].iloc[0]
    deviations = (0.022, 0.071, 0.019, 0.031, 0.040, 0.029)
    pooled = math.sqrt(sum(sd**2 for sd in deviations) / len(deviations))
    assert (gap["value"], gap["error"]) == pytest.approx((0.550 - 0.553, pooled * math.sqrt(2 / 3)))
    # The best LRs of both methods are at the edges of their grids.
    edge = table[(table["study"] == "apertus/Apertus-8B-Instruct-2509") & (table["measure"] == "lr_ratio")].iloc[0]
    assert not edge["counts"]
    assert "edge of its grid" in edge["remark"]
    assert (table["measure"] == "lr_ratio").sum() + (table["measure"] == "rank_1_gap").sum() >= 8
    summary = summary_table(table)
    of_all = summary[summary["attribute"] == ""].set_index("measure")
    assert of_all.loc["rank_1_gap", "k"] == 4
    # A source with several measurements counts once.
    assert of_all.loc["lr_ratio", "k"] == table[table["counts"] & (table["measure"] == "lr_ratio")]["source"].nunique()


def test_the_matrix_has_a_column_for_each_scale_and_the_worst_verdict_of_several_sources(claims):
    own = read_own(REPOSITORY / "paper_figures/published/laptop", "laptop")
    cells = matrix(claims, [own])
    assert list(dict.fromkeys(cells.sort_values("parameters")["scale"])) == [
        "tiny",
        "0.6B",
        "1.7B",
        "3B",
        "8B",
        "70B",
    ]
    at = cells.set_index(["claim_id", "scale"])
    assert at.loc[("B1", "0.6B"), "origin"] == "nhckdvrl"
    assert at.loc[("B1", "0.6B"), "others"] == "nayyirahsan: inconclusive"
    assert at.loc[("F1", "70B"), "verdict"] == "not tested"
    assert at.loc[("B3", "tiny"), "verdict"] == own.claims.set_index("claim_id").loc["B3", "verdict"]


def test_a_source_of_ones_own_stands_beside_the_shipped_ones(source):
    folder = source(noise={"sd": 0.001, "dof": 9, "source": "made-up repeats"})
    assert source_folders(folder)[-1] == folder
    assert source_folders(folder.parent)[-1] == folder
    [study] = read_studies([folder])
    row = judge(study).set_index("claim_id").loc["B1"]
    assert row["verdict"] == "confirmed"
    assert row["estimate"] == pytest.approx(10)
    assert "seed noise from made-up repeats" in row["reason"]
    assert row["doubts"] == "one seed"
    [alone] = read_studies([source()])
    assert judge(alone).set_index("claim_id").loc["B1", "verdict"] == "inconclusive"


def test_noise_of_a_source_that_is_not_there_is_refused(source, tmp_path):
    with pytest.raises(UserError, match="takes its noise from 'nobody', which is none of made-up"):
        read_studies([source(noise={"from": "nobody"})])
    with pytest.raises(UserError, match="made-up: no comparison has repeated seeds"):
        read_studies([source(noise={"from": "made-up"})])
    with pytest.raises(UserError, match="is no source"):
        source_folders(tmp_path / "empty")
    with pytest.raises(UserError, match="two sources have the name orbit"):
        source_folders(source(ROWS, name="orbit"))


def test_the_commits_and_licences_of_shipped_sources_are_said():
    for folder in source_folders():
        origin = import_source(folder).source.origin
        assert all((origin.repository, origin.path, origin.commit, origin.date, origin.licence))
