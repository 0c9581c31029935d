"""What has to agree before a version is tagged, and what the workflows of GitHub run."""

from __future__ import annotations

import re
import tomllib

import yaml

from .conftest import REPOSITORY


def test_changelog_citation_and_fallback_name_the_same_version():
    [version, *_] = re.findall(r"^## (\d\S*)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["version"] == version
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
