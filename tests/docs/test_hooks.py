"""The pages that are made when the site is built, and the links that are fitted for it."""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location

import pytest

from lorabench.claims.judge import CLAIMS

from ..conftest import REPOSITORY


@pytest.fixture(scope="module")
def hooks():
    spec = spec_from_file_location("hooks", REPOSITORY / "docs/hooks.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_to_files_with_a_page_lead_to_it_and_others_become_text(hooks):
    text = "[a](../paper_figures/published/laptop/claims.csv) [b](../CONTRIBUTING.md) [c](results.md)"
    assert hooks.on_page_markdown(text) == "[a](all-laptop.md) b [c](results.md)"
    picture = "![v](../paper_figures/published/laptop/verdicts.svg)"
    assert hooks.on_page_markdown(picture) == "![v](published/laptop/verdicts.svg)"
    assert [file for file in hooks.PAGES if not (REPOSITORY / file).is_file()] == []


def test_the_page_of_claims_has_a_section_for_each(hooks):
    page = hooks.claims_page()
    assert sorted(re.findall(r"^### ([A-Z]\d+) ", page, re.M)) == sorted(claim.id for claim in CLAIMS)
    assert page.count("- **Criterion**: ") == len(CLAIMS)


def test_long_tables_are_made_from_the_committed_files(hooks):
    for folder in hooks.published_folders(REPOSITORY):
        page = hooks.results_page(folder)
        assert page.count("![") == len(list(folder.glob("*.svg")))
    assert "## nhckdvrl" in hooks.evidence_page()
    assert "| nayyirahsan |" in hooks.learning_rates_page()
    assert "| A1 |" in hooks.calibration_page()
