"""A built wheel, installed in a fresh environment, works in an empty folder without the repository."""

import json
import sys
import sysconfig
from pathlib import Path

import pandas as pd
import pytest

from ..custom.conftest import write_rows
from .checkout import fresh_clone, shell

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> str:
    """The folder of the commands of a fresh environment into which the wheel is installed.

    It finds the dependencies in the environment of the tests; tests/test_dependencies.py sees that all are declared.
    """
    folder = tmp_path_factory.mktemp("wheel")
    clone = fresh_clone(tmp_path_factory.mktemp("clone"))
    shell(f"pip wheel -q --no-deps -w {folder} {clone} && {sys.executable} -m venv {folder}/environment", folder)
    shell("environment/bin/pip install -q --no-deps lorabench-*.whl", folder)
    own, tests = (sysconfig.get_path("purelib", vars=base) for base in ({"base": f"{folder}/environment"}, {}))
    # A line of such a file is appended to the path of modules, so that the wheel comes first.
    Path(own, "dependencies.pth").write_text(f"{tests}\n")
    return str(folder / "environment/bin")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with nothing in it but files that have names of Python's modules and must not be run."""
    folder = tmp_path_factory.mktemp("empty")
    for module in ("json", "random", "studies", "yaml"):
        (folder / f"{module}.py").write_text(f"raise SystemExit('the {module}.py of the folder was run')\n")
    return folder


def test_an_own_preset_runs_to_its_report_in_the_folder_and_nothing_is_written_elsewhere(commands, folder):
    package = Path(shell("python -P -c 'import lorabench; print(lorabench.__path__[0])'", folder, commands).strip())
    assert package.is_relative_to(Path(commands).parent), "the wheel's, not the repository's"
    before = {path for path in package.rglob("*") if "__pycache__" not in path.parts}
    # The shipped Slurm profile is found by its name.
    assert "rule train:" in shell("lorabench run smoke --profile slurm --dry-run", folder, commands)
    write_rows(folder / "mine.jsonl", 48)
    printed = shell("lorabench init my.yaml --model tiny --data mine.jsonl --rank 8 --seeds 2", folder, commands)
    assert "next: lorabench run my.yaml" in printed
    shell("lorabench run my.yaml --cores 2", folder, commands)
    results = folder / "results/my"
    runs = pd.read_csv(results / "tables/runs.csv")
    assert set(runs["status"]) <= {"done", "diverged"}
    assert set(runs["method"]) == {"fullft", "lora"}
    assert "LoRA against full fine-tuning: tiny on mine.jsonl" in (results / "report/index.html").read_text()
    assert list((folder / "paper_figures/my").glob("*.svg"))
    assert {path for path in package.rglob("*") if "__pycache__" not in path.parts} == before
    [record, *_] = (results / "runs").glob("*/record.json")
    assert json.loads(record.read_text())["environment"]["git_sha"] is None
