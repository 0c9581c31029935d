"""What has to agree before a version is tagged, and what the workflows of GitHub and the recipes of images run."""

import re
import tomllib
from importlib.metadata import requires

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .conftest import REPOSITORY

ENVIRONMENTS = REPOSITORY / "workflow/envs"


def test_changelog_citation_and_fallback_name_the_same_version_and_date():
    [(version, date), *_] = re.findall(r"^## (\d\S*) \((.*)\)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert (citation["version"], str(citation["date-released"])) == (version, date)
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools_scm"]
    assert settings["fallback_version"] == f"{version}.dev0"


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
