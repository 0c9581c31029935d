"""Check both distributions of dist/ in fresh environments, and write the notes of the release.

    make release                                         # builds them first; the version is the newest of CHANGELOG.md
    make release PYTHONS="3.11 3.13"                     # on these alone

On each Python that the machine has, by pyenv or by its name, lora-advice is installed with its dependencies and audits
a configuration. lorabench is installed with the versions of constraints.txt and plans a preset. Where the pinned torch
has no build for a Python, lorabench is installed without dependencies and imported, and the line says so.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTES = Path("build/notes.md")


def newest(changelog: str) -> tuple[str, str]:
    """Return the version of the newest section of a changelog that has one, with a date, and the section's text."""
    section = re.search(r"^## (\d\S*) \(\d{4}-\d\d-\d\d\)\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if section is None:
        sys.exit("CHANGELOG.md has no section `## X.Y.Z (date)`, which the release needs.")
    return section[1], section[2].strip() + "\n"


def interpreter(version: str) -> str | None:
    """Return the path of a Python of a version such as 3.12, or null if neither pyenv nor the machine has it."""
    if pyenv := shutil.which("pyenv"):
        done = subprocess.run([pyenv, "prefix", version], capture_output=True, text=True, check=False)
        path = Path(done.stdout.strip(), "bin", f"python{version}")
        if done.returncode == 0 and path.is_file():
            return str(path)
    return shutil.which(f"python{version}")


def run(*command: object, expected: int = 0) -> str:
    """Run a command in an empty folder and return what it prints; another status than expected ends the script."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != expected:
        sys.exit(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def check(python: str, lorabench: Path, advice: Path) -> str:
    """Install both wheels in a fresh environment of a Python, try them, and return what was done."""
    constraints = ROOT / "constraints.txt"
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", folder)
        commands = Path(folder, "bin")
        pip = (commands / "python", "-m", "pip", "install", "-q", "-c", constraints)
        run(*pip, advice)
        audited = run(commands / "lora-advice", "audit", ROOT / "examples/axolotl.yaml", expected=1)
        assert "1 error" in audited, audited
        torch = subprocess.run([*pip, "--dry-run", "--no-deps", "torch"], capture_output=True, check=False)
        if torch.returncode:
            run(*pip, "--no-deps", lorabench)
            run(commands / "python", "-c", "import lorabench, studies")
            return "lora-advice works; lorabench is imported without dependencies, since torch has no build"
        run(*pip, lorabench)
        run(commands / "python", "-m", "pip", "check")
        run(commands / "lorabench", "plan", "--preset", "smoke")
        return "lora-advice and lorabench work"


def main(arguments: Sequence[str] | None = None) -> None:
    """Check the wheels of the newest version on each Python, and write the notes."""
    parser = argparse.ArgumentParser(description="Check both distributions of dist/, and write the notes.")
    parser.add_argument("--version", action="store_true", help="print the version of the release and do nothing else")
    parser.add_argument("--notes", action="store_true", help="print the notes and do nothing else")
    parser.add_argument("--python", nargs="*", default=[], help="versions of Python, such as 3.12")
    given = parser.parse_args(arguments)
    version, notes = newest((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    if given.version or given.notes:
        print(notes.rstrip() if given.notes else version)
        return
    wheels = [ROOT / f"dist/{name}-{version}-py3-none-any.whl" for name in ("lorabench", "lora_advice")]
    if missing := [wheel.name for wheel in wheels if not wheel.is_file()]:
        sys.exit(f"dist/ has no {' and no '.join(missing)}; `make release` builds them.")
    for name in given.python:
        start, python = time.monotonic(), interpreter(name)
        outcome = "not on this machine, so not checked" if python is None else check(python, *wheels)
        print(f"Python {name}: {outcome} ({time.monotonic() - start:.0f} s)", flush=True)
    (ROOT / NOTES).parent.mkdir(exist_ok=True)
    (ROOT / NOTES).write_text(notes, encoding="utf-8")
    print(f"{NOTES} has the notes. To release: git tag v{version} && git push origin v{version}")


if __name__ == "__main__":
    main()
