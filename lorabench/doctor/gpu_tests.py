"""The tests that need a GPU: `lorabench doctor --gpu-tests`. They are in the repository and not in the package."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from lorabench.errors import UserError

CLONE = Path(__file__).parents[2]
FOLDERS = ("tests/doctor", "tests/training")
"""The folders of all tests that are marked `gpu`."""


def gpu_tests(mark: str = "gpu", *options: str) -> list[str]:
    """Return the command that runs the tests with a mark, of those folders; UserError says that they are not here."""
    folders = [CLONE / folder for folder in FOLDERS]
    if find_spec("xdist") is None or not all(folder.is_dir() for folder in folders):
        raise UserError(
            "the tests of a GPU are in the repository: clone it, and run lorabench doctor --gpu-tests with what "
            "pip install -c constraints.txt -e '.[test]' -e advice installs there"
        )
    # One after the other, since they measure memory.
    return [sys.executable, "-m", "pytest", "-m", mark, "-n", "0", *options, *map(str, folders)]
