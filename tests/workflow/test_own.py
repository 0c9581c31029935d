"""A user's own data from `lorabench init` to the report, through Snakemake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from ..conftest import REPOSITORY
from ..custom.conftest import write_rows

pytestmark = pytest.mark.slow


def run(folder: Path, *command: str) -> str:
    """Run a Python module in a working copy and return its output."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A working copy in which the README's commands for own data have been run, and the output of `init`."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("Snakefile", "workflow", "lorabench", "pyproject.toml"):
        source = REPOSITORY / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    data = write_rows(folder / "mine.jsonl", 48)
    data.write_text(data.read_text() + '{"prompt": "no answer"}\nnot JSON\n')
    options = ["--model", "tiny", "--data", "mine.jsonl", "--rank", "8", "--seeds", "2"]
    output = run(folder, "lorabench.cli", "init", "my.yaml", *options)
    run(folder, "snakemake", "--cores", "2", "--config", "preset=my.yaml")
    return folder, output


def test_init_describes_model_and_data_and_names_the_next_command(finished):
    _, output = finished
    for line in (
        "tiny: llama, 0.83M parameters, width 128",
        "mine.jsonl: 48 of 50 rows can be used as prompt/completion; left out: "
        "1 no text (line 49), 1 not JSON (line 50)",
        "split: 38 train, 5 validation, 5 test",
        "wrote my.yaml; next: snakemake --cores all --config preset=my.yaml",
    ):
        assert line in output
    assert "rank" in output


def test_the_report_answers_for_this_model_and_data(finished):
    folder, _ = finished
    results = folder / "results" / "my"
    runs = pd.read_csv(results / "tables/runs.csv")
    # Two arms of five LRs, and the second seed at the best of each.
    assert len(runs) == 2 * (5 + 1)
    # The highest LR may diverge, but the repeats are at the best LR.
    assert set(runs["status"]) <= {"done", "diverged"}
    assert set(runs.loc[runs["seed"] == 1, "status"]) == {"done"}
    assert set(runs["dataset"]) == {"mine"}
    assert runs["template_sha256"].notna().all()
    page = (results / "report/index.html").read_text()
    assert "LoRA against full fine-tuning: tiny on mine.jsonl" in page
    [tally] = (results / "data").glob("mine.*.rows.json")
    assert json.loads(tally.read_text()) == {
        "format": "prompt/completion",
        "rows": 50,
        "usable": 48,
        "unit": "line",
        "bad": [
            {"reason": "no text", "rows": 1, "first": 49},
            {"reason": "not JSON", "rows": 1, "first": 50},
        ],
    }


def test_recommendations_use_the_measured_runs(finished):
    folder, _ = finished
    recommended = json.loads(run(folder, "lorabench.cli", "recommend", "--model", "tiny", "--json"))
    assert [run["rank"] for run in recommended["seen"]] == [None, 8]
    assert all(run["where"].startswith("measured, results/my: mine, batch 4, 9 steps") for run in recommended["seen"])
