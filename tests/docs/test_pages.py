"""The links of the README and of the pages lead somewhere, names that pages state exist, and the site's pages are made.

Every link leads somewhere in the repository, where people read the pages too. It may not lead through a symbolic link,
which code hosts do not follow.
"""

import os
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorabench.claims.judge import CLAIMS
from lorabench.store.schemas import SCHEMAS

from ..conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
ELSEWHERE = [REPOSITORY / "README.md", *REPOSITORY.glob("studies/*/README.md"), *REPOSITORY.glob("advice/docs/*.md")]
PAGES = [*(REPOSITORY / name for name in ("config/README.md", "advice/README.md")), *ELSEWHERE]
PAGES += [*REPOSITORY.glob("*.md"), *DOCS.glob("*.md")]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as code hosts and mkdocs make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def test_links_lead_to_files_and_headings_of_the_repository():
    dead = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.M | re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            file, _, anchor = link.partition("#")
            if re.match(r"\w+:", file):
                continue
            target = Path(os.path.normpath(page.parent / file)) if file else page
            if not target.exists() or target.resolve() != target or (anchor and anchor not in anchors(target)):
                dead.append(f"{page.name}: {link}")
    assert dead == []


def test_pages_that_code_names_exist():
    """Messages and docstrings name pages by their path from the root."""
    folders = ("lorabench", "advice", "workflow", "benchmarks", "studies", "tests", "paper_figures", ".ci", "slurm")
    paths = [path for folder in folders for path in (REPOSITORY / folder).rglob("*")]
    texts = [
        path.read_text(errors="ignore")
        for path in paths
        if path.suffix in (".py", ".smk", ".yaml", ".json", ".j2", "")
        and path.is_file()
        and "egg-info" not in str(path)
    ]
    named = set(re.findall(r"(?<![\w/])(?:advice/)?docs/[\w/-]+\.md", "\n".join(texts)))
    assert sorted(name for name in named if not (REPOSITORY / name).is_file() and "reports/_src" not in name) == []


def test_files_and_names_that_the_pages_state_exist():
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]
    path = r"`((?:lorabench|advice|workflow|benchmarks|studies|tests|docs|slurm|paper_figures/reference)/[\w./-]+)`"
    named = {(page.name, name) for page in pages for name in re.findall(path, page.read_text())}
    assert sorted((page, name) for page, name in named if not (REPOSITORY / name).exists()) == []


@pytest.fixture(scope="module")
def hooks():
    spec = spec_from_file_location("hooks", REPOSITORY / "docs/hooks.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages_of(section: dict[str, Any]) -> list[str]:
    [content] = section.values()
    return [content] if isinstance(content, str) else [name for part in content for name in pages_of(part)]


def test_the_navigation_is_short_and_every_page_is_reachable(hooks):
    """People find a page among few."""
    sections = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]
    named = [name for section in sections for name in pages_of(section)]
    own = [section for section in sections if section.keys().isdisjoint({"Studies", "Advice"})]
    assert sum(len(pages_of(section)) for section in own) <= 14
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if path.parent.name != "published"}
    pages = {name: (DOCS / name).read_text() for name in sorted(written)}
    pages |= {hooks.ELSEWHERE[path.relative_to(REPOSITORY).as_posix()]: hooks.page_of(path) for path in ELSEWHERE}
    linked = {name for page in pages for name in re.findall(r"\]\(([\w./-]+\.md)\b", hooks.site_links(pages[page]))}
    assert {*written, *hooks.PAGES.values()} <= {*named, *map(os.path.normpath, linked)}


def test_pages_of_the_site_are_made_from_claims_and_committed_files(hooks):
    page = hooks.claims_page()
    assert sorted(re.findall(r"^#### ([A-Z]\d+) ", page, re.M)) == sorted(claim.id for claim in CLAIMS)
    assert page.count("- **Criterion**: ") == len(CLAIMS)
    columns = hooks.columns_page()
    for name, schema in SCHEMAS.items():
        _, _, section = columns.partition(f"\n## {name}\n")
        first_cells = re.findall(r"^\| (`.*?) \|", section.partition("\n## ")[0], re.M)
        assert re.findall(r"`(\w+)`", " ".join(first_cells)) == schema.names
    for folder in hooks.published_folders(REPOSITORY):
        assert hooks.results_page(folder).count("![") == len(list(folder.glob("*.svg")))
    assert "## nhckdvrl" in hooks.evidence_page()
    assert "| nayyirahsan |" in hooks.learning_rates_page()
    assert "| A1 |" in hooks.calibration_page()
