"""The sections of the page: every figure and every claim is in one of them."""

from __future__ import annotations

from lorabench.claims.judge import CLAIMS
from lorabench.figures.catalog import FIGURES
from lorabench.report.page import SECTIONS, arrange


def test_each_figure_and_each_claim_has_one_place():
    placed = [name for section in SECTIONS for name in section["figures"]]
    assert sorted([*placed, "verdicts"]) == sorted(FIGURES)
    assert sorted(claim for section in SECTIONS for claim in section["claims"]) == sorted(claim.id for claim in CLAIMS)


def test_claims_of_a_numbered_figure_stand_in_its_section():
    numbered = {claim.id: claim.figure[0] for claim in CLAIMS if claim.figure[0].isdigit()}
    of = {claim: section["short"] for section in SECTIONS for claim in section["claims"]}
    assert numbered
    assert {claim: of[claim] for claim in numbered} == {claim: f"Fig. {number}" for claim, number in numbered.items()}


def test_anchors_are_unique():
    ids = [section["id"] for section in SECTIONS]
    assert len({*ids, *FIGURES}) == len(ids) + len(FIGURES)


def test_what_is_in_no_section_comes_last_and_empty_sections_are_left_out():
    figures = [{"name": "new_figure"}, {"name": "fig1_envelopes"}]
    claims = [{"claim_id": "Z1"}, {"claim_id": "B1"}]
    first, second, last = arrange(figures, claims)
    assert [first["about"]["id"], second["about"]["id"], last["about"]["id"]] == ["rank", "learning-rate", "further"]
    assert (first["figures"], first["claims"]) == ([figures[1]], [])
    assert (last["figures"], last["claims"]) == ([figures[0]], [claims[0]])
