"""The README's commands, run as they are written.

Those that train for long are run by Snakemake as a dry run, and those that are run elsewhere are named here: a new
command in the README must be one or the other.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorabench.claims import judge_claims
from lorabench.models.tiny import shipped_folder
from lorabench.tables.io import write_frame
from lorabench.tables.tables import Tables

from .conftest import REPOSITORY
from .custom.conftest import write_rows
from .handmade import curves_of, make_sweep, runs_table
from .workflow.checkout import copy_checkout

ELSEWHERE = {
    "python3 -m venv .venv": "what CI begins with",
    "python -m benchmarks.sampling": "takes minutes; its numbers are kept beside it",
    "python -m benchmarks.speed": "takes long; tests/benchmarks/test_speed.py runs its quick form",
}
"""How the commands begin that are not run here, and why."""


def commands() -> list[str]:
    """The lines of the README's shell blocks, without their comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.M | re.S)
    lines = [line.partition("    #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working copy with what the README's examples are about: tables, a model, a data file."""
    checkout = copy_checkout(tmp_path_factory.mktemp("readme"))
    for place, dataset in (("results/laptop", "instruct"), ("from_the_cluster", "worked")):
        runs = runs_table([row for rank in (None, 1, 16) for row in make_sweep(rank, dataset=dataset)])
        write_frame(runs, "runs", checkout / place / "tables")
        write_frame(curves_of(runs), "curves", checkout / place / "tables")
    shutil.copytree(shipped_folder("llama-128"), checkout / "path/to/model")
    write_rows(checkout / "my.jsonl", 50)
    problems = [json.dumps({"question": f"What is {n} + 2?", "answer": n + 2}) for n in range(50)]
    (checkout / "problems.jsonl").write_text("\n".join(problems))
    return checkout


def run(command: str, folder: Path) -> str:
    """Run a command line in a shell; returns all it printed."""
    # The commands of the environment that runs the tests. No hub is asked: the examples must work without.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = result.stdout + result.stderr
    assert result.returncode == 0, f"{command}\n{said}"
    return said


def test_there_are_commands_of_each_kind():
    found = commands()
    assert all(any(line.startswith(start) for line in found) for start in ELSEWHERE)
    assert {shlex.split(line)[0] for line in found} == {"python3", "python", "lorabench", "snakemake"}


@pytest.mark.slow
def test_lorabench_commands_run_in_the_order_they_are_written(folder):
    for line in commands():
        if line.startswith("lorabench "):
            said = run(line, folder)
            assert "Traceback" not in said, line
    assert (folder / "my.yaml").is_file()
    assert {"fig1_envelopes", "fig2_lr_by_rank"} <= {figure.stem for figure in (folder / "figures").glob("*.svg")}
    assert "lora_alpha" in (folder / "finetune.py").read_text()
    merged = Tables.read(folder / "merged")
    assert set(merged.runs["dataset"]) == {"instruct", "worked"}
    judged = judge_claims(merged).set_index("claim_id")["verdict"]
    assert judged["A7"] != "not tested"


@pytest.mark.slow
def test_snakemake_commands_are_planned_as_they_are_written(folder):
    run("lorabench init planned.yaml --model tiny --data my.jsonl", folder)
    for line in commands():
        if line.startswith("snakemake "):
            dry = line if "--dry-run" in line else line.replace("snakemake", "snakemake --dry-run --quiet rules", 1)
            said = run(dry.replace("my.yaml", "planned.yaml"), folder)
            assert re.search(r"^(train|rule train)\b", said, re.M), f"{line}\n{said}"


def test_nothing_is_left_out():
    rest = [line for line in commands() if not line.startswith(("lorabench ", "snakemake "))]
    assert all(any(line.startswith(start) for start in ELSEWHERE) for line in rest), rest
