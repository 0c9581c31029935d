"""What has to agree before a version is tagged, and what the workflows of GitHub and the recipes of images run."""

import re
import sys
import tomllib
from importlib.metadata import requires

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from release import newest

from .conftest import REPOSITORY
from .workflow.checkout import fresh_clone, shell

ENVIRONMENTS = REPOSITORY / "workflow/envs"


def test_changelog_citation_and_fallback_name_the_same_version_and_date():
    [(version, date), *_] = re.findall(r"^## (\d\S*) \((.*)\)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert (citation["version"], str(citation["date-released"])) == (version, date)
    for project in ("pyproject.toml", "advice/pyproject.toml"):
        settings = tomllib.loads((REPOSITORY / project).read_text())["tool"]["setuptools_scm"]
        assert settings["fallback_version"] == f"{version}.dev0"


def test_notes_are_those_of_the_newest_section_with_a_version():
    unreleased, older = "# Changelog\n\n## Unreleased\n\n- c\n\n", "## 1.1.0 (2026-11-01)\n"
    changelog = f"{unreleased}## 1.2.0 (2026-12-01)\n\n- b\n\n### More\n\n- a\n\n{older}"
    assert newest(changelog) == ("1.2.0", "- b\n\n### More\n\n- a\n")
    with pytest.raises(SystemExit, match="has no section"):
        newest(unreleased)


@pytest.mark.long
def test_both_distributions_are_built_and_work_in_a_fresh_environment(tmp_path):
    clone, (major, minor, *_) = fresh_clone(tmp_path), sys.version_info
    shell(f"{sys.executable} -m venv .venv", clone)
    printed = shell(f"make release PYTHONS='{major}.{minor} 3.99'", clone)
    assert f"Python {major}.{minor}: lora-advice and lorabench work" in printed
    assert "Python 3.99: not on this machine, so not checked" in printed
    _, notes = newest((clone / "CHANGELOG.md").read_text())
    assert (clone / "build/notes.md").read_text() == notes


def test_actions_are_pinned_by_hash():
    used = [
        action
        for path in (REPOSITORY / ".github/workflows").iterdir()
        for action in re.findall(r"uses: (.*)", path.read_text())
    ]
    assert len(used) > 5
    assert [action for action in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40}  # v[\d.]+", action)] == []


def pinned(name: str) -> dict[str, str]:
    """The version of each package that a file of constraints pins."""
    lines = re.findall(r"^([\w.-]+)==([^\s\\;]+)", (REPOSITORY / name).read_text(), re.MULTILINE)
    return {canonicalize_name(package): version for package, version in lines}


def test_hashes_are_those_of_the_versions_of_the_constraints():
    text = (REPOSITORY / "constraints-hashes.txt").read_text()
    hashed = pinned("constraints-hashes.txt")
    assert hashed.items() <= pinned("constraints.txt").items()
    entries = re.findall(r"^\S+==\S+(?: \\\n    --hash=sha256:[0-9a-f]{64})+$", text, re.MULTILINE)
    assert len(entries) == len(hashed) > 100
    # Without a dependency that pip would then install unchecked.
    needed, missing = ["lorabench"], set()
    seen = {"torch"}
    while needed:
        for line in requires(needed.pop()) or []:
            requirement = Requirement(line)
            name = canonicalize_name(requirement.name)
            if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
                continue
            seen.add(name)
            needed.append(name)
            missing |= {name} - set(hashed)
    assert missing == set()


def test_the_conda_environment_has_the_python_of_the_images_and_the_versions_of_the_constraints():
    dependencies = yaml.safe_load((ENVIRONMENTS / "lorabench.yaml").read_text())["dependencies"]
    versions = dict(dependency.split("=") for dependency in dependencies if "=" in dependency)
    assert f"FROM python:{versions.pop('python')}\n" in (ENVIRONMENTS / "Dockerfile").read_text()
    assert versions.items() <= pinned("constraints.txt").items()
