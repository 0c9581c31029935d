"""The page of claims in the documentation says what the claims' declarations say."""

import re

import pytest

from lorabench.claims.catalog import CLAIMS
from lorabench.errors import UserError
from lorabench.report.claims_page import END, FAMILIES, START, claims_block, write_page

from ..conftest import REPOSITORY

PAGE = REPOSITORY / "docs/claims.md"


def test_the_committed_page_has_the_block_that_the_claims_give():
    """When it fails: python -m lorabench.report.claims_page docs/claims.md"""
    assert claims_block() in PAGE.read_text(encoding="utf-8")


def test_all_claims_are_on_the_page():
    headings = re.findall(r"^### ([A-Z]\d+) ", claims_block(), flags=re.MULTILINE)
    assert len([heading for heading in headings if heading[0] != "P"]) == 57, "P are predictions of this project"
    assert sorted(headings) == sorted(claim.id for claim in CLAIMS)
    assert {heading[0] for heading in headings} == set(FAMILIES)


def test_text_around_the_block_stays(tmp_path):
    page = tmp_path / "claims.md"
    page.write_text(f"before\n{START}\nold\n{END}\nafter\n", encoding="utf-8")
    write_page(page)
    assert page.read_text(encoding="utf-8") == f"before\n{claims_block()}\nafter\n"


def test_a_page_without_marker_lines_is_refused(tmp_path):
    page = tmp_path / "claims.md"
    page.write_text(f"before\n{START}\n", encoding="utf-8")
    with pytest.raises(UserError, match="needs the two lines"):
        write_page(page)
    assert page.read_text(encoding="utf-8") == f"before\n{START}\n"
