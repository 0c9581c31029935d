"""Fixtures for what a user brings: a small data file, and a model folder."""

import json
import shutil
from pathlib import Path
from random import Random

import pytest

from lorabench.models.specs import shipped_folder

WORDS = ("apple", "river", "stone", "cloud", "green", "tiger", "lemon")


def rows(count: int) -> list[dict[str, str]]:
    """Return examples that a model can learn: reverse a list of words."""
    rng = Random(0)
    lists = [rng.choices(WORDS, k=rng.randint(2, 4)) for _ in range(count)]
    return [
        {"prompt": f"Reverse {number}: {' '.join(words)}", "completion": " ".join(reversed(words))}
        for number, words in enumerate(lists)
    ]


def write_rows(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return path


@pytest.fixture
def base(tmp_path) -> Path:
    """Return a model folder with the tiny base, as if downloaded, without a chat template."""
    folder = Path(shutil.copytree(shipped_folder("llama-128"), tmp_path / "base"))
    (folder / "chat_template.jinja").unlink()
    (folder / "recipe.json").unlink()
    return folder
