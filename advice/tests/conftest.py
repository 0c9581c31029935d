"""The tiny bases of the suite, of which tests use the files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def shipped() -> Path:
    """Return the folder of the suite's tiny bases."""
    return REPOSITORY / "lorabench/models/shipped"


@pytest.fixture
def base(tmp_path: Path, shipped: Path) -> Path:
    """Return a model folder with a tiny base, as if downloaded, without a chat template."""
    folder = Path(shutil.copytree(shipped / "llama-128", tmp_path / "base"))
    (folder / "chat_template.jinja").unlink()
    return folder
