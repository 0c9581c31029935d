"""A working copy of the repository to run Snakemake in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ..conftest import REPOSITORY

_CODE = ("Snakefile", "workflow", "lorabench", "pyproject.toml", "slurm")


def copy_checkout(folder: Path) -> Path:
    """Copy the files that Snakemake needs into a folder, so that the repository stays clean."""
    for name in _CODE:
        source = REPOSITORY / name
        if source.is_symlink() or source.is_file():
            shutil.copy(source, folder / name, follow_symlinks=False)
        else:
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def adapt_profile(checkout: Path, old: str, new: str) -> None:
    """Change a setting of the Slurm profile, as a site does."""
    profile = checkout / "slurm/config.yaml"
    text = profile.read_text()
    assert text.count(old) == 1, old
    profile.write_text(text.replace(old, new))


def snakemake(checkout: Path, *arguments: str, fails: bool = False) -> str:
    """Run Snakemake on two cores in the working copy, and return its output."""
    # The command `lorabench` of the rules is beside the interpreter that runs the tests.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "2", *arguments],
        cwd=checkout,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    text = result.stdout + result.stderr
    assert (result.returncode != 0) == fails, text
    return text
